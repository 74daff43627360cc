"""Prepared launches on a GPU: bit for bit what Triton's own give, on any stream, in any thread, in a graph."""
import os
import threading
from unittest import mock

import pytest
import torch
from triton import knobs

from moba_megatron import moba_attn_varlen
from moba_megatron.kernels import launcher
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


def test_an_interrupt_between_launches():
    """A's were the last, B's are half started, and A comes again with its old addresses."""
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
    assert caplog.text.count("ZeroDivisionError") == 2
    assert not any(plan.is_prepared for plan in launcher._plans.values())
    assert_equal(gradients(*tensors, arguments), want)
    launcher._plans.clear()
    monkeypatch.setenv("MOBA_PREPARED_LAUNCHES", "0")
    with mock.patch.object(launcher._Launch, "prepared", lambda *_: pytest.fail("prepared")):
        for _ in range(2):
            assert_equal(gradients(*tensors, arguments), want)
