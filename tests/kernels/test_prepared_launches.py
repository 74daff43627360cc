"""Prepared launches: a stand-in for Triton's compiled kernels notes what is started, which is what Triton starts.

Nothing is compiled and nothing runs: the operator goes through its launches on CPU tensors as for Hopper.
"""
import contextlib
import functools
import threading
from types import SimpleNamespace

import pytest
import torch
import triton
from stand_in_driver import CASES, cloned, make

from moba_megatron import kernels
from moba_megatron.kernels import launcher, tuning
from moba_megatron.kernels.workspace import ALIGNMENT, plan_workspace, workspace_limit
from moba_megatron.ops.decode import moba_decode
from moba_megatron.ops.pipeline import Pipeline
from moba_megatron.segments import Segments

pytestmark = pytest.mark.usefixtures("driver")


def make_decode(paged=False):
    """As :func:`make`, for a decoding step."""
    lengths = torch.tensor([900, 1024], dtype=torch.int32)
    shape = (32, 64) if paged else (2, 1024)
    k, v = (torch.zeros(*shape, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    table = torch.arange(32, dtype=torch.int32).view(2, 16) if paged else None

    def call(q, k, v, means):
        return moba_decode(q, k, v, means, lengths, 128, 3, block_table=table, backend="triton", return_lse=True)

    return (torch.zeros(2, 8, 128, dtype=torch.bfloat16), k, v, torch.zeros(2, 8, 2, 128, dtype=torch.bfloat16)), call


def make_rank():
    """As :func:`make`, for two segments of one sequence on a rank of context parallelism."""
    (q, k, v, do, _), _ = make([4096], chunk=512)
    cu_q, cu_k, ids, offsets = (torch.tensor(x, dtype=torch.int32)
                                for x in ([0, 512, 1024], [0, 4096], [0, 0], [512, 3072]))
    segments = Segments(cu_q, cu_k, ids, offsets, 512, 4096, 512)
    pipeline = Pipeline(kernels, 3, 0.1)

    def call(q, k, v, do):
        choice = pipeline.choose(q, k, segments)
        o, saved = pipeline.attend(q, k, v, choice, segments)
        return (choice.selected, choice.routing.indices, o, saved.lse,
                *pipeline.backward(do, None, q, k, v, saved, segments, torch.float32))

    return (q[:1024], k, v, do[:1024]), call


def assert_same(launches, ordinary, moved: dict[int, int]):
    """Names, grids, sizes and scalars agree, and each pointer of one stands wherever its counterpart stands.

    moved: address in ``ordinary`` -> address in ``launches``, as far as known; completed.
    """
    assert [x[0] for x in launches] == [x[0] for x in ordinary]
    for (name, *launch, got), (_, *expected, want) in zip(launches, ordinary):
        assert launch == expected, name
        assert len(got) == len(want), name
        for i, (a, b) in enumerate(zip(got, want)):
            if isinstance(b, tuple):
                assert moved.setdefault(b[1], a[1]) == a[1], (name, i)
            else:
                assert a == b, (name, i)


def plainly(call, tensors, monkeypatch):
    """The call with every launch through Triton, each allocation at an address of its own."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setenv("MOBA_PREPARED_LAUNCHES", "0")
        makers = [(torch, "empty"), (torch, "empty_strided"), (torch, "empty_like"), (torch.Tensor, "__neg__")]
        for place, name in makers:
            patch.setattr(place, name, lambda *args, real=getattr(place, name), **options: (
                kept.append(real(*args, **options)), kept[-1])[1])
        return call(*tensors)


@pytest.mark.parametrize("made", [*(functools.partial(make, **case) for case in CASES.values()), make_decode,
                                  functools.partial(make_decode, paged=True), make_rank],
                         ids=[*CASES, "decode", "decode from pages", "a rank of context parallelism"])
def test_prepared_launches_are_what_triton_launches(made, driver, monkeypatch):
    tensors, call = made()
    kept = [call(*tensors)]  # so that no result of a later call is where one of this was
    assert not driver.prepared and launcher._plans
    others = cloned(tensors)
    driver.launches = []
    got = call(*others)
    prepared, driver.launches = driver.launches, []
    assert driver.prepared == len(prepared) > 0
    want = plainly(call, tensors, monkeypatch)
    assert driver.prepared == len(prepared)
    moved = {b.data_ptr(): a.data_ptr() for a, b in zip((*others, *got), (*tensors, *want)) if b.numel()}
    if "softmax_scale" not in (made.keywords if isinstance(made, functools.partial) else {}):  # -q is made anew
        moved[0] = 0
    assert_same(prepared, driver.launches, moved)
    check_scratch()
    assert kept


def check_scratch():
    """No two scratch tensors that are used between each other's first and last use share memory; each is in it."""
    for plan in launcher._plans.values():
        spans = {}
        for at, launch in enumerate(plan.launches):
            for x in launch.buffers():
                if x.place in plan._offsets:
                    begin = plan._offsets[x.place]
                    spans[x.place] = spans.get(x.place, (at,))[0], at, begin, begin + plan._allocated[
                        x.place - plan.inputs].nbytes
        assert set(spans) == set(plan._offsets)
        for place, (first, last, begin, end) in spans.items():
            assert end <= plan.workspace_bytes
            for other, (its_first, its_last, its_begin, its_end) in spans.items():
                if place != other and its_first <= last and first <= its_last:
                    assert its_end <= begin or end <= its_begin


class Event:
    """An event that notes how many launches there were before it."""

    def __init__(self, driver):
        self._driver, self.at = driver, []

    def record(self):
        self.at.append(len(self._driver.launches))


@pytest.mark.parametrize("name, topk", [(name, 3) for name in (
    "1 head", "gqa", "chunk 128: fused", "cut lists", "groups of heads", "groups of heads, fused", "packed", "fp32"
)] + [("gqa", 1)])
def test_the_event_is_where_dk_and_dv_are_complete(name, topk, driver):
    """Recorded right behind the last kernel that writes them, whichever way the call goes."""
    case = CASES[name]
    (q, k, v, do, _), _ = make(**case)
    cu = torch.tensor([0, *case["lengths"]]).cumsum(0).int()
    segments = Segments.from_cu_seqlens(cu, max(case["lengths"]), case["chunk"])
    pipeline = Pipeline(kernels, topk, 0.1, workspace_mib=case.get("workspace_mib"))
    choice = pipeline.choose(q, k, segments) if topk > 1 else None
    o, saved = pipeline.attend(q, k, v, choice, segments)
    for way in ("through Triton", "prepared", "prepared, without", "prepared"):
        driver.launches.clear()
        event = Event(driver)
        _, *grads = pipeline.backward(do, None, q, k, v, saved, segments, torch.float32,
                                      None if way == "prepared, without" else event)
        addresses = {("pointer", x.data_ptr()) for x in grads}
        writing = [i for i, (*_, values) in enumerate(driver.launches)
                   if addresses & {x for x in values if isinstance(x, tuple)}]
        assert event.at == ([] if way == "prepared, without" else [writing[-1] + 1]), way
        assert writing[-1] < len(driver.launches) - 1, "dq comes after it"
        assert len(writing) > 1 or name not in ("cut lists", "groups of heads, fused")


def test_an_event_that_is_not_mentioned_is_at_the_end(driver):
    """A forward call says nothing of it."""
    (q, k, _, _, _), _ = make(**CASES["1 head"])
    segments = Segments.from_cu_seqlens(torch.tensor([0, 2048], dtype=torch.int32), 2048, 512)
    for _ in range(3):
        driver.launches.clear()
        event = Event(driver)
        kernels.call(lambda q, k, segments: kernels.gate(q, kernels.chunk_means(k, segments), segments, 3), q, k,
                     segments, event=event)
        assert driver.launches and event.at == [len(driver.launches)]


def test_memory_that_is_free_again_is_used_again():
    sizes, spans = {0: 1000, 1: 5000, 2: 900, 3: 10}, {0: (0, 1), 1: (1, 3), 2: (2, 3), 3: (0, 3)}
    offsets, total = plan_workspace(sizes, spans)
    assert offsets[0] == offsets[2] and all(x % ALIGNMENT == 0 for x in offsets.values())
    assert total == max(offsets[n] + sizes[n] for n in sizes) < sum(sizes.values())


def test_the_stream_is_taken_at_each_call(driver):
    tensors, call = make(**CASES["1 head"])
    for stream in (5, 5, 5, 9, 9, 0):
        driver.stream = stream
        driver.launches.clear()
        call(*tensors)
        assert {x[2] for x in driver.launches} == {stream}


def test_what_is_forced_is_not_kept(driver):
    tensors, call = make(**CASES["1 head"])
    with tuning.forced("sm_90"):
        for _ in range(2):
            call(*tensors)
    assert not launcher._plans and not driver.prepared


@pytest.mark.parametrize("error", [OSError("a fault"), TypeError("no such argument")], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("at", [0, 3])
def test_after_a_fault_launches_go_through_triton(error, at, driver, monkeypatch, caplog):
    """All of the call's, those that were started before it too; said once."""
    tensors, call = make(**CASES["1 head"])
    call(*tensors)
    started = []

    def fault():
        started.append(1)
        if len(started) > at:
            raise error

    driver.fault = fault
    for _ in range(3):
        driver.launches, driver.prepared = [], 0
        got = call(*tensors)
        through_triton = driver.launches[driver.prepared:] if not driver.prepared else None
    driver.launches = []
    want = plainly(call, tensors, monkeypatch)
    moved = {b.data_ptr(): a.data_ptr() for a, b in zip((*tensors, *got), (*tensors, *want))}
    assert_same(through_triton, driver.launches, moved)
    assert caplog.text.count(f"not used any more: {type(error).__name__}: {error}") == len(launcher._plans) == 2


def test_an_interrupt_leaves_nothing_behind(driver, monkeypatch):
    tensors, call = make(**CASES["1 head"])
    call(*tensors)
    call(*tensors)
    launches = len(driver.launches) // 2
    for number in range(launches):
        left = [number]

        def interrupt(left=left):
            left[0] -= 1
            if left[0] < 0:
                driver.fault = None
                raise KeyboardInterrupt

        driver.fault = interrupt
        with pytest.raises(KeyboardInterrupt):
            call(*cloned(tensors))
        driver.launches, driver.prepared = [], 0
        got = call(*tensors)
        prepared, driver.launches = driver.launches, []
        assert driver.prepared == launches
        want = plainly(call, tensors, monkeypatch)
        assert_same(prepared, driver.launches,
                    {b.data_ptr(): a.data_ptr() for a, b in zip((*tensors, *got), (*tensors, *want))})


def test_threads_share_plans(driver, monkeypatch):
    """Each call's launches have its own tensors' addresses."""
    tensors, call = make(**CASES["1 head"])
    call(*tensors)
    inputs, seen = [cloned(tensors) for _ in range(4)], []
    note = driver.note
    monkeypatch.setattr(driver, "note", lambda *args: (seen.append((threading.current_thread(), args[4])), note(*args)))
    threads = [threading.Thread(target=lambda mine=mine: [call(*mine) for _ in range(5)]) for mine in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    of_inputs = {x.data_ptr(): i for i, mine in enumerate(inputs) for x in mine}
    whose = {}
    for thread, args in seen:
        for x in args:
            if type(x) is int and x in of_inputs:
                assert whose.setdefault(thread, of_inputs[x]) == of_inputs[x]
    assert len(whose) == 4 and driver.prepared


@pytest.mark.parametrize("change", ["strides", "alignment", "dtype", "length", "option", "workspace"])
def test_another_signature_is_another_plan(change, monkeypatch):
    case = dict(CASES["1 head"])
    (q, k, v, do, dlse), call = make(**case)
    call(q, k, v, do, dlse)
    before = len(launcher._plans)
    if change == "strides":
        k = torch.zeros(2048, 1, 256, dtype=k.dtype)[..., :128]
    elif change == "alignment":
        k = torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    elif change == "workspace":
        monkeypatch.setenv("MOBA_WORKSPACE_MIB", "77")
    else:
        case |= {"dtype": dict(dtype=torch.float16), "length": dict(lengths=[2049]),
                 "option": dict(softmax_scale=0.5)}[change]
        (q, k, v, do, dlse), call = make(**case)
    call(q, k, v, do, dlse)
    assert len(launcher._plans) == before + 2


def test_an_error_of_a_stage_keeps_no_plan(driver, monkeypatch):
    tensors, call = make(**CASES["1 head"])
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "gate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*tensors)
    assert not launcher._plans and launcher._building.plan is None
    call(*tensors)
    call(*tensors)
    assert driver.prepared


class Kernel:
    """As a JITFunction: ``kernel[grid](...)`` compiles and launches."""

    params = [SimpleNamespace(name="x", is_constexpr=False)]

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        def run(x, **options):
            self.log.append("Triton")
            return {grid: lambda *args, stream: self.log.append(stream)}

        return run


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(launcher, "MAX_PLANS", 3)
    kernel = Kernel([])
    for length in range(1, 9):
        launcher.call(lambda x: launcher.launch(kernel, (4,), x), torch.zeros(length))
        assert len(launcher._plans) <= 3


def test_the_limit_of_scratch_memory_is_the_calls(monkeypatch):
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", "77")
    limits = []

    def inner(x):
        limits.append(launcher.scratch_limit())

    def outer(x):
        limits.append(launcher.scratch_limit())
        launcher.call(inner, x)

    launcher.call(outer, torch.zeros(1), workspace_mib=5)
    launcher.call(outer, torch.zeros(1))
    assert limits == [5 << 20, 5 << 20, 77 << 20, 77 << 20]
    assert workspace_limit() == 77 << 20


def test_what_a_plan_would_keep_or_lose_is_refused():
    kernel, kept = Kernel([]), torch.zeros(4)
    with pytest.raises(TypeError, match="make it an argument"):
        launcher.call(lambda x: launcher.launch(kernel, (4,), kept), torch.zeros(4))
    with pytest.raises(TypeError, match="strides .* is to be contiguous"):
        launcher.call(lambda x: x.contiguous(), torch.zeros(4, 4).t())
    with pytest.raises(TypeError):
        launcher.call(lambda x: x + 1, torch.zeros(4))
    with pytest.raises(TypeError):
        launcher.call(lambda x: torch.neg(x), torch.zeros(4))
    assert not launcher._plans


class OnCard(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    number = 0
    device = property(lambda self: torch.device("cuda", self.number))


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Prepared or not; afterwards the current device is what it was."""
    current, log = [0], []

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton.runtime.driver.active, "get_current_stream", lambda n: f"stream of {n} on {current[0]}")
    kernel = Kernel(log)
    function = functools.partial(launcher.launch, kernel, (4,))
    for number in (1, 0, 1, 0):
        x = torch.zeros(4).as_subclass(OnCard)
        x.number = number
        launcher.call(function, x)
        assert current == [0]
    assert log == ["Triton", "Triton", "stream of 1 on 1", "stream of 0 on 0"]
    assert [key[0].index for key in launcher._plans] == [1, 0]
