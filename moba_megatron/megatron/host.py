"""What MoBA reads from Megatron-LM where its training loop is the host: flags and the iteration."""
from __future__ import annotations

import argparse
import functools
import os
import sys

from ..config import MoBAConfig
from .arguments import config_from_args


def host_args() -> argparse.Namespace | None:
    """Megatron-LM's parsed arguments; None outside of its training scripts."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)


def host_config() -> MoBAConfig | None:
    """The MoBAConfig of Megatron-LM's ``--moba-*`` flags; None where it does not know them. Rank 0 prints it once."""
    args = host_args()
    if not hasattr(args, "moba_chunk_size"):
        return None
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
