"""Exchanges among ranks of one host by the GPUs' copy engines, in memory of torch's symmetric memory.

Every rank of a group has an arena that all others have mapped, all of one size. What a rank sends lies in its own, at a
place that every rank works out alike, and receivers read it from there: no addresses travel, hosts do not wait for each
other. GPUs tell each other by numbers that only grow: "ready", what I send in exchange n is in my arena; "done", I have
read yours. An exchange ends when every rank is done: what waits for it may use the memory again.

Order. A signal is written after everything before it on its stream. A rank signals "ready" before it waits, and reads
before it waits for "done": even where one queue runs everything, a wait is for what others issued before they waited.

Safety. Of other ranks' memory a rank writes these numbers alone. One that fails in mid-schedule lets the others' waits
pass (:func:`.comm.abandon`), all raise by their next call but one, and nothing uses those arenas again.
"""
import functools
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collective_check import CollectiveCheck
from .comm import MAX_RUNS, Library, ListMessages, Messages, Pending, Rows, Runs, Slot, met
from .copy_engines import CopyEngines, addresses_of_all, new_arena

GRAIN = 32 << 20  # an arena is a multiple of this, bytes
FLAG_STEP = 128  # bytes between the numbers that ranks write to each other
FOR_EVER = 1 << 30  # exchanges ahead that a rank which gives up says are done
MOST_PLANS = 512  # of a group


class Copy(NamedTuple):
    """Rows of ``width`` bytes: an end is the number of a base, and bytes from there and from row to row."""

    target: int
    target_offset: int
    target_pitch: int
    source: int
    source_offset: int
    source_pitch: int
    rows: int
    width: int

    def at(self, bases: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int], int, int]:
        return ((bases[self.target] + self.target_offset, self.target_pitch),
                (bases[self.source] + self.source_offset, self.source_pitch), self.rows, self.width)


class Plan(NamedTuple):
    """An exchange's copies: to this rank's arena, of its own rows, and by rank from the others' arenas."""

    staged: list[Copy]
    own: list[Copy]
    read: dict[int, list[Copy]]
    sent: int  # bytes


class Peers:
    """The ranks of a group, one host's, with their arenas.

    Args:
        arena: this rank's, uint8.
        arenas: addresses of every rank's as this rank sees them; zeros up to :func:`first_slot` at first.
        keep: what the addresses belong to.
    """

    def __init__(self, rank: int, arena: Tensor, arenas: Sequence[int], engines: CopyEngines, keep: Any = None):
        self.arena, self.arenas, self.exchanges, self._engines, self._keep = arena, list(arenas), 0, engines, keep
        self.plans: dict[tuple, Plan] = {}
        # the next one first: no two ranks begin with the same
        self.others = [(rank + i) % len(arenas) for i in range(1, len(arenas))]
        # "ready" and "done" of this rank, where each other one reads them; of each other one, where this one does
        self._tell = {r: [arenas[r] + (2 * rank + i) * FLAG_STEP for i in (0, 1)] for r in self.others}
        self._hear = {r: [arenas[rank] + (2 * r + i) * FLAG_STEP for i in (0, 1)] for r in self.others}

    def run(self, plan: Plan, bases: Sequence[int], after: torch.cuda.Event | None, what: str,
            finish: Callable[[], None] | None) -> torch.cuda.Event:
        """Issues copies; the event of the end. ``after``: when the first may begin, None: now.

        ``finish`` launches what is to be done with what was read.
        """
        engines, self.exchanges = self._engines, self.exchanges + 1
        engines.begin(after)
        for copy in plan.staged:
            engines.place(engines.remote, *copy.at(bases))
        for ready, _ in self._tell.values():
            engines.signal(ready, self.exchanges)
        for copy in plan.own:
            engines.place(engines.local, *copy.at(bases))
        for r, copies in plan.read.items():
            engines.wait(engines.remote, self._hear[r][0], self.exchanges)
            for copy in copies:
                engines.copy(engines.remote, *copy.at(bases))
            engines.signal(self._tell[r][1], self.exchanges)
        for _, done in self._hear.values():
            engines.wait(engines.local, done, self.exchanges)
        return engines.end(f"context parallel exchange {what!r}, number {self.exchanges}", finish)

    def give_up(self) -> None:
        """Lets all waits for this rank pass, and the current stream await what was issued so far."""
        for address in (x for both in self._tell.values() for x in both):
            self._engines.signal(address, self.exchanges + FOR_EVER)
        self._engines.end("the end of a context parallel group's exchanges", keep=self).wait()


class SymmetricMemory(Library):
    """Rows that travel through arenas; in each lane, of so many bytes, two slots take turns."""

    early = True

    def __init__(self, rows: Rows, group: dist.ProcessGroup, peers: Peers, lanes: Sequence[int]):
        super().__init__(rows, group)
        self._peers, self._lanes = peers, lanes

    def tensors(self, slot: Slot, *kinds: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        made, offset = [], self._offset(slot)
        for shape, dtype in kinds:
            nbytes = math.prod(shape) * dtype.itemsize
            made.append(self._peers.arena[offset:offset + nbytes].view(dtype).view(shape))
            offset += aligned(nbytes)
        return made

    def deliver(self, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str, slot: Slot,
                after: torch.cuda.Event | None = None) -> Pending:
        if any(x.dtype != out.dtype or out.shape[0] != self.rows.size for x, out in zip(tensors, outs)):
            return super().deliver(tensors, outs, stage, slot, after)
        return self._exchange(delivered, self.rows.runs, tensors, outs, outs, stage, slot, after)

    def _ends(self, views: Sequence[Tensor], rows: Rows, slot: Slot, lasting: bool
              ) -> tuple[Sequence[Tensor], list[Tensor]]:
        views = [x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous() for x in views]
        if lasting or views[0].shape[0] > 1:
            return views, [x.new_empty(rows.total, *x.shape[2:]) for x in views]
        return views, self.tensors(slot, *(((rows.total, *x.shape[2:]), x.dtype) for x in views))

    def _received(self, tensors: Sequence[Tensor], slot: Slot) -> list[Tensor]:
        """Behind the tensors in their slot, where it has room: memory allocated now may be in use at ``after``."""
        rows, sent = self.rows, [(x.shape, x.dtype) for x in tensors]
        kinds = [*sent, *(((rows.size - 1, rows.local, *shape[1:]), dtype) for shape, dtype in sent)]
        if sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in kinds) > self._lanes[slot[0]]:
            return super()._received(tensors, slot)
        return self.tensors(slot, *kinds)[len(sent):]

    def _exchange(self, messages: ListMessages, runs: Runs, sources: Sequence[Tensor], targets: Sequence[Tensor],
                  outs: Sequence[Tensor], stage: str, slot: Slot, after: torch.cuda.Event | None = None,
                  finish: Callable[[Sequence[Tensor]], Any] | None = None) -> Pending:
        peers, begin, lane = self._peers, self._offset(slot), self._lanes[slot[0]]
        arena, key, bases = peers.arenas[self.rows.rank], [messages, runs, begin, lane], []
        for x in (*sources, *targets):
            address = x.data_ptr()
            bases.append(address)
            place = address - arena
            key.append((x.shape, x.stride(), x.dtype, place if 0 <= place - begin < lane else None))
        key = tuple(key)
        plan = peers.plans.get(key)
        if plan is None:
            if len(peers.plans) >= MOST_PLANS:
                peers.plans.clear()
            listed = messages(runs, self.rows.rank, sources, targets)
            plan = peers.plans[key] = self._plan(listed, sources, targets, stage, begin, begin + lane)
        done = peers.run(plan, bases + peers.arenas, after, stage, finish and functools.partial(finish, outs))
        return Pending([done], outs, (sources, targets, outs), stage, sent=plan.sent)

    def _plan(self, listed: Iterator[Messages], sources: Sequence[Tensor], targets: Sequence[Tensor], stage: str,
              begin: int, end: int) -> Plan:
        """Copies for messages; what is sent or received in the slot, ``begin`` to ``end`` of the arena, lies there."""
        peers, me, at, tensors, listed = self._peers, self.rows.rank, begin, (*sources, *targets), list(listed)
        arena, runs, own, sent = peers.arenas[me], len(listed) // len(sources), [], 0
        staged, read = ({r: [] for r in peers.others} for _ in range(2))

        def in_tensor(i: int, x: Tensor) -> tuple[int, int, int]:
            return i, x.data_ptr() - tensors[i].data_ptr(), x.stride(0) * x.element_size()

        for n, (outputs, inputs) in enumerate(listed):
            source, run = divmod(n, runs)
            target, other, rows, nbytes = len(sources) + source, peers.others[0], inputs[me].shape[0], inputs[me].nbytes
            width, mine = nbytes // rows, own
            sends, receives = (begin <= x[other].data_ptr() - arena < end for x in (inputs, outputs))
            receives = receives and not sends and outputs[me] is not None
            if sends or receives:  # they lie in every rank's arena as here, sent from there, or received at their place
                places = [x.data_ptr() - arena for x in (inputs if sends else outputs)]
                mine = staged[other] if receives else own
            else:
                places = [at + (r * runs + run) * nbytes for r in range(len(inputs))]
                for r in peers.others:
                    place = len(tensors) + me, places[r], width
                    staged[r].append(Copy(*place, *in_tensor(source, inputs[r]), rows, width))
                at += (run == runs - 1) * aligned(len(inputs) * runs * nbytes)
            if min(places) < begin or max(places) + nbytes > end:
                raise ValueError(f"{stage} must fit its {end - begin} bytes, got {max(places) + nbytes - begin}")
            if outputs[me] is not None:
                mine.append(Copy(*in_tensor(target, outputs[me]), *in_tensor(source, inputs[me]), rows, width))
            for r in peers.others:
                place = len(tensors) + r, places[r if receives else me], width
                read[r].append(Copy(*in_tensor(target, outputs[r]), *place, rows, width))
                sent += nbytes
        return Plan([x for copies in staged.values() for x in _joined(copies)], _joined(own),
                    {r: _joined(copies, apart=True) for r, copies in read.items()}, sent)

    def _offset(self, slot: Slot) -> int:
        return first_slot(self.rows.size) + 2 * sum(self._lanes[:slot[0]]) + slot[1] % 2 * self._lanes[slot[0]]


def delivered(runs: Runs, me: int, tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> Iterator[Messages]:
    """From each ``[S, h, D]`` its rows to each rank; into ``[P, T, h, D]``."""
    for x, out in zip(tensors, outs):
        length = out.shape[1] // len(runs)
        for i, firsts in enumerate(runs):
            yield out[:, i * length:(i + 1) * length].unbind(), [x[first:first + length] for first in firsts]


def _joined(copies: Sequence[Copy], apart: bool = False) -> list[Copy]:
    """Fewer copies: rows that are neighbours at both ends as one; ``apart``: also two that are not neighbours."""
    joined = []
    for copy in map(_in_one, copies):
        last = joined[-1] if joined else copy
        steps = copy.target_offset - last.target_offset, copy.source_offset - last.source_offset
        alike = (last.target, last.source, last.width) == (copy.target, copy.source, copy.width)
        if alike and steps == (last.rows * last.target_pitch, last.rows * last.source_pitch) and (
                (last.target_pitch, last.source_pitch) == (copy.target_pitch, copy.source_pitch)):
            joined[-1] = _in_one(last._replace(rows=last.rows + copy.rows))
        elif alike and apart and last.rows == copy.rows == 1 and copy.width <= min(steps) and max(steps) < 1 << 31:
            joined[-1] = last._replace(target_pitch=steps[0], source_pitch=steps[1], rows=2)
        else:
            joined.append(copy)
    return joined


def _in_one(copy: Copy) -> Copy:
    """Contiguous rows as one row; CUDA's are below 2 GiB."""
    nbytes = copy.rows * copy.width
    if not copy.target_pitch == copy.source_pitch == copy.width or nbytes >= 1 << 30:
        return copy
    return copy._replace(target_pitch=nbytes, source_pitch=nbytes, rows=1, width=nbytes)


def aligned(nbytes: int) -> int:
    """Bytes that a tensor, or messages to all ranks, take in an arena."""
    return -(-nbytes // 512) * 512


def first_slot(size: int) -> int:
    """Bytes of an arena before its slots: the numbers that ranks tell each other, and room for an attempt."""
    return aligned(2 * size * FLAG_STEP + 32)


def through_arenas(rows: Rows, group: dist.ProcessGroup, device: torch.device,
                   lanes: Sequence[Sequence[int]]) -> SymmetricMemory | None:
    """As :func:`..all_gather.transport_for` says; None where the group's library moves rows."""
    sizes = [sum(aligned(x) + MAX_RUNS * aligned(1) for x in lane) for lane in lanes]  # a message each run
    nbytes, peers = first_slot(rows.size) + 2 * sum(sizes), met.get(group)
    if group not in met or peers is not None and peers.arena.nbytes < nbytes:
        CollectiveCheck.look(group, wait=True)  # a rank that has raised would not come
        torch.cuda.synchronize(device)  # then the arena before is free everywhere
        peers = met[group] = meet(group, device, -(-nbytes // GRAIN) * GRAIN)
    return None if peers is None else SymmetricMemory(rows, group, peers, sizes)


def meet(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> Peers | None:
    """Makes arenas and maps everybody's; None on all ranks if that fails on one, whatever the failure."""
    rank, size, peers, host, problem = dist.get_rank(group), group.size(), None, "", _choice(group.size())
    for step in (0, 1):
        try:
            if problem is None and step == 0:
                engines = CopyEngines(device, group._get_backend(device).options._timeout.total_seconds())
                arena = new_arena(nbytes, device)
                arena[:first_slot(size)] = 0
                host = socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text()
            elif problem is None:
                arenas, keep = addresses_of_all(arena, group)
                engines.attempt(arenas, rank, first_slot(size) - 32)
                peers = Peers(rank, arena, arenas, engines, keep)
        except Exception as error:  # whatever it is, the others wait to hear of it
            problem = f"{type(error).__name__}: {error}"
        everyone = [None] * size
        dist.all_gather_object(everyone, (problem, host), group)
        problems = [f"rank {r}: {x}" for r, (x, _) in enumerate(everyone) if x]
        if not problems and len(set(everyone)) > 1:
            problems = ["its ranks are on several hosts"]
        if problems and rank == 0 and {x for x, _ in everyone} not in ({OFF}, {NOT_CHOSEN}):
            logging.getLogger(__name__).warning("context parallel group of %d exchanges through its library: %s", size,
                                                "; ".join(problems))
        if problems:
            return None
    return peers


OFF, NOT_CHOSEN = ("MOBA_CP_COPY_ENGINES=0",
                   "copy engines among more than two ranks are chosen by MOBA_CP_COPY_ENGINES=1")


def _choice(size: int) -> str | None:
    """Why this rank does not want copy engines; None where it does. Never seen on hardware beyond two ranks."""
    value = os.environ.get("MOBA_CP_COPY_ENGINES", "")
    if value not in ("", "0", "1"):
        return f"MOBA_CP_COPY_ENGINES must be 0 or 1, got {value!r}"
    return OFF if value == "0" else NOT_CHOSEN if not value and size > 2 else None
