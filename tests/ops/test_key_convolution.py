"""Key convolution: against torch's own convolution, packed sequences apart, halos, gradients, errors."""
import pytest
import torch
import torch.nn.functional as F

from moba_megatron.ops import key_convolution

LENGTHS = [1, 0, 7, 2, 30]


def make(taps, dtype=torch.float64, lengths=LENGTHS, heads=2, dim=4):
    k = torch.randn(sum(lengths), heads, dim, dtype=dtype)
    weight = torch.randn(heads, taps, dim, dtype=dtype)
    return k, weight, torch.tensor([0, *lengths]).cumsum(0).int()


def with_conv1d(k, weight):
    """One sequence, by torch's depthwise convolution, whose taps run the other way."""
    heads, taps, dim = weight.shape
    filters = weight.flip(1).transpose(1, 2).reshape(heads * dim, 1, taps)
    rows = F.pad(k.flatten(1).t()[None], (taps - 1, 0))
    return k + F.silu(F.conv1d(rows, filters, groups=heads * dim))[0].t().view_as(k)


@pytest.mark.parametrize("taps", [3, 5])
def test_equals_torch_sequence_by_sequence(taps):
    k, weight, cu_seqlens = make(taps)
    got = key_convolution(k, weight, cu_seqlens)
    expected = torch.cat([with_conv1d(part, weight) for part in k.split(LENGTHS) if len(part)])
    assert torch.allclose(got, expected, rtol=1e-13, atol=1e-13)


def test_zeros_are_the_identity_and_can_learn():
    k, weight, cu_seqlens = make(3)
    weight = torch.zeros_like(weight).requires_grad_()
    out = key_convolution(k, weight, cu_seqlens)
    assert torch.equal(out, k)
    out.square().sum().backward()
    assert (weight.grad != 0).all()


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("cuts", [[16], [2, 4, 30], [1, 2, 3, 4, 5, 6]])
def test_runs_with_halos_equal_the_whole(taps, cuts):
    k, weight, _ = make(taps, lengths=[40])
    whole = key_convolution(k, weight, torch.tensor([0, 40], dtype=torch.int32))
    before = F.pad(k, (0, 0, 0, 0, taps - 1, 0))
    halo = torch.stack([before[cut:cut + taps - 1] for cut in [0, *cuts]])
    parts = key_convolution(k, weight, torch.tensor([0, *cuts, 40], dtype=torch.int32), halo)
    assert torch.equal(parts, whole)


def test_gradients_by_finite_differences():
    k, weight, cu_seqlens = make(3, lengths=[1, 4], dim=2)
    halo = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (k, weight, halo)]
    assert torch.autograd.gradcheck(lambda k, w, h: key_convolution(k, w, cu_seqlens, h), inputs)


@pytest.mark.parametrize("change, error, text", [
    (dict(weight=torch.zeros(2, 4, 4)), ValueError, "W of 3 or 5"),
    (dict(weight=torch.zeros(3, 3, 4)), ValueError, r"weight must have shape \[2, W, 4\]"),
    (dict(weight=None), TypeError, "weight must be a torch.Tensor, got NoneType"),
    (dict(k=torch.zeros(40, 2, 4).int()), TypeError, "k must be bfloat16"),
    (dict(k=torch.zeros(40, 8)), ValueError, "k must have 3 dimensions"),
    (dict(halo=torch.zeros(5, 3, 2, 4)), ValueError, r"halo must have shape \[runs, 2"),
    (dict(halo=torch.zeros(4, 2, 2, 4)), ValueError, "one entry for each of the 5 runs"),
    (dict(halo=torch.zeros(5, 2, 2, 4).double()), ValueError, "k's dtype torch.float32"),
    (dict(cu_seqlens=torch.tensor([0, 41], dtype=torch.int32)), ValueError, "cu_seqlens must run from 0"),
])
def test_mistakes_are_named(change, error, text):
    k, weight, cu_seqlens = make(3, torch.float32)
    with pytest.raises(error, match=text):
        key_convolution(**{**dict(k=k, weight=weight, cu_seqlens=cu_seqlens), **change})
