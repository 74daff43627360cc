"""Attention forward, interpreted: o and lse of every path of its kernels against fp64, for selections at random."""
import importlib

import pytest
import torch

import comparison
from moba_megatron import kernels, moba_attn_varlen
from moba_megatron.kernels import attention_call, launcher, tuning
from moba_megatron.kernels.workspace import head_groups, workspace_limit
from moba_megatron.segments import Segments

stage = importlib.import_module("moba_megatron.kernels.attention_fwd")

CASES = {
    "odd length": dict(lengths=[131], chunk=32, topk=3),
    "gqa": dict(lengths=[130], chunk=32, topk=3, heads=6, kv_heads=2),
    "mqa": dict(lengths=[100], chunk=32, topk=3, heads=3, kv_heads=1),
    "chunk 16": dict(lengths=[100], chunk=16, topk=4),
    "chunk 48": dict(lengths=[200], chunk=48, topk=3),
    "chunk 100": dict(lengths=[250], chunk=100, topk=2),
    "chunk 64, two tiles of keys": dict(lengths=[200], chunk=64, topk=3),
    "D 80, DV 96": dict(lengths=[90], chunk=32, topk=2, dim=80, dim_v=96),
    "D 192, DV 128": dict(lengths=[70], chunk=32, topk=2, dim=192, dim_v=128),
    "D 4, DV 8": dict(lengths=[90], chunk=32, topk=3, dim=4, dim_v=8),
    "D 8": dict(lengths=[90], chunk=32, topk=3, dim=8),
    "D 12, DV 4": dict(lengths=[70], chunk=16, topk=2, dim=12, dim_v=4),
    "DV 20": dict(lengths=[70], chunk=32, topk=2, dim_v=20),
    "packed, ragged, empty, short": dict(lengths=[0, 70, 0, 5, 101, 1], chunk=32, topk=3),
    "topk 1": dict(lengths=[70, 33], chunk=32, topk=1),
    "chunk as long as the sequence": dict(lengths=[70, 5], chunk=128, topk=1),
    "topk beyond the chunks": dict(lengths=[70], chunk=32, topk=6),
    "parts with offsets": dict(lengths=[150, 90], chunk=32, topk=3,
                               parts=[(0, 40, 50), (1, 3, 70), (0, 120, 30), (1, 90, 0)]),
    "fp16": dict(lengths=[130], chunk=32, topk=3, dtype=torch.float16),
    "fp16, chunk 48": dict(lengths=[130], chunk=48, topk=2, dtype=torch.float16),
}


def problem(lengths, chunk, topk, heads=2, kv_heads=2, dim=32, dim_v=None, dtype=torch.float32, parts=None):
    """q, k, v as views of one projection, selected with holes, segments. parts: (sequence, offset, length)."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    total_k, dim_v = sum(lengths), dim_v or dim
    segments = Segments.from_cu_seqlens(cu, max(lengths), chunk)
    if parts:
        ids, offsets, sizes = (torch.tensor(x, dtype=torch.int32) for x in zip(*parts))
        cu_q = torch.cat((torch.zeros(1, dtype=torch.int32), sizes.cumsum(0).int()))
        segments = Segments(cu_q, cu, ids, offsets, int(sizes.max()), max(lengths), chunk)
    total_q = int(segments.cu_seqlens_q[-1])
    q = torch.randn(total_q, heads * dim + 3).to(dtype)[:, :heads * dim].unflatten(1, (heads, dim))
    kv = torch.randn(total_k, kv_heads, dim + dim_v).to(dtype)
    sequence, position = segments.query_positions(total_q)
    earlier = (position // chunk)[:, None, None].expand(-1, heads, -1)
    order = torch.rand(total_q, heads, max(topk - 1, max(lengths) // chunk))
    order = order.masked_fill(torch.arange(order.shape[2]) >= earlier, 2.0)
    best, choice = order.sort(2)
    # about one choice in ten is empty, at any place of the row
    hole = (best > 1) | (torch.rand(order.shape) < 0.1)
    selected = torch.where(hole, -1, choice + segments.first_chunk()[sequence][:, None, None])[:, :, :topk - 1].int()
    return q, kv[..., :dim], kv[..., dim:], selected, segments


def check(q, k, v, selected, segments, scale=None):
    scale = q.shape[2] ** -0.5 if scale is None else scale
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, scale)
    assert o.dtype == q.dtype and lse.dtype == torch.float32
    mask = comparison.dense_mask(selected, segments, q.shape[0], k.shape[0])
    unused = torch.zeros(q.shape[0], q.shape[1], v.shape[2])
    exact, eager = (comparison.attend(q, k, v, unused, None, mask, scale, dtype) for dtype in (torch.float64, q.dtype))
    comparison.assert_as_good_as_eager(dict(o=o, lse=lse), exact, eager, q.dtype)
    return o, lse


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_fp64(case):
    check(*problem(**case))


@pytest.mark.parametrize("case", ["chunk 64, two tiles of keys", "odd length", "chunk 48", "D 80, DV 96", "D 8"])
def test_tensor_descriptors(case, monkeypatch):
    """As on Hopper, whose tiles come through descriptors; here in fp16, the dtype that they take."""
    monkeypatch.setattr(attention_call, "tma_available", lambda device: True)
    check(*problem(**{**CASES[case], "dtype": torch.float16}))


@pytest.mark.parametrize("config", [dict(BLOCK_M=16, BLOCK_N=32), dict(BLOCK_M=16, BLOCK_N=32, SPLIT=48),
                                    dict(BLOCK_M=16, BLOCK_N=64, SPLIT=64), dict(BLOCK_M=32, BLOCK_N=16)], ids=str)
def test_runs_of_a_list(config):
    """A chunk of 32 in one tile, in one larger than itself and in two; programs of one and of several tiles of rows."""
    with tuning.forced(configs={"attention_fwd": {**config, "num_warps": 4, "num_stages": 1}}):
        check(*problem([200], 32, 3, kv_heads=1))


def test_groups_of_heads(monkeypatch):
    """The same bits however many kv heads run at a time."""
    tensors = problem([90], 32, 3, heads=6, kv_heads=3)
    whole = check(*tensors, scale=0.2)
    for limit in ("0.001", "0.05", "1024"):
        monkeypatch.setenv("MOBA_WORKSPACE_MIB", limit)
        assert all(map(torch.equal, whole, kernels.attention_fwd(*tensors, 0.2)))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scales(scale):
    check(*problem([100], 32, 3), scale=scale)


def test_wide_offsets(monkeypatch):
    """64-bit addresses where an offset leaves int32; the same results."""
    q, k, v, selected, segments = problem([100], 32, 3)
    narrow = kernels.attention_fwd(q, k, v, selected, segments, 0.2)
    monkeypatch.setattr(stage, "_wide", lambda *tensors: True)
    monkeypatch.setattr(launcher, "_plans", {})
    assert all(map(torch.equal, narrow, kernels.attention_fwd(q, k, v, selected, segments, 0.2)))
    monkeypatch.undo()
    meta = torch.empty(1 << 20, 32, 128, device="meta")
    assert stage._wide(meta) and not stage._wide(meta[:, :8].contiguous()) and stage._wide(meta[:, :8])


def test_another_sequence_s_nan_stays_there():
    q, k, v, selected, segments = problem([40, 50], 32, 2)
    k[:40], v[:40] = float("nan"), float("nan")
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, 0.2)
    assert not o[40:].isnan().any() and not lse[40:].isnan().any() and lse[:40].isnan().all()


def test_no_queries():
    q, k, v, selected, segments = problem([0, 0], 32, 1)
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, 0.2)
    assert o.shape == (0, 2, 32) and lse.shape == (0, 2)


def test_refuses():
    q, k, v, selected, segments = problem([40], 32, 2)
    with pytest.raises(TypeError, match="q must be bfloat16"):
        kernels.attention_fwd(q.double(), k.double(), v.double(), selected, segments, 0.2)
    with pytest.raises(TypeError, match="interpreter .* computes bfloat16 wrongly: use float16 or float32"):
        moba_attn_varlen(*(x.bfloat16() for x in (q, k, v)), segments.cu_seqlens_q, 40, 32, 2, backend="triton")
    with pytest.raises(ValueError, match="head_dim must be at most 256"):
        kernels.attention_fwd(*(torch.randn(40, 2, 272) for _ in range(3)), selected, segments, 0.2)
    with pytest.raises(ValueError, match="chunk_size must be at least 16"):
        kernels.attention_fwd(q, k, v, selected, Segments.from_cu_seqlens(segments.cu_seqlens_q, 40, 8), 0.2)


def test_workspace(monkeypatch):
    assert head_groups(16, 1 << 20, 4 << 20) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert head_groups(10, 3, 12) == [(0, 4), (4, 7), (7, 10)]
    assert head_groups(3, 100, 1) == [(0, 1), (1, 2), (2, 3)]
    # 128K tokens, 16 heads of 128, topk 8, bf16: a default of a GiB runs four heads at a time
    monkeypatch.delenv("MOBA_WORKSPACE_MIB", raising=False)
    assert head_groups(16, 131072 * 7 * (256 + 4))[0] == (0, 4)
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", "0.5")
    assert workspace_limit() == 1 << 19
    for bad in ("0", "-3", "much"):
        monkeypatch.setenv("MOBA_WORKSPACE_MIB", bad)
        with pytest.raises(ValueError, match="MOBA_WORKSPACE_MIB must be a positive number"):
            workspace_limit()
