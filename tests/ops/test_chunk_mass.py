"""The mass of dense attention on each chunk, against whole softmax matrices in fp64."""
import importlib

import pytest
import torch
from cases import Case
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from moba_megatron import chunk_mass
from moba_megatron.segments import Segments, uniform_segments

module = importlib.import_module("moba_megatron.ops.chunk_mass")


def whole(q, k, lengths, chunk_size, scale):
    """By one matrix a sequence."""
    parts, begin, chunks = [], 0, k.shape[0] // chunk_size + len(lengths)
    for b, n in enumerate(lengths):
        keys = k[begin:begin + n].repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("thd,shd->ths", q[begin:begin + n], keys) * scale
        later = torch.ones(n, n, dtype=torch.bool).triu(1)[:, None]
        weights, first = scores.masked_fill(later, -torch.inf).softmax(2), begin // chunk_size + b
        chunk = first + torch.arange(n) // chunk_size
        parts.append(q.new_zeros(n, q.shape[1], chunks).index_add(2, chunk, weights))
        begin += n
    return torch.cat(parts)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), st.integers(1, 9), st.sampled_from((1, 2, 4)),
       st.integers(1, 300), st.integers(0, 99))
@examples(40)
def test_it_is_the_softmax(lengths, chunk_size, kv_heads, elements, seed):
    case = Case(tuple(lengths), chunk_size, 2, heads=4, kv_heads=kv_heads)
    q, k, *_ = case.tensors(torch.float64)
    segments = Segments.from_cu_seqlens(case.cu_seqlens(), case.max_seqlen, chunk_size)
    rows = torch.randint(q.shape[0], (7,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORE_ELEMENTS", elements)  # whatever the blocks
        for scale, given_scale in ((q.shape[2] ** -0.5, None), (-0.7, -0.7)):
            expected = whole(q, k, lengths, chunk_size, scale)
            got = chunk_mass(q, k, segments, softmax_scale=given_scale)
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(chunk_mass(q, k, segments, rows, softmax_scale=given_scale), expected[rows],
                                       rtol=1e-11, atol=1e-13)
    assert not got.requires_grad


def test_queries_behind_a_cache_in_bf16():
    q, k = (torch.randn(50, n, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    got = chunk_mass(q[-3:], k, uniform_segments(3, 50, 1, 8, q.device))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), whole(q.double(), k.double(), [50], 8, 0.25)[-3:], rtol=1e-5, atol=1e-6)


def test_never_the_whole_matrix(monkeypatch):
    """Nothing is larger than so many scores, but what is returned."""
    sizes, einsum = [], torch.einsum
    monkeypatch.setattr(module, "SCORE_ELEMENTS", 1 << 12)
    monkeypatch.setattr(torch, "einsum", lambda *args: (out := einsum(*args), sizes.append(out.numel()))[0])
    q, k = torch.randn(600, 4, 8), torch.randn(600, 2, 8)
    chunk_mass(q, k, uniform_segments(600, 600, 1, 64, q.device))
    assert sum(sizes) == 600 * 600 * 4 and max(sizes) <= 1 << 12


def test_refused():
    q = torch.randn(6, 2, 4)
    with pytest.raises(TypeError, match="segments must be"):
        chunk_mass(q, q, 3)
    with pytest.raises(ValueError, match="k must have q's head_dim 4"):
        chunk_mass(q, q[..., :3], uniform_segments(6, 6, 1, 2, q.device))


def test_rows_behind_the_last_sequence():
    """As the operator: cu_seqlens may end before the tensors."""
    q, k = (torch.randn(40, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    segments = Segments.from_cu_seqlens(torch.tensor([0, 12, 30], dtype=torch.int32), 18, 5)
    got = chunk_mass(q, k, segments)
    torch.testing.assert_close(got[:30, :, :8], whole(q[:30], k[:30], [12, 18], 5, 0.25), rtol=1e-11, atol=1e-13)
    assert got.shape == (40, 4, 10) and not got[30:].any() and not got[..., 8:].any()


def test_in_its_own_precision_under_autocast():
    q, k = (8 * torch.randn(40, n, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 2))
    segments = uniform_segments(40, 40, 1, 8, q.device)
    expected = chunk_mass(q, k, segments), chunk_mass(q.bfloat16(), k.bfloat16(), segments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunk_mass(q, k, segments), expected[0])
        assert torch.equal(chunk_mass(q.bfloat16(), k, segments), expected[1])  # both in autocast's, as for attention
