"""Exchanges among ranks of one host by the GPUs' copy engines: no kernel sends, nothing is packed, nothing is staged.

Each rank pushes rows straight to their place in the receivers' tensors, in memory that all have mapped
(:mod:`.peer_memory`). Where that is, hosts tell each other exchange by exchange (:mod:`.mail`), in the same order on
all ranks; GPUs tell each other by numbers in each other's memory: "ready", the receiver's tensors may be written;
"arrived", all rows of an exchange are there. Pushing and copying this rank's own rows have a stream each; the attention
kernels' stream awaits one event.

Order. A stream runs its copies and signals one after the other, and a signal is written after a fence for the whole
system (``cuStreamWriteValue32`` without NO_MEMORY_BARRIER), so whoever sees the number sees the rows. Numbers only
grow, so a wait is for "at least". A rank signals "ready" before it waits, and pushes before it waits for what arrives:
even if the hardware runs everything from one queue (``CUDA_DEVICE_MAX_CONNECTIONS=1``) each wait is for something that
the other ranks issued before they waited.

Safety. With its addresses a rank tells what it expects, and nothing is issued unless all expect the same: then every
copy ends within the tensor that its receiver allocated for it. Otherwise all ranks raise ValueError. Tensors that
copies read or write are kept until the compute stream has been told to wait for the exchange.
"""
from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .collective_check import CollectiveCheck
from .comm import Pending, count_sent
from .copy_engines import CopyEngines, LocalCopies, PreparedCopies, RunningCopies
from .mail import Mail
from .moves import Exchange, exchange_of, other_ranks, pair_of, plan_exchange, what_ranks_expect
from .peer_memory import PeerMemory, peer_memory
from .rows import Rows

MOST_PLANS = 256  # exchanges that are kept prepared; lengths of sequences may change with every batch
FLAG_STEP = 128  # bytes between the numbers that ranks write to each other


class Peers:
    """The ranks of a group, one host's, that write to each other's tensors.

    Args:
        flags: addresses of :meth:`flag_bytes` bytes of every rank as this rank sees them; zeros at first.
        keep: what ``flags`` belongs to.
        look: called while this rank waits for another's host; raises ValueError where that one is known to have failed.
    """

    def __init__(self, rank: int, flags: Sequence[int], engines: CopyEngines, memory: PeerMemory, mail: Mail,
                 keep: Any = None, look: Callable[[], None] = lambda: None):
        size = len(flags)
        self._rank, self._others = rank, other_ranks(rank, size)
        self._engines, self._memory, self._mail, self._keep, self._look = engines, memory, mail, keep, look
        self._arrived = [flags[rank] + r * FLAG_STEP for r in self._others]
        self._ready = [flags[rank] + (size + r) * FLAG_STEP for r in self._others]
        self._tell_arrived = [flags[r] + rank * FLAG_STEP for r in self._others]
        self._tell_ready = [flags[r] + (size + rank) * FLAG_STEP for r in self._others]
        self._exchanges = 0  # issued so far
        self._plans: dict[Exchange, tuple[LocalCopies, PreparedCopies, int, str]] = {}

    @staticmethod
    def flag_bytes(size: int) -> int:
        return 2 * size * FLAG_STEP

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that may be one of the ``outs`` of :meth:`deliver`, or of what they are views of."""
        return self._memory.empty(shape, dtype)

    def fetch(self, rows: Rows, parts: Sequence[Tensor], stage: str) -> Pending:
        """Starts to collect what every rank has for this one; pending, a new ``[S, h, D]`` for each of ``parts``.

        ``parts``: each ``[parts, T, h, D]``, rows whole: one part for each rank, or for several neighbours.
        """
        outs = [self.empty((rows.total, *x.shape[2:]), x.dtype) for x in parts]
        done = self._run(rows, outs, parts, stage)
        return Pending([done], outs[0], parts, stage, lambda _: outs)

    def event(self) -> torch.cuda.Event:
        """An event to be recorded on the current stream when a later :meth:`deliver` may begin."""
        return self._engines.event()

    def deliver(self, rows: Rows, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str,
                after: torch.cuda.Event | None = None) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]`` into its ``[P, T, h, D]``, by sender, rows whole.

        ``outs``: of :meth:`empty`, with the same strides on every rank. ``after``: recorded when the tensors are
        complete, after ``tensors`` and ``outs`` were allocated: what the current stream does later may not use the
        memory of either. None: they are complete now.
        """
        done = self._run(rows, tensors, outs, stage, back=True, after=after)
        return Pending([done], outs[0], (tensors, outs), stage)

    def collect(self, rows: Rows, tensors: Sequence[Tensor], stage: str) -> Pending:
        """Starts to send every rank its rows of ``[S, h, D]``; pending, the others' ``[P - 1, T, h, D]`` of each."""
        outs = [self.empty((rows.size - 1, rows.local, *x.shape[1:]), x.dtype) for x in tensors]
        done = self._run(rows, tensors, outs, stage, back=True, others_only=True)
        return Pending([done], tensors[0], tensors, stage, lambda _: outs)

    def _run(self, rows: Rows, wholes: Sequence[Tensor], parts: Sequence[Tensor], stage: str, back: bool = False,
             others_only: bool = False, after: torch.cuda.Event | None = None) -> RunningCopies:
        """Issues an exchange, or raises ValueError where ranks do not expect the same: on all, with the same text."""
        pairs = list(zip(wholes, parts, strict=True))
        own, push, sent, expected = self._prepared(exchange_of(rows, [pair_of(*x) for x in pairs], back, others_only))
        number, engines = self._exchanges + 1, self._engines
        what = f"context parallel exchange {stage!r}, number {number}"
        places = self._meet_hosts(number, what, f"{stage}: {expected}", parts if back else wholes)
        count_sent(stage, sent)
        engines.begin(after)
        engines.signal(engines.pushing, self._tell_ready, number)
        bases = [*(x.data_ptr() for pair in pairs for x in pair), *map(self._memory.address, places)]
        engines.wait_for(engines.pushing, self._ready, number)
        engines.copy(engines.pushing, push, bases)
        engines.signal(engines.pushing, self._tell_arrived, number)
        engines.place(own, bases)
        engines.wait_for(engines.placing, self._arrived, number)
        return engines.end(what)

    def _meet_hosts(self, number: int, what: str, expected: str, written: Sequence[Tensor]) -> list[bytes]:
        """Tells the other ranks where this one's tensors are; descriptions of theirs, rank after rank."""
        size, head = self._memory.DESCRIPTION, expected.encode()
        self._mail.post(number, len(head).to_bytes(2, "little") + head
                        + b"".join(map(self._memory.describe, written)))
        try:
            messages = [self._mail.read(number, rank, what, self._look) for rank in self._others]
        except ValueError:  # another rank raised before this exchange: to it, and so to all, it never was
            self._mail.take_back(number)
            raise
        self._exchanges = number
        heads, places = [head], []
        for message in messages:
            end = 2 + int.from_bytes(message[:2], "little")
            heads.append(message[2:end])
            places += [message[at:at + size] for at in range(end, len(message), size)]
        if any(x != head for x in heads):
            self._engines.end(what).wait()  # memory that earlier exchanges still write to is used again after them
            each = dict(zip([self._rank, *self._others], heads))
            raise ValueError("all ranks of a context parallel group must exchange the same rows, got " + "; ".join(
                f"rank {rank}: {each[rank].decode()}" for rank in sorted(each)) + ". Check the lengths that the data "
                "loader gives each rank")
        return places

    def _prepared(self, exchange: Exchange) -> tuple[LocalCopies, PreparedCopies, int, str]:
        """A plan with its copies in the driver's form; its bytes that leave; what all ranks must expect."""
        if exchange not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = plan_exchange(exchange)
            self._plans[exchange] = (LocalCopies(plan.own), PreparedCopies(plan.push),
                                     sum(c.rows * c.width for c in plan.push), what_ranks_expect(exchange))
        return self._plans[exchange]


_met: WeakKeyDictionary[dist.ProcessGroup, Peers | None] = WeakKeyDictionary()


def peers_for(rows: Rows, group: dist.ProcessGroup, device: torch.device) -> Peers | None:
    """The group's copy engines, or None where the process group's own library moves these rows.

    That is so for rows at places that the host does not know, off CUDA, in a CUDA graph under capture; among several
    hosts, without access to each other's memory, and as MOBA_CP_COPY_ENGINES says: 0 never, 1 wherever it can be, unset
    groups of two ranks. The first call is collective: all ranks get the same answer.
    """
    if (device.type != "cuda" or rows.runs is None or rows.size == 1 or not rows.local
            or torch.cuda.is_current_stream_capturing()):
        return None
    if group not in _met:
        _met[group] = _meet(group, device)
    return _met[group]


def _meet(group: dist.ProcessGroup, device: torch.device) -> Peers | None:
    """Finds every rank's memory and host; None on all ranks if that fails on one, whatever the failure."""
    rank, size = dist.get_rank(group), group.size()
    problem, told, path, mail, addresses = _choice(size), (None, b"", None), None, None, []
    try:
        if problem is None:
            timeout_s = group._get_backend(device).options._timeout.total_seconds()
            engines, memory = CopyEngines(device, timeout_s), peer_memory(device)
            flags = memory.empty((Peers.flag_bytes(size),), torch.uint8).zero_()
            engines.attempt([flags.data_ptr()], flags)
            if rank == 0:
                path = _shared_file(Mail.bytes_needed(size))
            host = socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text()
            told = host, memory.describe(flags), path
    except Exception as error:  # whatever it is, the others wait to hear of it
        problem = f"{type(error).__name__}: {error}"
    everyone = _tell_everyone(group, (problem, *told))
    if everyone is not None:
        try:
            with open(everyone[0][3], "r+b") as file:
                mail = Mail(rank, size, mmap.mmap(file.fileno(), 0), timeout_s)
            addresses = [flags.data_ptr() if r == rank else memory.address(x[2]) for r, x in enumerate(everyone)]
            engines.attempt(addresses, flags)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        everyone = _tell_everyone(group, (problem, told[0]))
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return None if everyone is None else Peers(rank, addresses, engines, memory, mail, flags, CollectiveCheck.look)


NOT_CHOSEN = "MOBA_CP_COPY_ENGINES=0", "copy engines among more than two ranks are chosen by MOBA_CP_COPY_ENGINES=1"


def _choice(size: int) -> str | None:
    """Why this rank does not want copy engines; None where it does. Never seen on hardware beyond two ranks."""
    value = os.environ.get("MOBA_CP_COPY_ENGINES", "")
    if value not in ("", "0", "1"):
        return f"MOBA_CP_COPY_ENGINES must be 0 or 1, got {value!r}"
    if value == "0":
        return NOT_CHOSEN[0]
    return NOT_CHOSEN[1] if not value and size > 2 else None


def _tell_everyone(group: dist.ProcessGroup, told: tuple) -> list[tuple] | None:
    """What all ranks tell, (problem or None, host, ...) each; None on all where one has a problem or another host."""
    everyone = [None] * group.size()
    dist.all_gather_object(everyone, told, group)
    problems = [f"rank {rank}: {x[0]}" for rank, x in enumerate(everyone) if x[0]]
    if not problems and len({x[1] for x in everyone}) > 1:
        problems.append("its ranks are on several hosts")
    chosen = len({x[0] for x in everyone}) == 1 and everyone[0][0] in NOT_CHOSEN
    if problems and not chosen and dist.get_rank(group) == 0:
        logging.getLogger(__name__).warning("context parallel group of %d exchanges through its library: %s",
                                            group.size(), "; ".join(problems))
    return None if problems else everyone


def _shared_file(size: int) -> str:
    """The path of a new file of zeros in memory."""
    handle, path = tempfile.mkstemp(prefix="moba_cp_", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        os.posix_fallocate(handle, 0, size)  # where there is no room writing would end the process
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(handle)
    return path
