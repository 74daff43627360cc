"""Collectives with an explicit wait, and a record of how long the compute stream stood still for them.

With meta tensors nothing travels: a schedule run on them compiles what it will launch.
"""
from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor


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
    """The result of collectives that were issued and may still be under way.

    Args:
        works, output: their handles, and what they fill.
        keep: tensors that they read; kept until the wait, after which the current stream may reuse their memory.
        stage: name for :func:`record_waits`.
        finish: makes the result of the output, after the wait; None for the output itself.
    """

    def __init__(self, works: Sequence[Any], output: Tensor, keep: Any, stage: str,
                 finish: Callable[[Tensor], Any] | None = None):
        self._works, self._output, self._keep, self._stage, self._finish = works, output, keep, stage, finish

    def wait(self) -> Any:
        """The result, once: this then holds nothing any more. On CUDA the current stream waits, not the host."""
        with nullcontext() if _record is None else _record.waited(self._stage, self._output.is_cuda):
            for work in self._works:
                work.wait()
        output, finish = self._output, self._finish
        self._works = self._output = self._keep = self._finish = None
        return output if finish is None else finish(output)

    def then(self, function: Callable[[Any], Any]) -> "Pending":
        """This, with one more function that makes its result."""
        finish = self._finish
        self._finish = function if finish is None else lambda output: function(finish(output))
        return self


def wait_for(pendings: Sequence[Pending]) -> None:
    """The results are not asked for."""
    for pending in pendings:
        pending.wait()


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


def all_gather(x: Tensor, group: dist.ProcessGroup, stage: str = "gather",
               finish: Callable[[Tensor], Any] | None = None) -> Pending:
    """Starts to gather ``[T, ...]`` from every rank; pending ``[P * T, ...]``, rank after rank."""
    x = x.contiguous()
    output = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    count_sent(stage, (group.size() - 1) * x.nbytes)
    works = [] if x.is_meta else [dist.all_gather_into_tensor(output, x, group=group, async_op=True)]
    return Pending(works, output, x, stage, finish)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, stage: str,
                   finish: Callable[[Tensor], Any] | None = None) -> Pending:
    """Starts to add ``[P * T, ...]`` over the ranks and to give each rank its part, pending ``[T, ...]``."""
    x = x.contiguous()
    output = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    count_sent(stage, (group.size() - 1) * output.nbytes)
    works = [] if x.is_meta else [dist.reduce_scatter_tensor(output, x, group=group, async_op=True)]
    return Pending(works, output, x, stage, finish)


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
