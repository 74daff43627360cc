"""Attention forward on a GPU: o and lse against fp64 in every dtype, large offsets, groups of heads, dense kernels."""
import pytest
import torch

import comparison
from moba_megatron import kernels
from moba_megatron.ops import flash_attn_4
from moba_megatron.ops.dense import CUDNN, FLASH, dense_causal, dense_causal_bwd, dense_kernel
from moba_megatron.segments import Segments

pytestmark = pytest.mark.gpu

CASES = {
    "chunk 128": dict(lengths=[1500], chunk=128, topk=4),
    "chunk 512, gqa": dict(lengths=[3000], chunk=512, topk=3, heads=8, kv_heads=2),
    "chunk 100, packed, ragged, empty, mqa": dict(lengths=[0, 700, 5, 0, 333], chunk=100, topk=3, kv_heads=1),
    "chunk 16": dict(lengths=[300, 41], chunk=16, topk=8),
    "topk 1": dict(lengths=[700, 99], chunk=128, topk=1),
    "dense": dict(lengths=[1700], chunk=2048, topk=1),
    "D 32": dict(lengths=[700], chunk=64, topk=3, dim=32),
    "D 64": dict(lengths=[1100], chunk=256, topk=3, dim=64),
    "D 80, DV 96": dict(lengths=[700], chunk=48, topk=3, dim=80, dim_v=96),
    "D 192, DV 128": dict(lengths=[1100], chunk=256, topk=3, dim=192, dim_v=128),
    "D 256": dict(lengths=[900], chunk=128, topk=3, dim=256),
    "parts with offsets": dict(lengths=[1500, 900], chunk=128, topk=4,
                               parts=[(0, 400, 500), (1, 3, 700), (0, 1200, 300)]),
}


def problem(lengths, chunk, topk, heads=4, kv_heads=4, dim=128, dim_v=None, dtype=torch.bfloat16, parts=None):
    """q, k, v as views of one projection, selected with holes, segments. parts: (sequence, offset, length)."""
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    total_k, dim_v = sum(lengths), dim_v or dim
    segments = Segments.from_cu_seqlens(cu, max(lengths), chunk)
    if parts:
        ids, offsets, sizes = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in zip(*parts))
        segments = Segments(torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int(), cu, ids, offsets,
                            max(p[2] for p in parts), max(lengths), chunk)
    total_q = sum(p[2] for p in parts) if parts else total_k
    q = torch.randn(total_q, heads * dim + 64, device="cuda").to(dtype)[:, :heads * dim].unflatten(1, (heads, dim))
    kv = torch.randn(total_k, kv_heads, dim + dim_v, device="cuda").to(dtype)
    sequence, position = segments.query_positions(total_q)
    earlier = (position // chunk)[:, None, None].expand(-1, heads, -1)
    order = torch.rand(total_q, heads, max(topk - 1, max(lengths) // chunk), device="cuda")
    order = order.masked_fill(torch.arange(order.shape[2], device="cuda") >= earlier, 2.0)
    best, choice = order.sort(2)
    hole = (best > 1) | (torch.rand(order.shape, device="cuda") < 0.1)
    selected = torch.where(hole, -1, choice + segments.first_chunk()[sequence][:, None, None])[:, :, :topk - 1].int()
    return q, kv[..., :dim], kv[..., dim:], selected, segments


def check(results, q, k, v, selected, segments, scale):
    mask = comparison.dense_mask(selected, segments, q.shape[0], k.shape[0])
    do = torch.zeros(q.shape[0], q.shape[1], v.shape[2], device="cuda")
    exact, eager = (comparison.attend(q, k, v, do, None, mask, scale, dtype) for dtype in (torch.float64, q.dtype))
    comparison.assert_as_good_as_eager(dict(zip(("o", "lse"), results)), exact, eager, q.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_fp64(case, dtype):
    q, k, v, selected, segments = problem(**case, dtype=dtype)
    scale = q.shape[2] ** -0.5
    check(kernels.attention_fwd(q, k, v, selected, segments, scale), q, k, v, selected, segments, scale)


@pytest.mark.parametrize("limit", ["1", "4"])
def test_groups_of_heads(limit, monkeypatch):
    tensors = problem([1500], 128, 4, heads=8)
    whole = kernels.attention_fwd(*tensors, 0.1)
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", limit)
    assert all(map(torch.equal, whole, kernels.attention_fwd(*tensors, 0.1)))


def test_offsets_beyond_int32():
    """A view whose rows lie 2^31 elements apart in all: rows at its end must be those of a compact copy."""
    total, heads, dim, width = 4096, 2, 64, 1 << 20
    wide = torch.empty(total, width, device="cuda", dtype=torch.bfloat16)  # 8 GiB
    wide[:, :3 * heads * dim] = torch.randn(total, 3 * heads * dim, device="cuda")
    q, k, v = wide[:, :3 * heads * dim].unflatten(1, (3, heads, dim)).unbind(1)
    segments = Segments.from_cu_seqlens(torch.tensor([0, total], device="cuda", dtype=torch.int32), total, 128)
    own = torch.arange(total, device="cuda")[:, None, None] // 128
    selected = torch.where(own > 0, own - 1, -1).expand(-1, heads, 1).int()
    strided = kernels.attention_fwd(q, k, v, selected, segments, 0.1)
    compact = kernels.attention_fwd(q.contiguous(), k.contiguous(), v.contiguous(), selected, segments, 0.1)
    assert all(map(torch.equal, strided, compact))


DENSE = {
    "one length": dict(lengths=[1024, 1024, 1024]),
    "one length, gqa": dict(lengths=[1024], heads=8, kv_heads=2),
    "one length, odd": dict(lengths=[777, 777], heads=4),
    "ragged": dict(lengths=[500, 0, 1024, 3, 0]),
    "ragged, mqa": dict(lengths=[500, 1024], kv_heads=1),
    "D 64": dict(lengths=[512, 300], dim=64),
    "fp16": dict(lengths=[512, 512], dtype=torch.float16),
}


@pytest.fixture
def no_flash_attn_4(monkeypatch):
    """torch's own kernels alone, also where flash-attn 4 is installed."""
    monkeypatch.setattr(flash_attn_4, "fits", lambda *_: False)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", ""])
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE.keys())
def test_dense_kernels(case, exact, no_flash_attn_4):
    """o, lse and gradients of the dense kernels inside torch, each as good as eager attention."""
    q, k, v, selected, segments = problem(**case, chunk=1024, topk=1)
    cu_seqlens, max_seqlen, scale = segments.cu_seqlens_q, segments.max_seqlen_q, 0.11
    torch.use_deterministic_algorithms(False)  # cuDNN's kernel is refused under them
    if torch.cuda.get_device_capability() == (9, 0):
        one_length = len(set(case["lengths"])) == 1
        assert dense_kernel(q, k, v, cu_seqlens, max_seqlen, exact=True) == (CUDNN if one_length else FLASH)
        assert dense_kernel(q, k, v, cu_seqlens, max_seqlen) == FLASH
    do = torch.randn(q.shape[0], q.shape[1], v.shape[2], device="cuda", dtype=q.dtype)
    o, lse = dense_causal(q, k, v, cu_seqlens, max_seqlen, scale, exact=exact)
    grads = dense_causal_bwd(do, None, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, exact=exact)
    mask = comparison.dense_mask(selected, segments, q.shape[0], k.shape[0])
    exact, eager = (comparison.attend(q, k, v, do, None, mask, scale, dtype) for dtype in (torch.float64, q.dtype))
    got = dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *grads)))
    assert all(x.is_contiguous() for x in got.values())
    comparison.assert_as_good_as_eager(got, exact, eager, q.dtype)


def test_dense_kernels_decline(no_flash_attn_4):
    q, k, v, _, segments = problem([512], 512, 1)
    arguments = segments.cu_seqlens_q, 512
    o, lse = dense_causal(q, k, v, *arguments, 0.1)
    assert dense_causal_bwd(o, lse, q, k, v, o, lse, *arguments, 0.1) is None
    assert dense_causal_bwd(o, None, q, k, v, o, lse, *arguments, 0.1, deterministic=True) is None
    assert dense_causal(q.float(), k.float(), v.float(), *arguments, 0.1) is None
    assert dense_causal(q, k, v[..., :64], *arguments, 0.1) is None
