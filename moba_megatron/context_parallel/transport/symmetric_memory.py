"""Exchanges among ranks of one host by the GPUs' copy engines, in memory of torch's symmetric memory.

Every rank of a group has an arena that all others have mapped, all of one size. What a rank sends lies in its own, at a
place that every rank works out alike, and receivers read it from there: no addresses travel, hosts do not wait for each
other. GPUs tell each other by numbers in the arenas' signal pads, 0 at first, that only grow: "ready", what I send in
exchange n is in my arena; "done", I have read yours. An exchange ends when every rank is done: what waits for it may
use the memory again.

Order. A signal is written after everything before it on its stream. A rank signals "ready" before it waits, and reads
before it waits for "done": even where one queue runs everything, a wait is for what others issued before they waited.

Safety. A rank writes into no arena but its own. One that fails in mid-schedule lets the others' waits pass
(:func:`.comm.abandon`), all raise by their next call but one, and nothing uses those arenas again.
"""
import functools
import itertools
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collective_check import CollectiveCheck
from .comm import Library, ListMessages, Pending, Rows, Runs, Slot, fetched, met

GRAIN = 32 << 20  # an arena is a multiple of this, bytes
NOT_CHOSEN = "MOBA_CP_COPY_ENGINES=0, or of more than two ranks not MOBA_CP_COPY_ENGINES=1"
Copy = namedtuple("Copy", "bases offsets pitches rows width")
"""Rows of ``width`` bytes, of a target and a source: the numbers of their bases, bytes from there, from row to row."""
Plan = namedtuple("Plan", "staged own read sent")
"""An exchange's copies: to this rank's arena, of its own rows, by rank from the others' arenas; bytes that are sent."""


class Peers:
    """A rank's exchanges with the others of its group: its arena, uint8, theirs, and this GPU's copies and signals. One
    stream has what others send and wait for, one what stays here. An exchange that is not done ``timeout_s`` after it
    was issued ends the process."""

    def __init__(self, device: torch.device, nbytes: int, timeout_s: float):
        from cuda.bindings import driver, runtime
        from torch.distributed._symmetric_memory import _SymmetricMemory

        from ...kernels import copying  # needs Triton
        self._driver, self._runtime, self._kernels, self._timeout_s = driver, runtime, copying, timeout_s
        # not from a pool, which would hand it out again while others have it mapped
        self.arena = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
        self._current = torch.cuda.current_stream(device)
        # of high priority: what they wait for must not stand behind kernels that were launched first
        self.remote, self.local = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self._unfinished = SimpleQueue()  # (deadline, event, what it is the end of, what to keep until then)
        threading.Thread(target=watch, args=(self._unfinished,), daemon=True, name="moba exchange watch").start()
        weakref.finalize(self, self._unfinished.put, None)

    def connect(self, rank: int, handle: Any) -> None:
        """Takes all ranks' arenas and signal pads, which ``handle`` has mapped, and makes exchange 0. Nobody waits for
        another in it: what this driver, GPU or Triton refuses is refused here."""
        self._handle, self.arenas, pads = handle, list(handle.buffer_ptrs), handle.signal_pad_ptrs
        # the next one first: no two ranks begin with the same
        self.others = [(rank + i) % len(pads) for i in range(1, len(pads))]
        # "ready" and "done" of this rank, where each other one reads them; of each other one, where this one does
        self._tell = {r: [pads[r] + 4 * (2 * rank + i) for i in (0, 1)] for r in self.others}
        self._hear = {r: [pads[rank] + 4 * (2 * r + i) for i in (0, 1)] for r in self.others}
        self.exchanges, copies = -1, [[Copy((rank, r), (0, 16), (16, 16), 1, 16)] for r in range(len(pads))]
        self.run(Plan(copies[rank], copies[rank], copies, 0), self.arenas, None, "attempt", None).synchronize()

    def run(self, plan: Plan, bases: Sequence[int], after: torch.cuda.Event | None, what: str,
            finish: Callable[[], None] | None) -> torch.cuda.Event:
        """Issues copies, the first after ``after`` if given, then ``finish``, for what was read; the end's event."""
        self.exchanges += 1
        self.begin(after)
        self.copy(self.remote, plan.staged, bases, True)
        for ready, _ in self._tell.values():
            self.signal(ready, self.exchanges)
        self.copy(self.local, plan.own, bases, True)
        for r in self.others:
            self.wait(self.remote, self._hear[r][0], self.exchanges)
            self.copy(self.remote, plan.read[r], bases, False)
            self.signal(self._tell[r][1], self.exchanges)
        for _, done in self._hear.values():
            self.wait(self.local, done, self.exchanges)
        return self.end(f"context parallel exchange {what!r}, number {self.exchanges}", finish)

    def give_up(self) -> None:
        """Lets all waits for this rank pass, and the current stream await what was issued so far."""
        for address in (x for both in self._tell.values() for x in both):
            self.signal(address, self.exchanges + (1 << 30))  # as if so many more exchanges were done
        self.end("the end of a context parallel group's exchanges", keep=self).wait()

    def begin(self, after: torch.cuda.Event | None) -> None:
        """What follows on both streams comes after ``after``, or else after what is on the current stream now."""
        current = torch.cuda.current_stream()
        if self._current != current:  # what that one has still to do may use arenas
            current.wait_stream(self._current)
        self._current, ready = current, current.record_event() if after is None else after
        for stream in (self.remote, self.local):
            stream.wait_event(ready)

    def end(self, what: str, finish: Callable[[], None] | None = None, keep: Any = None) -> torch.cuda.Event:
        """After everything issued so far, and ``finish``; watched by the name ``what``, keeps ``keep`` until then."""
        self.local.wait_event(self.remote.record_event())
        if finish is not None:
            with torch.cuda.stream(self.local):
                finish()
        done = self.local.record_event()
        self._unfinished.put((time.monotonic() + self._timeout_s, done, what, keep))
        return done

    def copy(self, stream: torch.cuda.Stream, copies: Sequence[Copy], bases: Sequence[int], here: bool) -> None:
        """``here``: within this GPU, by a kernel of few blocks where it can: CUDA's own take all of the GPU."""
        for (target, source), (to, by), (to_pitch, by_pitch), rows, width in copies:
            to, by = to + bases[target], by + bases[source]
            if here and self._kernels.copyable(rows, width, to, by, to_pitch, by_pitch):
                self._kernels.copy_rows(by, to, rows, width, by_pitch, to_pitch, stream)
            else:
                _call(self._runtime.cudaMemcpy2DAsync, to, to_pitch, by, by_pitch, width, rows,
                      self._runtime.cudaMemcpyKind.cudaMemcpyDefault, stream.cuda_stream)

    def signal(self, address: int, number: int) -> None:
        """Writes a number, mod 2^32, when everything before on the remote stream is done and seen by all GPUs."""
        _call(self._driver.cuStreamWriteValue32, self.remote.cuda_stream, address, number & 0xFFFFFFFF, 0)

    def wait(self, stream: torch.cuda.Stream, address: int, number: int) -> None:
        """The stream waits until the number at the address is this one, or up to 2^31 more."""
        _call(self._driver.cuStreamWaitValue32, stream.cuda_stream, address, number & 0xFFFFFFFF, 0)


def _call(function: Callable, *args) -> None:
    error, = function(*args)
    if int(error):
        raise RuntimeError(f"{function.__name__} failed with error {int(error)}")


def watch(exchanges: SimpleQueue) -> None:
    """Lets go of what is done, up to None; ends the process where one is late, as NCCL would: streams wait for ever."""
    from cuda.bindings import runtime  # what this thread asks must not spoil a CUDA graph that another one captures
    runtime.cudaThreadExchangeStreamCaptureMode(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
    for deadline, done, what, keep in iter(exchanges.get, None):
        while not done.query():
            if time.monotonic() > deadline:
                print(f"moba_megatron: {what} was not done in time: another rank failed, hangs or is slower than the "
                      "process group's timeout. This process ends", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.5)
        del done, keep  # nothing is kept while there is nothing to watch


class SymmetricMemory(Library):
    """Rows that travel through arenas; in each lane, of so many bytes, two slots take turns."""

    early = True

    def __init__(self, rows: Rows, group: dist.ProcessGroup, peers: Peers, lanes: Sequence[int]):
        super().__init__(rows, group)
        self._peers, self._lanes = peers, lanes

    def tensors(self, slot: Slot, *kinds: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor] | None:
        """None where the slot has no room for them."""
        room, sizes = self._room(slot), [aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in kinds]
        if sum(sizes) > len(room):
            return None
        parts = self._peers.arena[room.start:room.start + sum(sizes)].split(sizes)
        return [x.view(dtype)[:math.prod(shape)].view(shape) for x, (shape, dtype) in zip(parts, kinds)]

    def _exchange(self, messages: ListMessages, runs: Runs, sources: Sequence[Tensor], targets: Sequence[Tensor],
                  outs: Sequence[Tensor], stage: str, slot: Slot, after: torch.cuda.Event | None = None,
                  finish: Callable[[Sequence[Tensor]], Any] | None = None) -> Pending:
        peers, room, bases, layouts = self._peers, self._room(slot), [], []
        sources = [x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous() for x in sources]
        for x in (*sources, *targets):
            bases.append(x.data_ptr())
            place = bases[-1] - peers.arenas[self.rows.rank]
            layouts.append((x.shape, x.stride(), x.dtype, place if place in room else None))
        plan = _plan(messages, runs, self.rows.rank, room, stage, *layouts)
        done = peers.run(plan, bases + peers.arenas, after, stage, finish and functools.partial(finish, outs))
        return Pending([done], outs, (sources, targets, outs), stage, sent=plan.sent)

    def _room(self, slot: Slot) -> range:
        """A slot's bytes in every arena."""
        lane = self._lanes[slot[0]]
        begin = 2 * sum(self._lanes[:slot[0]]) + slot[1] % 2 * lane
        return range(begin, begin + lane)


@functools.lru_cache(maxsize=512)
def _plan(messages: ListMessages, runs: Runs, me: int, room: range, stage: str, *layouts: tuple) -> Plan:
    """Copies for messages, which are read where they lie in the slot: in targets, in sources, or in copies of these.
    ``layouts``: shape, strides and dtype of each source, then of each target, and its place if that is in the slot."""
    number, size, arenas = len(layouts) // 2, len(runs[0]), len(layouts)  # the last is the first arena's number
    tensors = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype, _ in layouts]
    sources, targets, placed = tensors[:number], tensors[number:], [x[-1] for x in layouts]
    receives = messages is fetched and None not in placed[number:]
    sent, places = sources, placed[number:] if receives else placed[:number]
    if None in places:
        sent = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in sources]
        *places, end = itertools.accumulate((aligned(x.nbytes) for x in sent), initial=room.start)
        if end > room.stop:
            raise ValueError(f"{stage} must fit its {len(room)} bytes, got {end - room.start}")
    staged, own, read = [], [], [[] for _ in range(size)]

    def add(copies: list[Copy], *ends: tuple[Tensor, int, int]) -> None:
        """``ends``: rows of target and source, each with the number of its base and its tensor's place from there."""
        where = [(base, place + x.storage_offset() * x.itemsize, x.stride(0) * x.itemsize) for x, base, place in ends]
        copies.append(_in_one(Copy(*zip(*where), len(ends[0][0]), ends[0][0][0].nbytes)))

    listed = zip(messages(runs, me, sources, targets), messages(runs, me, sent, targets))
    for n, ((outputs, inputs), (_, leaving)) in enumerate(listed):
        i = n // len(runs)
        for r in range(size):
            target, source = (outputs[r], number + i, 0), (inputs[r], i, 0)
            if r != me:
                add(read[r], target, (outputs[r] if receives else leaving[me], arenas + r, places[i]))
            elif outputs[me] is not None:
                add(staged if receives else own, target, source)
            if r != me and sent is not sources:
                add(staged, (leaving[r], arenas + me, places[i]), source)
    read = [_joined(copies, apart=True) for copies in read]
    return Plan(_joined(sorted(set(staged))), _joined(own), read, sum(x.rows * x.width for x in itertools.chain(*read)))


def _joined(copies: Sequence[Copy], apart: bool = False) -> list[Copy]:
    """Fewer copies: rows that are neighbours at both ends as one; ``apart``: also two that are not neighbours."""
    joined: list[Copy] = []
    for copy in copies:
        last = joined[-1] if joined else copy
        steps = tuple(b - a for a, b in zip(last.offsets, copy.offsets))
        pitches = steps if apart and last.rows == copy.rows == 1 else last.pitches
        alike = last._replace(offsets=copy.offsets, rows=copy.rows) == copy and copy.width <= min(steps)
        if alike and steps == tuple(last.rows * x for x in pitches) and max(steps) < 1 << 31:
            joined[-1] = _in_one(last._replace(pitches=pitches, rows=last.rows + copy.rows))
        else:
            joined.append(copy)
    return joined


def _in_one(copy: Copy) -> Copy:
    """Contiguous rows as one row; CUDA's are below 2 GiB."""
    nbytes = copy.rows * copy.width
    one = copy.pitches == (copy.width, copy.width) and nbytes < 1 << 30
    return copy._replace(pitches=(nbytes, nbytes), rows=1, width=nbytes) if one else copy


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes in an arena."""
    return -(-nbytes // 512) * 512


def through_arenas(rows: Rows, group: dist.ProcessGroup, device: torch.device,
                   lanes: Sequence[Sequence[int]]) -> SymmetricMemory | None:
    """As :func:`..all_gather.transport_for` says; None where the group's library moves rows."""
    sizes = [sum(aligned(x) + 2048 for x in lane) for lane in lanes]  # means of several groups are a tensor each
    nbytes, peers = 2 * sum(sizes), met.get(group)
    if group not in met or peers is not None and peers.arena.nbytes < nbytes:
        CollectiveCheck.look(group, wait=True)  # a rank that has raised would not come
        torch.cuda.synchronize(device)  # then the arena before is free everywhere
        peers = met[group] = meet(group, device, -(-nbytes // GRAIN) * GRAIN)
    return None if peers is None else SymmetricMemory(rows, group, peers, sizes)


def meet(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> Peers | None:
    """Makes arenas and maps everybody's; None on all ranks if that fails on one, whatever the failure."""
    rank, size, host, peers = dist.get_rank(group), group.size(), "", None
    choice = os.environ.get("MOBA_CP_COPY_ENGINES") or ("1" if size == 2 else "0")
    problem = {"0": NOT_CHOSEN, "1": None}.get(choice, f"MOBA_CP_COPY_ENGINES must be 0 or 1, got {choice!r}")
    for step in (0, 1):
        try:
            if step == 1:
                from torch.distributed._symmetric_memory import rendezvous
                peers.connect(rank, rendezvous(peers.arena, group.group_name))
            elif problem is None:
                peers = Peers(device, nbytes, group._get_backend(device).options._timeout.total_seconds())
                host = os.uname().nodename + Path("/proc/sys/kernel/random/boot_id").read_text()
        except Exception as error:  # whatever it is, the others wait to hear of it
            problem = f"{type(error).__name__}: {error}"
        everyone = [None] * size
        dist.all_gather_object(everyone, (problem, host), group)
        problems = [f"rank {r}: {x}" for r, (x, _) in enumerate(everyone) if x]
        if problems or len(set(everyone)) > 1:
            problems = problems or ["its ranks are on several hosts"]
            if rank == 0 and any(x != NOT_CHOSEN for x, _ in everyone):
                logging.getLogger(__name__).warning("context parallel group of %d exchanges through its library: %s",
                                                    size, "; ".join(problems))
            return None
    return peers
