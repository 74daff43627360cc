"""Launches a kernel: through Triton's own call, or from a record where an operator's call repeats an earlier one.

To find the compiled kernel Triton looks at every argument of every launch. That costs the host more than the GPU needs
for a short sequence. Calls of an operator with the same signature (shapes, strides, dtypes, alignments, options) make
the same launches: the compiled kernels of the first call are kept in order, and the second starts them directly. Of
that one the whole course is prepared, if it can be (``replay.py``), so that from then on no stage runs.
"""
from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Callable

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from . import INTERPRETED, tuning
from .replay import NotReplayable, Replay, Trace
from .workspace import give_limit, workspace_limit

logger = logging.getLogger("moba_megatron")

MAX_SIGNATURES = 512
"""Beyond this all records are dropped: data whose lengths never repeat must not fill the memory."""
_RECORDING = not INTERPRETED and triton.__version__.startswith(("3.6.", "3.7."))  # whose compiled kernels are known
_records: dict[tuple, "_Record"] = {}
_current = threading.local()


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """``kernel[grid](*args, **constants)``: first the run-time arguments, then constexprs and options by name."""
    record = getattr(_current, "record", None)
    if record is None or _hooked():
        kernel[grid](*args, **constants)
        return
    position = _current.position
    _current.position = position + 1
    known = record.launches.get(position)
    if known is None or known.kernel is not kernel or known.constants != constants:
        compiled = kernel[grid](*args, **constants)
        values = tuple(constants.get(parameter.name, parameter.default) for parameter in kernel.params[len(args):])
        known = record.launches[position] = _Launch(kernel, constants, compiled, values)
    else:
        compiled = known.compiled
        device = driver.active.get_current_device()
        compiled.run(*grid, *(1,) * (3 - len(grid)), driver.active.get_current_stream(device), compiled.function,
                     compiled.packed_metadata, None, None, None, *args, *known.values)
    if _current.trace is not None:
        _current.trace.add(compiled, grid, (*args, *known.values))


def milestone_reached() -> None:
    """Within ``compute`` of :func:`repeat`: whoever asked for a milestone need not wait for what comes after this."""
    trace, milestone = getattr(_current, "trace", None), getattr(_current, "milestone", None)
    if trace is not None:
        trace.milestone_reached()
    if milestone is not None:
        milestone.record()
        _current.milestone = None


def repeat(options: tuple, compute: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None,
           workspace_mib: float | None = None, milestone: torch.cuda.Event | None = None) -> tuple[Tensor, ...]:
    """``compute(*tensors)``, whose launches, allocations and results a later call with the same signature repeats.

    Args:
        options: whatever besides the tensors decides what ``compute`` does; hashable.
        compute: its results are tensors that it allocates, each contiguous; it waits for nothing.
        tensors: all tensors that ``compute`` reads; None is allowed.
        workspace_mib: the limit of ``compute``'s scratch memory; None for the environment's.
        milestone: recorded on the current stream where ``compute`` first says :func:`milestone_reached`, or at its end.
    """
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    key = _signature(options, tensors, addresses, workspace_mib)
    record = _records.get(key)
    replay = None if record is None else record.replay
    if replay is not None and key[0] in getattr(_current, "devices", ()) and not _hooked():
        results = replay.run(addresses, tensors[0].device, driver.active.get_current_stream(key[0]), milestone)
        if results is not None:
            return results
    with _Recorded(key, workspace_mib, milestone):
        known = key is not None and not _hooked()
        traced = known and record is not None and replay is None and not record.refused
        results = _traced(record, compute, tensors) if traced else compute(*tensors)
        milestone_reached()  # if compute has not said so
    if not known:
        return results
    # Triton has seen to it that this thread has the device's context: from now on its calls may be replayed
    _current.devices = getattr(_current, "devices", frozenset()) | {key[0]}
    return results


def _traced(record: "_Record", compute: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor | None, ...]
            ) -> tuple[Tensor, ...]:
    """Runs a call, and keeps its replay if it can be replayed."""
    trace = _current.trace = Trace(tensors)
    with trace:
        results = compute(*trace.inputs)
    try:
        record.replay = trace.replay(results)
    except NotReplayable as error:
        record.refused = True
        logger.debug("moba_megatron: a call is not replayed: %s", error)
    return results


def _hooked() -> bool:
    """Whether somebody, as a profiler, wants to hear of each launch through Triton."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _signature(options: tuple, tensors: tuple[Tensor | None, ...], addresses: list[int],
               workspace_mib: float | None) -> tuple | None:
    """What decides the launches of a call, or None where they are not recorded."""
    if not _RECORDING or tuning.is_forced():
        return None
    limit = workspace_limit() if workspace_mib is None else int(workspace_mib * (1 << 20))
    key = [driver.active.get_current_device(), limit, options]
    for x, address in zip(tensors, addresses):
        key += (None,) if x is None else (x.shape, x.stride(), x.dtype, address & 15)
    return tuple(key)


@dataclass(frozen=True)
class _Launch:
    kernel: object
    constants: dict
    compiled: object
    values: tuple


@dataclass
class _Record:
    """The calls with one signature: the compiled kernels in order, and how to do without the stages."""

    launches: dict[int, _Launch] = field(default_factory=dict)
    replay: Replay | None = None
    refused: bool = False


class _Recorded:
    """Within the block this thread's launches belong to a call with this signature (None: they are not recorded)."""

    def __init__(self, key: tuple | None, workspace_mib: float | None, milestone: torch.cuda.Event | None):
        self._key, self._workspace_mib, self._milestone = key, workspace_mib, milestone

    def __enter__(self) -> None:
        self._before = tuple(getattr(_current, name, None) for name in ("record", "position", "trace", "milestone"))
        if self._before[2] is not None:
            self._before[2].refuse("a call within the call")
        self._limit_before, _current.milestone = give_limit(self._workspace_mib), self._milestone
        if self._key is None:
            return
        if self._key not in _records and len(_records) >= MAX_SIGNATURES:
            _records.clear()
        _current.record, _current.position, _current.trace = _records.setdefault(self._key, _Record()), 0, None

    def __exit__(self, *error) -> None:
        _current.record, _current.position, _current.trace, _current.milestone = self._before
        give_limit(self._limit_before)
