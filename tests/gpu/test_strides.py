"""Tensors of more than 2^31 elements: heads a million rows of 128 apart, tokens far apart. Needs 20 GiB of memory.

The results are the bits of the same call with contiguous tensors. What each kernel does with such strides in less
memory is in tests/interpreted/test_strides.py.
"""
import pytest
import torch
from far_apart import far_apart

import decoding
from moba_megatron import kernels, moba_attn_varlen
from moba_megatron.ops import key_convolution
from moba_megatron.segments import Segments

GIB = 2 ** 30
MILLION_ROWS = 2 ** 27
"""Elements between heads of 128 over 1M tokens: head 16 lies at 2^31."""
pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40 * GIB,
                                 reason="needs 40 GiB of free device memory")]

CASES = {
    "heads far apart, chunk 512": dict(chunk=512, dim=128, strides=(128, MILLION_ROWS, 1)),
    "heads far apart, chunk 128": dict(chunk=128, dim=128, strides=(128, MILLION_ROWS, 1)),
    "heads far apart, portable": dict(chunk=100, dim=112, strides=(112, MILLION_ROWS, 1)),
    "heads far apart, chunk 64": dict(chunk=64, dim=64, strides=(64, MILLION_ROWS, 1)),
    "tokens far apart, chunk 512": dict(chunk=512, dim=128, strides=(2 ** 20 + 128, 128, 1)),
}


@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.empty_cache()


def normal(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(case):
    chunk, dim, strides = case["chunk"], case["dim"], case["strides"]
    tokens, cu = 2100, torch.tensor([0, 2100], dtype=torch.int32, device="cuda")
    near = [normal(tokens, 17, dim) for _ in range(4)]
    results = []
    for tensors in (near, [far_apart(x, *strides) for x in near]):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        o = moba_attn_varlen(*leaves, cu, tokens, chunk, 3, backend="triton")
        results.append((o.detach(), *torch.autograd.grad(o, leaves, tensors[3])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_means_and_key_convolution():
    k, weight = normal(2100, 17, 128), normal(17, 3, 128)
    far = far_apart(k, 128, MILLION_ROWS, 1)
    cu = torch.tensor([0, 2100], dtype=torch.int32, device="cuda")
    segments = Segments.from_cu_seqlens(cu, 2100, 128)
    assert torch.equal(kernels.chunk_means(k, segments), kernels.chunk_means(far, segments))
    results = []
    for x in (k, far):
        leaves = [x.detach().requires_grad_(), weight.requires_grad_()]
        out = key_convolution(*leaves, cu, backend="triton")
        results.append((out.detach(), *torch.autograd.grad(out, leaves, k)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("strides", [(17 * MILLION_ROWS // 16, 128, MILLION_ROWS, 1),
                                     (2 ** 12 * 128, 2 ** 20 + 128, 128, 1)], ids=["heads", "rows"])
def test_decoding(strides):
    k, v, q = normal(1, 2100, 17, 128), normal(1, 2100, 17, 128), normal(1, 34, 128)
    seqlens = torch.tensor([2049], dtype=torch.int32, device="cuda")
    results = []
    for caches in ((k, v), [far_apart(x, *strides) for x in (k, v)]):
        means = torch.zeros(1, 16, 17, 128, dtype=torch.bfloat16, device="cuda")
        decoding.fill_chunk_means(caches[0], means, seqlens - 1, 128)
        results.append((means, decoding.moba_decode(q, *caches, means, seqlens, 128, 3)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
