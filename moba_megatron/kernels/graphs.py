"""CUDA graphs of calls whose addresses come again. By the driver's functions: ``torch.cuda.graph`` waits for the device
and keeps random numbers from other threads."""
import ctypes
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress

import torch
from triton import knobs

libcuda = None
with suppress(OSError):
    libcuda = ctypes.CDLL("libcuda.so.1") if torch.version.cuda else None
MAX_GRAPHS = 256  # at a time: each takes memory of the device
MAX_KEYS = 1024  # a key that does not come among as many others, or twice as many, is forgotten with its graph
_graphs: weakref.WeakSet["Graph"] = weakref.WeakSet()
_recent, _older = {}, {}  # by key: its graph, or how often it came


def _driver(name: str, *args) -> None:
    mode = ctypes.byref(ctypes.c_int(2))  # relaxed: no thread's capture forbids the call or is broken by it
    libcuda.cuThreadExchangeStreamCaptureMode(mode)
    try:
        error = getattr(libcuda, name)(*args)
    finally:
        libcuda.cuThreadExchangeStreamCaptureMode(mode)
    if error:
        raise RuntimeError(f"{name} returned {error}")


class Graph:
    """What ``launches(stream)`` starts on a stream of the current device: it is captured, and does not run."""

    def __init__(self, launches: Callable[[int], None]):
        self._exec, self._lock = ctypes.c_void_p(), threading.Lock()
        stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
        with ExitStack() as after:
            _driver("cuStreamCreate", ctypes.byref(stream), 1)  # non-blocking; one of torch's may be in use elsewhere
            after.callback(_driver, "cuStreamDestroy_v2", stream)
            _driver("cuStreamBeginCapture_v2", stream, 2)
            try:
                launches(stream.value)
            finally:
                _driver("cuStreamEndCapture", stream, ctypes.byref(graph))
                after.callback(_driver, "cuGraphDestroy", graph)
            _driver("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, ctypes.c_uint64(0))
        _graphs.add(self)

    def launch(self, stream: int) -> None:
        with self._lock:  # one thread at a time, says the driver; not by the GIL, for it waits when its queue is full
            _driver("cuGraphLaunch", self._exec, ctypes.c_void_p(stream))

    def __del__(self):
        if self._exec and not sys.is_finalizing():
            _driver("cuGraphExecDestroy", self._exec)


def _alone() -> bool:
    """Whether no thread can be in ``torch.cuda.synchronize()``, an error beside a capture: no other is at work but
    daemons (which show progress or pin memory), nor the main one, which waits where this is autograd's."""
    here, main = threading.current_thread(), threading.main_thread()
    return (here is main or isinstance(here, threading._DummyThread)) and all(
        x.daemon or x is main for x in threading.enumerate())


def start(key: tuple, launches: Callable[[int], None], stream: int) -> None:
    """``launches(stream)``, the current one: by a graph from the third time on that a key comes, unless Triton's launch
    hooks or a capture of the stream are to see each launch."""
    global MAX_GRAPHS, _older, _recent
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # chains of functions, functions, or None
    if any(getattr(x, "calls", x) for x in hooks) or torch.cuda.is_current_stream_capturing():
        return launches(stream)
    known = _recent.get(key)
    if known is None:
        known = _recent[key] = _older.pop(key, 0)
    try:
        if known == 2 and len(_graphs) < MAX_GRAPHS and _alone():
            known = _recent[key] = Graph(launches)
        if isinstance(known, Graph):
            return known.launch(stream)
    except Exception as error:  # no memory for one, say
        MAX_GRAPHS = known = 0
        logging.getLogger("moba_megatron").warning("moba_megatron: no more CUDA graphs of launches: %r", error)
    _recent[object() if known == 2 else key] = known + 1  # at the limit graphs that do not come any more make room
    if len(_recent) >= MAX_KEYS:
        _recent, _older = {}, _recent
    launches(stream)
