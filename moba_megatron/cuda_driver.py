"""libcuda, for what torch has no call for: copies by copy engines (``context_parallel/transport``)."""
from __future__ import annotations

import ctypes
import functools

_POINTER = ctypes.c_void_p
_ARGUMENTS = {
    "cuMemcpy3DBatchAsync_v2": [ctypes.c_size_t, _POINTER, ctypes.c_ulonglong, _POINTER],
    "cuStreamBatchMemOp_v2": [_POINTER, ctypes.c_uint, _POINTER, ctypes.c_uint],
    "cuThreadExchangeStreamCaptureMode": [_POINTER],
    "cuMemGetAddressRange_v2": [_POINTER, _POINTER, ctypes.c_uint64],
    "cuPointerGetAttribute": [_POINTER, ctypes.c_int, ctypes.c_uint64],
    "cuIpcGetMemHandle": [_POINTER, ctypes.c_uint64],
}


@functools.lru_cache(maxsize=None)
def cuda_driver() -> ctypes.CDLL:
    """The driver, with the argument types of what is called here; every call gives up the interpreter's lock.

    Raises:
        OSError: it is not there. (A function that an old one lacks raises AttributeError where it is called.)
    """
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in _ARGUMENTS.items():
        if hasattr(library, name):
            getattr(library, name).argtypes = types
    return library
