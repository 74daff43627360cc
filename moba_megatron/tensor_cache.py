"""Tensors that depend only on numbers the host knows (cu_seqlens of equal lengths, orders of rows), made once and kept.

Whoever asks first must not decide what all others get: a pass with fake tensors, a transform, a compiler or a CUDA
graph under capture makes its own and leaves nothing behind; inference mode leaves tensors that training can use.
"""
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")


def is_unobserved(*tensors: Tensor) -> bool:
    """Whether nothing but autograd looks on: no compiler, no dispatch mode (fake tensors, selective checkpointing), no
    transform, no meta or batched tensor, no tensor subclass. Tensors made then are ordinary ones."""
    if (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()):
        return False
    for x in tensors:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or torch._C._functorch.is_legacy_batchedtensor(x):
            return False
    return True


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph of work for this device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_readable(x: Tensor) -> bool:
    """Whether the host may read values, and keep what it makes of them: no compiler, fake tensor or graph capture."""
    return not (torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta or is_capturing(x.device))


class _Memory(dict):
    """Copies of a tensor, and files with it, have none of what it was found to say: they may be written to alone."""

    def __reduce__(self):
        return dict, ()


def remembered(of: Tensor, key: Hashable, build: Callable[[], R], others: tuple = ()) -> R:
    """``build()``, or what an earlier layer of the same forward built from the same tensors, beside the first one."""
    if not all(is_readable(x) and not x.is_inference() for x in (of, *others) if isinstance(x, Tensor)):
        return build()
    state = [(id(x), x._version) if isinstance(x, Tensor) else x for x in others]
    known = getattr(of, "moba_remembered", {})
    if known.get("version") != of._version:
        known = of.moba_remembered = _Memory(version=of._version)
    if key not in known or known[key][1] != state:
        known[key] = build(), state, others  # these too, so that no other tensor gets their ids
    return known[key][0]


@dataclass
class _Entry:
    value: object
    tensors: list[Tensor]
    streams: set[int] = field(default_factory=set)
    """Those on which it has been used: the allocator must not reuse its memory before their work is done."""


class TensorCache:
    """Decorator of functions ``build(*numbers, device)`` that return a tensor, or tuples or dataclasses of tensors.

    ``build`` depends on nothing but its arguments, which are hashable. For a GPU it runs on the CPU, and its result's
    copy has arrived before anybody gets it, so every stream may read it at once. Where something looks on, ``build``
    runs with the device itself; under capture it must then wait for nothing. All decorated functions together keep up
    to ``max_bytes`` and ``max_entries`` results; the least recently used goes first, and what is larger is kept alone.
    What a CUDA graph reads comes on top and is kept for good: a graph does not say when it is gone."""

    def __init__(self, max_bytes: int, max_entries: int):
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._captured: dict[tuple, _Entry] = {}
        self._lock = threading.Lock()

    def __call__(self, build: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(build)
        def cached(*args):
            *numbers, device = args
            if device.type == "meta":  # a schedule that is compiled only: how large tensors are may depend on values
                return _on_device(build(*numbers, torch.device("cpu")), device).value
            if not is_unobserved():
                return build(*args)
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
            key, capturing = (build, device, *numbers), is_capturing(device)
            with self._lock:
                entry = self._entries.get(key) or self._captured.get(key)
                if key in self._entries:
                    self._entries.move_to_end(key)
                    if capturing:
                        self._captured[key] = self._entries.pop(key)
            if entry is None and capturing:
                return build(*args)
            if entry is None:
                with torch.inference_mode(False):
                    entry = _on_device(build(*numbers, torch.device("cpu")), device)
                with self._lock:
                    self._entries[key] = entry
                    while 1 < len(self._entries) and (
                            self.nbytes > self.max_bytes or len(self._entries) > self.max_entries):
                        self._entries.popitem(last=False)
            if device.type == "cuda" and not capturing:
                stream = torch._C._cuda_getCurrentRawStream(device.index)
                if stream not in entry.streams:
                    for x in entry.tensors:
                        x.record_stream(torch.cuda.current_stream(device))
                    entry.streams.add(stream)
            return entry.value

        return cached

    @property
    def nbytes(self) -> int:
        """Of what is kept and may be dropped."""
        return sum(x.nbytes for entry in self._entries.values() for x in entry.tensors)

    def clear(self) -> None:
        """Forgets everything but what CUDA graphs read."""
        with self._lock:
            self._entries.clear()


cached_tensors = TensorCache(64 << 20, 1024)
_copy_stream = functools.lru_cache(maxsize=None)(torch.cuda.Stream)  # one a device


def _on_device(value, device: torch.device) -> _Entry:
    """An entry with copies of the value's tensors; the host waits for them, but not for other work on the device."""
    copies: dict[int, Tensor] = {}  # a tensor that occurs twice is copied once

    def copied(x):
        if isinstance(x, Tensor):
            return copies.setdefault(id(x), x.to(device))
        if is_dataclass(x):
            return type(x)(**{f.name: copied(getattr(x, f.name)) for f in fields(x)})
        return tuple(map(copied, x)) if isinstance(x, tuple) else x

    with torch.cuda.stream(_copy_stream(device) if device.type == "cuda" else None):
        return _Entry(copied(value), list(copies.values()))
