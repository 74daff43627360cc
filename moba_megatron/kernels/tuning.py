"""Launch configurations: which tiles, warps and pipeline stages a kernel gets, from static tables; never autotuned.

A kernel asks ``config(stage, device, head_dim=..., chunk_size=..., itemsize=...)`` and gets a dict of constexprs and
launch options. The rows are in ``tuning_table.py``; ``python -m moba_megatron.tune`` writes more of them for an
unknown card, which ``MOBA_TUNING_FILE`` puts in front of the packaged ones. ``MOBA_TUNING_ARCH`` (``sm_86``) chooses
another architecture's rows. Both are read once a process.
"""
import contextlib
import functools
import json
import os
from dataclasses import replace
from unittest import mock

import torch
import triton

from .host import FP32_PRODUCTS, INTERPRETED
from .tuning_table import TABLE, Row

ARCHS = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227}
"""Architecture classes and a block's shared memory in KiB. sm_86 stands for every card with 99 KiB: 86, 89, 120."""
FIXED = {"ieee": int(FP32_PRODUCTS == "ieee"), "triton": int("{0}{1:0>2}".format(*triton.__version__.split(".")))}
"""Keys that are the same in a whole process."""
RENAMED = {"attention_fwd_own": "attention_fwd_diagonal", "attention_bwd_dkv": "attention_bwd_dkdv",
           "attention_bwd_dq_own": "attention_bwd_dq_diagonal"}
"""Stages in files that version 0.1 wrote."""
INTERPRETER = "interpreter"
INTERPRETER_BLOCK = 32  # tiles are cut to this there: small shapes then still have several tiles in each direction


def config(stage: str, device: torch.device | None = None, **key: int) -> dict[str, int]:
    """The configuration of a kernel: the first row of the stage, a name in ``tuning_table.TABLE`` as ``attention_fwd``,
    that fits the device's architecture and the key: a fresh dict as ``{"BLOCK_M": 64, "num_warps": 4}``. The key is
    what rows may be bounded by: ``head_dim`` (the larger of D and DV), ``chunk_size``, ``itemsize`` (bytes of q's
    dtype), and whatever else a stage's rows name; ``ieee``, whether products of fp32 are IEEE's, and ``triton``, its
    version (306: 3.6), are added. Raises KeyError for an unknown stage, LookupError where no row fits."""
    key.update(FIXED)
    return dict(_lookup(stage, arch_of(device), tuple(sorted(key.items()))))


@functools.lru_cache(maxsize=1024)  # chunk_size is any length where attention is dense
def _lookup(stage: str, arch: str, key: tuple[tuple[str, int], ...]) -> dict[str, int]:
    found = next((row for row in rows(stage) if row.fits(arch, dict(key))), None)
    if "record" in forced_settings:
        forced_settings["record"].append((stage, key, found))
    if stage in forced_settings.get("configs", {}):
        return forced_settings["configs"][stage]
    if found is None:
        raise LookupError(f"no row of the tuning table for stage {stage!r} fits {arch} and {dict(key)}: add one to "
                          "kernels/tuning_table.py, or write one with `python -m moba_megatron.tune`")
    if arch == INTERPRETER and found.archs == "*":
        return {name: min(value, INTERPRETER_BLOCK) if name.startswith("BLOCK_") else value
                for name, value in found.config.items()}
    return found.config


def rows(stage: str) -> tuple[Row, ...]:
    """The rows of a stage in the order in which they are tried: MOBA_TUNING_FILE's, then the packaged ones."""
    if stage not in TABLE:
        raise KeyError(f"no stage {stage!r} in the tuning table; stages: {', '.join(TABLE)}")
    return (*_file_rows(os.environ.get("MOBA_TUNING_FILE", "")).get(stage, ()), *TABLE[stage])


def arch_of(device: torch.device | None = None) -> str:
    """The architecture class of a device: a name in ``ARCHS``, or ``interpreter``."""
    return forced_settings.get("arch") or (INTERPRETER if INTERPRETED else _arch_of_device(device))


@functools.lru_cache(maxsize=None)
def _arch_of_device(device: torch.device | None) -> str:
    override = os.environ.get("MOBA_TUNING_ARCH", "")
    if override and override not in ARCHS:
        raise ValueError(f"MOBA_TUNING_ARCH must be one of {', '.join(ARCHS)}; got {override!r}")
    if override or not torch.cuda.is_available():
        return override or "sm_86"
    return arch_of_capability(*torch.cuda.get_device_capability(device or "cuda"))


def arch_of_capability(major: int, minor: int) -> str:
    """The class of a compute capability; a card that is not known gets the rows that need the least shared memory."""
    if major < 8:
        raise ValueError(f"the Triton kernels need compute capability 8.0 or later, got {major}.{minor}: "
                         "use backend='torch'")
    return {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(
        (major, minor), "sm_86")


forced_settings: dict[str, object] = {}  # what :func:`forced` sets; empty elsewhere


@contextlib.contextmanager
def forced(arch: str | None = None, configs: dict[str, dict[str, int]] | None = None,
           record: list[tuple[str, tuple, Row]] | None = None):
    """Within the block: this architecture, and these configurations (stage -> config) in place of the table's. Every
    look-up is added to ``record`` as (stage, key, row). For the compile report and ``tune``; not for several threads at
    once."""
    given = {"arch": arch, "configs": configs, "record": record}
    _lookup.cache_clear()
    try:
        with mock.patch.dict(forced_settings, {name: value for name, value in given.items() if value is not None}):
            yield
    finally:
        _lookup.cache_clear()


@functools.lru_cache(maxsize=None)
def _file_rows(path: str) -> dict[str, tuple[Row, ...]]:
    """Rows of a file written by ``tune``: ``{"rows": [{"stage", "archs", "upto", "config", "why"}, ...]}``."""
    found: dict[str, tuple[Row, ...]] = {}
    if not path:
        return found
    try:
        with open(path) as file:
            for item in json.load(file)["rows"]:
                stage = item.pop("stage")
                stage, row = RENAMED.get(stage, stage), Row(**item)  # in the words of today, as is the key
                upto = {"choices" if name == "slots" else name: x for name, x in row.upto.items() if name != "portable"}
                unknown = set(row.config).difference(["maxnreg"], *(known.config for known in TABLE.get(stage, ())))
                if unknown and stage in TABLE:
                    raise ValueError(f"its row for {stage} sets {', '.join(sorted(unknown))}, which no kernel of this "
                                     "version takes: write the file anew")
                found[stage] = (*found.get(stage, ()), replace(row, upto=upto))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"MOBA_TUNING_FILE must name a file written by `python -m moba_megatron.tune`, got "
                         f"{path!r}: {type(error).__name__}: {error}") from error
    return found
