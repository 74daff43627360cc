"""torch.autocast: plain torch computes in its inputs' precision, and mixed dtypes are cast as autocast casts them."""
import pytest
import torch

from moba_megatron import moba_attn_varlen
from moba_megatron.ops import causal_attn_varlen, key_convolution, moba_attention
from moba_megatron.ops.decode import decode_selection, fill_chunk_means, moba_decode
from moba_megatron.segments import uniform_segments

T, CPU, BF16 = 96, torch.device("cpu"), torch.bfloat16
CU = torch.tensor([0, 40, T], dtype=torch.int32)
CALLS = {
    "moba_attn_varlen": lambda q, k, v: moba_attn_varlen(q, k, v, CU, 56, 8, 3),
    "moba_attention": lambda q, k, v: moba_attention(q, k, v, uniform_segments(T, T, 1, 8, CPU), 3),
    "causal_attn_varlen": lambda q, k, v: causal_attn_varlen(q, k, v, CU, 56),
    "compiled": lambda q, k, v: torch.compile(lambda *x: moba_attn_varlen(*x, CU, 56, 8, 3), backend="aot_eager",
                                              fullgraph=True)(q, k, v),
}


def make(*dtypes):
    return [torch.randn(T, heads, 16).to(dtype).requires_grad_() for heads, dtype in zip((4, 2, 2), dtypes)]


def results(call, q, k, v, forward=True, backward=True):
    """o and the gradients, with autocast around forward and around backward or not."""
    torch._dynamo.reset()
    with torch.autocast("cpu", BF16, enabled=forward):
        o = call(q, k, v)
    with torch.autocast("cpu", BF16, enabled=backward):
        return o, *torch.autograd.grad(o, (q, k, v), torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.dtype))


@pytest.mark.parametrize("forward, backward", ((True, False), (False, True), (True, True)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_one_dtype_is_left_alone_bit_for_bit(name, dtype, forward, backward):
    qkv = make(dtype, dtype, dtype)
    for a, b in zip(results(CALLS[name], *qkv, forward, backward), results(CALLS[name], *qkv, False, False)):
        assert a.dtype == dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtypes", ((torch.float32, torch.float32, BF16), (BF16, torch.float32, BF16),
                                    (torch.float16, torch.float32, torch.float32)), ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_mixed_dtypes_are_cast_as_for_sdpa(name, dtypes):
    q, k, v = make(*dtypes)
    with torch.autocast("cpu", BF16):
        sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.detach()[None, :, :1] for x in (q, k, v)))
    got = results(CALLS[name], q, k, v)
    expected = results(lambda *x: CALLS[name](*(t.to(BF16) for t in x)), q, k, v, False, False)
    assert got[0].dtype == sdpa.dtype == BF16 and [x.dtype for x in got[1:]] == list(dtypes)
    assert all(map(torch.equal, got, expected))


def test_fp64_among_others_is_refused_as_without_autocast():
    q, k, v = make(torch.float64, torch.float32, torch.float32)
    with torch.autocast("cpu", BF16), pytest.raises(TypeError, match="k must have q's dtype torch.float64"):
        CALLS["moba_attn_varlen"](q, k, v)
    with pytest.raises(TypeError, match="v must have q's dtype"):
        CALLS["moba_attn_varlen"](*make(torch.float32, torch.float32, BF16))


@pytest.mark.parametrize("dtype", (torch.float32, BF16), ids=str)
def test_decode(dtype):
    """q takes the caches' dtype; nothing else changes."""
    q, k, v = torch.randn(2, 4, 16), *(torch.randn(2, 40, 2, 16, dtype=dtype) for _ in range(2))
    lengths, means = torch.tensor([40, 17], dtype=torch.int32), torch.zeros(2, 5, 2, 16, dtype=dtype)
    expected_means = means.clone()
    fill_chunk_means(k, expected_means, lengths, 8)
    expected = moba_decode(q.to(dtype), k, v, expected_means, lengths, 8, 3)
    chosen = decode_selection(q.to(dtype), k, expected_means, lengths, 8, 3)
    with torch.autocast("cpu", BF16):
        fill_chunk_means(k, means, lengths, 8)
        assert torch.equal(means, expected_means)
        assert torch.equal(moba_decode(q, k, v, means, lengths, 8, 3), expected) and expected.dtype == dtype
        assert torch.equal(decode_selection(q, k, means, lengths, 8, 3), chosen)


def test_key_convolution():
    k, weight, halo = torch.randn(T, 2, 16), torch.randn(2, 3, 16), torch.randn(2, 2, 2, 16)
    with torch.autocast("cpu", BF16):
        assert torch.equal(key_convolution(k, weight, CU, halo), key_convolution(k.clone(), weight, CU, halo.clone()))
        same = key_convolution(k, weight, CU, halo)
        mixed = key_convolution(k.to(BF16), weight, CU, halo)
    assert torch.equal(same, key_convolution(k, weight, CU, halo))
    assert torch.equal(mixed, key_convolution(k.to(BF16), weight, CU, halo.to(BF16)))
