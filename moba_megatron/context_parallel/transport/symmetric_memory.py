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
import sys
import threading
import time
from collections import deque, namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collective_check import CollectiveCheck
from .comm import MAX_RUNS, Library, ListMessages, Pending, Rows, Runs, Slot, collected, fetched, met

GRAIN = 32 << 20  # an arena is a multiple of this, bytes
FLAG_STEP = 128  # bytes between the numbers that ranks write to each other
FOR_EVER = 1 << 30  # exchanges ahead that a rank which gives up says are done
MOST_PLANS = 512  # of a group
OFF, NOT_CHOSEN = "MOBA_CP_COPY_ENGINES=0", "more than two ranks: MOBA_CP_COPY_ENGINES=1 chooses copy engines"
Copy = namedtuple("Copy", "bases offsets pitches rows width")
"""Rows of ``width`` bytes, of a target and a source: the numbers of their bases, bytes from there, from row to row."""
Plan = namedtuple("Plan", "staged own read sent")
"""An exchange's copies: to this rank's arena, of its own rows, by rank from the others' arenas; bytes that are sent."""


def new_arena(nbytes: int, device: torch.device) -> Tensor:
    """uint8; not from a pool, which would hand it out again while others have it mapped."""
    from torch._C._distributed_c10d import _SymmetricMemory
    return _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)


def addresses_of_all(arena: Tensor, group: dist.ProcessGroup) -> tuple[list[int], Any]:
    """Where this process sees every rank's arena, and what must be kept for that; collective."""
    from torch.distributed._symmetric_memory import rendezvous
    handle = rendezvous(arena, group.group_name)
    return list(handle.buffer_ptrs), handle


class CopyEngines:
    """Copies and signals of one GPU, on a stream for what others send and wait for and one for what stays here.

    An exchange that is not done ``timeout_s`` after it was issued ends the process.
    """

    def __init__(self, device: torch.device, timeout_s: float):
        from cuda.bindings import driver, runtime

        from ...kernels import copying  # needs Triton
        self._driver, self._runtime, self._kernels, self._timeout_s = driver, runtime, copying, timeout_s
        self._current = torch.cuda.current_stream(device)
        # of high priority: what they wait for must not stand behind kernels that were launched first
        self.remote, self.local = (torch.cuda.Stream(device, priority=-1) for _ in range(2))

    def begin(self, after: torch.cuda.Event | None) -> None:
        """What follows on both streams comes after ``after``, or else after what is on the current stream now.

        Where another stream was the current one before, all that it has to do comes before too: it may use arenas.
        """
        current = torch.cuda.current_stream()
        if self._current != current:
            current.wait_stream(self._current)
        self._current = current
        ready = current.record_event() if after is None else after
        self.remote.wait_event(ready)
        self.local.wait_event(ready)

    def end(self, what: str, finish: Callable[[], None] | None = None, keep: Any = None) -> torch.cuda.Event:
        """After everything issued so far, and ``finish``; watched by the name ``what``, keeps ``keep`` until then."""
        self.local.wait_event(self.remote.record_event())
        if finish is not None:
            with torch.cuda.stream(self.local):
                finish()
        done = self.local.record_event()
        _unfinished().append((time.monotonic() + self._timeout_s, done, what, keep))
        return done

    def copy(self, stream: torch.cuda.Stream, copy: Copy, bases: Sequence[int], here: bool) -> None:
        """``here``: within this GPU, by a kernel of few blocks where it can: CUDA's own take all of the GPU."""
        (target, source), (to, by), (to_pitch, by_pitch), rows, width = copy
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


@functools.lru_cache(maxsize=None)
def _unfinished() -> deque:
    """(deadline, event, what it is the end of, what to keep until then) of exchanges, which a thread watches."""
    from cuda.bindings import runtime
    exchanges: deque = deque()

    def watch() -> None:  # its queries must not spoil a CUDA graph that another thread captures
        runtime.cudaThreadExchangeStreamCaptureMode(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        while True:
            look(exchanges)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True, name="moba context parallel watch").start()
    return exchanges


def look(exchanges: deque) -> None:
    """Forgets those that are done; ends the process where one is late, as NCCL would: streams would wait for ever."""
    for _ in range(len(exchanges)):
        deadline, done, what, _ = exchange = exchanges.popleft()
        if done.query():
            continue
        if time.monotonic() > deadline:
            print(f"moba_megatron: {what} was not done in time: another rank failed, hangs or is slower than the "
                  "process group's timeout. This process ends", file=sys.stderr, flush=True)
            os._exit(1)
        exchanges.append(exchange)


class Peers:
    """The ranks of a group, one host's, with their arenas.

    Args:
        arena: this rank's, uint8.
        arenas: addresses of every rank's as this rank sees them; zeros up to :func:`first_slot` at first.
        keep: what the addresses belong to.
    """

    def __init__(self, rank: int, arena: Tensor, arenas: list[int], engines: CopyEngines, keep: Any = None):
        self.arena, self.arenas, self.exchanges, self._engines, self._keep = arena, arenas, 0, engines, keep
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
            engines.copy(engines.remote, copy, bases, True)
        for ready, _ in self._tell.values():
            engines.signal(ready, self.exchanges)
        for copy in plan.own:
            engines.copy(engines.local, copy, bases, True)
        for r, copies in plan.read.items():
            engines.wait(engines.remote, self._hear[r][0], self.exchanges)
            for copy in copies:
                engines.copy(engines.remote, copy, bases, False)
            engines.signal(self._tell[r][1], self.exchanges)
        for _, done in self._hear.values():
            engines.wait(engines.local, done, self.exchanges)
        return engines.end(f"context parallel exchange {what!r}, number {self.exchanges}", finish)

    def attempt(self, rank: int) -> None:
        """Exchange 0, in which nobody waits for another: what this driver, GPU or Triton refuses is refused here."""
        place, self.exchanges = first_slot(len(self.arenas)) - 32, -1
        mine, *others = ([Copy((rank, r), (place, place + 16), (16, 16), 1, 16)] for r in (rank, *self.others))
        self.run(Plan(mine, mine, dict(zip(self.others, others)), 0), self.arenas, None, "attempt", None).synchronize()

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

    def tensors(self, slot: Slot, *kinds: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor] | None:
        """None where the slot has no room for them."""
        made, place = [], self._offset(slot)
        end = place + self._lanes[slot[0]]
        for shape, dtype in kinds:
            begin, nbytes = place, math.prod(shape) * dtype.itemsize
            place += aligned(nbytes)
            if place > end:
                return None
            made.append(self._peers.arena[begin:begin + nbytes].view(dtype).view(shape))
        return made

    def deliver(self, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str, slot: Slot,
                after: torch.cuda.Event | None = None) -> Pending:
        if any(x.dtype != out.dtype or out.shape[0] != self.rows.size for x, out in zip(tensors, outs)):
            return super().deliver(tensors, outs, stage, slot, after)
        return self._exchange(collected, self.rows.runs, tensors, outs, outs, stage, slot, after)

    def _ends(self, views: Sequence[Tensor], rows: Rows, slot: Slot, lasting: bool
              ) -> tuple[Sequence[Tensor], list[Tensor]]:
        views = [x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous() for x in views]
        kinds = [((rows.total, *x.shape[2:]), x.dtype) for x in views]
        outs = None if lasting or views[0].shape[0] > 1 else self.tensors(slot, *kinds)
        return views, outs or [views[0].new_empty(shape, dtype=dtype) for shape, dtype in kinds]

    def _received(self, tensors: Sequence[Tensor], slot: Slot) -> list[Tensor]:
        """Behind the tensors in their slot, where it has room: memory allocated now may be in use at ``after``."""
        shape, sent = (self.rows.size - 1, self.rows.local), [(x.shape, x.dtype) for x in tensors]
        made = self.tensors(slot, *sent, *(((*shape, *x.shape[1:]), x.dtype) for x in tensors))
        return super()._received(tensors, slot) if made is None else made[len(sent):]

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
            plan = peers.plans[key] = self._plan(messages, runs, sources, targets, stage, slot)
        done = peers.run(plan, bases + peers.arenas, after, stage, finish and functools.partial(finish, outs))
        return Pending([done], outs, (sources, targets, outs), stage, sent=plan.sent)

    def _plan(self, messages: ListMessages, runs: Runs, sources: Sequence[Tensor], targets: Sequence[Tensor],
              stage: str, slot: Slot) -> Plan:
        """Copies for messages, which are read where they lie in the slot: sources, targets, or copies of sources."""
        peers, me, tensors, lane = self._peers, self.rows.rank, (*sources, *targets), self._lanes[slot[0]]
        arena, begin, other = peers.arenas[me], self._offset(slot), peers.others[0]
        staged, read, own = {r: [] for r in peers.others}, {r: [] for r in peers.others}, []
        sends, receives = (all(0 <= x.data_ptr() - arena - begin < lane for x in xs) for xs in (sources, targets))
        receives = receives and messages is fetched
        sent = sources if sends or receives else self.tensors(slot, *((x.shape, x.dtype) for x in sources))
        if sent is None:
            raise ValueError(f"{stage} must fit its {lane} bytes, got {sum(x.nbytes for x in sources)}")

        def add(copies: list[Copy], *ends: tuple[Tensor, int]) -> None:
            """``ends``: rows of target and source, each with its tensor's number, or behind these an arena's."""
            bases = [tensors[i].data_ptr() if i < len(tensors) else arena for _, i in ends]
            places = [(i, x.data_ptr() - at, x.stride(0) * x.element_size()) for (x, i), at in zip(ends, bases)]
            copies.append(_in_one(Copy(*zip(*places), len(ends[0][0]), ends[0][0][0].nbytes)))

        # copies of sources lie rank after rank
        order = runs if sends else [range(i * self.rows.local // len(runs), self.rows.total, self.rows.local)
                                    for i in range(len(runs))]
        listed = zip(messages(runs, me, sources, targets), messages(order, me, sent, targets))
        for n, ((outputs, inputs), (_, leaving)) in enumerate(listed):
            source, target = n // len(runs), len(sources) + n // len(runs)
            for r in peers.others:
                if not (sends or receives):
                    add(staged[r], (leaving[r], len(tensors) + me), (inputs[r], source))
                add(read[r], (outputs[r], target), (outputs[r] if receives else leaving[me], len(tensors) + r))
            if outputs[me] is not None:
                add(staged[other] if receives else own, (outputs[me], target), (inputs[me], source))
        read = {r: _joined(copies, apart=True) for r, copies in read.items()}
        return Plan(dict.fromkeys(x for copies in staged.values() for x in _joined(copies)), _joined(own), read,
                    sum(x.rows * x.width for copies in read.values() for x in copies))

    def _offset(self, slot: Slot) -> int:
        return first_slot(self.rows.size) + 2 * sum(self._lanes[:slot[0]]) + slot[1] % 2 * self._lanes[slot[0]]


def _joined(copies: Sequence[Copy], apart: bool = False) -> list[Copy]:
    """Fewer copies: rows that are neighbours at both ends as one; ``apart``: also two that are not neighbours."""
    joined: list[Copy] = []
    for copy in copies:
        last = joined[-1] if joined else copy
        steps = tuple(b - a for a, b in zip(last.offsets, copy.offsets))
        alike = (last.bases, last.width) == (copy.bases, copy.width)
        if alike and last.pitches == copy.pitches and steps == tuple(last.rows * pitch for pitch in last.pitches):
            joined[-1] = _in_one(last._replace(rows=last.rows + copy.rows))
        elif alike and apart and last.rows == copy.rows == 1 and copy.width <= min(steps) and max(steps) < 1 << 31:
            joined[-1] = last._replace(pitches=steps, rows=2)
        else:
            joined.append(copy)
    return joined


def _in_one(copy: Copy) -> Copy:
    """Contiguous rows as one row; CUDA's are below 2 GiB."""
    nbytes = copy.rows * copy.width
    one = copy.pitches == (copy.width, copy.width) and nbytes < 1 << 30
    return copy._replace(pitches=(nbytes, nbytes), rows=1, width=nbytes) if one else copy


def aligned(nbytes: int) -> int:
    """Bytes that a tensor, or messages to all ranks, take in an arena."""
    return -(-nbytes // 512) * 512


def first_slot(size: int) -> int:
    """Bytes of an arena before its slots: the numbers that ranks tell each other, and 32 for the first exchange."""
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
    rank, size, host, problem = dist.get_rank(group), group.size(), "", _choice(group.size())
    for step in (0, 1):
        try:
            if problem is None and step == 0:
                engines = CopyEngines(device, group._get_backend(device).options._timeout.total_seconds())
                arena = new_arena(nbytes, device)
                arena[:first_slot(size)] = 0
                host = socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text()
            elif problem is None:
                arenas, keep = addresses_of_all(arena, group)
                peers = Peers(rank, arena, arenas, engines, keep)
                peers.attempt(rank)
        except Exception as error:  # whatever it is, the others wait to hear of it
            problem = f"{type(error).__name__}: {error}"
        everyone = [None] * size
        dist.all_gather_object(everyone, (problem, host), group)
        problems = [f"rank {r}: {x}" for r, (x, _) in enumerate(everyone) if x]
        if not problems and len(set(everyone)) > 1:
            problems = ["its ranks are on several hosts"]
        if problems:
            if rank == 0 and {x for x, _ in everyone} not in ({OFF}, {NOT_CHOSEN}):
                logging.getLogger(__name__).warning("context parallel group of %d exchanges through its library: %s",
                                                    size, "; ".join(problems))
            return None
    return peers


def _choice(size: int) -> str | None:
    """Why this rank does not want copy engines; None where it does. Never seen on hardware beyond two ranks."""
    value = os.environ.get("MOBA_CP_COPY_ENGINES") or ("1" if size == 2 else "")
    return {"1": None, "0": OFF, "": NOT_CHOSEN}.get(value, f"MOBA_CP_COPY_ENGINES must be 0 or 1, got {value!r}")
