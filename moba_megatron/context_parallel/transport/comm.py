"""Which rows are whose, and how they travel: by the process group's library, with an explicit wait, recorded if wanted.
With meta tensors nothing travels: a schedule run on them compiles what it will launch."""
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

MAX_RUNS = 4
"""Runs of a rank that are exchanged in place, a message each; where there are more, rows are permuted instead."""
Runs = tuple[tuple[int, ...], ...]  # [i][r]: first global row of run i of rank r, all of one length
Slot = tuple[int, int]
"""Memory for an exchange: a lane of those that the transport was made with, and a number that counts up in it."""


@dataclass(frozen=True)
class Rows:
    """The rows of a group's ranks in "global" order (sequence after sequence) and in "rank-major" order."""

    size: int
    rank: int
    global_rows: Tensor  # int64 [S], for each row in global order its row in rank-major order
    rank_rows: Tensor  # int64 [S], the inverse
    runs: Runs | None  # None where the host does not know them, or they are more than MAX_RUNS

    @functools.cached_property
    def total(self) -> int:
        return self.global_rows.numel()

    @functools.cached_property
    def local(self) -> int:
        """Rows of one rank."""
        return self.total // self.size

    @property
    def own_rows(self) -> Tensor:
        """Global rows of this rank, int64 ``[T]``."""
        return self.rank_rows[self.rank * self.local:(self.rank + 1) * self.local]

    @property
    def rank_major(self) -> Runs:
        """As ``runs``, in rank-major order."""
        return tuple(rank * self.local for rank in range(self.size)),

    def own_runs(self) -> list[tuple[slice, slice]]:
        """Rows of each run of this rank: among its own, among all."""
        length = self.local // len(self.runs)
        return [(slice(i * length, (i + 1) * length), slice(firsts[self.rank], firsts[self.rank] + length))
                for i, firsts in enumerate(self.runs)]


def copy_rows(out: Tensor, x: Tensor) -> Tensor:
    """``out[...] = x``, then out, for tensors of one shape and dtype; 16 bytes at a time where both lie so. Slices of
    heads are strided, and torch copies strided tensors element by element."""
    ends = out, x
    if not (out.data_ptr() | x.data_ptr()) % 16:
        try:
            ends = out.view(torch.complex128), x.view(torch.complex128)
        except RuntimeError:  # rows, or the steps between them, are no multiple of 16 bytes: as it is
            pass
    ends[0].copy_(ends[1])
    return out


class WaitRecord:
    """What :func:`record_waits` saw."""

    def __init__(self):
        self._waits: list[tuple[str, Any, Any]] = []
        self._sent: Counter[str] = Counter()

    def summary(self) -> dict[str, dict[str, float]]:
        """By stage: ``calls``, ``exposed_ms`` and ``sent_bytes``, all added up. On CUDA call it after a synchronize.
        ``exposed_ms`` is the time between reaching the waits and passing them, on the compute stream (on CPU tensors
        the host's time); ``sent_bytes`` is what this rank handed to other ranks."""
        stages = {stage: dict(calls=0, exposed_ms=0.0, sent_bytes=sent) for stage, sent in self._sent.items()}
        for stage, before, after in self._waits:
            entry = stages[stage]
            entry["calls"] += 1
            entry["exposed_ms"] += (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)
        return stages

    @contextmanager
    def _waited(self, stage: str, on_cuda: bool) -> Iterator[None]:
        """Around a wait: notes the current stream's time before and after."""
        with torch.profiler.record_function("moba_cp " + stage):
            before = _now(on_cuda)
            yield
            self._waits.append((stage, before, _now(on_cuda)))


_record: WaitRecord | None = None


@contextmanager
def record_waits() -> Iterator[WaitRecord]:
    """Records the waits for collectives of everything inside, forward and backward; not inside CUDA graph capture."""
    global _record
    outer, _record = _record, WaitRecord()
    try:
        yield _record
    finally:
        _record = outer


def _now(on_cuda: bool) -> float | torch.cuda.Event:
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Pending:
    """The result of transfers that were issued and may still be under way. ``works``, ``output``: their handles, and
    what they fill: a tensor, or several; ``keep``: tensors that they read, kept until the wait, after which the current
    stream may reuse their memory; ``stage``: name for :func:`record_waits`; ``finish``: makes the result of the output,
    after the wait, None for the output itself; ``sent``: bytes that this rank hands to other ranks, for the record."""

    def __init__(self, works: Sequence[Any], output: Tensor | Sequence[Tensor], keep: Any, stage: str,
                 finish: Callable[[Any], Any] | None = None, sent: int = 0):
        self._works, self._output, self._keep, self._stage, self._finish = works, output, keep, stage, finish
        if _record is not None:
            _record._sent[stage] += sent

    def wait(self) -> Any:
        """The result, once: this then holds nothing any more. On CUDA the current stream waits, not the host."""
        first = self._output if isinstance(self._output, Tensor) else self._output[0]
        with nullcontext() if _record is None else _record._waited(self._stage, first.is_cuda):
            for work in self._works:
                work.wait()
        output, finish = self._output, self._finish
        self._works = self._output = self._keep = self._finish = None
        return output if finish is None else finish(output)


def arrived(pendings: Sequence[Pending]) -> list[Tensor]:
    """Their tensors, when they are here."""
    results = []
    for pending in pendings:
        result = pending.wait()
        results += [result] if isinstance(result, Tensor) else result or ()
    return results


def crowds_the_network(group: dist.ProcessGroup) -> bool:
    """Whether sending to each member on its own would carry the same bytes between nodes several times."""
    return torch.cuda.is_available() and 1 < members_a_node(group) < group.size()


_members: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def members_a_node(group: dist.ProcessGroup) -> int:
    """Ranks of the group on the fullest node."""
    if group not in _members:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
        _members[group] = max(Counter(rank // per_node for rank in dist.get_process_group_ranks(group)).values())
    return _members[group]


def all_gather(x: Tensor, group: dist.ProcessGroup, stage: str = "gather") -> Pending:
    """Starts to gather ``[T, ...]`` from every rank; pending ``[P * T, ...]``, rank after rank."""
    x = x.contiguous()
    output = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    works = [] if x.is_meta else [dist.all_gather_into_tensor(output, x, group=group, async_op=True)]
    return Pending(works, output, x, stage, sent=(group.size() - 1) * x.nbytes)


def reduce_scatter(x: Tensor, out: Tensor, group: dist.ProcessGroup, stage: str) -> Pending:
    """Starts to add ``[P * T, ...]`` over the ranks; the wait writes this rank's part to ``out`` ``[T, ...]``."""
    x = x.contiguous()
    output = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    works = [] if x.is_meta else [dist.reduce_scatter_tensor(output, x, group=group, async_op=True)]
    return Pending(works, output, x, stage, out.copy_, (group.size() - 1) * output.nbytes)


Messages = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
"""What comes from each rank, and what goes to it; None for own rows that stay, and where nothing travels."""
ListMessages = Callable[[Runs, int, Sequence[Tensor], Sequence[Tensor]], Iterable[Messages]]
"""Of runs, this rank, what is sent from and what is received in: views ``[rows, h, D]`` of these, of one shape; as
many, in order, of each tensor."""
Arrived = tuple[Tensor, list[tuple[slice, Tensor]]]
"""Rows that reached this rank: ``[P - 1, T, h, D]``, from the others in order; and its own, one run or several: (rows
of T, ``[rows, h, D]``)."""


def exchange(rounds: Iterable[Messages], output: Tensor | Sequence[Tensor], keep: Any, group: dist.ProcessGroup,
             stage: str, finish: Callable[[Any], Any] | None = None) -> Pending:
    """Starts exchanges as one, for which NCCL launches a single kernel; pending, as of :class:`Pending`. Messages are
    contiguous; what a rank has for itself, which need not be, is copied at once. What all get is sent from its place
    here. Every rank of the group must call this."""
    peers, me, messages, sent = dist.get_process_group_ranks(group), dist.get_rank(group), [], 0
    for outputs, inputs in rounds:
        own, here = inputs[me], outputs[me]
        if here is not None:
            copy_rows(here, own)
        for rank, (received, message) in enumerate(zip(outputs, inputs)):
            if rank != me and message is not None and message.numel():
                sent += message.nbytes
                messages.append(dist.P2POp(dist.isend, here if message is own else message, peers[rank], group))
            if rank != me and received is not None and received.numel():
                messages.append(dist.P2POp(dist.irecv, received, peers[rank], group))
    works = dist.batch_isend_irecv(messages) if messages and not messages[0].tensor.is_meta else []
    return Pending(works, output, keep, stage, finish, sent)


@dataclass(eq=False)
class Library:
    """Rows that travel among a group's ranks by its own library (NCCL, gloo). Where a rank's rows are a few runs whose
    places the host knows (one long sequence), messages are received and sent in place: nothing is permuted. Otherwise
    messages are whole ranks' rows, permuted by an index before or after."""

    rows: Rows
    group: dist.ProcessGroup
    early = False  # whether copy engines carry what travels, and `deliver` can begin at an event

    def fetch(self, views: Sequence[Tensor], stage: str, slot: Slot, *, rows: Rows | None = None,
              lasting: bool = True) -> Pending:
        """Starts to collect what every rank has for this one; pending, for each view a ``[S, h, D]`` in global order.
        ``views``: each ``[parts, T, h, D]``, any strides; a part for each rank, or for several neighbours, or for all.
        ``slot``: used by nothing that is still under way; ``rows``: of the views, None for the transport's;
        ``lasting``: False where the results, of what all get, are not used any more when the slot is used again."""
        rows = rows or self.rows
        to_all = views[0].shape[0] == 1
        permuted = rows.runs is None or to_all and crowds_the_network(self.group)
        finish = (lambda outs: [x.index_select(0, rows.global_rows) for x in outs]) if permuted else None
        if to_all and permuted:
            gathered = [all_gather(x[0], self.group, stage) for x in views]
            works, outs = [work for x in gathered for work in x._works], [x._output for x in gathered]
            return Pending(works, outs, gathered, stage, finish)
        runs = rows.rank_major if permuted else rows.runs
        memory = to_all and self.early and not lasting and self.tensors(
            slot, *[((rows.total, *x.shape[2:]), x.dtype) for x in views])
        outs = memory or [x.new_empty(rows.total, *x.shape[2:]) for x in views]
        if not (to_all or self.early):
            views = [copy_rows(torch.empty(x.shape, dtype=x.dtype, device=x.device), x) for x in views]
        return self._exchange(fetched, runs, views, outs, outs, stage, slot, finish=finish)

    @staticmethod
    def event() -> torch.cuda.Event:
        """To be recorded on the current stream, for :meth:`deliver`."""
        return torch.cuda.Event()

    def tensors(self, slot: Slot, *kinds: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor] | None:
        """Memory of such tensors in a slot, None without room: :meth:`deliver` and :meth:`reduce` send what is there
        without a copy, and the latter receives behind."""

    def deliver(self, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str, slot: Slot,
                after: torch.cuda.Event | None = None) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]``; they are in ``outs`` ``[parts, T, h, D]`` then.
        What several ranks computed for a part is added. ``after``: recorded when the tensors are complete, where the
        transport is ``early``; None: they are now."""
        if self.early and all(x.dtype == out.dtype and out.shape[0] == self.rows.size for x, out in zip(tensors, outs)):
            return self._exchange(collected, self.rows.runs, tensors, outs, outs, stage, slot, after)
        return self._collect(tensors, outs, stage, slot, lambda arrived: put(arrived, outs, self.rows), after)

    def reduce(self, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str, slot: Slot,
               deterministic: bool, after: torch.cuda.Event | None = None) -> list[Pending]:
        """Starts to add each ``[S, h, D]`` over the ranks; this rank's rows are in its out ``[T, h, D]`` then. The
        others' rows are added in a fixed order and the rank's own last, in their own dtype, and rounded once to out's;
        where it saves traffic between nodes, and not if ``deterministic``, the library adds in any order. ``after``: as
        of :meth:`deliver`."""
        if crowds_the_network(self.group) and not deterministic:
            return [reduce_scatter(x.index_select(0, self.rows.rank_rows), out, self.group, stage)
                    for x, out in zip(tensors, outs)]
        return [self._collect(tensors, outs, stage, slot, lambda arrived: add(arrived, outs), after)]

    def _collect(self, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str, slot: Slot,
                 finish: Callable[[list[Arrived]], None], after: torch.cuda.Event | None = None) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]``; then ``finish`` fills ``outs``."""
        rows, runs = self.rows, self.rows.runs or self.rows.rank_major
        if rows.runs is None:
            tensors = [x.index_select(0, rows.rank_rows) for x in tensors]
        shapes = [(rows.size - 1, rows.local, *x.shape[1:]) for x in tensors]
        # behind what is sent, where there is room: memory allocated now may be in use at ``after``
        made = self.tensors(slot, *((x.shape, x.dtype) for x in tensors), *zip(shapes, (x.dtype for x in tensors)))
        others = made[len(tensors):] if made else [x.new_empty(shape) for x, shape in zip(tensors, shapes)]
        length, arriving = rows.local // len(runs), []
        for x, received in zip(tensors, others):
            own = [(slice(i * length, (i + 1) * length), x[firsts[rows.rank]:][:length])
                   for i, firsts in enumerate(runs)]
            arriving.append((received, own))
        return self._exchange(collected, runs, tensors, others, outs, stage, slot, after, lambda _: finish(arriving))

    def _exchange(self, messages: ListMessages, runs: Runs, sources: Sequence[Tensor], targets: Sequence[Tensor],
                  outs: Sequence[Tensor], stage: str, slot: Slot, after: torch.cuda.Event | None = None,
                  finish: Callable[[Sequence[Tensor]], Any] | None = None) -> Pending:
        """Starts to send messages, and copies the rank's own; pending, ``outs`` or what ``finish`` makes of them."""
        rounds = messages(runs, self.rows.rank, sources, targets)
        return exchange(rounds, outs, (sources, targets), self.group, stage, finish)


def fetched(runs: Runs, me: int, views: Sequence[Tensor], outs: Sequence[Tensor]) -> Iterator[Messages]:
    """From each ``[parts, T, h, D]`` a part to each rank; into ``[S, h, D]``."""
    for x, out in zip(views, outs):
        length, size = x.shape[1] // len(runs), len(runs[0])
        for i, firsts in enumerate(runs):
            parts, outputs, inputs = x[:, i * length:(i + 1) * length].unbind(), [], []
            for rank, first in enumerate(firsts):
                outputs.append(out[first:first + length])
                inputs.append(parts[rank * len(parts) // size])
            yield outputs, inputs


def collected(runs: Runs, me: int, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[Messages]:
    """From each ``[S, h, D]`` its rows to each rank; into ``[P, T, h, D]``, or ``[P - 1, T, h, D]`` without its own."""
    for x, received in zip(tensors, others):
        length = received.shape[1] // len(runs)
        for i, firsts in enumerate(runs):
            came = list(received[:, i * length:(i + 1) * length])
            if len(came) < len(firsts):
                came.insert(me, None)
            yield came, [x[first:first + length] for first in firsts]


def put(arrived: Sequence[Arrived], outs: Sequence[Tensor], rows: Rows) -> None:
    """Puts rows into each ``[parts, T, h, D]``; what several ranks computed for a part is added."""
    me, size = rows.rank, rows.size
    for (others, own), out in zip(arrived, outs):
        parts = out.shape[0]
        if parts == size:
            copy_rows(out[:me], others[:me])
            copy_rows(out[me + 1:], others[me:])
            for part, mine in own:
                copy_rows(out[me, part], mine)
            continue
        for part, mine in own:
            by_rank, copies = [*others[:me, part], mine, *others[me:, part]], size // parts
            for i in range(parts):
                *first, last = by_rank[i * copies:(i + 1) * copies]
                torch.add(functools.reduce(torch.add, first), last, out=out[i, part])


def add(arrived: Sequence[Arrived], outs: Sequence[Tensor]) -> None:
    """Adds the ranks' rows into each ``[T, h, D]``."""
    for (others, own), out in zip(arrived, outs):
        for part, mine in own:
            torch.add(others[0, part] if len(others) == 1 else others[:, part].sum(0), mine, out=out[part])


met: WeakKeyDictionary[dist.ProcessGroup, Any] = WeakKeyDictionary()
"""A group's :class:`.symmetric_memory.Peers`, None where its library moves rows."""


def abandon(group: dist.ProcessGroup) -> bool:
    """Gives up the arenas of all groups within this one: exchanges may be incomplete. Whether there were any."""
    ranks = set(dist.get_process_group_ranks(group)) if met else set()
    within = [each for each, peers in met.items() if peers and ranks.issuperset(dist.get_process_group_ranks(each))]
    for each in within:
        met.pop(each).give_up()
    return bool(within)
