"""Rows behind the last sequence, and lengths that break their contract, where the host does not look at them.

Memory is poisoned and nothing waits for the host. What is checked in detail is in tests/interpreted/test_bounds.py.
"""
import pytest
import torch

import comparison
from moba_megatron import moba_attn_varlen
from moba_megatron.kernels import launcher
from moba_megatron.kernels.bounds import bounded_lengths
from moba_megatron.ops import key_convolution, moba_attention
from moba_megatron.reference import bounded_lengths as reference_lengths
from moba_megatron.segments import Segments, uniform_segments

pytestmark = pytest.mark.gpu

CASES = {
    "chunk 512": dict(chunk=512, topk=3, dim=128), "chunk 128": dict(chunk=128, topk=5, dim=128),
    "portable": dict(chunk=100, topk=3, dim=80), "own chunk only": dict(chunk=512, topk=1, dim=128),
    "dense, packages": dict(chunk=4096, topk=1, dim=128, backend="auto"),
    "dense, own": dict(chunk=4096, topk=1, dim=128), "dense, portable": dict(chunk=4096, topk=1, dim=80),
    "groups of heads": dict(chunk=512, topk=3, dim=128, workspace_mib=1),
}


@pytest.fixture(autouse=True)
def no_records(monkeypatch):
    monkeypatch.setattr(launcher, "_plans", {})
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN; the dense kernels only warn


def make(total, dim, behind=0):
    tensors = [torch.randn(total + behind, heads, dim, device="cuda").bfloat16() for heads in (4, 2, 2, 4)]
    for x in tensors:
        x[total:] = torch.nan
    return tensors


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def gradients(tensors, cu, longest, chunk, topk, dim, backend="triton", **options):
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    o, lse = moba_attn_varlen(*leaves, cu, longest, chunk, topk, backend=backend, return_lse=True, **options)
    return o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, tensors[3])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_behind_the_last_sequence(case):
    """Three times: compiled, and twice prepared; 1100 rows behind, so that chunks and tiles of their own lie there."""
    total = 3000
    tensors, cu = make(total, case["dim"], behind=1096), ints(0, 1700, 1700, total)
    expected = gradients([x[:total].contiguous() for x in tensors], cu, 1700, **case)
    for _ in range(3):
        got = gradients(tensors, cu, 1700, **case)
        for name, x, wanted in zip(("o", "lse", "dq", "dk", "dv"), got, expected, strict=True):
            assert (x[total:] == (-torch.inf if name == "lse" else 0)).all(), name
            if case.get("backend") == "auto":  # dq is added up in any order
                assert comparison.relative_error(x[:total], wanted.double()) < 1e-2, name
            else:
                assert torch.equal(x[:total], wanted), name


def test_equal_lengths_are_not_guessed():
    """Tokens are sequences times the bound, lengths are not: cuDNN would cut at the wrong rows."""
    torch.use_deterministic_algorithms(False)
    q, k, v, _ = make(1024, 64)
    cu = ints(0, 500, 900)
    got = moba_attn_varlen(q, k, v, cu, 512, 512, 3)
    expected = moba_attn_varlen(q[:900], k[:900], v[:900], cu, 512, 512, 3, backend="reference")
    assert comparison.relative_error(got[:900], expected.double()) < 1e-2
    assert not got[900:].any()
    uniform = moba_attention(q, k, v, uniform_segments(512, 512, 2, 512, q.device), 3)
    expected = moba_attn_varlen(q, k, v, ints(0, 512, 1024), 512, 512, 3, backend="reference")
    assert comparison.relative_error(uniform, expected.double()) < 1e-2


WRONG = {"beyond the end": (0, 1500, 5000), "far beyond": (0, 2 ** 31 - 1, 2 ** 31 - 1),
         "falling": (0, 2000, 700, 3000), "negative": (-5, -2 ** 31, 1000), "not from 0": (900, 1000, 3000),
         "all beyond": (9000, 9001, 10000)}


@pytest.mark.parametrize("case", ["chunk 512", "chunk 128", "dense, packages", "dense, own"])
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_lengths_that_break_their_contract_are_bounded(given, case):
    case, tensors = CASES[case], make(3000, CASES[case]["dim"])
    meant = reference_lengths(torch.tensor(given, dtype=torch.int32), 3000).cuda()
    assert torch.equal(bounded_lengths(ints(*given), 3000), meant)
    got, expected = (gradients(tensors, cu, 3000, **case) for cu in (ints(*given), meant))
    for x, wanted in zip(got, expected, strict=True):
        assert not x.isnan().any()
        if case.get("backend") != "auto":
            assert torch.equal(x, wanted)
    torch.cuda.synchronize()


def test_segments_that_break_their_contract_are_bounded():
    segments = Segments(ints(5, -1, 9000), ints(3, 9000, 2), ints(7, -3), ints(-4, 10 ** 9), 3000, 3000, 128)
    tensors = make(3000, 128)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    o = moba_attention(*leaves, segments, 3, backend="triton")
    assert all(x.isfinite().all() for x in (o, *torch.autograd.grad(o, leaves, tensors[3])))
    torch.cuda.synchronize()


def test_a_bound_that_is_too_small_leaves_nothing_unwritten():
    for case in ("chunk 512", "dense, own"):
        got = gradients(make(4096, 128), ints(0, 4096), 2048, **CASES[case])
        assert all(x.isfinite().all() for x in got)


def test_the_key_convolution():
    k, weight = make(3000, 128, behind=1096)[1], torch.randn(2, 3, 128, device="cuda").bfloat16()
    cu, results = ints(0, 1700, 3000), []
    for rows in (4096, 3000):
        leaves = [k[:rows].detach().requires_grad_(), weight.requires_grad_()]
        out = key_convolution(*leaves, cu)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    for x, wanted in zip(*results):
        torch.testing.assert_close(x[:3000], wanted)
        assert not x[3000:].any()


def test_nothing_waits_for_the_host():
    tensors, cu = make(3000, 128, behind=1096), ints(0, 1700, 3000)
    for _ in range(3):
        gradients(tensors, cu, 1700, **CASES["chunk 512"])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(tensors, cu, 1700, **CASES["chunk 512"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
