"""Prepared launches: what a call starts on the device is worked out once for each signature, then a loop over launches.

The host code of the stages runs on :class:`Buffer`, which know a tensor's layout and have no values: that yields a
:class:`Plan`, the launches in order, where each pointer comes from, and the layout of one block of scratch memory. The
first run of a plan goes through Triton's ``kernel[grid](...)``, which returns the compiled kernels; from then on each
is started by ``compiled[grid](...)``, with addresses in place of tensors, which spares Triton's look at every argument.
Small calls whose addresses repeat are CUDA graphs. A plan holds no memory and nothing of a run: threads may share it.
"""
import contextvars
import functools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton import AsyncCompileMode
from triton.runtime import driver
from triton.runtime._async_compile import FutureKernel
from triton.runtime.jit import JITFunction

from . import graphs
from .host import INTERPRETED
from .tuning import forced_settings
from .workspace import plan_workspace, workspace_limit

logger = logging.getLogger("moba_megatron")

MAX_PLANS = 512  # beyond this all plans are dropped: data whose lengths never repeat must not fill the memory
MAX_BYTES = 64 << 20  # of the results of a call that may be a graph: the device is busy with others for long enough
_Address = type("_Address", (int,), {"data_ptr": int.__int__})  # a tensor, as far as descriptors are concerned
_plans: dict[tuple, "Plan"] = {}
_compiled: dict[tuple, list] = {}  # what threads compile or have compiled, by kernel, device and constexprs
_building = threading.local()  # .plan: the plan that this thread is making; .limit: its scratch memory, bytes


class Buffer:
    """A tensor to be: an input, or what a stage allocates by :func:`empty`; no operation of torch takes it. ``place``:
    its number among the inputs and allocations of its plan; ``offset``: elements from the start of that one;
    ``misaligned``: the address modulo 16, bytes. The rest is as of a tensor, in elements."""

    __slots__ = ("device", "dtype", "misaligned", "nbytes", "offset", "place", "shape", "strides")

    def __init__(self, place: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype,
                 device: torch.device, offset: int = 0, misaligned: int = 0):
        self.place, self.shape, self.strides, self.dtype, self.device = place, shape, strides, dtype, device
        self.offset, self.misaligned, self.nbytes = offset, misaligned, math.prod(shape) * dtype.itemsize

    def stride(self, dim: int | None = None):
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def data_ptr(self) -> int:
        """The address modulo 16, bytes: all that kernels are compiled for."""
        return self.misaligned

    @property
    def source(self) -> tuple[int, int]:
        """Its place, and the bytes from the start of that."""
        return self.place, self.offset * self.dtype.itemsize

    def contiguous(self) -> "Buffer":
        """Itself; what is not contiguous must be made so before the call."""
        dense = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if size > 1 and stride != dense and self.numel():
                raise TypeError(f"a tensor of strides {self.strides} is to be contiguous within a prepared call")
            dense *= size
        return self

    def __getitem__(self, rows: slice) -> "Buffer":
        """``[begin:end]`` of the first dimension."""
        begin, end, step = rows.indices(self.shape[0])
        assert step == 1
        offset = begin * self.strides[0]
        return Buffer(self.place, (max(0, end - begin), *self.shape[1:]), self.strides, self.dtype, self.device,
                      self.offset + offset, (self.misaligned + offset * self.dtype.itemsize) % 16)


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor to be: ``make(base, *layout)`` with a tensor or an address in place of the buffer."""
    make: Callable
    base: Buffer
    layout: tuple


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Buffer:
    """Uninitialised, contiguous memory: a result where the call returns it, else scratch."""
    strides = tuple(math.prod(max(1, n) for n in shape[i + 1:]) for i in range(len(shape)))
    plan = _building.plan
    plan._allocated.append(Buffer(plan.inputs + len(plan._allocated), tuple(shape), strides, dtype, device))
    return plan._allocated[-1]


def rows(x: Tensor) -> Tensor:
    """A tensor, copied if it must be for the stride of its last dimension to be 1: what the kernels read."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(kernel, grid: tuple[int, ...], *args, **named) -> "_Launch":
    """``kernel[grid](*args, **named)`` as the next launch of the call; constexprs are a kernel's last parameters.
    Products and sums fuse, whatever Triton's default is."""
    if any(isinstance(x, Tensor) for x in (*args, *named.values())):
        raise TypeError("a tensor within a prepared call would be that of the first call for ever: make it an argument")
    named.setdefault("enable_fp_fusion", True)
    _building.plan.launches.append(_Launch(kernel, (*grid, *(1,) * (3 - len(grid))), args, named))
    return _building.plan.launches[-1]


def planned(kernel) -> list["_Launch"]:
    """The launches of a kernel in this call so far, which may be changed yet."""
    return [x for x in _building.plan.launches if x.kernel is kernel]


def record_event() -> None:
    """Whoever gave the call an event need not wait for launches after this; the first time in a call counts."""
    if _building.plan.event_at is None:
        _building.plan.event_at = len(_building.plan.launches)


def scratch_limit() -> int:
    """The limit of the call's scratch memory, bytes."""
    return _building.limit


def stage(function: Callable) -> Callable:
    """Decorator of a function that :func:`call` can take: calling it is that call."""
    return functools.wraps(function)(functools.partial(call, function))


def call(function: Callable, *args, workspace_mib: float | None = None, event: torch.cuda.Event | None = None,
         out: Sequence[Tensor] | None = None, **named):
    """``function(*args, **named)`` with buffers in place of tensors, whose launches then run on the tensors; returns
    what the function returns, tensors in place of buffers. Within another call it is part of that one.

    MOBA_PREPARED_LAUNCHES=0 starts every launch through Triton, which then looks at its settings (``triton.knobs``)
    each time, not with a signature's first call alone. Else a small call becomes a CUDA graph where addresses repeat.

    Args:
        function: calls :func:`empty` and :func:`launch`, and other stages; nothing but the layouts of tensors and the
            other arguments decides what it does. ``function.later(what it returns, *args, **named)``, where it has
            that, is the call expected next if a tensor requires grad: its kernels are compiled beside this one's.
        args, named: tensors of one device, ``None``, dataclasses of tensors and numbers
            (:class:`..segments.Segments`), and whatever is hashable.
        workspace_mib: limit of scratch memory, MiB; None for the environment's.
        event: recorded on the current stream at :func:`record_event`, or at the end.
        out: memory for the results of a function that returns several allocations; it is then what is returned.
    """
    if getattr(_building, "plan", None) is not None:
        return function(*args, **named)
    limit = workspace_limit() if workspace_mib is None else int(workspace_mib * (1 << 20))
    tensors: list[Tensor] = []
    key = [None, function, limit, *named]
    _note((*args, *named.values()), key, tensors)
    addresses = list(map(Tensor.data_ptr, tensors))
    for x, address in zip(tensors, addresses):
        key += (x.shape, x.stride(), address & 15)
    device = key[0] = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # launches go to the current device's stream, wherever the tensors are
            return call(function, *args, workspace_mib=workspace_mib, event=event, out=out, **named)
    plan = _plans.get(key := tuple(key))
    if plan is None or forced_settings:
        plan = _make_plan(function, args, named, tensors, limit)
        if not forced_settings:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan.run(tensors, addresses, event, out)


def _note(args, key: list, tensors: list[Tensor]) -> None:
    """Collects the tensors among arguments, and what else they say of a call's signature."""
    for x in args:
        if isinstance(x, Tensor):
            tensors.append(x)
            key.append(x.dtype)
        elif _has_tensors(type(x)):
            key.append(type(x))
            _note(vars(x).values(), key, tensors)
        else:
            key.append(x)


@functools.lru_cache(maxsize=None)
def _has_tensors(kind: type) -> bool:
    """Whether it is a dataclass with fields for tensors; whatever else is hashable, and taken whole."""
    return is_dataclass(kind) and any("Tensor" in str(field.type) for field in fields(kind))


def _mapped(of: Callable, kind: type, x):
    """What a call takes or returns, with ``of`` applied to all of a kind, also in tuples and in dataclasses of them."""
    if isinstance(x, kind):
        return of(x)
    inner = functools.partial(_mapped, of, kind)
    if type(x) is tuple:
        return tuple(map(inner, x))
    return type(x)(*map(inner, vars(x).values())) if _has_tensors(type(x)) else x


def _make_plan(function: Callable, args: tuple, named: dict[str, Any], tensors: list[Tensor], limit: int) -> "Plan":
    if INTERPRETED and any(x.dtype == torch.bfloat16 for x in tensors):
        raise TypeError("Triton's interpreter (TRITON_INTERPRET=1) computes bfloat16 wrongly: use float16 or float32, "
                        "or backend='torch'")
    plan = Plan(len(tensors))
    buffers = iter([Buffer(place, tuple(x.shape), x.stride(), x.dtype, x.device, 0, x.data_ptr() % 16)
                    for place, x in enumerate(tensors)])  # in the order in which they are met here
    args, *values = _mapped(lambda _: next(buffers), Tensor, (args, *named.values()))
    named = dict(zip(named, values))
    try:
        _building.plan, _building.limit = plan, limit
        plan.finish(function(*args, **named))
        if any(x.requires_grad for x in tensors) and hasattr(function, "later"):
            plan.later = functools.partial(function.later, plan._returned, *args, **named)
    finally:
        _building.plan = None
    return plan


class _Launch:
    """One launch of a plan; after the first run with the compiled kernel, and its arguments but for the addresses."""

    def __init__(self, kernel, grid: tuple[int, int, int], args: tuple, named: dict[str, Any]):
        self.kernel, self.grid, self.args, self.named = kernel, grid, args, named
        self.compiled: Any = None
        self.start: Callable | None = None

    def buffers(self) -> list[Buffer]:
        found = (x.base if isinstance(x, Descriptor) else x for x in (*self.args, *self.named.values()))
        return [x for x in found if isinstance(x, Buffer)]

    def key(self) -> tuple:
        return self.kernel, driver.active.get_current_device(), *(
            self.named.get(p.name) for p in self.kernel.params if p.is_constexpr)

    def _arguments(self, tensor: Callable[[Buffer], Tensor]) -> tuple[list, dict[str, Any], dict[int, Any]]:
        """What ``kernel[grid]`` takes, and the descriptors in it, by the identity of what stood for them."""
        made: dict[int, Any] = {}

        def real(x):
            if isinstance(x, Descriptor):
                return made.setdefault(id(x), x.make(tensor(x.base), *x.layout))
            return tensor(x) if isinstance(x, Buffer) else x

        return list(map(real, self.args)), dict(zip(self.named, map(real, self.named.values()))), made

    def through_triton(self, tensor: Callable[[Buffer], Tensor]) -> None:
        """Compiles where it is the first time; what is not interpreted can be started by :meth:`prepared` then."""
        args, named, made = self._arguments(tensor)
        compiled = self.kernel[self.grid](*args, **named)
        if isinstance(compiled, FutureKernel):  # of another thread, or a mode around this call; by now it is there
            compiled = compiled.result()
        if self.compiled is None and hasattr(compiled, "__getitem__"):
            values = [*self.args, *(self.named.get(p.name, p.default) for p in self.kernel.params[len(self.args):])]
            for x in made.values():
                x.base = None  # a plan keeps no tensor
            self.values = values  # pointers: position, place, bytes; descriptors: these, and one without an address
            self.pointers = [(i, *x.source) for i, x in enumerate(values) if isinstance(x, Buffer)]
            self.descriptors = [(i, *x.base.source, made[id(x)]) for i, x in enumerate(values)
                                if isinstance(x, Descriptor)]
            self.compiled = compiled  # the last: another thread takes the rest to be there

    def prepared(self, addresses: list[int], stream: int) -> None:
        if 0 in self.grid:
            return
        values = self.values.copy()
        for position, place, offset in self.pointers:
            values[position] = addresses[place] + offset
        for position, place, offset, descriptor in self.descriptors:
            values[position] = moved = object.__new__(type(descriptor))
            moved.__dict__.update(descriptor.__dict__, base=_Address(addresses[place] + offset))
        if self.start is None:
            self.start = self.compiled[self.grid]
        self.start(*values, stream=stream)


class Plan:
    """The launches of a call with one signature."""

    def __init__(self, inputs: int):
        self.inputs = inputs
        self.launches: list[_Launch] = []
        self.event_at: int | None = None
        self.is_prepared, self._faulty = False, False  # every launch has its compiled kernel; one has failed
        self._compiled, self._may_be_graph, self.later = False, False, lambda: None
        self._allocated: list[Buffer] = []

    def finish(self, returned) -> None:
        """Lays out the scratch memory: of allocations that are not returned, for as long as launches use them."""
        self._returned = returned
        self.event_at = len(self.launches) if self.event_at is None else self.event_at
        found: set[int] = set()
        _mapped(lambda x: found.add(x.place) or x, Buffer, returned)
        self._results = {place: self._allocated[place - self.inputs] for place in sorted(found) if place >= self.inputs}
        wholes = returned if isinstance(returned, tuple) else (returned,)
        self._flat = all(isinstance(x, Buffer) and x is self._results.get(x.place) for x in wholes)
        self._order = [list(self._results).index(x.place) for x in wholes] if self._flat else []
        spans: dict[int, tuple[int, int]] = {}
        for at, launch in enumerate(self.launches):
            for x in launch.buffers():
                if x.place >= self.inputs and x.place not in self._results and x.nbytes:
                    spans[x.place] = spans.get(x.place, (at, at))[0], at
        sizes = {place: self._allocated[place - self.inputs].nbytes for place in spans}
        self._offsets, self.workspace_bytes = plan_workspace(sizes, spans)

    def run(self, tensors: list[Tensor], addresses: list[int], event: torch.cuda.Event | None,
            out: Sequence[Tensor] | None):
        """Starts the launches on the current stream of the tensors' device, which is the current one."""
        device = tensors[0].device
        if out is None:
            results = []
            for x in self._results.values():
                results.append(torch.empty_strided(x.shape, x.strides, dtype=x.dtype, device=device))
        else:
            results = [out[i] for i in map(self._order.index, range(len(out)))]
        size = (self.workspace_bytes,)
        workspace = torch.empty_strided(size, (1,), dtype=torch.uint8, device=device) if self.workspace_bytes else None
        if not self.is_prepared or os.environ.get("MOBA_PREPARED_LAUNCHES") == "0":
            self._through_triton(tensors, results, workspace, event)
        else:
            try:  # without Triton's look at the arguments
                addresses = addresses + [0] * len(self._allocated)
                base = 0 if workspace is None else workspace.data_ptr()
                for place, offset in self._offsets.items():
                    addresses[place] = base + offset
                for place, x in zip(self._results, results):
                    addresses[place] = x.data_ptr()
                start = functools.partial(self._start, event, _Launch.prepared, addresses)
                stream = driver.active.get_current_stream(device.index)
                if self._may_be_graph and event is None:
                    graphs.start((self, *addresses), start, stream)
                else:
                    start(stream)
            except Exception as error:
                self.is_prepared, self._faulty = False, True
                logger.warning("moba_megatron: prepared launches of a call are not used any more: %s: %s",
                               type(error).__name__, error)
                self._through_triton(tensors, results, workspace, event)
        if out is not None:
            return out
        if self._flat:
            ordered = tuple(map(results.__getitem__, self._order))
            return ordered if isinstance(self._returned, tuple) else ordered[0]
        wholes = {**dict(enumerate(tensors)), **dict(zip(self._results, results))}
        return _mapped(lambda x: _view(wholes[x.place], x), Buffer, self._returned)

    def _through_triton(self, tensors: list[Tensor], results: list[Tensor], workspace: Tensor | None,
                        event: torch.cuda.Event | None) -> None:
        wholes = {**dict(enumerate(tensors)), **dict(zip(self._results, results))}

        def tensor(x: Buffer) -> Tensor:
            if x.place in wholes:
                return _view(wholes[x.place], x)
            whole, begin = self._allocated[x.place - self.inputs], self._offsets.get(x.place)
            if begin is None:  # of size 0
                return torch.empty(x.shape, dtype=x.dtype, device=tensors[0].device)
            return _view(workspace[begin:begin + whole.nbytes].view(whole.dtype).view(whole.shape), x)

        if len(self.launches) > 1 and not self._compiled and not INTERPRETED:
            self._compiled = True
            contextvars.Context().run(_compile, self)
        self._start(event, _Launch.through_triton, tensor)
        self._may_be_graph = (graphs.libcuda is not None and tensors[0].is_cuda and len(self.launches) > 1
                              and sum(x.nbytes for x in results) <= MAX_BYTES)
        for launch in self.launches:
            if launch.compiled is None:  # it is interpreted
                return
            of, sizes = getattr(launch.compiled, "metadata", None), ("global_scratch_size", "profile_scratch_size")
            self._may_be_graph &= not any(getattr(of, size, 0) for size in sizes)  # memory of one launch alone
        self.is_prepared = bool(self.launches) and not self._faulty

    def _start(self, event: torch.cuda.Event | None, start: Callable, *args) -> None:
        for launch in self.launches[:self.event_at]:
            start(launch, *args)
        if event is not None:
            event.record()
        for launch in self.launches[self.event_at:]:
            start(launch, *args)


def _view(base: Tensor, x: Buffer) -> Tensor:
    """The part of an input or allocation that a buffer is."""
    if x.offset == 0 and base.shape == x.shape:
        return base
    return base.as_strided(x.shape, x.strides, base.storage_offset() + x.offset)


def _compile(plan: Plan) -> None:
    """Compiles its kernels side by side, in threads that go on with those of the call expected next; an error is left
    to the launch that meets it."""
    launches, pool = [launch for launch in plan.launches if isinstance(launch.kernel, JITFunction)], None
    try:
        if not all(launch.key() in _compiled for launch in launches):
            _building.plan = later = Plan(0)
            plan.later()
            wanted = launches + [launch for launch in later.launches if isinstance(launch.kernel, JITFunction)]
            # of torchrun's ranks on this host each takes its part of the cores
            pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1)
            submit = functools.partial(pool.submit, _compile_with_launcher)
            AsyncCompileMode(SimpleNamespace(submit=submit)).__enter__()  # for good: the context is this function's
            patience = time.monotonic() + 3
            for launch in sorted(wanted, key=lambda launch: -len(launch.kernel.params)):  # which take longer
                args, named, _ = launch._arguments(lambda x: x)
                kernel = launch.kernel.warmup(*args, grid=launch.grid, **named)
                _compiled.setdefault(launch.key(), []).append(kernel)
                while _python_runs() and time.monotonic() < patience:
                    pass  # all of Python has one core: the longest first
        for kernel in (kernel for launch in launches for kernel in _compiled[launch.key()]):
            if isinstance(kernel, FutureKernel):
                kernel.result()
    except Exception as error:
        logger.debug("moba_megatron: kernels were not compiled side by side: %r", error)
        for launch in launches:  # Triton would keep the error
            _compiled.pop(launch.key(), None)
            launch.kernel.device_caches.pop(driver.active.get_current_device(), None)
    finally:
        _building.plan = None
        if pool:
            pool.shutdown(wait=False)


def _compile_with_launcher(compile: Callable):
    """What it returns, with what starts it in Triton's cache: up to Triton 3.6 a C compiler makes that, in 0.3 s."""
    kernel = compile()
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _python_runs() -> bool:
    """Whether another thread holds the interpreter, as Triton's do until a kernel's code has become its IR."""
    begin = time.monotonic()
    for _ in range(5):
        time.sleep(0.001)
    return time.monotonic() - begin > 0.005 + sys.getswitchinterval() / 2
