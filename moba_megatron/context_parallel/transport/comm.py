"""Rows that travel by the process group's library, with an explicit wait, and a record of how long streams stood still.

With meta tensors nothing travels: a schedule run on them compiles what it will launch.
"""
from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import Rows, copy_rows

Slot = tuple[int, int]
"""Memory for an exchange: a lane of those given to :func:`.choice.transport_for`, and a number that counts up in it."""


class WaitRecord:
    """What :func:`record_waits` saw."""

    def __init__(self):
        self._waits: list[tuple[str, Any, Any]] = []
        self._sent: dict[str, int] = {}

    def summary(self) -> dict[str, dict[str, float]]:
        """By stage: ``calls``, ``exposed_ms`` and ``sent_bytes``, all added up. On CUDA call it after a synchronize.

        ``exposed_ms`` is the time between reaching the waits and passing them, on the compute stream (on CPU tensors
        the host's time); ``sent_bytes`` is what this rank handed to other ranks.
        """
        stages = {stage: dict(calls=0, exposed_ms=0.0, sent_bytes=sent) for stage, sent in self._sent.items()}
        for stage, before, after in self._waits:
            entry = stages[stage]
            entry["calls"] += 1
            entry["exposed_ms"] += (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)
        return stages

    def sent(self, stage: str, size: int) -> None:
        self._sent[stage] = self._sent.get(stage, 0) + size

    @contextmanager
    def waited(self, stage: str, on_cuda: bool) -> Iterator[None]:
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
    """The result of transfers that were issued and may still be under way.

    Args:
        works, output: their handles, and what they fill: a tensor, or several.
        keep: tensors that they read; kept until the wait, after which the current stream may reuse their memory.
        stage: name for :func:`record_waits`.
        finish: makes the result of the output, after the wait; None for the output itself.
    """

    def __init__(self, works: Sequence[Any], output: Tensor | Sequence[Tensor], keep: Any, stage: str,
                 finish: Callable[[Any], Any] | None = None):
        self._works, self._output, self._keep, self._stage, self._finish = works, output, keep, stage, finish

    def wait(self) -> Any:
        """The result, once: this then holds nothing any more. On CUDA the current stream waits, not the host."""
        first = self._output if isinstance(self._output, Tensor) else self._output[0]
        with nullcontext() if _record is None else _record.waited(self._stage, first.is_cuda):
            for work in self._works:
                work.wait()
        output, finish = self._output, self._finish
        self._works = self._output = self._keep = self._finish = None
        return output if finish is None else finish(output)


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


def count_sent(stage: str, size: int) -> None:
    """Adds bytes that this rank hands to other ranks to the record, if there is one."""
    if _record is not None:
        _record.sent(stage, size)


def all_gather(x: Tensor, group: dist.ProcessGroup, stage: str = "gather") -> Pending:
    """Starts to gather ``[T, ...]`` from every rank; pending ``[P * T, ...]``, rank after rank."""
    x = x.contiguous()
    output = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    count_sent(stage, (group.size() - 1) * x.nbytes)
    works = [] if x.is_meta else [dist.all_gather_into_tensor(output, x, group=group, async_op=True)]
    return Pending(works, output, x, stage)


def reduce_scatter(x: Tensor, out: Tensor, group: dist.ProcessGroup, stage: str) -> Pending:
    """Starts to add ``[P * T, ...]`` over the ranks; the wait writes this rank's part to ``out`` ``[T, ...]``."""
    x = x.contiguous()
    output = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    count_sent(stage, (group.size() - 1) * output.nbytes)
    works = [] if x.is_meta else [dist.reduce_scatter_tensor(output, x, group=group, async_op=True)]
    return Pending(works, output, x, stage, out.copy_)


def exchange(rounds: Sequence[tuple[list[Tensor | None], list[Tensor | None]]], device: torch.device,
             group: dist.ProcessGroup, stage: str) -> list:
    """Starts exchanges (outputs, inputs) as one, for which NCCL launches a single kernel; handles for :class:`Pending`.

    ``inputs[r]`` goes to each rank r, ``outputs[r]`` is received from it: contiguous, None where nothing travels. Every
    rank of the group must call this.
    """
    count_sent(stage, sum(x.nbytes for _, inputs in rounds for x in inputs if x is not None))
    if device.type == "meta":
        return []
    peers, messages = dist.get_process_group_ranks(group), []
    for outputs, inputs in rounds:
        for rank, (output, message) in enumerate(zip(outputs, inputs)):
            messages += [dist.P2POp(how, x, peers[rank], group) for how, x in
                         ((dist.isend, message), (dist.irecv, output)) if x is not None and x.numel()]
    return dist.batch_isend_irecv(messages) if messages else []


class Arrived(NamedTuple):
    """What reached this rank: its rows as every rank computed them."""

    others: Tensor  # [P - 1, T, h, D], from the other ranks in order
    own: list[tuple[slice, Tensor]]  # (rows of T, this rank's own [rows, h, D]), one or several


Messages = tuple[Sequence[Tensor | None], Sequence[Tensor]]
"""What comes from each rank, and what goes to it: ``[rows, h, D]``, of one shape; None for own rows that stay."""
Runs = tuple[tuple[int, ...], ...]
"""As :attr:`.rows.Rows.runs`."""
ListMessages = Callable[[Runs, int, Sequence[Tensor], Sequence[Tensor]], Iterable[Messages]]
"""Of runs, this rank, what is sent from and what is received in: views of these; as many, in order, of each tensor."""


class Library:
    """Rows that travel among a group's ranks by its own library (NCCL, gloo).

    Where a rank's rows are a few runs whose places the host knows (one long sequence), messages are received and sent
    in place: nothing is permuted. Otherwise messages are whole ranks' rows, permuted by an index before or after.
    """

    early = False
    """Whether copy engines carry what travels, and :meth:`deliver` can begin at an event."""

    def __init__(self, rows: Rows, group: dist.ProcessGroup):
        self.rows, self.group = rows, group

    def fetch(self, views: Sequence[Tensor], stage: str, slot: Slot, *, rows: Rows | None = None,
              lasting: bool = True) -> Pending:
        """Starts to collect what every rank has for this one; pending, for each view a ``[S, h, D]`` in global order.

        Args:
            views: each ``[parts, T, h, D]``, any strides; a part for each rank, or for several neighbours, or for all.
            slot: used by nothing that is still under way.
            rows: of the views; None for the transport's.
            lasting: False where the results, of what all get, are not used any more when the slot is used again.
        """
        rows = rows or self.rows
        to_all = views[0].shape[0] == 1
        permuted = rows.runs is None or to_all and crowds_the_network(self.group)
        finish = (lambda outs: [x.index_select(0, rows.global_rows) for x in outs]) if permuted else None
        if to_all and permuted:
            gathered = [all_gather(x[0], self.group, stage) for x in views]
            works, outs = [work for x in gathered for work in x._works], [x._output for x in gathered]
            return Pending(works, outs, gathered, stage, finish)
        runs = rows.rank_major if permuted else rows.runs
        views = list(map(self._sendable, views))
        outs = self._wholes(views, rows, slot, lasting)
        return self._exchange(fetched, runs, views, outs, outs, stage, slot, finish=finish)

    @staticmethod
    def event() -> torch.cuda.Event:
        """To be recorded on the current stream, for :meth:`deliver`."""
        return torch.cuda.Event()

    def tensors(self, slot: Slot, *kinds: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor] | None:
        """Tensors of such shapes and dtypes for :meth:`deliver` to send without a copy in between, if there are any, or
        all of them for :meth:`reduce`, which receives behind them."""

    def deliver(self, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str, slot: Slot,
                after: torch.cuda.Event | None = None) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]``; they are in ``outs`` ``[parts, T, h, D]`` then.

        What several ranks computed for a part is added. ``after``: recorded when the tensors are complete, where the
        transport is ``early``; None: they are now.
        """
        return self._collect(tensors, outs, stage, slot, lambda arrived: put(arrived, outs, self.rows), after)

    def reduce(self, tensors: Sequence[Tensor], outs: Sequence[Tensor], stage: str, slot: Slot,
               deterministic: bool, after: torch.cuda.Event | None = None) -> list[Pending]:
        """Starts to add each ``[S, h, D]`` over the ranks; this rank's rows are in its out ``[T, h, D]`` then.

        The others' rows are added in a fixed order and the rank's own last, in their own dtype, and rounded once to
        out's; where it saves traffic between nodes, and not if ``deterministic``, the library adds in any order.
        ``after``: as of :meth:`deliver`.
        """
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
        others = self._received(tensors, slot)
        arriving = [arrived_at(rows, runs, x, y) for x, y in zip(tensors, others)]
        return self._exchange(collected, runs, tensors, others, outs, stage, slot, after, lambda _: finish(arriving))

    def _sendable(self, x: Tensor) -> Tensor:
        """``[parts, T, h, D]``: x, or a copy whose rows can be sent. What all get is sent from its place here."""
        return x if x.shape[0] == 1 else copy_rows(torch.empty(x.shape, dtype=x.dtype, device=x.device), x)

    def _wholes(self, views: Sequence[Tensor], rows: Rows, slot: Slot, lasting: bool) -> list[Tensor]:
        return [x.new_empty(rows.total, *x.shape[2:]) for x in views]

    def _received(self, tensors: Sequence[Tensor], slot: Slot) -> list[Tensor]:
        """Memory for others' rows of each ``[S, h, D]``: ``[P - 1, T, h, D]``."""
        return [x.new_empty(self.rows.size - 1, self.rows.local, *x.shape[1:]) for x in tensors]

    def _exchange(self, messages: ListMessages, runs: Runs, sources: Sequence[Tensor], targets: Sequence[Tensor],
                  outs: Sequence[Tensor], stage: str, slot: Slot, after: torch.cuda.Event | None = None,
                  finish: Callable[[Sequence[Tensor]], Any] | None = None) -> Pending:
        """Starts to send messages, and copies the rank's own; pending, ``outs`` or what ``finish`` makes of them."""
        me, rounds = self.rows.rank, []
        for outputs, inputs in messages(runs, me, sources, targets):
            if outputs[me] is not None:
                copy_rows(outputs[me], inputs[me])
            sent = [outputs[me] if x is inputs[me] else x for x in inputs]
            rounds.append(([*outputs[:me], None, *outputs[me + 1:]], [*sent[:me], None, *sent[me + 1:]]))
        works = exchange(rounds, outs[0].device, self.group, stage)
        return Pending(works, outs, (sources, targets, rounds), stage, finish)


def fetched(runs: Runs, me: int, views: Sequence[Tensor], outs: Sequence[Tensor]) -> Iterator[Messages]:
    """From each ``[parts, T, h, D]`` a part to each rank; into ``[S, h, D]``."""
    for x, out in zip(views, outs):
        length, size = x.shape[1] // len(runs), len(runs[0])
        for i, firsts in enumerate(runs):
            sent = x[:, i * length:(i + 1) * length].unbind()
            yield [out[first:first + length] for first in firsts], [sent[r * len(sent) // size] for r in range(size)]


def collected(runs: Runs, me: int, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[Messages]:
    """From each ``[S, h, D]`` its rows to each other rank; into ``[P - 1, T, h, D]``."""
    for x, received in zip(tensors, others):
        length = received.shape[1] // len(runs)
        for i, firsts in enumerate(runs):
            came = list(received[:, i * length:(i + 1) * length])
            yield [*came[:me], None, *came[me:]], [x[first:first + length] for first in firsts]


def arrived_at(rows: Rows, runs, whole: Tensor, others: Tensor) -> Arrived:
    """Of ``[S, h, D]`` this rank's own rows, beside the others' ``[P - 1, T, h, D]``."""
    length = rows.local // len(runs)
    return Arrived(others, [(slice(i * length, (i + 1) * length), whole[firsts[rows.rank]:][:length])
                            for i, firsts in enumerate(runs)])


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
