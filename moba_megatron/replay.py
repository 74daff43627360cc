"""Choices that routers made: recorded on the host, saved, and given to another run in the routers' place."""
import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import _CheckpointFrame

from .config import MoBAConfig
from .ops import select_for_segments
from .ops.validation import check_tensor
from .segments import Segments
from .tensor_cache import is_capturing


@dataclass(frozen=True)
class LayerSelection:
    """What one call of a layer chose."""

    # int16 or int32 `[T, H or HK, topk - 1]` on the CPU: earlier chunks, numbered within the query's sequence; -1 none
    numbers: Tensor
    chunk_size: int
    topk: int
    causal: bool  # every earlier chunk was chosen, and the layer attended causally
    groups: bool  # lists are of groups of query heads


@dataclass
class RecordedSelection:
    """What :func:`record_selection` records and :func:`replay_selection` replays. ``layers``: for each layer, by its
    1-based number, global under pipeline parallelism, what its calls chose, in their order: one a micro batch, or one a
    step of a generation. Layers and calls that attended densely have no entry."""

    layers: dict[int, list[LayerSelection]] = field(default_factory=dict)

    def save(self, path: str | PathLike) -> None:
        """Writes an .npz file, without pickles; one that is there stays until the new one is whole."""
        n = sum(map(len, self.layers.values()))
        with open(f"{os.fspath(path)}.part", "wb") as file:
            np.savez(file, **{f"{layer}.{i}.{x.chunk_size}.{x.topk}.{x.causal:d}.{x.groups:d}.{n}": x.numbers.numpy()
                              for layer, calls in self.layers.items() for i, x in enumerate(calls)})
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: str | PathLike) -> "RecordedSelection":
        """Reads what :meth:`save` wrote; ValueError for another file."""
        recorded = cls()
        with open(path, "rb") as opened:
            try:
                file = np.load(opened, allow_pickle=False)
                for layer, i, size, topk, causal, groups, n, x in sorted((*map(int, x.split(".")), x) for x in file):
                    calls, numbers = recorded.layers.setdefault(layer, []), file[x]
                    if str(numbers.dtype) not in ("int16", "int32") or numbers.ndim != 3 or (i, n) != (
                            len(calls), len(file)):
                        raise ValueError(f"{numbers.dtype} {numbers.shape} as {x!r}, of {len(file)} calls")
                    calls.append(LayerSelection(torch.from_numpy(numbers), size, topk, bool(causal), bool(groups)))
            except Exception as error:  # a damaged archive raises anything
                raise ValueError(f"path must be what RecordedSelection.save wrote, got {path}: {error}") from None
        return recorded

    def joined(self, batch: int = 1) -> "RecordedSelection":
        """A layer's calls as one, for a forward over a prompt and the new tokens after it; ``batch``: sequences, none a
        beam, which changes places. ValueError where a call's rows are not of so many."""
        joined, rows = RecordedSelection(), [len(call.numbers) for calls in self.layers.values() for call in calls]
        if batch not in range(1, 1 << 31) or any(n % batch for n in rows):
            raise ValueError(f"batch must be the number of sequences in each call, of {set(rows)} rows, got {batch!r}")
        for layer, calls in self.layers.items():
            numbers = torch.cat([call.numbers.unflatten(0, (batch, -1)) for call in calls], 1).flatten(0, 1)
            joined.layers[layer] = [replace(calls[-1], numbers=numbers)]
        return joined


class _Run:
    """A recording or a replay: counts the calls of each layer."""

    def __init__(self, recorded: RecordedSelection):
        self.recorded, self.calls, self.is_over, self.thread = recorded, Counter(), False, threading.get_ident()

    def call(self, layer: int) -> tuple[int, bool]:
        """The number of the layer's call, and whether it runs again: a backward pass recomputes it. Checkpoints, which
        are among the callers of both runs, keep the numbers of their calls, in order."""
        task, number = torch._C._current_graph_task_id(), self.calls[layer]
        known = [(vars(x).setdefault("moba_calls", {}), reruns) for x, reruns in _checkpoints()]
        if again := task != -1:
            numbers, place = next((x[self, layer] for x, reruns in known if reruns and (self, layer) in x), ((), {}))
            at = place.get(task, 0)  # each backward pass begins anew
            place[task] = at + 1
            number = numbers[at] if at < len(numbers) else None
        if number is None:
            raise RuntimeError(f"layer {layer} runs in a backward pass, but not in it the first time: record_selection "
                               "and replay_selection must surround forward and backward, and know the checkpoints of "
                               "torch, Megatron and Transformer Engine alone")
        self.calls[layer] += not again
        for x, reruns in known:
            if not reruns:
                x.setdefault((self, layer), ([], {}))[0].append(number)
        return number, again


def _checkpoints() -> Iterator[tuple[Any, bool]]:
    """The checkpoints that this thread is in, the innermost first: for each an object that is the same when it runs
    again, the node of a reentrant one and PyTorch's frame of others; and whether it runs again."""
    frame = sys._getframe(2)
    while frame is not None:
        seen = frame.f_locals
        inner = getattr(getattr(seen.get("gen"), "gi_frame", None), "f_locals", {})
        for x, reruns in ((seen.get("ctx"), frame.f_code.co_name == "backward"), (seen.get("frame"), True),
                          (inner.get("new_frame"), False)):
            if isinstance(x, (torch.autograd.function.FunctionCtx, _CheckpointFrame)):
                yield x, reruns
        frame = frame.f_back


in_use = False  # whether this process has recorded or replayed anything
_recording: _Run | None = None
_replays: list[_Run] = []


@contextlib.contextmanager
def record_selection() -> Iterator[RecordedSelection]:
    """Records what every MoBA layer chooses inside the block, in Megatron-Core and in Transformers. Each rank records
    its own queries, heads and layers; what a backward pass recomputes is recorded once. No bit of the run changes.
    Under context parallelism keys are gathered once more; nothing waits for a GPU before the block's end. New tokens of
    a generation are recorded where they choose (``decode="moba"``). RuntimeError inside another recording, or in a CUDA
    graph."""
    global _recording, in_use
    if _recording is not None:
        raise RuntimeError("record_selection is not for use inside of another record_selection")
    _recording, in_use = _Run(RecordedSelection()), True
    try:
        yield _recording.recorded
    finally:
        _recording = None
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies to the host


@contextlib.contextmanager
def replay_selection(choices: RecordedSelection) -> Iterator[None]:
    """Has every MoBA layer attend to recorded choices inside the block, which takes in the backward passes.

    What the same layout recorded gives the same bits. Under tensor, pipeline and context parallelism a rank takes its
    layers, heads and rows of what one process recorded. Of blocks within each other the last one entered counts.

    Raises:
        TypeError: choices is something else.
        RuntimeError: another thread is in such a block, which is the process's.
        ValueError: in the block, where a layer's call was not recorded, or with another chunk size, topk, number of
            tokens or heads; at its end, where one was not replayed (among several ranks: of a layer that was called).
    """
    global in_use
    if not isinstance(choices, RecordedSelection):
        raise TypeError(f"choices must be a RecordedSelection, got {type(choices).__name__}")
    run, in_use = _Run(choices), True
    if _replays and _replays[-1].thread != run.thread:
        raise RuntimeError("replay_selection is under way in another thread: it is the process's")
    _replays.append(run)
    try:
        yield
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        for layer, calls in choices.layers.items():
            if (number := run.calls[layer]) < len(calls) and (number or alone or not run.calls.total()):
                raise ValueError(f"replay_selection: layer {layer} was recorded in {len(calls)} calls, and replayed in "
                                 f"{number}")
    finally:
        _replays.remove(run)
        run.is_over = True


def is_active() -> bool:
    """Whether a recording or a replay is under way; RuntimeError in a backward pass of a replay that is over."""
    if in_use and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1 and any(
            run.is_over for x, _ in _checkpoints() for run, _ in vars(x).get("moba_calls", ())):
        raise RuntimeError("replay_selection must surround the backward passes that recompute what ran in it")
    return _recording is not None or bool(_replays)


def refuse_new_tokens(dense: bool) -> None:
    """Raises ValueError for a single new token over a cache, where it attends densely while others are recorded, or
    would need the kernels of decoding for a replay."""
    if _recording is not None if dense else _replays:
        raise ValueError("decode must be moba for record_selection, got dense: new tokens would choose nothing" if dense
                         else "replay_selection is not for single new tokens over a cache: join its calls, by joined()")


@torch.compiler.disable
def replayed(layer: int, q: Tensor, k: Tensor, segments: Segments, moba: MoBAConfig, part: tuple[int, int] = (1, 0),
             rows: Any = None, by_gate: bool = True) -> tuple[Tensor, bool] | None:
    """What was recorded of a layer's call, int32 ids ``[T, H or HK, n]``, and whether that was everything; None without
    a replay. ValueError where it does not fit this run. ``part``: tensor parallel size, and rank in it; ``rows``: the
    context parallel rank's among all; ``by_gate``: lists are of heads or groups as the config says."""
    if not _replays:
        return None
    (number, _), calls = _replays[-1].call(layer), _replays[-1].recorded.layers.get(layer, ())
    where = f"replay_selection: call {number + 1} of layer {layer}"
    if number >= len(calls):
        raise ValueError(f"{where} was not recorded, its record has {len(calls)} calls")
    call = calls[number]
    for name in ("chunk_size", "topk"):
        if getattr(call, name) != getattr(moba, name):
            raise ValueError(f"{where} was recorded with {name} {getattr(call, name)}, got {getattr(moba, name)}")
    (tokens, heads, _), total = call.numbers.shape, q.shape[0]
    lists = (k if (moba.selection == "group" if by_gate else call.groups) else q).shape[1]
    if heads not in (lists, lists * part[0]) or tokens not in (total, total if rows is None else rows.total):
        raise ValueError(f"{where} was recorded for {tokens} tokens and {heads} heads, got {total} and {lists} here")
    numbers = call.numbers if heads == lists else call.numbers[:, part[1] * lists:][:, :lists]
    numbers = numbers.to(q.device, non_blocking=True).int()
    if tokens > total:
        numbers = numbers[rows.own_rows]
    return torch.where(numbers < 0, -1, numbers + _first_chunks(segments, total)), call.causal


def choose(layer: int, q: Tensor, k: Callable[[], Tensor], segments: Segments, moba: MoBAConfig,
           given: tuple[Tensor, bool] | None, select: Callable[[], Tensor] | None = None) -> Tensor | None:
    """The chunks that a layer's queries attend to, int32 ids ``[T, H or HK, n]``, or None for all: attention is causal
    then, as the operator's. ``given``: of :func:`replayed`; ``select``: chooses in place of MoBA's gate."""
    everything = select is None and segments.max_seqlen_k <= moba.topk * segments.chunk_size
    if given is None:
        given = select() if select else select_for_segments(q, k(), segments, moba.topk, shared=moba.selection,
                                                            backend=moba.backend), everything
        check_tensor("what the selector returns", given[0], 3, (torch.int32,))  # None would be MoBA's gate
    selected, causal = given
    if len(selected) != len(q):
        raise ValueError(f"what the selector returns must be of {len(q)} tokens, got {len(selected)}")
    if _recording is not None:  # which may be of a selector, and other sequences' chunks
        bound, numbers = segments.max_seqlen_k // moba.chunk_size + 1, selected - _first_chunks(segments, q.shape[0])
        numbers = torch.where((selected < 0) | (numbers < 0) | (numbers >= bound), -1, numbers)
        record(layer, numbers, bound, moba, causal, selected.shape[1] != q.shape[1])
    return None if causal and everything else selected


@torch.compiler.disable
def record(layer: int, numbers: Tensor, bound: int, moba: MoBAConfig, causal: bool, groups: bool) -> None:
    """Adds a call of a layer, by chunk numbers below ``bound``, to the recording."""
    if is_capturing(numbers.device):
        raise RuntimeError("record_selection cannot record in a CUDA graph: capture nothing while it does")
    if not _recording.call(layer)[1]:
        kept = torch.empty(numbers.shape, dtype=torch.int16 if bound <= 1 << 15 else torch.int32,
                           pin_memory=numbers.is_cuda)
        kept.copy_(numbers.to(kept.dtype), non_blocking=True)
        selection = LayerSelection(kept, moba.chunk_size, moba.topk, causal, groups)
        _recording.recorded.layers.setdefault(layer, []).append(selection)


def _first_chunks(segments: Segments, rows: int) -> Tensor:
    """The id of the first chunk of each query's sequence: int32 ``[T, 1, 1]``."""
    return segments.first_chunk().int()[segments.query_positions(rows)[0]][:, None, None]
