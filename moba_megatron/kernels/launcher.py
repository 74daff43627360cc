"""Launches a kernel: through Triton's own call, or from a record where an operator's call repeats an earlier one.

To find the compiled kernel Triton looks at every argument of every launch. That costs the host more than the GPU needs
for a short sequence. Calls of an operator with the same signature (shapes, strides, dtypes, alignments, options) make
the same launches, so the compiled kernels of the first are kept in order and started directly from then on.
"""
from __future__ import annotations

import threading
from dataclasses import dataclass

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from . import INTERPRETED, tuning
from .workspace import give_limit, workspace_limit

MAX_SIGNATURES = 512
"""Beyond this all records are dropped: data whose lengths never repeat must not fill the memory."""
_RECORDING = not INTERPRETED and triton.__version__.startswith(("3.6.", "3.7."))  # whose compiled kernels are known
_records: dict[tuple, dict[int, "_Launch"]] = {}
_current = threading.local()


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """``kernel[grid](*args, **constants)``: first the run-time arguments, then constexprs and options by name."""
    record = getattr(_current, "record", None)
    if record is None or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
        kernel[grid](*args, **constants)
        return
    position = _current.position
    _current.position = position + 1
    known = record.get(position)
    if known is None or known.kernel is not kernel or known.constants != constants:
        compiled = kernel[grid](*args, **constants)
        values = tuple(constants.get(parameter.name, parameter.default) for parameter in kernel.params[len(args):])
        record[position] = _Launch(kernel, constants, compiled, values)
        return
    compiled = known.compiled
    device = driver.active.get_current_device()
    compiled.run(*grid, *(1,) * (3 - len(grid)), driver.active.get_current_stream(device), compiled.function,
                 compiled.packed_metadata, None, None, None, *args, *known.values)


@dataclass(frozen=True)
class _Launch:
    kernel: object
    constants: dict
    compiled: object
    values: tuple


class repeated:
    """Within the block this thread's launches belong to a call with this signature.

    Args:
        options: whatever besides the tensors decides the launches; hashable.
        tensors: what the kernels read that was not allocated within the block; None is allowed.
        workspace_mib: the limit of scratch memory within the block; None for the environment's.
    """

    def __init__(self, options: tuple, *tensors: Tensor | None, workspace_mib: float | None = None):
        self._workspace_mib, self._key = workspace_mib, None
        if _RECORDING and not tuning.is_forced():
            layouts = (x if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() & 15) for x in tensors)
            limit = workspace_limit() if workspace_mib is None else workspace_mib
            self._key = (driver.active.get_current_device(), limit, options, *layouts)

    def __enter__(self) -> None:
        self._before = getattr(_current, "record", None), getattr(_current, "position", 0)
        self._limit_before = give_limit(self._workspace_mib)
        if self._key is None:
            return
        if self._key not in _records and len(_records) >= MAX_SIGNATURES:
            _records.clear()
        _current.record, _current.position = _records.setdefault(self._key, {}), 0

    def __exit__(self, *error) -> None:
        _current.record, _current.position = self._before
        give_limit(self._limit_before)
