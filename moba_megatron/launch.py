"""Runs a training script of Megatron-LM with MoBA, without a change to its source.

    torchrun --nproc-per-node 8 -m moba_megatron.launch pretrain_gpt.py --attention moba --moba-chunk-size 4096 \\
        --moba-topk 12 ...

With ``--attention full``, the default, only the flags are added (and hooks that pass every call through where
``--use-checkpoint-args`` may restore ``moba``). What is hooked, and why, is said in `megatron/patching.py`.
"""
from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
import warnings

from .megatron import patching
from .megatron.arguments import add_moba_arguments, config_from_args
from .megatron.host import print_once
from .rendezvous import ArgumentParser, report_error

USAGE = ("usage: python -m moba_megatron.launch SCRIPT [--attention moba --moba-chunk-size N --moba-topk K] "
         "[SCRIPT's flags]")
CHECKED_VERSIONS = ("0.13", "0.14", "0.15", "0.16", "0.17", "0.18", "0.19", "0.20")

ARGUMENTS_HOOK = ("megatron.training.arguments", "add_megatron_arguments", patching.moba_arguments)
HOOKS = (
    ("megatron.core.models.backends", "LocalSpecProvider.core_attention", patching.moba_core_attention),
    ("megatron.training.training", "setup_model_and_optimizer", patching.moba_model_check),
    ("megatron.training.training", "num_floating_point_operations", patching.moba_flops),
)
OPTIONAL_HOOKS = (  # Transformer Engine may be missing; the hybrid model has moved, and needs packages of its own
    ("megatron.core.extensions.transformer_engine_spec_provider", "TESpecProvider.core_attention",
     patching.moba_core_attention),
    ("megatron.core.models.hybrid.hybrid_block", "HybridStack.__init__", patching.moba_hybrid_stack),
    ("megatron.core.ssm.mamba_block", "MambaStack.__init__", patching.moba_hybrid_stack),
)


def main(argv: list[str] | None = None) -> int:
    """Hooks MoBA into Megatron-LM and runs the script; returns the exit status if it could not start."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        print(f"{USAGE}\nSCRIPT comes first; its own --help lists the --moba-* flags too", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    script, flags = argv[0], argv[1:]
    if not os.path.isfile(script):
        report_error(f"no file {script}: give the path of Megatron-LM's pretrain_gpt.py")
        return 2
    try:
        attention = check_flags(flags)
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # as `python SCRIPT` does
        install(attention)
    except (TypeError, ValueError, ImportError) as error:
        report_error(str(error))
        return 2
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    return 0


def check_flags(flags: list[str]) -> str:
    """Reads ``--attention`` and checks the ``--moba-*`` flags before anything heavy starts.

    Returns:
        ``moba`` also where ``--use-checkpoint-args`` may yet say so.

    Raises:
        ValueError: a flag is out of range, or ``--yaml-cfg`` would drop the flags.
    """
    parser = ArgumentParser(prog="moba_megatron.launch", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--train-iters", type=int)
    parser.add_argument("--yaml-cfg")
    args = add_moba_arguments(parser, default="full", full_meaning=patching.FULL_MEANING).parse_known_args(flags)[0]
    if args.attention == "moba":
        config_from_args(args)
        if args.yaml_cfg is not None:
            raise ValueError("--yaml-cfg replaces all flags, --attention moba too: give the settings as flags")
    elif "--use-checkpoint-args" in flags:
        return "moba"
    elif any(flag.startswith("--moba-") for flag in flags):
        print_once("> --moba-* flags have no effect without --attention moba")
    return args.attention


def install(attention: str = "moba") -> list[str]:
    """Hooks into the Megatron-LM that ``import megatron`` finds. Calling it again changes nothing.

    Args:
        attention: ``moba``; with ``full`` only the argument parser is extended.

    Returns:
        what was hooked, as ``module.name``.

    Raises:
        ImportError: there is no megatron.training, or it lacks one of HOOKS.
    """
    try:
        importlib.import_module("megatron.training")
    except ImportError as error:
        raise ImportError(
            f"megatron.training cannot be imported ({error}): give the path of a script in a Megatron-LM checkout, or "
            "set PYTHONPATH to one. (megatron-core's wheels have it from 0.17.1 on.)") from error
    patching.only_flags = attention != "moba"
    required = [ARGUMENTS_HOOK, *(HOOKS if attention == "moba" else ())]
    missing = [f"{module}.{name}" for module, name, _ in required if _owner(module, name) is None]
    version = _warn_of_unknown_version(missing)
    if missing:
        raise ImportError(f"megatron-core {version} has no {', '.join(missing)}: --attention moba cannot be hooked in. "
                          "Use --spec moba_megatron.layer_specs moba_layer_spec with MOBA_* environment variables")
    hooked = []
    for module, name, hook in [*required, *(OPTIONAL_HOOKS if attention == "moba" else ())]:
        owner, attribute = _owner(module, name), name.rpartition(".")[2]
        if owner is not None:
            setattr(owner, attribute, hook(getattr(owner, attribute)))
            hooked.append(f"{module}.{name}")
    return hooked


def _owner(module: str, name: str):
    """The module or class that has ``name``; None where this Megatron or its dependencies lack it."""
    try:
        owner = importlib.import_module(module)
        *classes, attribute = name.split(".")
        owner = functools.reduce(getattr, classes, owner)
        getattr(owner, attribute)
    except (ImportError, AttributeError):
        return None
    return owner


def megatron_version() -> str:
    """megatron-core's version as the sources say it, "unknown" where they do not."""
    try:
        info = importlib.import_module("megatron.core.package_info")
        return f"{info.MAJOR}.{info.MINOR}.{info.PATCH}{info.PRE_RELEASE}"
    except (ImportError, AttributeError):
        return "unknown"


def is_known_version(version: str) -> bool:
    """Whether the hooks were checked against a release of this line."""
    return ".".join(version.split(".")[:2]) in CHECKED_VERSIONS


def _warn_of_unknown_version(missing: list[str]) -> str:
    version = megatron_version()
    if not is_known_version(version):
        found = "all of the hooked functions are there" if not missing else f"not found: {', '.join(missing)}"
        warnings.warn(f"megatron-core {version} was not checked with moba_megatron (checked: {CHECKED_VERSIONS[0]} to "
                      f"{CHECKED_VERSIONS[-1]}); {found}", stacklevel=3)
    return version


if __name__ == "__main__":
    sys.exit(main())
