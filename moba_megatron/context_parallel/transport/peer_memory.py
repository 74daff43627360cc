"""Tensors that other processes of the host write to: allocated from a pool of their own, found by CUDA's IPC handles.

The pool is torch's caching allocator's, apart from the rest so that no segment of it is ever returned to the driver
while others have it mapped. Segments that can grow (``expandable_segments``) have no handles of this kind: where the
allocator is set so, it is set otherwise while the pool allocates.
"""
from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...cuda_driver import cuda_driver
from .copy_engines import DriverError, check_call

_BUFFER_ID, _ENABLE_PEER_ACCESS = 7, 1  # CU_POINTER_ATTRIBUTE_BUFFER_ID, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class _Handle(ctypes.Structure):
    """The driver's CUipcMemHandle."""

    _fields_ = [("data", ctypes.c_ubyte * 64)]


class PeerMemory:
    """What this process lets others write to, and what they let it write to."""

    DESCRIPTION = 8 + 8 + 64
    """Bytes that tell another process where a tensor is: offset in its segment, the segment's number and handle."""

    def __init__(self, device: torch.device):
        self._device, self._library = device, cuda_driver()
        with torch.cuda.device(device):
            self._pool = torch.cuda.MemPool(use_on_oom=True)
        self._settings = None
        self._handles: dict[tuple[int, int], bytes] = {}
        self._opened: dict[bytes, int] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that others can write to; DriverError where the allocator gives no such memory."""
        try:
            return self._allocate(shape, dtype)
        except DriverError:
            if self._settings is not None:
                raise
            self._settings = _settings_without_expandable_segments()
            return self._allocate(shape, dtype)

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with torch.cuda.use_mem_pool(self._pool, self._device), self._fixed_segments():
            x = torch.empty(shape, dtype=dtype, device=self._device)
        self.describe(x)
        return x

    def describe(self, x: Tensor) -> bytes:
        """For another process's :meth:`address`."""
        base, pointer = ctypes.c_uint64(), x.data_ptr()
        check_call(self._library.cuMemGetAddressRange_v2(ctypes.byref(base), None, pointer), "cuMemGetAddressRange")
        number = ctypes.c_uint64()
        check_call(self._library.cuPointerGetAttribute(ctypes.byref(number), _BUFFER_ID, pointer),
                   "cuPointerGetAttribute")
        segment = base.value, number.value  # addresses may come again, numbers do not
        if segment not in self._handles:
            handle = _Handle()
            check_call(self._library.cuIpcGetMemHandle(ctypes.byref(handle), base), "cuIpcGetMemHandle")
            self._handles[segment] = number.value.to_bytes(8, "little") + bytes(handle.data)
        return (pointer - base.value).to_bytes(8, "little") + self._handles[segment]

    def address(self, description: bytes) -> int:
        """Where this process writes to another one's tensor."""
        segment = description[8:]
        if segment not in self._opened:
            pointer, handle = ctypes.c_uint64(), _Handle((ctypes.c_ubyte * 64)(*segment[8:]))
            check_call(self._library.cuIpcOpenMemHandle_v2(ctypes.byref(pointer), handle, _ENABLE_PEER_ACCESS),
                       "cuIpcOpenMemHandle")
            self._opened[segment] = pointer.value
        return self._opened[segment] + int.from_bytes(description[:8], "little")

    @contextmanager
    def _fixed_segments(self) -> Iterator[None]:
        """While the pool allocates."""
        if self._settings is None:
            yield
            return
        before, without = self._settings
        _set(without)
        try:
            yield
        finally:
            _set(before)


@functools.lru_cache(maxsize=None)
def peer_memory(device: torch.device) -> PeerMemory:
    """The device's, one for the process: groups of ranks come and go, and segments stay mapped."""
    return PeerMemory(device)


def _settings_without_expandable_segments() -> tuple[str, str]:
    """The allocator's settings, and the same with segments that do not grow."""
    get = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    before = get() if get is not None else next((os.environ[x] for x in _SETTINGS if os.environ.get(x)), "")
    others = [x for x in re.split(r",(?![^\[]*\])", before) if x and not x.strip().startswith("expandable_segments")]
    return before, ",".join([*others, "expandable_segments:False"])


def _set(settings: str) -> None:
    set_ = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (set_ or torch._C._cuda_cudaCachingAllocator_set_allocator_settings)(settings)
