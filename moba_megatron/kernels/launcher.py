"""Launches a kernel: through Triton's own call, or from a record where an operator's call repeats an earlier one.

To find the compiled kernel Triton looks at every argument of every launch. That costs the host more than the GPU needs
for a short sequence. Calls of an operator with the same signature (shapes, strides, dtypes, alignments, options) make
the same launches: the compiled kernels of the first call are kept in order, and the second starts them directly. Of
that one the whole course is prepared, if it can be (``replay.py``), so that from then on no stage runs.
"""
from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from dataclasses import dataclass, field
from typing import Callable

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from . import tuning
from .host import INTERPRETED
from .replay import NotReplayable, Replay, Trace
from .workspace import given, workspace_limit

logger = logging.getLogger("moba_megatron")

MAX_SIGNATURES = 512
"""Beyond this all records are dropped: data whose lengths never repeat must not fill the memory."""
_RECORDING = not INTERPRETED and triton.__version__.startswith(("3.6.", "3.7."))  # whose compiled kernels are known
_records: dict[tuple, "_Record"] = {}
_current = threading.local()
_STATE = ("record", "position", "trace", "event")
"""What a thread keeps in ``_current`` during a call, besides the limit of its workspace."""


def on_device(device: torch.device):
    """A context in which a CUDA device is the current one, with its own current stream; nothing where it is already.

    Triton launches on the current device's stream, whatever the tensors' device is.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def launch(kernel, grid: tuple[int, ...], *args, **named) -> None:
    """``kernel[grid](*args, **named)`` on the first argument's device; constexprs are a kernel's last parameters."""
    first = args[0] if args else next(iter(named.values()))
    with on_device(first.device):
        record = getattr(_current, "record", None)
        if record is None or record.faulty or _hooked():
            kernel[grid](*args, **named)
            return
        position = _current.position
        _current.position = position + 1
        runtime = _runtime_names(kernel)
        values = (*args, *(named[name] for name in runtime[len(args):]))
        constants = {name: value for name, value in named.items() if name not in runtime}
        known = record.launches.get(position)
        if known is None or known.kernel is not kernel or known.constants != constants:
            compiled = kernel[grid](*args, **named)
            defaults = tuple(constants.get(parameter.name, parameter.default)
                             for parameter in kernel.params[len(runtime):])
            known = record.launches[position] = _Launch(kernel, constants, compiled, defaults)
        else:
            try:
                device = driver.active.get_current_device()
                known.compiled.run(*grid, *(1,) * (3 - len(grid)), driver.active.get_current_stream(device),
                                   known.compiled.function, known.compiled.packed_metadata, None, None, None, *values,
                                   *known.values)
            except Exception as error:
                record.give_up(error)
                kernel[grid](*args, **named)
        if _current.trace is not None:
            _current.trace.add(known.compiled, grid, (*values, *known.values))


@functools.lru_cache(maxsize=None)
def _runtime_names(kernel) -> tuple[str, ...]:
    return tuple(parameter.name for parameter in kernel.params if not parameter.is_constexpr)


def record_event() -> None:
    """Within ``compute`` of :func:`repeat`: whoever gave an event need not wait for what comes after this."""
    trace, event = getattr(_current, "trace", None), getattr(_current, "event", None)
    if trace is not None:
        trace.record_event()
    if event is not None:
        event.record()
        _current.event = None


def repeat(options: tuple, compute: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None,
           workspace_mib: float | None = None, event: torch.cuda.Event | None = None) -> tuple[Tensor, ...]:
    """``compute(*tensors)``, whose launches, allocations and results a later call with the same signature repeats.

    A fault in what is repeated (not in ``compute`` itself) is said in a warning, and calls of this signature go through
    Triton from then on. MOBA_PREPARED_LAUNCHES=0 lets every call do so.

    Args:
        options: whatever besides the tensors decides what ``compute`` does; hashable.
        compute: its results are tensors that it allocates, each contiguous; it waits for nothing, and may run again.
        tensors: all tensors that ``compute`` reads, on one device; None is allowed.
        workspace_mib: the limit of ``compute``'s scratch memory; None for the environment's.
        event: recorded on the current stream where ``compute`` first says :func:`record_event`, or at its end.
    """
    with on_device(tensors[0].device) if tensors else contextlib.nullcontext():
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        key = _signature(options, tensors, addresses, workspace_mib)
        record = _record_of(key)
        if record is None:
            return _call(None, None, compute, tensors, workspace_mib, event)
        results, fault = None, None
        try:
            if record.replay is None:
                if record.launches and not record.refused:
                    results = _traced(record, compute, tensors, workspace_mib, event)
            elif key[0] in getattr(_current, "devices", ()):
                stream = driver.active.get_current_stream(key[0])
                results = record.replay.run(addresses, tensors[0].device, stream, event)
        except Exception as error:
            fault = error
        if results is None:
            results = _call(record, None, compute, tensors, workspace_mib, event)
        if fault is not None:  # an error of compute's own has been met again
            record.give_up(fault)
        # Triton has seen to it that this thread has the device's context: from now on its calls may be replayed
        _current.devices = getattr(_current, "devices", frozenset()) | {key[0]}
        return results


def _traced(record: "_Record", compute: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor | None, ...],
            workspace_mib: float | None, event: torch.cuda.Event | None) -> tuple[Tensor, ...]:
    """Runs a call, and keeps its replay if it can be replayed."""
    trace = Trace(tensors)
    with trace:
        results = _call(record, trace, compute, trace.inputs, workspace_mib, event)
    try:
        record.replay = trace.replay(results)
    except NotReplayable as error:
        record.refused = True
        logger.debug("moba_megatron: a call is not replayed: %s", error)
    return results


def _call(record: "_Record | None", trace: Trace | None, compute: Callable[..., tuple[Tensor, ...]],
          tensors: tuple[Tensor | None, ...], workspace_mib: float | None, event: torch.cuda.Event | None
          ) -> tuple[Tensor, ...]:
    """``compute(*tensors)``, during which this thread's launches belong to a record, and are traced."""
    before, limit = {name: getattr(_current, name, None) for name in _STATE}, given.mib

    def restore() -> None:
        vars(_current).update(before)
        given.mib = limit

    if before["trace"] is not None:
        before["trace"].refuse("a call within the call")
    try:
        try:
            vars(_current).update(record=record, position=0, trace=trace, event=event)
            given.mib = workspace_mib
            results = compute(*tensors)
            record_event()  # if compute has not said so
            return results
        finally:
            restore()
    finally:  # an interrupt may have come in the first: whatever launches next must not be taken for this call's
        restore()


def _record_of(key: tuple | None) -> "_Record | None":
    """The record of a signature, a new one at first; None where nothing is recorded."""
    if key is None or _hooked():
        return None
    if key not in _records and len(_records) >= MAX_SIGNATURES:
        _records.clear()
    record = _records.setdefault(key, _Record())
    return None if record.faulty else record


def _hooked() -> bool:
    """Whether somebody, as a profiler, wants to hear of each launch through Triton."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _signature(options: tuple, tensors: tuple[Tensor | None, ...], addresses: list[int],
               workspace_mib: float | None) -> tuple | None:
    """What decides the launches of a call, or None where they are not recorded."""
    if not _RECORDING or tuning.is_forced() or os.environ.get("MOBA_PREPARED_LAUNCHES") == "0":
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
    faulty: bool = False

    def give_up(self, error: Exception) -> None:
        """From now on the calls go through Triton."""
        self.faulty, self.replay = True, None
        logger.warning("moba_megatron: prepared launches of a call are not used any more: %s: %s",
                       type(error).__name__, error)
