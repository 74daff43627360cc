"""Attention backward on a GPU: dq, dk, dv against fp64 in every dtype, equal bits in every run, cut lists."""
import importlib

import pytest
import torch

import comparison
from moba_megatron import kernels, reference
from moba_megatron.kernels import tuning
from tests.gpu.test_attention_fwd import CASES, problem

pytestmark = pytest.mark.gpu
stage = importlib.import_module("moba_megatron.kernels.attention_bwd")


def backward(q, k, v, selected, segments, lse_gradient=False, **options):
    """What attention_bwd gives, with its do and dlse."""
    scale = q.shape[2] ** -0.5
    o, lse = reference.attention_fwd(q.double(), k.double(), v.double(), selected, segments, scale)
    do = torch.randn(q.shape[1], q.shape[0], v.shape[2] + 8, device="cuda").to(q.dtype).transpose(0, 1)[..., :-8]
    dlse = torch.randn(lse.shape, device="cuda") if lse_gradient else None
    got = kernels.attention_bwd(do, dlse, q, k, v, o.to(q.dtype), lse.float(), selected, segments, scale, **options)
    return dict(zip(("dq", "dk", "dv"), got)), do, dlse


def check(q, k, v, selected, segments, **options):
    got, do, dlse = backward(q, k, v, selected, segments, **options)
    mask = comparison.dense_mask(selected, segments, q.shape[0], k.shape[0])
    exact, eager = (comparison.attend(q, k, v, do, dlse, mask, q.shape[2] ** -0.5, dtype)
                    for dtype in (torch.float64, q.dtype))
    comparison.assert_as_good_as_eager(got, exact, eager, q.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_fp64(case, dtype):
    check(*problem(**case, dtype=dtype), lse_gradient=True)


def to_first_chunk(selected, segments):
    """Every query that can picks its sequence's first chunk."""
    sequence, position = segments.query_positions(selected.shape[0])
    first = segments.first_chunk()[sequence].int()
    selected = torch.where(selected == first[:, None, None], -1, selected)
    selected[:, :, 0] = torch.where(position >= segments.chunk_size, first, -1)[:, None]
    return selected


@pytest.mark.parametrize("chunk", [128, 512])
def test_cut_lists(chunk):
    q, k, v, selected, segments = problem([3000], chunk, 4, heads=8, kv_heads=2)
    with tuning.forced(configs={"attention_bwd_dkdv": {**tuning.config("attention_bwd_dkdv", q.device, head_dim=128,
                                                                      chunk_size=chunk, itemsize=2), "SPLIT": 512}}):
        check(q, k, v, to_first_chunk(selected, segments), segments)


@pytest.mark.parametrize("chunk", [128, 512])
def test_equal_bits(chunk, monkeypatch):
    """Twenty runs, and one with a smaller workspace, all give the same bits."""
    q, k, v, selected, segments = problem([6000], chunk, 6, heads=8, kv_heads=4)
    selected, scale = to_first_chunk(selected, segments), 0.1
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, scale)
    do = torch.randn_like(o)
    runs = [kernels.attention_bwd(do, None, q, k, v, o, lse, selected, segments, scale) for _ in range(20)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", "16")
    assert torch.equal(runs[0][0], kernels.attention_bwd(do, None, q, k, v, o, lse, selected, segments, scale)[0])


def test_kv_grad_dtype():
    tensors = problem([1500], 128, 4)
    torch.manual_seed(5)
    rounded, *_ = backward(*tensors)
    torch.manual_seed(5)
    full, *_ = backward(*tensors, kv_grad_dtype=torch.float32)
    assert full["dk"].dtype == full["dv"].dtype == torch.float32
    assert all(torch.equal(full[name].bfloat16(), rounded[name]) for name in ("dk", "dv"))
