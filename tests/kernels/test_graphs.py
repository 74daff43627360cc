"""Calls that become CUDA graphs, by a stand-in for libcuda: which do, what starts then, and what faults leave."""
import threading
import time
import weakref

import pytest
import torch
from stand_in_driver import CASES, Cuda, cloned, make
from triton import knobs

from moba_megatron import kernels, moba_attn_varlen
from moba_megatron.kernels import graphs, launcher
from moba_megatron.segments import Segments

CAPTURE = ["cuStreamCreate", "cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags",
           "cuGraphDestroy", "cuStreamDestroy_v2"]


@pytest.fixture
def cuda(driver, monkeypatch):
    """The stand-in in place of libcuda, CPU tensors that say they are on a CUDA device, nothing known of any call."""
    cuda = Cuda(driver)
    monkeypatch.setattr(graphs, "libcuda", cuda)
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 256)
    monkeypatch.setattr(graphs, "_graphs", weakref.WeakSet())
    monkeypatch.setattr(graphs, "_recent", {})
    monkeypatch.setattr(graphs, "_older", {})
    monkeypatch.setattr(graphs, "_alone", lambda: True)  # threads that have compiled may not have ended yet
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield cuda
    graphs._recent.clear()
    graphs._older.clear()
    assert not driver.captured and not cuda.streams and not cuda.graphs
    assert not cuda.execs and not cuda.mode


@pytest.fixture
def again(monkeypatch):
    """Makes of a call one whose n-th allocation has the address that it had the time before, for the same tensors."""
    memory, turn, real = {}, threading.local(), torch.empty_strided

    def empty_strided(size, stride, **options):
        if not getattr(turn, "of", None):
            return real(size, stride, **options)
        turn.number += 1
        place = (turn.of, turn.number)
        if place not in memory:
            memory[place] = real(size, stride, **options)
        return memory[place].detach()

    def wrapped(call):
        def called(*tensors):
            turn.number, turn.of = 0, tuple(x.data_ptr() for x in tensors)
            try:
                return call(*tensors)
            finally:
                turn.of = None

        return called

    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    return wrapped


@pytest.fixture
def started(driver):
    """What calling starts: the launches that run, and how many were started one by one."""
    def of(call, *tensors):
        driver.launches, driver.prepared = [], 0
        call(*tensors)
        return driver.launches, driver.prepared

    return of


alone = graphs._alone


def small(event=None, length=2048):
    """Tensors, and a call without autograd."""
    (q, k, _, _, _), _ = make([length], heads=1, chunk=512)
    segments = Segments.from_cu_seqlens(torch.tensor([0, length], dtype=torch.int32), length, 512)

    def means_and_gate(q, k, segments):
        return kernels.gate(q, kernels.chunk_means(k, segments), segments, 3)

    return (q, k), lambda q, k: kernels.call(means_and_gate, q, k, segments, event=event)


@pytest.mark.parametrize("case", [CASES[name] for name in (
    "1 head", "gqa", "chunk 128: fused", "groups of heads", "packed", "fp32", "gradient of lse")])
def test_the_third_time_that_addresses_come_is_a_graph(case, driver, cuda, again, started):
    """Forward and backward are one each; what runs is what runs without, on the stream of the time."""
    tensors, call = make(**case)
    call = again(call)
    call(*tensors)  # through Triton
    for _ in range(2):
        launches, prepared = started(call, *tensors)
        assert prepared == len(launches) > 2 and not cuda.called
    assert started(call, *tensors) == (launches, prepared)
    assert cuda.called == 2 * [*CAPTURE, "cuGraphLaunch"]
    for driver.stream in (5, 0, 9):
        cuda.called.clear()
        expected = [(name, grid, driver.stream, values) for name, grid, _, values in launches]
        assert started(call, *tensors) == (expected, 0)
        assert cuda.called == ["cuGraphLaunch"] * 2


def test_other_addresses_are_other_graphs(cuda, again, started):
    a, call = make(**CASES["1 head"])
    b, call = cloned(a), again(call)
    call(*a)
    of_a, of_b = started(call, *a)[0], started(call, *b)[0]
    assert of_a != of_b
    for _ in range(4):
        assert started(call, *a)[0] == of_a
        assert started(call, *b)[0] == of_b
    assert len(cuda.execs) == 4
    del b[0]
    moved = [a[0].clone(), *a[1:]]  # q alone is elsewhere
    launches, prepared = started(call, *moved)
    assert prepared == len(launches) and launches not in (of_a, of_b)
    assert started(call, *a) == (of_a, 0)


def test_another_call_with_the_same_addresses_is_another_graph(cuda, again, started):
    tensors, cu = make(**CASES["1 head"])[0][:3], torch.tensor([0, 2048], dtype=torch.int32)
    calls = [again(lambda q, k, v, scale=scale: moba_attn_varlen(q, k, v, cu, 2048, 512, 3, softmax_scale=scale,
                                                                 backend="triton")) for scale in (None, 0.5)]
    for _ in range(3):
        want = [started(call, *tensors)[0] for call in calls]
    assert want[0] != want[1]
    for _ in range(3):
        assert [started(call, *tensors)[0] for call in calls] == want
    assert len(cuda.execs) == 2


def test_fresh_memory_each_time_is_never_a_graph(cuda, started):
    (q, k), call = small()
    kept = []
    for _ in range(6):
        kept.append(call(q, k))
    assert not cuda.called and len(graphs._recent) == 5


class Event:
    def record(self):
        pass


def hook(*_):
    pass


@pytest.mark.parametrize("reason", ["large", "event", "enter hook", "exit hook", "one function as hook", "capture",
                                    "environment", "no CUDA", "one launch", "no libcuda"])
def test_which_calls_are_started_launch_by_launch(reason, cuda, again, started, monkeypatch):
    """And those that were a graph are one again when the reason is gone."""
    (q, k), call = small(Event() if reason == "event" else None)
    if reason == "one launch":
        segments = Segments.from_cu_seqlens(torch.tensor([0, 2048], dtype=torch.int32), 2048, 512, exact=True)
        call = lambda q, k: kernels.call(kernels.chunk_means, k, segments)  # noqa: E731
    call = again(call)
    if reason in ("enter hook", "exit hook", "one function as hook", "capture", "environment"):
        for _ in range(4):
            call(q, k)
        assert started(call, q, k)[1] == 0
        cuda.called.clear()
    with monkeypatch.context() as patch:
        if reason == "large":
            size = call(q, k).nbytes
            launcher._plans.clear()
            patch.setattr(launcher, "MAX_BYTES", size - 1)
        elif reason == "capture":
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        elif reason == "environment":
            patch.setenv("MOBA_PREPARED_LAUNCHES", "0")
        elif reason == "no CUDA":
            patch.setattr(torch.Tensor, "is_cuda", False)
        elif reason == "no libcuda":
            patch.setattr(graphs, "libcuda", None)
        elif "hook" in reason:
            chain = knobs.runtime.launch_enter_hook if reason == "enter hook" else knobs.runtime.launch_exit_hook
            if reason == "one function as hook":
                patch.setattr(knobs.runtime, "launch_exit_hook", hook)
            else:
                patch.setattr(chain, "calls", [hook])
        for _ in range(6):
            launches, prepared = started(call, q, k)
            assert launches and not cuda.called and prepared in (0, len(launches))
    assert prepared == (0 if reason == "environment" else len(launches))
    if cuda.execs:
        assert started(call, q, k)[1] == 0
    if reason == "large":
        launcher._plans.clear()
        monkeypatch.setattr(launcher, "MAX_BYTES", size)
        for _ in range(4):
            call(q, k)
        assert started(call, q, k)[1] == 0


@pytest.mark.parametrize("size", ["global_scratch_size", "profile_scratch_size"])
def test_memory_that_triton_gives_to_one_launch_is_in_no_graph(size, cuda, again, started, monkeypatch):
    """Instrumentation of Triton's: it is free again after the launch."""
    (q, k), call = small()
    call = again(call)
    call(q, k)
    for plan in launcher._plans.values():
        monkeypatch.setattr(plan.launches[0].compiled.metadata, size, 8, raising=False)
    launcher._plans.clear()  # the next finds the same compiled kernels
    for _ in range(6):
        launches, prepared = started(call, q, k)
    assert prepared == len(launches) and not cuda.called


def test_hooks_may_be_none(cuda, again, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", None)
    (q, k), call = small()
    call = again(call)
    for _ in range(4):
        call(q, k)
    assert len(cuda.execs) == 1


def test_graphs_and_what_is_known_of_keys_are_bounded(cuda, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    monkeypatch.setattr(graphs, "MAX_KEYS", 8)
    runs = []

    def come(key, times=1):
        for _ in range(times):
            graphs.start((key,), runs.append, 7)

    for key in range(5):
        come(key, 4)
    assert len(cuda.execs) == 3
    assert runs.count(7) == 3 * 2 + 2 * 4  # the last two found no room
    cuda.called.clear()
    come("new", 2)  # and those that no longer come make some
    for _ in range(30):
        come(0)
        come("new")
        assert len(cuda.execs) <= 3 and len(graphs._recent) <= 8 and len(graphs._older) <= 8
    assert cuda.called.count("cuGraphExecDestroy") == 2 and len(cuda.execs) == 2
    assert cuda.called.count("cuStreamCreate") == 1
    for key in range(100, 200):
        come(key)
        assert len(graphs._recent) <= 8 and len(graphs._older) <= 8
    assert not cuda.execs


@pytest.mark.parametrize("name", [*CAPTURE[:4], "cuGraphLaunch"])
def test_a_fault_of_the_driver_leaves_prepared_launches(name, driver, cuda, again, started, caplog):
    """The launches run once; said once; from there on no graph is made."""
    tensors, call = make(**CASES["1 head"])
    call = again(call)
    call(*tensors)
    for _ in range(2):
        expected = started(call, *tensors)[0]
    cuda.results[name] = 2
    for _ in range(4):
        assert started(call, *tensors)[0] == expected
        assert not driver.captured and not cuda.streams and not cuda.graphs
    assert driver.prepared == len(expected)
    assert cuda.called.count(name) == 1
    assert len(caplog.records) == 1
    assert f"no more CUDA graphs of launches: RuntimeError('{name} returned 2')" in caplog.text
    assert all(plan.is_prepared for plan in launcher._plans.values())
    caplog.clear()  # the error's frames have the graph


@pytest.mark.parametrize("at", [0, 1])
def test_a_fault_of_a_launch_during_capture(at, driver, cuda, again, started, caplog):
    """The capture ends; a launch that fails again without goes through Triton with the others, once each."""
    (q, k), call = small()
    call = again(call)
    call(q, k)
    call(q, k)
    names = [x[0] for x in started(call, q, k)[0]]
    left = [at]

    def fault():
        left[0] -= 1
        if left[0] == -1:
            raise OSError("once")

    driver.fault = fault
    launches, _ = started(call, q, k)
    assert [x[0] for x in launches] == names and not driver.captured and not cuda.streams and not cuda.graphs
    assert "OSError('once')" in caplog.text and "not used any more" not in caplog.text
    driver.fault = lambda: 1 / 0
    launches, prepared = started(call, q, k)
    assert [x[0] for x in launches] == names and prepared == 0
    assert "not used any more: ZeroDivisionError" in caplog.text


def test_an_interrupt_during_capture(driver, cuda, again, started):
    (q, k), call = small()
    call = again(call)
    call(q, k)
    call(q, k)
    expected = started(call, q, k)[0]

    def interrupt():
        driver.fault = None
        raise KeyboardInterrupt

    driver.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        call(q, k)
    assert not driver.captured and not cuda.streams and not cuda.graphs and not cuda.mode
    for _ in range(2):
        launches, prepared = started(call, q, k)
        assert launches == expected
    assert prepared == 0


def test_no_capture_beside_threads_at_work(cuda, again, started, monkeypatch):
    """One that is no daemon, and the main one where another calls: they might wait for the device meanwhile."""
    (q, k), call = small()
    call = again(call)
    call(q, k)
    until = time.monotonic() + 20
    while not alone() and time.monotonic() < until:
        time.sleep(0.01)
    monkeypatch.setattr(graphs, "_alone", alone)
    done = threading.Event()
    for daemon in (False, True):
        thread = threading.Thread(target=done.wait, daemon=daemon)
        thread.start()
        try:
            for _ in range(5):
                call(q, k)
            assert len(cuda.execs) == daemon
        finally:
            done.set()
            thread.join()
        done.clear()
    other = [x.clone() for x in (q, k)]
    thread = threading.Thread(target=lambda: [call(*other) for _ in range(5)], daemon=True)
    thread.start()
    thread.join()
    assert len(cuda.execs) == 1
    call(*other)
    assert len(cuda.execs) == 2 and started(call, *other)[1] == 0


def test_threads_with_memory_of_their_own(driver, cuda, again):
    """Each thread's graphs have its own tensors' addresses; none captures what another starts."""
    (q, k), call = small()
    call = again(call)
    call(q, k)
    launches, inputs, started, real = len(driver.launches), [cloned((q, k)) for _ in range(4)], {}, driver.note

    def note(*args):
        time.sleep(0.0005)  # others run
        real(*args)
        started[threading.get_ident()][-1] += 1

    def work(mine):
        counts = started[threading.get_ident()] = []
        for _ in range(8):
            counts.append(0)
            call(*mine)

    driver.note = note
    threads = [threading.Thread(target=work, args=(mine,)) for mine in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(started.values()) == [[launches] * 3 + [0] * 5] * 4
    assert len(cuda.execs) == 4
    for captured in cuda.execs.values():
        pointers = {x[1] for *_, values in captured for x in values if isinstance(x, tuple)}
        assert len(captured) == launches
        assert sorted(sum(x.data_ptr() in pointers for x in mine) for mine in inputs) == [0, 0, 0, 2]


def test_a_graph_and_what_it_asks_of_the_driver(driver, cuda, monkeypatch):
    streams, running = [], []

    def launches(stream):
        streams.append(stream)
        driver.captured[stream].append(("kernel", (1, 1, 1), stream, []))

    graph = graphs.Graph(launches)
    assert cuda.called == CAPTURE and not cuda.mode and len(cuda.execs) == 1
    assert streams != [None] and not driver.launches
    graph.launch(1 << 45)
    graph.launch(0)
    assert driver.launches == [("kernel", (1, 1, 1), stream, []) for stream in (1 << 45, 0)]
    real = cuda._cuGraphLaunch

    def slow(*args):
        running.append(1)
        assert len(running) == 1
        time.sleep(0.002)
        running.pop()
        real(*args)

    monkeypatch.setattr(cuda, "_cuGraphLaunch", slow, raising=False)
    threads = [threading.Thread(target=graph.launch, args=(stream,)) for stream in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 6 and sorted(x[2] for x in driver.launches[2:]) == [0, 1, 2, 3]
    cuda.called.clear()
    del graph, threads, thread
    assert cuda.called == ["cuGraphExecDestroy"] and not cuda.execs
    cuda.results["cuGraphInstantiateWithFlags"] = 2
    with pytest.raises(RuntimeError, match="cuGraphInstantiateWithFlags returned 2"):
        graphs.Graph(launches)
    assert cuda.called == ["cuGraphExecDestroy", *CAPTURE] and not len(graphs._graphs)
