"""The header by which the ranks of a group notice that one of them got different or bad input."""
from __future__ import annotations

import functools
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensor_cache import cached_tensors
from .transport.comm import Pending, all_gather


class Agreement:
    """Checks inputs on every rank of a group, so that a rank with bad input ends all ranks rather than hanging them.

    Inside the ``with`` block a rank checks its own input and sets ``signature`` to a text of everything that the
    following collectives depend on (shapes, dtypes, chunk size). At its end the ranks exchange that text, or the text
    of the error that was raised, in a message of fixed size: it cannot itself fail to match, whatever the inputs are.

    Cost: with gloo one all-gather of 512 bytes a call, read at once. With NCCL the host reads the message at once only
    where this rank has a signature that the group has not yet agreed on (the first call, a new sequence length).
    Otherwise neither the host nor the compute stream waits: a side stream copies the message to pinned memory, and it
    is looked at when the next attention call begins. A rank whose input changed alone is on the reading side and
    raises immediately; its peers raise at their next call. In a CUDA graph under capture nothing is exchanged.

    Args:
        group: the context parallel group.

    Raises:
        ValueError: at the end of the block, with the same text on every rank, where a rank raised TypeError or
            ValueError in the block or where the signatures differ.
    """

    HEADER_BYTES = 512
    MOST_AGREED = 1024
    """Signatures that a group remembers; beyond it forgets all, on every rank at the same call."""
    _agreed: dict[str, set[str]] = {}  # by group
    _unread: dict[str, deque] = {}

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.signature = ""
        self._new: list[str] = []

    def __enter__(self) -> "Agreement":
        self._read_finished()
        return self

    def __exit__(self, exc_type, error, traceback) -> bool:
        if error is not None and not isinstance(error, (TypeError, ValueError)):
            return False
        if _capturing():
            return False
        text = "!" + str(error) if error is not None else self.signature
        device = _group_device(self.group)
        headers = all_gather(_header(text, self.HEADER_BYTES, device), self.group, "agreement")
        if device.type == "cuda" and text in self._known:
            self._read_later(headers, device)
        else:
            self._check(headers.wait(), error)
            if len(self._known) + 2 > self.MOST_AGREED:
                self._known.clear()
            self._known.update(self._new or (text,))
        return False

    def is_new(self) -> bool:
        """Whether the exchange at the end of the block will make the host wait anyway: costly checks may go with it.

        What is then added to the signature is compared this once; the signature as it is now is known from then on.
        """
        self._new = [] if self.signature in self._known else [self.signature]
        return bool(self._new)

    @property
    def _known(self) -> set[str]:
        return self._agreed.setdefault(self.group.group_name, set())

    def _check(self, headers: Tensor, error: Exception | None = None) -> None:
        rows = headers.view(self.group.size(), self.HEADER_BYTES).cpu()
        texts = [bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "ignore") for row in rows]
        problems = [f"context parallel rank {rank}: {t[1:]}" for rank, t in enumerate(texts) if t.startswith("!")]
        if problems:
            raise ValueError("; ".join(problems)) from error
        if len(set(texts)) > 1:
            each = "; ".join(f"rank {rank}: {t}" for rank, t in enumerate(texts))
            raise ValueError("all ranks of a context parallel group must call attention with the same shapes, dtypes "
                             f"and MoBA settings, got {each}. Check the lengths that the data loader gives each rank")

    def _read_later(self, pending: Pending, device: torch.device) -> None:
        with torch.cuda.stream(_side_stream(device)):
            headers = pending.wait()
            copy = torch.empty(headers.shape, dtype=headers.dtype, pin_memory=True)
            copy.copy_(headers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        # the device tensor is kept too: its memory must not be reused before the copy is done
        self._unread.setdefault(self.group.group_name, deque()).append((event, copy, headers))

    def _read_finished(self) -> None:
        unread = self._unread.get(self.group.group_name)
        while unread and not _capturing() and unread[0][0].query():
            self._check(unread.popleft()[1])


@cached_tensors
def _header(text: str, size: int, device: torch.device) -> Tensor:
    return torch.tensor(list(text.encode()[:size].ljust(size, b"\0")), dtype=torch.uint8, device=device)


def _group_device(group: dist.ProcessGroup) -> torch.device:
    """The device of the group's small messages: the CPU with gloo, else this rank's GPU."""
    if dist.get_backend(group) == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@functools.lru_cache(maxsize=None)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
