"""Exchanges among ranks of one host by the GPUs' copy engines: no kernel sends, nothing is packed.

Every rank has staging memory that the others write to (symmetric memory). An exchange is a series of pieces, numbered
alike on all ranks: each rank pushes rows straight from its tensors into the others' staging and then writes the piece's
number behind them; a rank that sees all numbers moves the rows from its staging to their place and tells the senders
that this slot of staging is free. Pushing and placing have a stream each, so that both directions of the link and the
local copies overlap; the attention kernels' stream awaits one event.

Order. A stream runs its copies and its signals one after the other, and a signal is written after a fence for the
whole system (``cuStreamWriteValue32`` without NO_MEMORY_BARRIER), so whoever sees the number sees the rows. Numbers
only grow, so a wait is for "at least", and nothing has to be reset. Slot ``n % SLOTS`` is written again once piece
``n - SLOTS`` has been placed. A rank issues piece n's placing after pushing n + 1, always in this order: even if the
hardware runs everything from one queue (``CUDA_DEVICE_MAX_CONNECTIONS=1``) each wait is for something that the other
ranks issued before they could wait for this one.

Memory. Tensors that the side streams read or write are kept until the compute stream has been told to wait for them.
"""
from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Pending, count_sent
from .copy_engines import CopyEngines, LocalCopies, PreparedCopies, RunningCopies
from .moves import Exchange, exchange_of, pair_of, plan_exchange

if TYPE_CHECKING:
    from .rows import Rows

SLOTS = 4
"""Pieces that staging memory holds: as many may be under way."""
SLOT_BYTES = 128 << 20
"""Bytes of a slot, what all others send together: 128 MiB take a link of NVLink 4 about 0.35 ms. Before it is placed,
each piece waits for blocks of the attention kernels to end: with 64 MiB the last pieces came late at 512K."""
MOST_PLANS = 256
"""Exchanges that are kept prepared; lengths of sequences may change with every batch."""
FLAG_STEP = 128
"""Bytes between the numbers that ranks write to each other."""


class Peers:
    """The ranks of a group, one host's, that write to each other's staging memory.

    Args:
        rank: this one's.
        staging: addresses of every rank's staging memory as this rank sees them; all zeros at first.
        engines: the driver's calls.
        keep: what the memory belongs to.
        slot_bytes: of staging memory.
    """

    def __init__(self, rank: int, staging: Sequence[int], engines: CopyEngines, keep: Any = None,
                 slot_bytes: int = SLOT_BYTES):
        size, others = len(staging), [r for r in range(len(staging)) if r != rank]
        self._engines, self._keep = engines, keep
        self._share = slot_bytes // (size - 1) // FLAG_STEP * FLAG_STEP
        self._slots = [[base + i * slot_bytes for base in reversed(staging)] for i in range(SLOTS)]  # rank r's: -1 - r
        flags = [base + SLOTS * slot_bytes for base in staging]
        self._arrived = [flags[rank] + r * FLAG_STEP for r in others]
        self._freed = [flags[rank] + (size + r) * FLAG_STEP for r in others]
        self._tell_arrived = [flags[r] + rank * FLAG_STEP for r in others]
        self._tell_freed = [flags[r] + (size + rank) * FLAG_STEP for r in others]
        self._pieces = 0  # issued so far
        self._copies: dict[Exchange, tuple] = {}

    def fetch(self, rows: Rows, parts: Sequence[Tensor], stage: str) -> Pending:
        """Starts to collect what every rank has for this one, in global order.

        Args:
            rows: whose runs are known.
            parts: each ``[parts, T, h, D]``, rows whole: one part for each rank, or for several neighbours.
            stage: name for :func:`~.comm.record_waits`.

        Returns:
            Pending, for each of ``parts`` a contiguous ``[S, h, D]``.
        """
        outs = [x.new_empty(rows.total, *x.shape[2:]) for x in parts]
        done = self._run(rows, outs, parts, stage)
        return Pending([done], outs[0], parts, stage, lambda _: outs)

    def milestone(self) -> torch.cuda.Event:
        """An event to be recorded on the current stream when a later :meth:`deliver` may begin."""
        return self._engines.milestone()

    def deliver(self, rows: Rows, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str,
                after: torch.cuda.Event | None = None) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]`` into its ``[P, T, h, D]``, by sender, rows whole.

        Args:
            after: recorded when the tensors are complete, after ``tensors`` and ``outs`` were allocated: what the
                current stream does later may not use the memory of either. None: they are complete now.
        """
        done = self._run(rows, tensors, outs, stage, back=True, after=after)
        return Pending([done], outs[0], tensors, stage)

    def collect(self, rows: Rows, tensors: Sequence[Tensor], stage: str) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]``.

        Returns:
            Pending, for each of ``tensors`` the other ranks' ``[P - 1, T, h, D]``, contiguous.
        """
        outs = [x.new_empty(rows.size - 1, rows.local, *x.shape[1:]) for x in tensors]
        done = self._run(rows, tensors, outs, stage, back=True, others_only=True)
        return Pending([done], tensors[0], tensors, stage, lambda _: outs)

    def _run(self, rows: Rows, wholes: Sequence[Tensor], parts: Sequence[Tensor], stage: str, back: bool = False,
             others_only: bool = False, after: torch.cuda.Event | None = None) -> RunningCopies:
        """Issues an exchange."""
        exchange = exchange_of(rows, [pair_of(*x) for x in zip(wholes, parts)], self._share, back, others_only)
        if exchange not in self._copies:
            if len(self._copies) >= MOST_PLANS:
                self._copies.clear()
            self._copies[exchange] = self._prepare(exchange)
        own, pieces, sent = self._copies[exchange]
        count_sent(stage, sent)
        engines, bases = self._engines, [x.data_ptr() for pair in zip(wholes, parts) for x in pair]
        engines.begin(after)
        for i, (push, _) in enumerate(pieces):
            self._push(self._pieces + i, push, bases)
            if i:
                self._place(self._pieces + i - 1, pieces[i - 1][1], bases)
            else:
                engines.place(own, bases)
        self._place(self._pieces + len(pieces) - 1, pieces[-1][1], bases)
        self._pieces += len(pieces)
        return engines.end(f"context parallel exchange {stage!r}, piece {self._pieces}")

    def _prepare(self, exchange: Exchange) -> tuple:
        """A plan with its copies in the driver's form; its bytes that leave."""
        plan = plan_exchange(exchange)
        pieces = [(PreparedCopies(piece.push), LocalCopies(piece.place)) for piece in plan.pieces]
        return LocalCopies(plan.own), pieces, sum(c.rows * c.width for piece in plan.pieces for c in piece.push)

    def _push(self, number: int, copies: PreparedCopies, tensors: list[int]) -> None:
        engines = self._engines
        if number >= SLOTS:
            engines.wait_for(engines.pushing, self._freed, number - SLOTS + 1)
        engines.copy(engines.pushing, copies, tensors + self._slots[number % SLOTS])
        engines.signal(engines.pushing, self._tell_arrived, number + 1)

    def _place(self, number: int, copies: LocalCopies, tensors: list[int]) -> None:
        engines = self._engines
        engines.wait_for(engines.placing, self._arrived, number + 1)
        engines.place(copies, tensors + self._slots[number % SLOTS])
        engines.signal(engines.placing, self._tell_freed, number + 1)


_met: WeakKeyDictionary[dist.ProcessGroup, Peers | None] = WeakKeyDictionary()


def peers_for(rows: Rows, group: dist.ProcessGroup, device: torch.device) -> Peers | None:
    """The group's copy engines, or None where the process group's own library moves these rows.

    That is so for rows at places that the host does not know, off CUDA, among several hosts, without access to each
    other's memory, in a CUDA graph under capture, and with ``MOBA_CP_COPY_ENGINES=0`` (on every rank). The first call
    is collective; all ranks get the same answer.
    """
    if (device.type != "cuda" or rows.runs is None or rows.size == 1 or not rows.local
            or os.environ.get("MOBA_CP_COPY_ENGINES", "1") == "0" or torch.cuda.is_current_stream_capturing()):
        return None
    if group not in _met:
        _met[group] = _meet(group, device)
    return _met[group]


def _meet(group: dist.ProcessGroup, device: torch.device) -> Peers | None:
    """Allocates staging memory that all ranks can write to; None on all ranks if that fails on one."""
    rank, size = dist.get_rank(group), group.size()
    problem, memory, handle, engines = None, None, None, None
    try:
        import torch.distributed._symmetric_memory as symmetric  # not in every build of torch

        engines = CopyEngines(device, group._get_backend(device).options._timeout.total_seconds())
        memory = symmetric.empty(SLOTS * SLOT_BYTES + 2 * size * FLAG_STEP, dtype=torch.uint8, device=device)
        memory.zero_()
        torch.cuda.synchronize(device)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if _agree_on_problem(group, problem, socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text()):
        return None
    try:
        handle = symmetric.rendezvous(memory, group)
        if not all(handle.buffer_ptrs):
            problem = "a rank's memory is out of reach"
    except RuntimeError as error:
        problem = str(error)
    if _agree_on_problem(group, problem):
        return None
    return Peers(rank, handle.buffer_ptrs, engines, (memory, handle))


def _agree_on_problem(group: dist.ProcessGroup, problem: str | None, host: str = "") -> bool:
    """Whether any rank has a problem, or is on another host; the same on all ranks."""
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, (problem, host), group)
    problems = [p for p, _ in everyone if p]
    if len({h for _, h in everyone}) > 1:
        problems.append("its ranks are on several hosts")
    if problems and dist.get_rank(group) == 0:
        logging.getLogger(__name__).warning("context parallel group of %d exchanges through its library: %s",
                                            group.size(), problems[0])
    return bool(problems)
