"""Choices that routers made: recorded on the host, saved, and given to another run in the routers' place."""
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
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


@dataclass
class RecordedSelection:
    """What :func:`record_selection` records and :func:`replay_selection` replays.

    ``layers``: for each layer, by its 1-based number, global under pipeline parallelism, what its calls chose, in their
    order: one a micro batch, or one a step of a generation. Layers and calls that attended densely have no entry.
    """

    layers: dict[int, list[LayerSelection]] = field(default_factory=dict)

    def save(self, path: str | PathLike) -> None:
        """Writes an .npz file, without pickles."""
        with open(path, "wb") as file:
            np.savez(file, **{f"{layer}.{number}.{call.chunk_size}.{call.topk}.{call.causal:d}": call.numbers.numpy()
                              for layer, calls in self.layers.items() for number, call in enumerate(calls)})

    @classmethod
    def load(cls, path: str | PathLike) -> "RecordedSelection":
        """Reads what :meth:`save` wrote; ValueError for another file."""
        recorded = cls()
        try:
            with np.load(path, allow_pickle=False) as file:
                for layer, _, chunk_size, topk, causal, name in sorted((*map(int, x.split(".")), x) for x in file):
                    call = LayerSelection(torch.from_numpy(file[name]), chunk_size, topk, bool(causal))
                    recorded.layers.setdefault(layer, []).append(call)
        except (ValueError, AttributeError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"path must be a file that RecordedSelection.save wrote, got {path}: {error}") from None
        return recorded

    def joined(self, batch: int = 1) -> "RecordedSelection":
        """A layer's calls as one, for a forward over a prompt and the new tokens after it; ``batch``: sequences."""
        joined = RecordedSelection()
        for layer, calls in self.layers.items():
            numbers = torch.cat([call.numbers.unflatten(0, (batch, -1)) for call in calls], 1).flatten(0, 1)
            joined.layers[layer] = [replace(calls[-1], numbers=numbers)]
        return joined


class _Run:
    """A recording or a replay: counts the calls of each layer."""

    def __init__(self, recorded: RecordedSelection):
        self.recorded, self.calls, self.is_over = recorded, Counter(), False

    def call(self, layer: int) -> tuple[int, bool]:
        """The number of the layer's call, and whether it runs again: a backward pass recomputes it.

        Checkpoints, which are among the callers of both runs, keep the number.
        """
        known = [vars(x).setdefault("moba_calls", {}) for x in _checkpoints()]
        again = torch._C._current_graph_task_id() != -1
        number = next((x[self, layer] for x in known if (self, layer) in x), None) if again else self.calls[layer]
        if number is None:
            raise RuntimeError(f"layer {layer} runs in a backward pass, but not in it the first time: record_selection "
                               "and replay_selection must surround forward and backward, and know the checkpoints of "
                               "torch, Megatron and Transformer Engine alone")
        self.calls[layer] += not again
        for x in known:
            x[self, layer] = number
        return number, again


def _checkpoints() -> Iterator[Any]:
    """The checkpoints that this thread is in, the innermost first: for each an object that is the same when it runs
    again, the node of a reentrant one and PyTorch's frame of others."""
    frame = sys._getframe(2)
    while frame is not None:
        seen = frame.f_locals
        inner = getattr(getattr(seen.get("gen"), "gi_frame", None), "f_locals", {})
        for x in (seen.get("ctx"), seen.get("frame"), inner.get("new_frame")):
            if isinstance(x, (torch.autograd.function.FunctionCtx, _CheckpointFrame)):
                yield x
        frame = frame.f_back


in_use = False  # whether this process has recorded or replayed anything
_recording: _Run | None = None
_replaying: _Run | None = None


@contextlib.contextmanager
def record_selection() -> Iterator[RecordedSelection]:
    """Records what every MoBA layer chooses inside the block, in Megatron-Core and in Transformers.

    Each rank records its own queries, heads and layers; what a backward pass recomputes is recorded once. No bit of the
    run changes. Under context parallelism keys are gathered once more; nothing waits for a GPU before the block's end.
    New tokens of a generation are recorded where they choose (``decode="moba"``).

    Raises:
        RuntimeError: inside another recording, or in a CUDA graph.
    """
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
    layers, heads and rows of what one process recorded.

    Raises:
        TypeError: choices is something else.
        ValueError: in the block, where a layer was not recorded, or with another chunk size, topk, number of tokens or
            heads, or where it is called more often than it was; at the block's end, where it was called less often.
    """
    global _replaying, in_use
    if not isinstance(choices, RecordedSelection):
        raise TypeError(f"choices must be a RecordedSelection, got {type(choices).__name__}")
    before, run = _replaying, _Run(choices)
    _replaying, in_use = run, True
    try:
        yield
        for layer, number in run.calls.items():
            if number < (recorded := len(choices.layers.get(layer, ()))):
                raise ValueError(f"replay_selection: layer {layer} was recorded in {recorded} calls, and replayed in "
                                 f"{number}")
    finally:
        _replaying, run.is_over = before, True


def is_active() -> bool:
    """Whether a recording or a replay is under way; RuntimeError where a backward pass recomputes a replay's layer
    after the replay."""
    if in_use and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1 and any(
            run.is_over for x in _checkpoints() for run, _ in vars(x).get("moba_calls", ())):
        raise RuntimeError("replay_selection must surround the backward passes that recompute what ran in it")
    return _recording is not None or _replaying is not None


def refuse_new_tokens(dense: bool) -> None:
    """Raises ValueError for a single new token over a cache, where it attends densely while others are recorded, or
    would need the kernels of decoding for a replay."""
    if (_recording if dense else _replaying) is not None:
        raise ValueError("decode must be moba for record_selection, got dense: new tokens would choose nothing" if dense
                         else "replay_selection is not for single new tokens over a cache in Transformers: run whole "
                              "sequences, by RecordedSelection.joined")


@torch.compiler.disable
def replayed(layer: int, q: Tensor, k: Tensor, segments: Segments, moba: MoBAConfig, part: tuple[int, int] = (1, 0),
             rows: Any = None, by_gate: bool = True) -> tuple[Tensor, bool] | None:
    """What was recorded of a layer's call, int32 ids ``[T, H or HK, n]``, and whether that was everything; None without
    a replay. ValueError where it does not fit this run.

    ``part``: tensor parallel size, and rank in it; ``rows``: the context parallel rank's among all; ``by_gate``: lists
    are of heads or groups as the config says.
    """
    if _replaying is None:
        return None
    (number, _), calls = _replaying.call(layer), _replaying.recorded.layers.get(layer, ())
    where = f"replay_selection: call {number + 1} of layer {layer}"
    if number >= len(calls):
        raise ValueError(f"{where} was not recorded, its record has {len(calls)} calls")
    call = calls[number]
    for name in ("chunk_size", "topk"):
        if getattr(call, name) != getattr(moba, name):
            raise ValueError(f"{where} was recorded with {name} {getattr(call, name)}, got {getattr(moba, name)}")
    (tokens, heads, _), total, either = call.numbers.shape, q.shape[0], (q.shape[1], k.shape[1])
    either = (either[moba.selection == "group"],) if by_gate else either
    lists = next((n for n in either if heads in (n, n * part[0])), either[0])
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
    if _recording is not None:  # which may be of a selector, and other sequences' chunks
        bound, numbers = segments.max_seqlen_k // moba.chunk_size + 1, selected - _first_chunks(segments, q.shape[0])
        numbers = torch.where((selected < 0) | (numbers < 0) | (numbers >= bound), -1, numbers)
        record(layer, numbers, bound, moba, causal)
    return None if causal and everything else selected


@torch.compiler.disable
def record(layer: int, numbers: Tensor, bound: int, moba: MoBAConfig, causal: bool) -> None:
    """Adds a call of a layer, by chunk numbers below ``bound``, to the recording."""
    if is_capturing(numbers.device):
        raise RuntimeError("record_selection cannot record in a CUDA graph: capture nothing while it does")
    if not _recording.call(layer)[1]:
        kept = torch.empty(numbers.shape, dtype=torch.int16 if bound <= 1 << 15 else torch.int32,
                           pin_memory=numbers.is_cuda)
        kept.copy_(numbers.to(kept.dtype), non_blocking=True)
        selection = LayerSelection(kept, moba.chunk_size, moba.topk, causal)
        _recording.recorded.layers.setdefault(layer, []).append(selection)


def _first_chunks(segments: Segments, rows: int) -> Tensor:
    """The id of the first chunk of each query's sequence: int32 ``[T, 1, 1]``."""
    return segments.first_chunk().int()[segments.query_positions(rows)[0]][:, None, None]
