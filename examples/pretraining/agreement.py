"""Errors in a run of many processes: all ranks learn of one rank's, and an error that all have is said once."""
import contextlib
import os
import sys
import time

import torch

from moba_megatron.rendezvous import report_error


class SharedError(ValueError):
    """A user's mistake that every rank raises with the same message."""


class RunError(RuntimeError):
    """What broke a run that was right to start; said without a traceback."""


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


def on_first_rank(function, *args) -> None:
    """Calls the function on rank 0 alone; where it fails, it fails on all ranks, which otherwise wait for it.

    Raises:
        SharedError: as :func:`on_all_ranks`.
    """
    on_all_ranks(function if torch.distributed.get_rank() == 0 else lambda *_: None, *args)


def lost_rank(error: BaseException, timeout_minutes: float) -> str | None:
    """What to say of a collective that failed because of another rank; None for any other error."""
    text = str(error)
    if any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")):
        return "another rank ended in the middle of a step: its own message or torchrun's report says why"
    if any(sign in text for sign in ("Timed out waiting", "pplication timeout", "imed out")):
        return (f"another rank did not answer for {60 * timeout_minutes:g} s (--distributed-timeout-minutes "
                f"{timeout_minutes:g}): it stalls, or is slower than that")
    return None


def gather(value) -> list:
    """The values of all ranks."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def abort(message: str, status: int, shared: bool = False, patience: float = 0) -> None:
    """Ends this process, whatever others wait for (torchrun then ends them); what is shared is said once.

    With patience the message comes at once and the end after so many seconds: torchrun calls the first rank to end the
    root cause.
    """
    with contextlib.suppress(OSError):  # a log on a full disk
        if shared:
            report_error(message.removeprefix("error: "))
        else:
            sys.stderr.write(f"[rank {torch.distributed.get_rank()}] {message}\n")  # one write: ranks share stderr
            sys.stderr.flush()
    time.sleep(patience)
    os._exit(status)
