"""The operators on a GPU under compilers, autocast, transforms and counters, with inputs of any strides."""
import pytest
import torch
from hypothesis import assume, given
from properties import LAYOUTS, Problem, calls, examples, operators_called
from torch.utils.flop_counter import FlopCounterMode

import comparison
from moba_megatron import moba_attn_varlen
from moba_megatron.ops import causal_attn_varlen

pytestmark = pytest.mark.gpu
ON_GPU = dict(dtypes=(torch.bfloat16, torch.float16, torch.float32), chunks=(16, 48), dims=((16, 16),), longest=100)
CU = torch.tensor([0, 300, 1024], dtype=torch.int32)
ATTEND = {
    "dense, packed": (lambda q, k, v: causal_attn_varlen(q, k, v, CU.cuda(), 724), "auto"),
    "dense, one length": (lambda q, k, v: causal_attn_varlen(q, k, v, CU.cuda()[::2].contiguous(), 1024), "auto"),
    "dense, own kernels": (lambda q, k, v: causal_attn_varlen(q, k, v, CU.cuda(), 724, backend="triton"), "triton"),
    "sparse": (lambda q, k, v: moba_attn_varlen(q, k, v, CU.cuda(), 724, 64, 3), "auto"),
}


def make(layout="contiguous", dtypes=(torch.bfloat16,) * 3):
    return [LAYOUTS[layout](torch.randn(1024, heads, 64, device="cuda").to(dtype)).detach().requires_grad_()
            for heads, dtype in zip((4, 2, 2), dtypes)]


def results(function, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = function(*leaves)
    return o.detach(), *torch.autograd.grad(o.float().square().sum(), leaves)


@pytest.mark.parametrize("layout", ("contiguous", "head-major", "fused"))
@pytest.mark.parametrize("name", ATTEND)
def test_compiled_with_inputs_of_any_strides(name, layout):
    """o is contiguous, as the fake says, so that what a compiler makes of it reads the right places."""
    attend, _ = ATTEND[name]
    inputs = make(layout)
    assert attend(*inputs).is_contiguous()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: attend(*x).transpose(0, 1).flatten(1) * 2, backend="aot_eager", fullgraph=True)
    eager = results(lambda *x: attend(*x).transpose(0, 1).flatten(1) * 2, inputs)
    for a, b in zip(results(compiled, inputs), eager):
        assert comparison.relative_error(a, b.double()) < 5e-3  # dense kernels sum dq in any order, then round to bf16


def test_inductor_with_head_major_inputs():
    torch._dynamo.reset()
    attend, _ = ATTEND["dense, packed"]
    inputs = make("head-major")
    function = lambda *x: (attend(*x) * 2.0).flatten(1).sum(1)  # noqa: E731
    for a, b in zip(results(torch.compile(function), inputs), results(function, inputs)):
        assert comparison.relative_error(a, b.double()) < 2e-2  # o is rounded elsewhere


@pytest.mark.parametrize("layout", ("contiguous", "head-major", "every other element", "one head expanded"))
@pytest.mark.parametrize("name", ATTEND)
def test_fakes_have_the_strides_of_what_is_real(name, layout):
    attend, backend = ATTEND[name]
    seen = operators_called(lambda: results(attend, make(layout)))
    assert len(seen) == 2
    for function, args in seen:
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(function, args, test_utils=("test_faketensor",))


@pytest.mark.parametrize("name", ATTEND)
def test_autocast_casts_mixed_dtypes_and_nothing_else(name):
    attend, _ = ATTEND[name]
    for dtypes in ((torch.float32, torch.bfloat16, torch.bfloat16), (torch.float16,) * 3):
        inputs = make(dtypes=dtypes)
        own = dtypes[0] if len(set(dtypes)) == 1 else torch.bfloat16
        with torch.autocast("cuda", torch.bfloat16):
            got = attend(*inputs)
        assert got.dtype == own and torch.equal(got, attend(*(x.to(own) for x in inputs)))


def test_flops_and_transforms():
    attend, _ = ATTEND["sparse"]
    inputs = make()
    with FlopCounterMode(display=False) as counter:
        expected = results(attend, inputs)
    pairs = 4 * sum(64 * min(p // 64, 2) + p % 64 + 1 for n in (300, 724) for p in range(n))
    scored = 4 * sum(p // 64 for n in (300, 724) for p in range(n) if p // 64 > 2)
    assert counter.get_total_flops() == 2 * pairs * 128 + 2 * scored * 64 + 2 * pairs * 5 * 64
    grads = torch.func.grad(lambda *x: attend(*x).float().square().sum(), argnums=(0, 1, 2))(
        *(x.detach() for x in inputs))
    for a, b in zip(grads, expected[1:]):
        assert comparison.relative_error(a, b.double()) < 1e-3
    stacked = [torch.stack((x.detach(), x.detach() * 0.5)) for x in inputs]
    for a, b in zip(torch.vmap(attend)(*stacked), (attend(*(x[i] for x in stacked)) for i in range(2))):
        assert torch.equal(a, b)


@examples(3)
@given(calls(**ON_GPU))
def test_random_calls(call):
    problem = Problem(call, "cuda")
    problem.check(problem.run())


@examples(1)
@given(calls(**ON_GPU))
def test_random_calls_captured(call):
    assume(call.case.total)
    problem = Problem(call, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run()
    for x in captured:
        x.zero_()
    graph.replay()
    problem.check(captured)
