"""Rows of keys and values that travel one by one: which go where, their sending, and the way back of their gradients.

Sums over ranks are fp32 and in the order of ranks, so they are reproducible.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..transport.comm import Pending, exchange


@dataclass(frozen=True)
class Travel:
    """Which rows of one group of kv heads travel; a row here is one (token, kv head).

    Args:
        send: int64 ``[n]``, rows of this rank's ``[T, h, D]``, flattened to ``[T * h, D]``: for rank 0, rank 1, ...
        send_counts: how many go to each rank; what a rank has for itself is copied.
        take: int64 ``[m]``, rows of the tensor ``[R, h, D]`` where they are read, flattened: what comes from rank 0,
            rank 1, ...
        take_counts: how many come from each rank.
    """

    send: Tensor
    send_counts: tuple[int, ...]
    take: Tensor
    take_counts: tuple[int, ...]

    def saved(self) -> list:
        """What makes it again, for autograd."""
        return [self.send, self.send_counts, self.take, self.take_counts]

    def start(self, x: Tensor, group: dist.ProcessGroup, stage: str, place: Callable[[Tensor], Tensor]) -> Pending:
        """Starts to send rows of ``x`` ``[T, h, D]``.

        Args:
            place: makes of x the tensor ``[R, h, D]`` that has this rank's own rows, and room for the others'.

        Returns:
            Pending, that tensor.
        """
        heads = x.shape[1]
        message = x[self.send // heads, self.send % heads]
        arrived = message.new_empty(self.take.numel(), x.shape[2])
        works = _exchange(arrived, self.take_counts, message, self.send_counts, group, stage)

        def finish(arrived: Tensor) -> Tensor:
            out = place(x)
            if arrived.shape[0]:
                out.flatten(0, 1).index_copy_(0, self.take, arrived)
            return out

        return Pending(works, arrived, message, stage, finish)

    def give_back(self, x: Tensor, own: Tensor, out: Tensor, group: dist.ProcessGroup, stage: str) -> Pending:
        """Starts to send the rows of ``x`` ``[R, h, D]`` that came back to their owners.

        Args:
            own: ``[T, h, D]``, contiguous, this rank's part of the sums of its rows; the others' are added to it.
            out: the wait writes the sums here; may be ``own``.
        """
        message = x.flatten(0, 1).index_select(0, self.take)
        arrived = message.new_empty(self.send.numel(), x.shape[2])
        works = _exchange(arrived, self.send_counts, message, self.take_counts, group, stage)

        def finish(arrived: Tensor) -> Tensor:
            for to, part in zip(self.send.split(self.send_counts), arrived.split(self.send_counts)):
                own.flatten(0, 1).index_add_(0, to, part)  # a row occurs once: the order of sums is the ranks'
            return out if out is own else out.copy_(own)

        return Pending(works, arrived, message, stage, finish)


def _exchange(arrived: Tensor, take_counts: tuple[int, ...], message: Tensor, send_counts: tuple[int, ...],
              group: dist.ProcessGroup, stage: str) -> list:
    """Handles of the messages between ranks; what a rank has for itself is there at once."""
    me = dist.get_rank(group)
    outputs, inputs = parts(arrived, take_counts), parts(message, send_counts)
    if outputs[me] is not None:
        outputs[me].copy_(inputs[me])
        outputs[me] = inputs[me] = None
    return exchange(outputs, inputs, message.device, group, stage)


def true_numbers(mask: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` elements that are True, in order, int64; the host knows the count and need not wait."""
    return torch.nonzero_static(mask.flatten(), size=count).flatten()


def parts(x: Tensor, counts: tuple[int, ...]) -> list[Tensor | None]:
    """``x`` cut up by counts; None for parts without rows."""
    return [part if part.shape[0] else None for part in x.split(counts)]
