"""What MoBA reads of Megatron: its version, the layer that is being built, Megatron-LM's flags and iteration."""
import argparse
import functools
import importlib
import os
import sys

from ..config import MoBAConfig
from .arguments import config_from_args

CHECKED_VERSIONS = ("0.13", "0.14", "0.15", "0.16", "0.17", "0.18", "0.19", "0.20")


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


def layer_being_built(kind: type):
    """The innermost object of this class whose constructor is running in this thread, or None. Megatron does not tell a
    core attention which layers it is in. Their constructors call its constructor, so they are found among the callers,
    and no class of Megatron has to be changed for it."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__" and isinstance(layer := frame.f_locals.get("self"), kind):
            return layer
        frame = frame.f_back
    return None


def host_args() -> argparse.Namespace | None:
    """Megatron-LM's parsed arguments; None outside of its training scripts."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)


def host_config() -> MoBAConfig | None:
    """The MoBAConfig of Megatron-LM's ``--moba-*`` flags; None where it does not know them. Rank 0 prints it once."""
    args = host_args()
    if getattr(args, "yaml_cfg", None) is not None and (
            said := [name for name in vars(args) if name == "attention" or name.startswith("moba_")]):
        raise ValueError(f"--yaml-cfg {args.yaml_cfg} must not say {said[0]}: give a flag, or with --spec MOBA_*")
    if not hasattr(args, "moba_chunk_size"):
        return None
    unread = [name.upper() for name in sorted(vars(args)) if name.startswith("moba_")
              and name != "moba_workspace_mib" and os.environ.get(name.upper())]
    if unread and not is_active():
        raise ValueError(f"environment variable {unread[0]} must not be set beside Megatron-LM's --moba-* flags, which "
                         "count where it has them (launch, patch): give the flag")
    config = config_from_args(argparse.Namespace(**{**vars(args), "attention": "moba"}))
    print_once(f"> {config.describe()} (from --moba-* flags)")
    return config


def host_iteration() -> int | None:
    """The iteration that Megatron-LM trains, 0-based; None outside of its training scripts."""
    args = host_args()
    return getattr(args, "curr_iteration", getattr(args, "iteration", None))


def is_active() -> bool:
    """Whether Megatron-LM runs with ``--attention moba``."""
    return getattr(host_args(), "attention", "full") == "moba"


@functools.lru_cache(maxsize=None)
def print_once(line: str) -> None:
    """Prints a line, from rank 0 alone, and not again."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)
