"""The key convolution on a GPU: kernels against the reference in fp64, strided keys, the operator behind it, graphs."""
import pytest
import torch

import comparison
from moba_megatron import moba_attn_varlen
from moba_megatron.ops import key_convolution

pytestmark = pytest.mark.gpu

CASES = {
    "one sequence": dict(lengths=[1000]),
    "packed, ragged, empty": dict(lengths=[0, 1, 33, 2, 700, 0, 513]),
    "five taps": dict(lengths=[3, 500, 1, 33], taps=5),
    "halo": dict(lengths=[2, 600, 1], halo=True),
    "five taps, halo": dict(lengths=[3, 50, 1, 1200], taps=5, halo=True),
    "odd heads and dims": dict(lengths=[400, 9], heads=3, dim=48, halo=True),
    "one head of 8": dict(lengths=[700], heads=1, dim=8),
    "heads of 256": dict(lengths=[300, 40], heads=2, dim=256, taps=5),
    "many programs": dict(lengths=[20000, 4096, 1], heads=8),
}


def make(lengths, taps=3, heads=2, dim=128, halo=False, dtype=torch.bfloat16, weight_dtype=None):
    """k (a strided view of a fused projection), weight, cu_seqlens, halo or None, and the gradient of the output."""
    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda").to(dtype)

    total = sum(lengths)
    k = normal(total, heads, 4 * dim)[:, :, 2 * dim:3 * dim]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    weight = normal(heads, taps, dim, dtype=weight_dtype or dtype)
    halo = normal(len(lengths), taps - 1, heads, dim) if halo else None
    return k, weight, cu_seqlens, halo, normal(total, heads, dim)


def gradients(k, weight, cu_seqlens, halo, dout, backend="triton", wide=None):
    """The output and the gradients of k, weight and halo, in ``wide`` if that is given."""
    leaves = [x.detach().to(wide or x.dtype).requires_grad_() for x in (k, weight, halo) if x is not None]
    out = key_convolution(*leaves[:2], cu_seqlens, *leaves[2:], backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def check(arguments, dtype):
    exact = gradients(*arguments, backend="reference", wide=torch.float64)
    for got, expected in zip(gradients(*arguments), exact):
        # a few fp32 operations, one rounding; the weight's gradient is a sum over all rows
        bound = 2 * torch.finfo(got.dtype).eps + 2e-6 + (1e-5 if got.shape == arguments[1].shape else 0)
        error = (got.double() - expected).abs().max() / max(1.0, expected.abs().max().item())
        assert got.dtype in (dtype, arguments[1].dtype) and error <= bound, f"{error} > {bound}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case, dtype):
    check(make(**case, dtype=dtype), dtype)


def test_weight_of_another_dtype():
    check(make([300, 41], weight_dtype=torch.float32), torch.bfloat16)


def test_zeros_change_no_bit_and_learn():
    k, weight, cu_seqlens, _, dout = make([500, 77])
    out, dk, dweight = gradients(k, weight.zero_(), cu_seqlens, None, dout)
    assert torch.equal(out, k) and torch.equal(dk, dout) and dweight.abs().max() > 0.1


@pytest.mark.parametrize("width", [3, 5])
def test_runs_with_halos_equal_the_whole(width):
    """As context parallel ranks see it: a sequence cut into runs, each with the keys before it."""
    k, weight, cu_seqlens, _, dout = make([1500], taps=width)
    whole = gradients(k, weight, cu_seqlens, None, dout)
    cuts = [0, 700, 1100, 1500]
    before = torch.cat((torch.zeros_like(k[:width - 1]), k))  # row r's predecessor is at r + width - 2
    halo = torch.stack([before[cut:cut + width - 1] for cut in cuts[:-1]])
    runs = torch.tensor(cuts, dtype=torch.int32, device="cuda")
    out, dk, dweight, dhalo = gradients(k, weight, runs, halo, dout)
    assert torch.equal(out, whole[0])
    summed = dk.float()
    for cut, grad in zip(cuts[1:-1], dhalo[1:]):
        summed[cut - width + 1:cut] += grad.float()
    assert comparison.relative_error(summed, whole[1].double()) < 1e-2
    assert comparison.relative_error(dweight, whole[2].double()) < 1e-2


@pytest.mark.parametrize("chunk, topk, dim", [(128, 8, 128), (512, 3, 128), (64, 3, 64)])
def test_through_the_operator(chunk, topk, dim):
    """Convolution, means, gate and attention: what the operator makes of keys that were convolved in fp64."""
    k, weight, cu_seqlens, _, dout = make([3000, 0, 1096], heads=2, dim=dim)
    q, v = (torch.randn(4096, heads, dim, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weight)]

    def attend(convolved, q, v):
        return moba_attn_varlen(q, convolved, v, cu_seqlens, 3000, chunk, topk, backend="triton", deterministic=True)

    convolved = key_convolution(leaves[1], leaves[3], cu_seqlens, backend="triton")
    o = attend(convolved, leaves[0], leaves[2])
    do = torch.randn_like(o)
    dq, dk, dv, dweight = torch.autograd.grad(o, leaves, do)
    given = [x.detach().requires_grad_() for x in (convolved, q, v)]
    expected = attend(*given)
    dconvolved, *others = torch.autograd.grad(expected, given, do)
    assert torch.equal(o, expected) and torch.equal(dq, others[0]) and torch.equal(dv, others[1])
    exact = gradients(k, weight, cu_seqlens, None, dconvolved, backend="reference", wide=torch.float64)
    assert comparison.relative_error(convolved, exact[0]) < 1e-2
    assert comparison.relative_error(dk, exact[1]) < 1e-2 and comparison.relative_error(dweight, exact[2]) < 1e-2


def test_the_host_never_waits_and_graphs_replay():
    k, weight, cu_seqlens, halo, dout = make([3000, 0, 1096], taps=5, halo=True)
    eager = gradients(k, weight, cu_seqlens, halo, dout)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(k, weight, cu_seqlens, halo, dout)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(k, weight, cu_seqlens, halo, dout)
    for x in captured:
        x.zero_()
    graph.replay()
    for a, b in zip(eager, captured):
        assert torch.equal(a, b)  # sums have a fixed order
