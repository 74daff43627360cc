"""Prepared launches on a GPU, one by one and as CUDA graphs: bit for bit what Triton's own give, on any stream, in any
thread, in a graph of the user's."""
import contextlib
import os
import threading
import weakref
from unittest import mock

import pytest
import torch
from triton import knobs

from moba_megatron import moba_attn_varlen
from moba_megatron.kernels import graphs, launcher
from tests.gpu.test_op import gradients, make

pytestmark = pytest.mark.gpu

CASES = {
    "chunk 512": dict(lengths=[3000, 0, 1096], chunk=512, topk=3, heads=4, kv_heads=2, dim=128),
    "chunk 512, one head": dict(lengths=[8192], chunk=512, topk=3, heads=1, kv_heads=1, dim=128),
    "chunk 128": dict(lengths=[3000, 0, 1096], chunk=128, topk=5, heads=4, kv_heads=2, dim=128),
    "portable": dict(lengths=[1500, 700], chunk=100, topk=3, heads=4, kv_heads=2, dim=80),
}


def ordinary(*call, **options):
    """The call with every launch through Triton."""
    with mock.patch.dict(os.environ, MOBA_PREPARED_LAUNCHES="0"):
        return gradients(*call, **options)


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    monkeypatch.setattr(launcher, "_plans", {})
    monkeypatch.setattr(graphs, "_recent", {})
    monkeypatch.setattr(graphs, "_older", {})
    monkeypatch.setattr(graphs, "MAX_GRAPHS", graphs.MAX_GRAPHS)


@contextlib.contextmanager
def graph_launches():
    """A list of the graphs launched meanwhile: graph, stream, thread."""
    launched, real = [], graphs.Graph.launch

    def launch(self, stream):
        real(self, stream)
        launched.append((self, stream, threading.get_ident()))

    with mock.patch.object(graphs.Graph, "launch", launch):
        yield launched


def until_graphs(call, *arguments, number=2):
    """Repeats a call until it is graphs, as one of forward and one of backward: the allocator settles first."""
    for _ in range(16):
        with graph_launches() as launched:
            call(*arguments)
        if len(launched) == number:
            return
    pytest.fail("addresses do not repeat")


@pytest.mark.parametrize("mib", [None, 2], ids=["", "groups of heads"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fresh_values_and_fresh_memory(case, mib):
    kept = []  # so that no call finds its tensors where the call before had them
    for turn in range(4):
        *tensors, _, arguments = make(**case)
        got = gradients(*tensors, arguments, workspace_mib=mib)
        assert_equal(got, ordinary(*tensors, arguments, workspace_mib=mib))
        kept += [*tensors, *got] if turn % 2 else []
    assert all(plan.is_prepared for plan in launcher._plans.values())


def test_other_strides_and_alignments_in_turn():
    *tensors, _, arguments = make(**CASES["chunk 512"])

    def unaligned(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    def strided(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    calls = [tensors, [unaligned(x) for x in tensors], [strided(x) for x in tensors],
             [tensors[0], unaligned(tensors[1]), *tensors[2:]]]
    want = [ordinary(*call, arguments) for call in calls]
    for _ in range(3):
        for call, expected in zip(calls, want):
            assert_equal(gradients(*call, arguments), expected)


def test_one_tensor_as_q_k_and_v_and_then_three():
    *tensors, _, arguments = make(**{**CASES["chunk 512"], "kv_heads": 4})
    x, do = tensors[0], tensors[3]
    for _ in range(2):
        gradients(x, x, x, do, arguments)
    for q, k, v in (tensors[:3], (x, x, x), (x, tensors[1], x)):
        assert_equal(gradients(q, k, v, do, arguments), ordinary(q, k, v, do, arguments))


def test_two_streams_at_once():
    case = CASES["chunk 512"]
    inputs = [(*tensors, arguments) for *tensors, _, arguments in (make(**case) for _ in range(2))]
    want = [ordinary(*x) for x in inputs]
    for _ in range(2):
        gradients(*inputs[0])
    streams = [torch.cuda.Stream() for _ in inputs]
    got = [[], []]
    torch.cuda.synchronize()
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(gradients(*inputs[i]))
    torch.cuda.synchronize()
    for i, expected in enumerate(want):
        for results in got[i]:
            assert_equal(results, expected)


def test_threads_at_once_and_a_thread_that_has_done_nothing_before():
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want = ordinary(*tensors, arguments)
    for _ in range(2):
        gradients(*tensors, arguments)
    torch.cuda.synchronize()
    got, start = [], threading.Barrier(3)

    def work():
        start.wait()
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results = [moba_attn_varlen(*tensors[:3], *arguments, backend="triton") for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        got.extend(results)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 60
    for o in got:
        assert torch.equal(o, want[0])


def test_captured_when_prepared():
    *static, _, arguments = make(**CASES["chunk 512"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradients(*static, arguments)
    torch.cuda.current_stream().wait_stream(side)
    assert all(plan.is_prepared for plan in launcher._plans.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(*static, arguments)
    for _ in range(3):
        for x, new in zip(static, make(**CASES["chunk 512"])):
            x.copy_(new)
        assert_equal(gradients(*static, arguments), ordinary(*static, arguments))  # eager between replays of the graph
        graph.replay()
        assert_equal(captured, ordinary(*static, arguments))


def test_interleaved_microbatches():
    """As a pipeline's warm-up: three forwards first, then backward and forward in turn."""
    case, pending, got = CASES["chunk 512"], [], {}
    batches = [make(**case) for _ in range(6)]
    want = [ordinary(*tensors, arguments) for *tensors, _, arguments in batches]

    def forward(i):
        *tensors, _, _, arguments = batches[i]
        leaves = [x.detach().requires_grad_() for x in tensors]
        return i, leaves, moba_attn_varlen(*leaves, *arguments, backend="triton")

    def backward(i, leaves, o):
        got[i] = [o.detach(), *torch.autograd.grad(o, leaves, batches[i][3])]

    for i in range(6):
        if i >= 3:
            backward(*pending.pop(0))
        pending.append(forward(i))
    while pending:
        backward(*pending.pop())
    for i, expected in enumerate(want):
        assert_equal(got[i], expected)


def test_scratch_and_results_are_written_before_they_are_read():
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want = ordinary(*tensors, arguments)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that torch.empty gives with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        for _ in range(3):
            assert_equal(gradients(*tensors, arguments), want)
    finally:
        torch.use_deterministic_algorithms(False)


def test_four_threads_forward_and_backward():
    batches = [make(**CASES["chunk 512"]) for _ in range(4)]
    want = [ordinary(*tensors, arguments) for *tensors, _, arguments in batches]
    got = {}

    def work(i):
        *tensors, _, arguments = batches[i]
        with torch.cuda.stream(torch.cuda.Stream()):
            got[i] = [gradients(*tensors, arguments) for _ in range(6)]
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(want):
        for results in got[i]:
            assert_equal(results, expected)


def test_an_interrupt_between_launches(monkeypatch):
    """A's were the last, B's are half started, and A comes again with its old addresses."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 0)
    (*a, _, arguments), (*b, _, _) = (make(**CASES["chunk 512"]) for _ in range(2))
    want = ordinary(*a, arguments)
    with torch.no_grad():
        def call(tensors):
            return moba_attn_varlen(*tensors[:3], *arguments, backend="triton")

        for _ in range(3):
            call(b)
        call(a)
        real, started = launcher._Launch.prepared, []

        def interrupted(self, *args):
            started.append(self)
            if len(started) == 4:
                raise KeyboardInterrupt
            real(self, *args)

        with pytest.raises(KeyboardInterrupt), mock.patch.object(launcher._Launch, "prepared", interrupted):
            call(b)
        assert torch.equal(call(a), want[0])


def test_launch_hooks_hear_of_every_launch():
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want = ordinary(*tensors, arguments)
    for _ in range(2):
        gradients(*tensors, arguments)
    heard = []

    def hear(metadata):
        heard.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hear)
    try:
        assert_equal(gradients(*tensors, arguments), want)
    finally:
        knobs.runtime.launch_enter_hook.remove(hear)
    assert len(heard) == sum(len(plan.launches) for plan in launcher._plans.values())


def test_a_fault_and_the_environment_variable(monkeypatch, caplog):
    *tensors, _, arguments = make(**CASES["chunk 128"])
    want = ordinary(*tensors, arguments)
    for _ in range(2):
        gradients(*tensors, arguments)
    with mock.patch.object(launcher._Launch, "prepared", lambda *_: 1 / 0):
        assert_equal(gradients(*tensors, arguments), want)
    assert caplog.text.count("not used any more: ZeroDivisionError") == 2
    assert not any(plan.is_prepared for plan in launcher._plans.values())
    assert_equal(gradients(*tensors, arguments), want)
    launcher._plans.clear()
    monkeypatch.setenv("MOBA_PREPARED_LAUNCHES", "0")
    with mock.patch.object(launcher._Launch, "prepared", lambda *_: pytest.fail("prepared")):
        for _ in range(2):
            assert_equal(gradients(*tensors, arguments), want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_loop_is_graphs(case):
    *tensors, _, arguments = make(**case)
    want = ordinary(*tensors, arguments)
    with graph_launches() as launched:
        for _ in range(12):
            assert_equal(gradients(*tensors, arguments), want)
    assert len(launched) >= 12 and len({graph for graph, *_ in launched}) >= 2


def test_fresh_values_in_the_memory_of_a_graph_and_results_that_are_kept():
    """Lengths are values too: other sequences of the same rows."""
    *static, _, (cu_seqlens, *numbers) = make(**CASES["chunk 512"])
    batches = [make(**CASES["chunk 512"])[:4] for _ in range(3)]
    lengths = [cu_seqlens.new_tensor(x) for x in ([0, 3000, 3000, 4096], [0, 1500, 2900, 4096], [0, 96, 3096, 4096])]
    call = (*static, (cu_seqlens, *numbers))
    want = []
    for batch, cu in zip(batches, lengths):
        for x, new in zip((*static, cu_seqlens), (*batch, cu)):
            x.copy_(new)
        want.append(ordinary(*call))
    until_graphs(gradients, *call)
    kept = []
    with graph_launches() as launched:
        for turn in range(48):
            for x, new in zip((*static, cu_seqlens), (*batches[turn % 3], lengths[turn % 3])):
                x.copy_(new)
            kept = [*kept[-2:], (turn % 3, gradients(*call))]
            for i, results in kept:
                assert_equal(results, want[i])
    assert len(launched) > 24


def test_graphs_on_the_current_stream():
    """Behind what is there already, and before what comes."""
    *tensors, _, arguments = make(**CASES["chunk 512"])
    batches = [make(**CASES["chunk 512"])[:4] for _ in range(2)]
    want = [ordinary(*batch, arguments) for batch in batches]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        until_graphs(gradients, *tensors, arguments)
        for turn in range(16):
            with graph_launches() as launched:
                torch.cuda._sleep(10_000_000)
                for x, new in zip(tensors, batches[turn % 2]):
                    x.copy_(new)
                got = zip(gradients(*tensors, arguments), want[turn % 2], strict=True)
                assert not sum((a != b).sum() for a, b in got).item()
                del got
            assert {x for _, x, _ in launched} <= {stream.cuda_stream}
    assert len(launched) == 2
    torch.cuda.current_stream().wait_stream(stream)


def test_graphs_on_two_streams_at_once():
    inputs = [(*tensors, arguments) for *tensors, _, arguments in (make(**CASES["chunk 512"]) for _ in range(2))]
    want = [ordinary(*x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in inputs]
    torch.cuda.synchronize()
    with graph_launches() as launched:
        for _ in range(20):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    for a, b in zip(gradients(*inputs[i]), want[i], strict=True):
                        wrong[i] += (a != b).sum()
    torch.cuda.synchronize()
    assert {x for _, x, _ in launched} == {stream.cuda_stream for stream in streams}
    assert len(launched) >= 20 and not any(x.item() for x in wrong)


@pytest.mark.parametrize("alone", [True, False], ids=["graphs all the same", ""])
def test_graphs_of_four_threads(alone, monkeypatch):
    """Each makes its own if it may, which it may not; backward is in one thread for all."""
    if alone:
        monkeypatch.setattr(graphs, "_alone", lambda: True)
    batches = [make(**CASES["chunk 512"]) for _ in range(4)]
    want = [ordinary(*tensors, arguments) for *tensors, _, arguments in batches]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in batches]
    done, start = [], threading.Barrier(4)

    def work(i):
        *tensors, _, arguments = batches[i]
        start.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(25):
                for a, b in zip(gradients(*tensors, arguments), want[i], strict=True):
                    wrong[i] += (a != b).sum()
            torch.cuda.current_stream().synchronize()
        done.append(threading.get_ident())

    torch.cuda.synchronize()
    with graph_launches() as launched:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(done) == 4 and not any(x.item() for x in wrong)
    if alone:
        assert {thread for *_, thread in launched} >= set(done) and len(launched) > 40
    else:
        assert not launched
    assert graphs.MAX_GRAPHS  # none failed


def test_a_thread_that_has_done_nothing_before_launches_a_graph():
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want, got = ordinary(*tensors, arguments), []

    def call():
        with torch.no_grad():
            o = moba_attn_varlen(*tensors[:3], *arguments, backend="triton")
        got.append(torch.equal(o, want[0]))

    until_graphs(call, number=1)
    with graph_launches() as launched:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(launched) == 1 and all(got)


def test_a_users_graph_has_the_launches_and_graphs_go_on_afterwards():
    *static, _, arguments = make(**CASES["chunk 512"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        until_graphs(gradients, *static, arguments)
    torch.cuda.current_stream().wait_stream(side)
    users = torch.cuda.CUDAGraph()
    with graph_launches() as launched, torch.cuda.graph(users, stream=side):
        captured = gradients(*static, arguments)
    assert not launched
    until_graphs(gradients, *static, arguments)
    for _ in range(3):
        for x, new in zip(static, make(**CASES["chunk 512"])):
            x.copy_(new)
        want = ordinary(*static, arguments)
        users.replay()
        assert_equal(captured, want)
        assert_equal(gradients(*static, arguments), want)
    until_graphs(gradients, *static, arguments)


def test_a_graph_is_made_and_dropped_while_another_thread_captures(monkeypatch):
    """In the mode that forbids all threads what CUDA calls unsafe: neither spoils the other."""
    monkeypatch.setattr(graphs, "_alone", lambda: True)
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want, got, launched = ordinary(*tensors, arguments)[0], [], []
    stream, side, users, x = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.ones(4).cuda()

    def call():
        with torch.no_grad(), torch.cuda.stream(stream):
            return moba_attn_varlen(*tensors[:3], *arguments, backend="triton")

    def others():
        with graph_launches() as seen:
            call()
            got.append(call())
        launched.append(len(seen))
        seen.clear()
        graphs._recent.clear()

    torch.cuda.synchronize()
    for _ in range(16):
        if 2 not in graphs._recent.values():  # the next is a graph
            call()
    torch.cuda.synchronize()
    thread = threading.Thread(target=others)
    with torch.cuda.stream(side):  # torch.cuda.graph would empty the allocator's cache
        users.capture_begin(capture_error_mode="global")
        y = x + 1
        thread.start()
        thread.join()
        y = y + 1
        users.capture_end()
    torch.cuda.synchronize()
    users.replay()
    torch.cuda.synchronize()
    assert y.tolist() == [3.0] * 4
    assert launched == [2] and graphs.MAX_GRAPHS
    assert torch.equal(got[0], want)


def test_hooks_hear_of_launches_that_were_a_graph():
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want = ordinary(*tensors, arguments)
    until_graphs(gradients, *tensors, arguments)
    heard = []

    def hear(metadata):
        heard.append(metadata.get()["name"])

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        heard.clear()
        chain.add(hear)
        try:
            with graph_launches() as launched:
                assert_equal(gradients(*tensors, arguments), want)
        finally:
            chain.remove(hear)
        assert not launched and len(heard) == sum(len(plan.launches) for plan in launcher._plans.values())
    until_graphs(gradients, *tensors, arguments)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_launch_that_fails_during_capture(error, caplog):
    """Nothing of it is left: the device goes on, and what was captured has not run."""
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want, failed, real = ordinary(*tensors, arguments)[0], [], launcher._Launch.prepared

    def call():
        with torch.no_grad():
            return moba_attn_varlen(*tensors[:3], *arguments, backend="triton")

    def fails(self, addresses, stream):
        if stream != torch.cuda.current_stream().cuda_stream and not failed and self.kernel is third.kernel:
            failed.append(self)
            raise error
        real(self, addresses, stream)

    call()
    third = next(iter(launcher._plans.values())).launches[2]
    with mock.patch.object(launcher._Launch, "prepared", fails):
        for _ in range(8):
            try:
                assert torch.equal(call(), want)
            except KeyboardInterrupt:
                assert error is KeyboardInterrupt
    assert failed and next(iter(launcher._plans.values())).is_prepared
    with graph_launches() as launched:
        assert torch.equal(call(), want)
    assert len(launched) == (error is KeyboardInterrupt)
    assert ("no more CUDA graphs" in caplog.text) == (error is RuntimeError)


def test_the_driver_has_no_memory_for_a_graph(caplog):
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want, real = ordinary(*tensors, arguments), graphs._driver

    def driver(name, *args):
        if name == "cuGraphInstantiateWithFlags":
            raise RuntimeError(f"{name} returned 2")
        real(name, *args)

    with mock.patch.object(graphs, "_driver", driver), graph_launches() as launched:
        for _ in range(8):
            assert_equal(gradients(*tensors, arguments), want)
    assert not launched and caplog.text.count("no more CUDA graphs") == 1
    assert all(plan.is_prepared for plan in launcher._plans.values())


def test_graphs_that_are_dropped_while_they_run():
    *tensors, _, arguments = make(**CASES["chunk 512"])
    want = ordinary(*tensors, arguments)
    for _ in range(5):
        until_graphs(gradients, *tensors, arguments)
        torch.cuda._sleep(10_000_000)
        with graph_launches() as launched:
            got = gradients(*tensors, arguments)
        dropped = [weakref.ref(graph) for graph, *_ in launched]
        launched.clear()
        graphs._recent.clear()
        graphs._older.clear()
        assert [x() for x in dropped] == [None, None]
        assert_equal(got, want)
        del got
