"""Exchanges among ranks of one host by the GPUs' copy engines: no kernel sends, nothing is packed, nothing is staged.

Each rank pushes rows straight from its tensors to their place in the receivers' tensors, which lie in memory that all
have mapped (:mod:`.peer_memory`). Where they are, hosts tell each other exchange by exchange (:mod:`.mail`), in the
same order on all ranks; GPUs tell each other by numbers in each other's memory: "ready", the receiver's tensors may be
written; "arrived", all rows of an exchange are there. Pushing and copying this rank's own rows have a stream each, so
that both directions of the link and the local copies overlap; the attention kernels' stream awaits one event.

Order. A stream runs its copies and its signals one after the other, and a signal is written after a fence for the
whole system (``cuStreamWriteValue32`` without NO_MEMORY_BARRIER), so whoever sees the number sees the rows. Numbers
only grow, so a wait is for "at least", and nothing has to be reset. In an exchange a rank signals "ready" before it
waits, and pushes before it waits for what arrives, always in this order: even if the hardware runs everything from one
queue (``CUDA_DEVICE_MAX_CONNECTIONS=1``) each wait is for something that the other ranks issued before they waited.

Memory. Tensors that copies read or write, this rank's or others', are kept until the compute stream has been told to
wait for the exchange.
"""
from __future__ import annotations

import logging
import mmap
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Pending, count_sent
from .copy_engines import CopyEngines, LocalCopies, PreparedCopies, RunningCopies
from .mail import Mail
from .moves import Exchange, exchange_of, other_ranks, pair_of, plan_exchange
from .peer_memory import PeerMemory, peer_memory

if TYPE_CHECKING:
    from .rows import Rows

MOST_PLANS = 256
"""Exchanges that are kept prepared; lengths of sequences may change with every batch."""
FLAG_STEP = 128
"""Bytes between the numbers that ranks write to each other."""


class Peers:
    """The ranks of a group, one host's, that write to each other's tensors.

    Args:
        rank: this one's.
        flags: addresses of :meth:`flag_bytes` bytes of every rank as this rank sees them; zeros at first.
        engines: the driver's calls.
        memory: where tensors are that others write to.
        mail: from host to host.
        keep: what ``flags`` belongs to.
    """

    def __init__(self, rank: int, flags: Sequence[int], engines: CopyEngines, memory: PeerMemory, mail: Mail,
                 keep: Any = None):
        size = len(flags)
        self._others = other_ranks(rank, size)
        self._engines, self._memory, self._mail, self._keep = engines, memory, mail, keep
        self._arrived = [flags[rank] + r * FLAG_STEP for r in self._others]
        self._ready = [flags[rank] + (size + r) * FLAG_STEP for r in self._others]
        self._tell_arrived = [flags[r] + rank * FLAG_STEP for r in self._others]
        self._tell_ready = [flags[r] + (size + rank) * FLAG_STEP for r in self._others]
        self._exchanges = 0  # issued so far
        self._plans: dict[Exchange, tuple[LocalCopies, PreparedCopies, int]] = {}

    @staticmethod
    def flag_bytes(size: int) -> int:
        return 2 * size * FLAG_STEP

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that may be one of the ``outs`` of :meth:`deliver`, or of what they are views of."""
        return self._memory.empty(shape, dtype)

    def fetch(self, rows: Rows, parts: Sequence[Tensor], stage: str) -> Pending:
        """Starts to collect what every rank has for this one, in global order.

        Args:
            rows: whose runs are known.
            parts: each ``[parts, T, h, D]``, rows whole: one part for each rank, or for several neighbours.
            stage: name for :func:`~.comm.record_waits`.

        Returns:
            Pending, for each of ``parts`` a contiguous ``[S, h, D]``.
        """
        outs = [self.empty((rows.total, *x.shape[2:]), x.dtype) for x in parts]
        done = self._run(rows, outs, parts, stage)
        return Pending([done], outs[0], parts, stage, lambda _: outs)

    def milestone(self) -> torch.cuda.Event:
        """An event to be recorded on the current stream when a later :meth:`deliver` may begin."""
        return self._engines.milestone()

    def deliver(self, rows: Rows, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str,
                after: torch.cuda.Event | None = None) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]`` into its ``[P, T, h, D]``, by sender, rows whole.

        Args:
            outs: of :meth:`empty`, with the same strides on every rank.
            after: recorded when the tensors are complete, after ``tensors`` and ``outs`` were allocated: what the
                current stream does later may not use the memory of either. None: they are complete now.
        """
        done = self._run(rows, tensors, outs, stage, back=True, after=after)
        return Pending([done], outs[0], (tensors, outs), stage)

    def collect(self, rows: Rows, tensors: Sequence[Tensor], stage: str) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]``.

        Returns:
            Pending, for each of ``tensors`` the other ranks' ``[P - 1, T, h, D]``, contiguous.
        """
        outs = [self.empty((rows.size - 1, rows.local, *x.shape[1:]), x.dtype) for x in tensors]
        done = self._run(rows, tensors, outs, stage, back=True, others_only=True)
        return Pending([done], tensors[0], tensors, stage, lambda _: outs)

    def _run(self, rows: Rows, wholes: Sequence[Tensor], parts: Sequence[Tensor], stage: str, back: bool = False,
             others_only: bool = False, after: torch.cuda.Event | None = None) -> RunningCopies:
        """Issues an exchange."""
        pairs = list(zip(wholes, parts, strict=True))
        own, push, sent = self._prepared(exchange_of(rows, [pair_of(*x) for x in pairs], back, others_only))
        count_sent(stage, sent)
        self._exchanges += 1
        number, engines, size = self._exchanges, self._engines, self._memory.DESCRIPTION
        what = f"context parallel exchange {stage!r}, number {number}"
        self._mail.post(number, b"".join(map(self._memory.describe, parts if back else wholes)))
        engines.begin(after)
        engines.signal(engines.pushing, self._tell_ready, number)
        bases = [x.data_ptr() for pair in pairs for x in pair]
        for rank in self._others:
            message = self._mail.read(number, rank, what)
            bases += [self._memory.address(message[at:at + size]) for at in range(0, len(message), size)]
        engines.wait_for(engines.pushing, self._ready, number)
        engines.copy(engines.pushing, push, bases)
        engines.signal(engines.pushing, self._tell_arrived, number)
        engines.place(own, bases)
        engines.wait_for(engines.placing, self._arrived, number)
        return engines.end(what)

    def _prepared(self, exchange: Exchange) -> tuple[LocalCopies, PreparedCopies, int]:
        """A plan with its copies in the driver's form; its bytes that leave."""
        if exchange not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = plan_exchange(exchange)
            self._plans[exchange] = (LocalCopies(plan.own), PreparedCopies(plan.push),
                                     sum(c.rows * c.width for c in plan.push))
        return self._plans[exchange]


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
    """Finds every rank's memory and host; None on all ranks if that fails on one."""
    rank, size = dist.get_rank(group), group.size()
    problem, engines, memory, flags, place, path, timeout_s = None, None, None, None, b"", None, None
    try:
        timeout_s = group._get_backend(device).options._timeout.total_seconds()
        engines, memory = CopyEngines(device, timeout_s), peer_memory(device)
        flags = memory.empty((Peers.flag_bytes(size),), torch.uint8).zero_()
        place = memory.describe(flags)
        if rank == 0:
            path = _shared_file(Mail.bytes_needed(size))
        torch.cuda.synchronize(device)
    except (ImportError, AttributeError, OSError, RuntimeError, TypeError) as error:  # also of an older torch
        problem = f"{type(error).__name__}: {error}"
    host = socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text()
    everyone = _tell_everyone(group, (problem, host, place, path))
    mail, addresses = None, []
    if everyone is not None:
        try:
            with open(everyone[0][3], "r+b") as file:
                mail = Mail(rank, size, mmap.mmap(file.fileno(), 0), timeout_s)
            addresses = [flags.data_ptr() if r == rank else memory.address(x[2]) for r, x in enumerate(everyone)]
        except (OSError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
        everyone = _tell_everyone(group, (problem, host))
    if path is not None:
        os.unlink(path)
    return None if everyone is None else Peers(rank, addresses, engines, memory, mail, flags)


def _tell_everyone(group: dist.ProcessGroup, told: tuple) -> list[tuple] | None:
    """What all ranks tell, (problem or None, host, ...) each; None on all where one has a problem or another host."""
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, told, group)
    problems = [x[0] for x in everyone if x[0]]
    if len({x[1] for x in everyone}) > 1:
        problems.append("its ranks are on several hosts")
    if problems and dist.get_rank(group) == 0:
        logging.getLogger(__name__).warning("context parallel group of %d exchanges through its library: %s",
                                            group.size(), problems[0])
    return None if problems else everyone


def _shared_file(size: int) -> str:
    """The path of a new file of zeros in memory."""
    handle, path = tempfile.mkstemp(prefix="moba_cp_", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    with open(handle, "wb") as file:
        file.truncate(size)
    return path
