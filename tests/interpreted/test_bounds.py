"""Rows behind the last sequence, and lengths that break their contract: kernels and reference, values not looked at.

As on CUDA the host reads no lengths here. Uninitialised memory holds NaN or the largest integer (conftest.py), inputs
hold NaN where nothing may be read.
"""
import pytest
import torch

from moba_megatron import kernels, moba_attn_varlen, reference
from moba_megatron.kernels.bounds import bounded_lengths
from moba_megatron.ops import key_convolution, moba_attention, validation
from moba_megatron.segments import Segments

BACKENDS = ["triton", "torch", "reference"]
CASES = {"sparse": (16, 2), "sparse, cut short": (40, 2), "dense": (64, 1), "own chunk only": (16, 1)}
"""Chunk size and topk for sequences of 33 and 37 rows."""


@pytest.fixture(autouse=True)
def values_not_read(monkeypatch):
    monkeypatch.setattr(validation, "values_readable", lambda x: False)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def make(total, behind=0):
    """q, k, v, do; NaN in rows from ``total`` on, 0 in those of do, whose NaN must not matter either."""
    tensors = [torch.randn(total + behind, heads, 16) for heads in (2, 1, 1, 2)]
    for x in tensors:
        x[total:] = torch.nan
    return tensors


def gradients(tensors, place, topk, backend, call=moba_attn_varlen, **options):
    """o, lse and the gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    o, lse = call(*leaves, *place, topk, backend=backend, return_lse=True, **options)
    return o, lse, *torch.autograd.grad(o, leaves, tensors[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk, topk", CASES.values(), ids=CASES)
def test_rows_behind_the_last_sequence(chunk, topk, backend):
    """They give 0 and -inf and take no gradient; those before are what they are without them."""
    tensors = make(70, behind=31)
    place = ints(0, 33, 70), 37, chunk
    got = gradients(tensors, place, topk, backend)
    expected = gradients([x[:70] for x in tensors], place, topk, backend)
    for name, x, wanted in zip(("o", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(x[:70], wanted, msg=name)
        assert (x[70:] == (-torch.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topk", [2, 1])
def test_queries_and_keys_behind_the_segments(topk, backend):
    """Two segments of one sequence among three, with queries and keys behind."""
    keys, queries = make(70, behind=9), make(30, behind=5)
    tensors = queries[0], keys[1], keys[2], queries[3]
    segments = Segments(ints(0, 12, 30), ints(0, 20, 70), ints(1, 1), ints(0, 25), 18, 50, 16)
    got = gradients(tensors, (segments,), topk, backend, moba_attention)
    expected = gradients((queries[0][:30], keys[1][:70], keys[2][:70], queries[3][:30]), (segments,), topk, backend,
                         moba_attention)
    for x, wanted, rows in zip(got, expected, (30, 30, 30, 70, 70), strict=True):
        torch.testing.assert_close(x[:rows], wanted)
        assert (x[rows:] == (-torch.inf if x.dim() == 2 else 0)).all()


WRONG = {
    "beyond the end": ((0, 33, 90), (0, 33, 70)), "far beyond": ((0, 2 ** 31 - 1, 2 ** 31 - 1), (0, 70, 70)),
    "falling": ((0, 50, 20, 70), (0, 50, 50, 70)), "negative": ((-5, -2 ** 31, 40), (0, 0, 40)),
    "not from 0": ((9, 30, 70), (0, 30, 70)), "all beyond": ((80, 90, 100), (0, 70, 70)), "none": ((0, 0), (0, 0)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given, meant", WRONG.values(), ids=WRONG)
def test_lengths_that_break_their_contract_are_bounded(given, meant, backend):
    tensors = make(70)
    got, expected = (gradients(tensors, (ints(*cu), 70, 16), 2, backend) for cu in (given, meant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topk, max_seqlen", [(2, 37), (2, 20), (1, 20)])
def test_a_bound_that_is_too_small_leaves_nothing_unwritten(topk, max_seqlen, backend):
    got = gradients(make(70), (ints(0, 70), max_seqlen, 16 if topk > 1 else 48), topk, backend)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("change", [
    dict(seq_ids=ints(7, -3)), dict(offsets=ints(-4, 10 ** 9)), dict(cu_seqlens_q=ints(0, 60, 70)),
    dict(cu_seqlens_k=ints(0, 5, 7)), dict(cu_seqlens_q=ints(5, -1, 900), cu_seqlens_k=ints(3, 900, 2))])
@pytest.mark.parametrize("topk", [2, 1])
def test_segments_that_break_their_contract_are_bounded(topk, change):
    """Kernels and reference agree on what is meant, and on what comes of it."""
    segments = Segments(**{**dict(cu_seqlens_q=ints(0, 12, 30), cu_seqlens_k=ints(0, 20, 70), seq_ids=ints(1, 1),
                                  offsets=ints(0, 25), max_seqlen_q=70, max_seqlen_k=70, chunk_size=16), **change})
    meant = [stages.bounded(segments, 70, 70) for stages in (kernels, reference)]
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seq_ids", "offsets"):
        assert getattr(meant[0], name).tolist() == getattr(meant[1], name).tolist(), name
    tensors = make(70)
    for a, *others in zip(*(gradients(tensors, (segments,), topk, backend, moba_attention) for backend in BACKENDS)):
        for b in others:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_many_lengths():
    """More than a program takes at a time, with steps back in every block."""
    cu = torch.randint(-50, 5000, (3000,), dtype=torch.int32)
    for total in (0, 1, 2500, 10 ** 6):
        assert torch.equal(bounded_lengths(cu, total), reference.bounded_lengths(cu, total))
    rising = torch.arange(3000, dtype=torch.int32)
    assert torch.equal(bounded_lengths(rising, 2999), rising)


def test_what_is_known_is_not_looked_at():
    segments = Segments.from_cu_seqlens(ints(0, 33, 70), 37, 16, exact=True)
    assert kernels.bounded(segments, 70, 70) is segments and reference.bounded(segments, 70, 70) is segments


@pytest.mark.parametrize("with_halo", [False, True], ids=["", "halo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_key_convolution(backend, with_halo):
    k, weight = make(70, behind=31)[0], torch.randn(2, 3, 16)
    halo, dout = torch.randn(2, 2, 2, 16) if with_halo else None, torch.randn(101, 2, 16)
    dout[70:] = torch.nan
    results = []
    for rows, cu in ((101, ints(0, 33, 70)), (70, ints(0, 33, 70)), (70, ints(0, 33, 2 ** 30))):
        leaves = [x.detach().requires_grad_() for x in (k[:rows], weight, halo) if x is not None]
        out = key_convolution(*leaves[:2], cu, *leaves[2:], backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, dout[:rows])))
    assert all(not x[70:].any() for x in results[0][:2])
    for other in results[1:]:
        for x, wanted in zip(results[0], other):
            torch.testing.assert_close(x[:70], wanted)


def test_lengths_with_a_stride():
    tensors, cu = make(70), ints(0, 5, 33, 6, 70, 7)[::2]
    for a, b in zip(*(gradients(tensors, (x, 37, 16), 2, "triton") for x in (cu, cu.clone()))):
        assert torch.equal(a, b)
    segments = Segments(cu, cu, ints(0, 9, 1, 9)[::2], ints(0, 9, 0, 9)[::2], 37, 37, 16)
    whole = Segments.from_cu_seqlens(cu.clone(), 37, 16)
    for a, b in zip(*(gradients(tensors, (x,), 2, "triton", moba_attention) for x in (segments, whole))):
        torch.testing.assert_close(a, b)
