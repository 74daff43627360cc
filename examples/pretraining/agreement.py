"""Errors in a run of many processes: all ranks learn of one rank's, and an error that all have is said once."""
import os
import sys

import torch


class SharedError(ValueError):
    """A user's mistake that every rank raises with the same message."""


def on_all_ranks(function, *args):
    """Calls the function, which must not communicate, on every rank; where it fails on one, it fails on all.

    Returns:
        the function's value on this rank.

    Raises:
        SharedError: the function raised ValueError or OSError on some rank; the message is the first such rank's.
    """
    value = problem = None
    try:
        value = function(*args)
    except (ValueError, OSError) as error:
        problem = str(error)
    for found in gather(problem):
        if found is not None:
            raise SharedError(found)
    return value


def gather(value) -> list:
    """The values of all ranks."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def abort(message: str, status: int, shared: bool = False) -> None:
    """Ends this process at once, whatever others wait for (torchrun then ends them); rank 0 says what is shared."""
    rank = torch.distributed.get_rank()
    if rank == 0 or not shared:
        print(message if shared else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
    os._exit(status)
