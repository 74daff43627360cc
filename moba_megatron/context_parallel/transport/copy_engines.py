"""Copies and signals on two streams, prepared once and issued with other addresses each time.

What goes to another GPU is the driver's copy, by a copy engine. Within a GPU the driver copies by kernels that take all
of it from the attention kernels; small ones of our own do (``kernels/copying.py``).
"""
from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

import torch

from ...cuda_driver import cuda_driver
from .moves import Copy

_POINTER, _IN_STREAM_ORDER = 1, 1  # CU_MEMCPY_OPERAND_TYPE_POINTER, CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_BESIDE_KERNELS = 1  # CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE: by a copy engine, where kernels would be faster too
_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32 (flags 0: the value, or later ones), ..._WRITE_VALUE_32
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class _End(ctypes.Structure):
    """The driver's CUmemcpy3DOperand, a pointer."""

    _fields_ = [("type", ctypes.c_uint), ("pointer", ctypes.c_uint64), ("pitch", ctypes.c_size_t),
                ("layer", ctypes.c_size_t), ("location", ctypes.c_uint), ("location_id", ctypes.c_int)]


class _Rectangle(ctypes.Structure):
    """The driver's CUDA_MEMCPY3D_BATCH_OP."""

    _fields_ = [("source", _End), ("target", _End), ("width", ctypes.c_size_t), ("height", ctypes.c_size_t),
                ("depth", ctypes.c_size_t), ("order", ctypes.c_uint), ("flags", ctypes.c_uint)]


class _MemoryOperation(ctypes.Structure):
    """The driver's CUstreamBatchMemOpParams, where it waits for a value or writes one."""

    _fields_ = [("operation", ctypes.c_uint), ("address", ctypes.c_uint64), ("value", ctypes.c_uint64),
                ("flags", ctypes.c_uint), ("alias", ctypes.c_uint64), ("unused", ctypes.c_uint64)]


class DriverError(RuntimeError):
    """The CUDA driver refused a call."""


def check_call(code: int, call: str) -> None:
    """Raises DriverError where a call of the driver failed."""
    if code:
        raise DriverError(f"{call} failed with CUDA driver error {code}")


class RunningCopies:
    """An exchange that was issued, as a handle for :class:`~.comm.Pending`."""

    def __init__(self, done: torch.cuda.Event):
        self._done = done

    def wait(self) -> None:
        """The current stream awaits the copies, not the host."""
        torch.cuda.current_stream().wait_event(self._done)


class PreparedCopies:
    """Copies in the driver's form, but for addresses."""

    def __init__(self, copies: Sequence[Copy]):
        self._forms = (_Rectangle * len(copies))(*(
            _Rectangle(_End(_POINTER, 0, c.source_pitch), _End(_POINTER, 0, c.target_pitch), c.width, c.rows, 1,
                       _IN_STREAM_ORDER, _BESIDE_KERNELS) for c in copies))
        self._address = ctypes.addressof(self._forms)
        self._ends = [(form.source, c.source, c.source_offset, form.target, c.target, c.target_offset)
                      for form, c in zip(self._forms, copies)]

    def at(self, bases: list[int]) -> tuple[int, int]:
        """How many they are, and the address of their form with pointers into memory at ``bases``; until the next."""
        for source, source_number, source_offset, target, target_number, target_offset in self._ends:
            source.pointer = bases[source_number] + source_offset
            target.pointer = bases[target_number] + target_offset
        return len(self._ends), self._address


class LocalCopies:
    """Copies within this GPU: by kernels of few blocks where rows are multiples of 16 bytes, else by the driver."""

    def __init__(self, copies: Sequence[Copy]):
        self.parts = [(c, PreparedCopies([c])) for c in copies]


class CopyEngines:
    """Copies and signals of one GPU, on a stream that pushes and one that places.

    An exchange that is not done ``timeout_s`` after it was issued ends the process.
    """

    _kernels = None

    def __init__(self, device: torch.device, timeout_s: float):
        from ...kernels import copying  # needs Triton
        self._kernels, self._library, self._watch = copying, cuda_driver(), _Watch(timeout_s)
        # of high priority: what they wait for must not stand behind kernels that were launched first
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]
        self.pushing, self.placing = (stream.cuda_stream for stream in self._streams)
        self._operations: dict[int, tuple] = {}

    @staticmethod
    def event() -> torch.cuda.Event:
        """To be recorded on the current stream, for :meth:`begin`."""
        return torch.cuda.Event()

    def begin(self, after: torch.cuda.Event | None = None) -> None:
        """What follows on both streams comes after ``after``, or else after what is on the current stream now."""
        ready = torch.cuda.current_stream().record_event() if after is None else after
        for stream in self._streams:
            stream.wait_event(ready)

    def end(self, what: str) -> RunningCopies:
        """A handle for everything issued so far, watched under the name ``what``."""
        pushing, placing = self._streams
        placing.wait_event(pushing.record_event())
        done = placing.record_event()
        self._watch.add(done, what)
        return RunningCopies(done)

    def attempt(self, addresses: Sequence[int], flags: torch.Tensor) -> None:
        """Does once what exchanges do, so that what this driver, GPU or Triton refuses is refused here, and waits.

        ``addresses``: of zeros that all ranks' GPUs can write to; ``flags``: this rank's zeros, at least 32 bytes.
        """
        zeros, bases = Copy(0, 0, 16, 1, 0, 16, 1, 16), [flags.data_ptr(), flags.data_ptr() + 16]
        self.begin()
        self.signal(self.pushing, list(addresses), 0)
        self.wait_for(self.placing, [flags.data_ptr()], 0)
        self.copy(self.pushing, PreparedCopies([zeros]), bases)
        self.place(LocalCopies([zeros]), bases)
        for stream in self._streams:
            stream.synchronize()

    def copy(self, stream: int, copies: PreparedCopies, bases: list[int]) -> None:
        """Issues copies between memory at ``bases``, by the numbers that the copies name; they run in any order."""
        number, address = copies.at(bases)
        if number:
            check_call(self._library.cuMemcpy3DBatchAsync_v2(number, address, 0, stream), "cuMemcpy3DBatchAsync")

    def place(self, copies: LocalCopies, bases: list[int]) -> None:
        """As :meth:`copy`, within this GPU, on the stream that places."""
        for c, prepared in copies.parts:
            source, target = bases[c.source] + c.source_offset, bases[c.target] + c.target_offset
            kernels = self._kernels
            if kernels and kernels.copyable(c.rows, c.width, c.source_pitch, c.target_pitch, source, target):
                kernels.copy_rows(source, target, c.rows, c.width, c.source_pitch, c.target_pitch, self._streams[1])
            else:
                self.copy(self.placing, prepared, bases)

    def wait_for(self, stream: int, addresses: list[int], value: int) -> None:
        """The stream waits until the number at each address is ``value`` or has passed it."""
        self._operate(stream, _WAIT, addresses, value)

    def signal(self, stream: int, addresses: list[int], value: int) -> None:
        """Writes a number to each address when everything before on the stream is done and seen by all GPUs."""
        self._operate(stream, _WRITE, addresses, value)

    def _operate(self, stream: int, operation: int, addresses: list[int], value: int) -> None:
        key = operation, *addresses
        if key not in self._operations:
            form = (_MemoryOperation * len(addresses))(*(_MemoryOperation(operation, x) for x in addresses))
            self._operations[key] = form, ctypes.addressof(form), len(addresses)
        form, address, number = self._operations[key]
        for x in form:
            x.value = value & 0xFFFFFFFF  # the driver compares differences: numbers may wrap around
        check_call(self._library.cuStreamBatchMemOp_v2(stream, number, address, 0), "cuStreamBatchMemOp")


class _Watch:
    """Ends the process when an exchange is not done in time, as NCCL's watchdog does: streams would wait for ever."""

    INTERVAL_S = 1.0

    def __init__(self, timeout_s: float):
        self._timeout_s, self._unfinished, self._thread = timeout_s, deque(), None

    def add(self, done: torch.cuda.Event, what: str) -> None:
        self._unfinished.append((time.monotonic(), done, what))
        if self._thread is None:
            self._thread = threading.Thread(target=_look_again, args=(weakref.ref(self),), daemon=True,
                                            name="moba context parallel watch")
            self._thread.start()

    def look(self) -> float:
        """Ends the process where something is late; seconds until the next look."""
        while self._unfinished and self._unfinished[0][1].query():
            self._unfinished.popleft()
        if self._unfinished:
            began, _, what = self._unfinished[0]
            waited = time.monotonic() - began
            if waited > self._timeout_s:
                print(f"moba_megatron: {what} was not done after {waited:.0f} s: another rank failed, hangs or "
                      "is slower than the process group's timeout. This process ends", file=sys.stderr, flush=True)
                os._exit(1)
        return min(self.INTERVAL_S, self._timeout_s / 4)


def _look_again(reference: weakref.ref[_Watch]) -> None:
    """Looks until nobody has the watch any more: a group that was destroyed leaves no thread."""
    # a query from this thread must not spoil a CUDA graph that another one captures
    check_call(cuda_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_RELAXED))), "watching")
    while (watch := reference()) is not None:
        seconds = watch.look()
        del watch
        time.sleep(seconds)
