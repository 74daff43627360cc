"""Tensors that are kept between calls: right whoever asked first, bounded, and nowhere else than in the one cache."""
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import threading
import types
import typing

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import moba_megatron
from moba_megatron import moba_attn_varlen
from moba_megatron.context_parallel import Sequences
from moba_megatron.ops import moba_attention
from moba_megatron.segments import Segments, uniform_segments
from moba_megatron.tensor_cache import TensorCache, cached_tensors

CPU = torch.device("cpu")
CACHED = {
    "whole sequences": lambda n: uniform_segments(n, n, 2, 4, CPU),
    "the end of sequences": lambda n: uniform_segments(3, n, 2, 4, CPU),
    "packed sequences": lambda n: Segments.from_cu_seqlens(torch.arange(n + 1, dtype=torch.int32), 1, 4),
    "cu_seqlens of a group": lambda n: Sequences.uniform(n, 2, CPU),
    "segments of a group": lambda n: Sequences.uniform(n, 2, CPU).whole(4),
    "a rank's part": lambda n: Sequences.uniform(n, 2, CPU).part(2),
    "rows of a group": lambda n: Sequences.uniform(n, 2, CPU).rows(2, 1),
    "a rank of a zigzag": lambda n: Sequences.uniform(n, 2, CPU).zigzag(2, 1, 4),
}


def tensors_of(x):
    if isinstance(x, torch.Tensor):
        return [x]
    names = [f.name for f in dataclasses.fields(x)] if dataclasses.is_dataclass(x) else []
    return [t for name in names for t in tensors_of(getattr(x, name))]


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def in_another_thread(make, n):
    thread = threading.Thread(target=make, args=(n,))
    thread.start()
    thread.join()


FIRST = {
    "fake tensors": lambda make, n: _within(FakeTensorMode(), make, n),
    "inference mode": lambda make, n: _within(torch.inference_mode(), make, n),
    "a default device": lambda make, n: _within(torch.device("meta"), make, n),
    "a dispatch mode": lambda make, n: _within(Looking(), make, n),
    "vmap": lambda make, n: torch.vmap(lambda x: (make(n), x)[1])(torch.zeros(2)),
    "grad": lambda make, n: torch.func.grad(lambda x: (make(n), x)[1])(torch.tensor(0.)),
    "another thread": in_another_thread,
    "a compiler": lambda make, n: torch.compile(lambda x: x + tensors_of(make(n))[0].sum(), backend="eager")(
        torch.zeros(1)),
}


def _within(context, make, n):
    with context:
        make(n)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", CACHED)
def test_the_first_to_ask_leaves_nothing_odd_behind(name, first):
    n, make = 48, CACHED[name]
    cached_tensors.clear()
    expected = make(n)
    cached_tensors.clear()
    torch._dynamo.reset()
    try:
        FIRST[first](make, n)
    except torch._subclasses.fake_tensor.DynamicOutputShapeException:
        assert (name, first) == ("a rank of a zigzag", "fake tensors")  # how much ranks send depends on values
    got = make(n)
    for a, b in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert type(a) is torch.Tensor and a.device == CPU and not a.is_inference()
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("first", ("fake tensors", "inference mode", "a dispatch mode", "a default device"))
def test_training_after_it(first):
    """The operator itself, by segments that all come from the cache."""
    def attend(n):
        q, k, v = (torch.randn(2 * n, heads, 8, requires_grad=True, device="cpu") for heads in (4, 2, 2))
        o = moba_attention(q, k, v, uniform_segments(n, n, 2, 4, CPU), 2)
        if not isinstance(o, FakeTensor) and not o.is_inference():
            o.sum().backward()
            assert all(x.grad.isfinite().all() for x in (q, k, v))

    cached_tensors.clear()
    FIRST[first](attend, 24)
    attend(24)


def test_what_is_asked_for_again_is_the_same_object_and_copies_are_shared():
    assert uniform_segments(24, 24, 2, 4, CPU) is uniform_segments(24, 24, 2, 4, CPU)
    assert uniform_segments(24, 24, 2, 4, CPU) is not uniform_segments(24, 24, 2, 8, CPU)


def test_bounds():
    """In bytes and in number; the oldest goes first; what is larger than all is kept alone."""
    cache, made = TensorCache(max_bytes=4096, max_entries=3), []

    @cache
    def zeros(n, device):
        made.append(n)
        return torch.zeros(n, dtype=torch.int8, device=device)

    for n in (1000, 1001, 1002, 1000, 1003, 1000, 1001):
        zeros(n, CPU)
    assert made == [1000, 1001, 1002, 1003, 1001] and cache.nbytes == 1003 + 1000 + 1001
    zeros(4000, CPU)
    assert cache.nbytes == 4000
    zeros(5000, CPU), zeros(5000, CPU)
    assert cache.nbytes == 5000 and made[5:] == [4000, 5000]
    cache.clear()
    assert cache.nbytes == 0


def test_what_a_graph_reads_is_kept(monkeypatch):
    """The rules of capture, without a GPU: nothing made in it is kept, and what it was given is never dropped."""
    cache, made = TensorCache(max_bytes=1 << 20, max_entries=1), []

    @cache
    def counted(n, device):
        made.append(n)
        return torch.arange(n, device=device)

    before = counted(5, CPU)
    with monkeypatch.context() as capture:
        capture.setattr("moba_megatron.tensor_cache.is_capturing", lambda device: True)
        assert counted(5, CPU) is before
        assert counted(6, CPU) is not counted(6, CPU)
    for n in (6, 7, 8):
        counted(n, CPU)
    cache.clear()
    assert counted(5, CPU) is before and made == [5, 6, 6, 6, 7, 8]


def modules():
    for found in pkgutil.walk_packages(moba_megatron.__path__, "moba_megatron."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def holds_tensors(kind, seen=()):
    """Whether values of an annotated type can hold a tensor."""
    if isinstance(kind, type) and issubclass(kind, torch.Tensor):
        return True
    if dataclasses.is_dataclass(kind) and kind not in seen:
        hints = typing.get_type_hints(kind)
        return any(holds_tensors(hints[f.name], (*seen, kind)) for f in dataclasses.fields(kind))
    return any(holds_tensors(x, seen) for x in typing.get_args(kind))


NO_CACHES = {"moba_megatron.megatron.refusals._pending"}
"""Queues: what waits there is read once, in order, by whoever put it there."""


def test_no_other_cache_holds_tensors():
    """Every functools cache, and every dict, list and set of a module or class, by what it is annotated to hold."""
    found, caches = [], 0
    for module in modules():
        places = [(module.__name__, vars(module), getattr(module, "__annotations__", {}))]
        places += [(f"{module.__name__}.{x.__name__}", vars(x), inspect.get_annotations(x))
                   for x in vars(module).values() if inspect.isclass(x) and x.__module__ == module.__name__]
        for place, names, annotations in places:
            for name, x in names.items():
                if isinstance(x, functools._lru_cache_wrapper) and x.__module__ == module.__name__:
                    caches += 1
                    kind = typing.get_type_hints(x.__wrapped__).get("return")
                    assert kind is not None, f"{place}.{name} must say what it returns"
                elif isinstance(x, (dict, list, set)) and name in annotations:
                    kind = eval(annotations[name], vars(module)) if isinstance(annotations[name], str) else x
                else:
                    continue
                if holds_tensors(kind) and f"{place}.{name}" not in NO_CACHES:
                    found.append(f"{place}.{name}")
    assert caches > 10
    assert not found, f"tensors are kept by tensor_cache.cached_tensors only, not by {', '.join(found)}"


def test_the_walk_sees_what_it_looks_for():
    assert holds_tensors(dict[str, Segments]) and holds_tensors(torch.Tensor | None) and holds_tensors(Segments)
    assert not holds_tensors(dict[str, tuple[int, str]]) and not holds_tensors(types.ModuleType)


def test_unusual_calls_of_the_operator_keep_nothing_unusual():
    cached_tensors.clear()
    with FakeTensorMode():
        q = torch.randn(12, 2, 4)
        moba_attn_varlen(q, q, q, torch.tensor([0, 12], dtype=torch.int32), 12, 4, 2)
    assert cached_tensors.nbytes == 0
