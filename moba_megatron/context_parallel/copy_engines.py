"""The CUDA driver's copies and signals on two streams, prepared once and issued with other addresses each time."""
from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from .moves import Copy

_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE
_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32 (flags 0: the value, or later ones), ..._WRITE_VALUE_32
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class _Copy2D(ctypes.Structure):
    """The driver's CUDA_MEMCPY2D."""

    _fields_ = [field for end in ("source", "target") for field in (
        (end + "_x", ctypes.c_size_t), (end + "_y", ctypes.c_size_t), (end + "_type", ctypes.c_uint),
        (end + "_host", ctypes.c_void_p), (end + "_device", ctypes.c_uint64), (end + "_array", ctypes.c_void_p),
        (end + "_pitch", ctypes.c_size_t))] + [("width", ctypes.c_size_t), ("height", ctypes.c_size_t)]


class _MemoryOperation(ctypes.Structure):
    """The driver's CUstreamBatchMemOpParams, where it waits for a value or writes one."""

    _fields_ = [("operation", ctypes.c_uint), ("address", ctypes.c_uint64), ("value", ctypes.c_uint64),
                ("flags", ctypes.c_uint), ("alias", ctypes.c_uint64), ("unused", ctypes.c_uint64)]


class DriverError(RuntimeError):
    """The CUDA driver refused a call."""


@functools.lru_cache(maxsize=None)
def _driver() -> ctypes.CDLL:
    library, address, stream = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p, ctypes.c_void_p
    library.cuMemcpy2DAsync_v2.argtypes = [address, stream]
    library.cuStreamBatchMemOp_v2.argtypes = [stream, ctypes.c_uint, address, ctypes.c_uint]
    library.cuThreadExchangeStreamCaptureMode.argtypes = [address]
    return library


def _check(code: int, call: str) -> None:
    if code:
        raise DriverError(f"{call} failed with CUDA driver error {code}")


class RunningCopies:
    """An exchange that was issued, as a handle for :class:`~.comm.Pending`."""

    def __init__(self, done: torch.cuda.Event):
        self._done = done

    def wait(self) -> None:
        """The current stream awaits the copies, not the host."""
        torch.cuda.current_stream().wait_event(self._done)


class CopyEngines:
    """Copies and signals of one GPU, on a stream that pushes and one that places.

    Args:
        device: this rank's.
        timeout_s: an exchange that is not done so long after it was issued ends the process.
    """

    def __init__(self, device: torch.device, timeout_s: float):
        self._library, self._watch = _driver(), _Watch(timeout_s)
        # of high priority: what they wait for must not stand behind kernels that were launched first
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]
        self.pushing, self.placing = (stream.cuda_stream for stream in self._streams)
        self._operations: dict[int, tuple] = {}

    def begin(self) -> None:
        """What follows on both streams comes after what is on the current stream now."""
        ready = torch.cuda.current_stream().record_event()
        for stream in self._streams:
            stream.wait_event(ready)

    def end(self, what: str) -> RunningCopies:
        """A handle for everything issued so far, watched under the name ``what``."""
        pushing, placing = self._streams
        placing.wait_event(pushing.record_event())
        done = placing.record_event()
        self._watch.add(done, what)
        return RunningCopies(done)

    def prepare(self, copies: Sequence[Copy]) -> list[tuple]:
        """Copies in the driver's form, for :meth:`copy`."""
        return [_prepare(c) for c in copies]

    def copy(self, stream: int, prepared: list[tuple], bases: list[int]) -> None:
        """Issues copies between memory at ``bases``, by the numbers that the copies name."""
        for form, address, source, source_offset, target, target_offset in prepared:
            form.source_device = bases[source] + source_offset
            form.target_device = bases[target] + target_offset
            _check(self._library.cuMemcpy2DAsync_v2(address, stream), "cuMemcpy2DAsync")  # reads the form at once

    def wait_for(self, stream: int, addresses: list[int], value: int) -> None:
        """The stream waits until the number at each address is ``value`` or has passed it."""
        self._operate(stream, _WAIT, addresses, value)

    def signal(self, stream: int, addresses: list[int], value: int) -> None:
        """Writes a number to each address when everything before on the stream is done and seen by all GPUs."""
        self._operate(stream, _WRITE, addresses, value)

    def _operate(self, stream: int, operation: int, addresses: list[int], value: int) -> None:
        key = addresses[0], operation
        if key not in self._operations:
            form = (_MemoryOperation * len(addresses))(*(_MemoryOperation(operation, x) for x in addresses))
            self._operations[key] = form, ctypes.addressof(form), len(addresses)
        form, address, number = self._operations[key]
        for x in form:
            x.value = value & 0xFFFFFFFF  # the driver compares differences: numbers may wrap around
        _check(self._library.cuStreamBatchMemOp_v2(stream, number, address, 0), "cuStreamBatchMemOp")


def _prepare(c: Copy) -> tuple:
    form = _Copy2D(source_type=_DEVICE_MEMORY, source_pitch=c.source_pitch, target_type=_DEVICE_MEMORY,
                   target_pitch=c.target_pitch, width=c.width, height=c.rows)
    return form, ctypes.addressof(form), c.source, c.source_offset, c.target, c.target_offset


class _Watch:
    """Ends the process when an exchange is not done in time, as NCCL's watchdog does: streams would wait for ever."""

    INTERVAL_S = 1.0

    def __init__(self, timeout_s: float):
        self._timeout_s, self._unfinished, self._thread = timeout_s, deque(), None

    def add(self, done: torch.cuda.Event, what: str) -> None:
        self._unfinished.append((time.monotonic(), done, what))
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="moba context parallel watch", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        # a query from this thread must not spoil a CUDA graph that another one captures
        _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_RELAXED))), "watching")
        while True:
            time.sleep(min(self.INTERVAL_S, self._timeout_s / 4))
            while self._unfinished and self._unfinished[0][1].query():
                self._unfinished.popleft()
            if self._unfinished:
                began, _, what = self._unfinished[0]
                waited = time.monotonic() - began
                if waited > self._timeout_s:
                    print(f"moba_megatron: {what} was not done after {waited:.0f} s: another rank failed, hangs or "
                          "is slower than the process group's timeout. This process ends", file=sys.stderr, flush=True)
                    os._exit(1)
