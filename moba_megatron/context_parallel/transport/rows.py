"""Rows of one rank among the rows of all, and the copies of rows that stay on their rank."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RUNS = 4
"""Runs of a rank that are exchanged in place, a message each; where there are more, rows are permuted instead."""


@dataclass(frozen=True)
class Rows:
    """The rows of a group's ranks in "global" order (sequence after sequence) and in "rank-major" order."""

    size: int
    rank: int
    global_rows: Tensor  # int64 [S], for each row in global order its row in rank-major order
    rank_rows: Tensor  # int64 [S], the inverse
    runs: tuple[tuple[int, ...], ...] | None  # [i][r]: first global row of run i of rank r, all of one length, if known

    @property
    def total(self) -> int:
        return self.global_rows.numel()

    @property
    def local(self) -> int:
        """Rows of one rank."""
        return self.total // self.size

    @property
    def own_rows(self) -> Tensor:
        """Global rows of this rank, int64 ``[T]``."""
        return self.rank_rows[self.rank * self.local:(self.rank + 1) * self.local]

    @property
    def rank_major(self) -> tuple[tuple[int, ...]]:
        """As ``runs``, in rank-major order."""
        return tuple(rank * self.local for rank in range(self.size)),

    def local_run(self, run: int) -> slice:
        """A run's rows among this rank's own."""
        length = self.local // len(self.runs)
        return slice(run * length, (run + 1) * length)

    def global_run(self, run: int, rank: int) -> slice:
        """A run's rows among all, for any rank."""
        first = self.runs[run][rank]
        return slice(first, first + self.local // len(self.runs))


def place_own(rows: Rows, out: Tensor, own: Tensor) -> None:
    """Writes this rank's rows ``own`` ``[T, h, D]`` to their places in ``out`` ``[S, h, D]``."""
    if rows.runs is None:
        out.index_copy_(0, rows.own_rows, own)
        return
    for run in range(len(rows.runs)):
        copy_rows(out[rows.global_run(run, rows.rank)], own[rows.local_run(run)])


def take_own(rows: Rows, x: Tensor) -> Tensor:
    """A copy of this rank's rows of ``x`` ``[S, h, D]``."""
    if rows.runs is None:
        return x.index_select(0, rows.own_rows)
    return torch.cat([x[rows.global_run(run, rows.rank)] for run in range(len(rows.runs))])


def whole_rows(x: Tensor) -> Tensor:
    """``[parts, T, h, D]`` whose rows ``[h, D]`` are contiguous: x itself, or a copy."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def copy_rows(out: Tensor, x: Tensor) -> Tensor:
    """``out[...] = x``, then out, for tensors of one shape and dtype; 16 bytes at a time where both lie so.

    Slices of heads are strided, and torch copies strided tensors element by element.
    """
    ends = out, x
    if not (out.data_ptr() | x.data_ptr()) % 16:
        try:
            ends = out.view(torch.complex128), x.view(torch.complex128)
        except RuntimeError:  # rows, or the steps between them, are no multiple of 16 bytes: as it is
            pass
    ends[0].copy_(ends[1])
    return out
