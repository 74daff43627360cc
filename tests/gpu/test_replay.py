"""Replayed calls on a GPU: bit for bit what Triton's own launches give, on any stream, in any thread, in a graph."""
import threading
from unittest import mock

import pytest
import torch

from gpu.test_op import gradients, make
from moba_megatron import moba_attn_varlen
from moba_megatron.kernels import launcher, replay

pytestmark = pytest.mark.gpu

CASES = {
    "chunk 512": dict(lengths=[3000, 0, 1096], chunk=512, topk=3, heads=4, kv_heads=2, dim=128),
    "chunk 512, one head": dict(lengths=[8192], chunk=512, topk=3, heads=1, kv_heads=1, dim=128),
    "chunk 128": dict(lengths=[3000, 0, 1096], chunk=128, topk=5, heads=4, kv_heads=2, dim=128),
    "portable": dict(lengths=[1500, 700], chunk=100, topk=3, heads=4, kv_heads=2, dim=80),
}


def ordinary(*call, **options):
    """The call with every launch through Triton."""
    with mock.patch.object(launcher, "_RECORDING", False):
        return gradients(*call, **options)


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture(autouse=True)
def no_records(monkeypatch):
    monkeypatch.setattr(launcher, "_records", {})


@pytest.mark.parametrize("mib", [None, 2], ids=["", "groups of heads"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fresh_values_and_fresh_memory(case, mib):
    kept = []  # so that no call finds its tensors where the call before had them
    for turn in range(4):
        *tensors, _, arguments = make(**case)
        got = gradients(*tensors, arguments, workspace_mib=mib)
        assert_equal(got, ordinary(*tensors, arguments, workspace_mib=mib))
        kept += [*tensors, *got] if turn % 2 else []
    assert all(record.replay for record in launcher._records.values())


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


def test_captured_after_a_replay():
    *static, _, arguments = make(**CASES["chunk 512"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradients(*static, arguments)
    torch.cuda.current_stream().wait_stream(side)
    assert all(record.replay for record in launcher._records.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(*static, arguments)
    for _ in range(3):
        for x, new in zip(static, make(**CASES["chunk 512"])):
            x.copy_(new)
        assert_equal(gradients(*static, arguments), ordinary(*static, arguments))  # eager between replays of the graph
        graph.replay()
        assert_equal(captured, ordinary(*static, arguments))


def test_an_interrupt_while_addresses_are_written():
    """A's were the last, B's are half written, and A comes again with its old addresses."""
    (*a, _, arguments), (*b, _, _) = (make(**CASES["chunk 512"]) for _ in range(2))
    want = ordinary(*a, arguments)
    with torch.no_grad():
        def call(tensors):
            return moba_attn_varlen(*tensors[:3], *arguments, backend="triton")

        for _ in range(3):
            call(b)
        call(a)
        driver, state = replay.cuda_driver(), {"armed": True}

        class Interrupted:
            def __getattr__(self, name):
                if name == "cuTensorMapReplaceAddress" and state.pop("armed", False):
                    raise KeyboardInterrupt
                return getattr(driver, name)

        with pytest.raises(KeyboardInterrupt), mock.patch.object(replay, "cuda_driver", Interrupted):
            call(b)
        assert torch.equal(call(a), want[0])


def test_a_fault_and_the_environment_variable(monkeypatch, caplog):
    *tensors, _, arguments = make(**CASES["chunk 128"])
    want = ordinary(*tensors, arguments)
    for _ in range(2):
        gradients(*tensors, arguments)
    with mock.patch.object(replay, "cuda_driver", lambda: 1 / 0):
        assert_equal(gradients(*tensors, arguments), want)
    assert caplog.text.count("ZeroDivisionError") == 2
    assert all(record.faulty for record in launcher._records.values())
    assert_equal(gradients(*tensors, arguments), want)
    launcher._records.clear()
    monkeypatch.setenv("MOBA_PREPARED_LAUNCHES", "0")
    assert_equal(gradients(*tensors, arguments), want)
    assert not launcher._records
