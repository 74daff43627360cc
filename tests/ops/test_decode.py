"""The decoding operator's reference: every step as training would attend at that position, and what it refuses."""
import pytest
import torch

import decoding
from moba_megatron import moba_attn_varlen
from moba_megatron.ops.decode import fill_chunk_means, moba_decode


@pytest.mark.parametrize("chunk, topk, prefill", [(8, 3, 1), (8, 3, 24), (5, 4, 17), (8, 1, 10), (64, 3, 5)])
def test_steps_equal_training(chunk, topk, prefill):
    """From a prefill on, each step's output is the last row of attention over the whole sequence."""
    total, q = 45, torch.randn(45, 4, 16, dtype=torch.float64)
    k, v = torch.randn(2, 1, 50, 2, 16, dtype=torch.float64)
    means = k.new_full((1, 50 // chunk, 2, 16), torch.nan)
    fill_chunk_means(k, means, torch.tensor([prefill], dtype=torch.int32), chunk)
    for n in range(prefill + 1, total + 1):
        lengths = torch.tensor([n], dtype=torch.int32)
        o, lse = moba_decode(q[n - 1:n], k, v, means, lengths, chunk, topk, return_lse=True)
        cu = torch.tensor([0, n], dtype=torch.int32)
        expected, expected_lse = moba_attn_varlen(q[:n], k[0, :n], v[0, :n], cu, n, chunk, topk, return_lse=True)
        torch.testing.assert_close(o[0], expected[-1])
        torch.testing.assert_close(lse[0], expected_lse[-1])


@pytest.mark.parametrize("case", ["pages", "left padding", "pages that cut chunks, left padding"])
def test_layouts_give_the_same_bits(case):
    """Padding and pages only say where a row is."""
    case = decoding.CASES[case]
    chunk, topk = case["chunk"], case["topk"]
    q, k, v, lengths, places = decoding.make(**case)
    means = decoding.filled_means(k, lengths, chunk, places, "reference")
    o = moba_decode(q, k, v, means, lengths, chunk, topk, **places)
    for b, n in enumerate(lengths.tolist()):
        row = places.get("cache_starts", torch.zeros_like(lengths))[b] + torch.arange(n)
        if "block_table" in places:
            rows = [x[places["block_table"][b, row // x.shape[1]].long(), row % x.shape[1]][None] for x in (k, v)]
        else:
            rows = [x[b:b + 1, row] for x in (k, v)]
        alone = lengths[b:b + 1]
        means = decoding.filled_means(rows[0], alone, chunk, {}, "reference")
        assert torch.equal(moba_decode(q[b:b + 1], *rows, means, alone, chunk, topk)[0], o[b])


def test_compiled():
    q, k, v, lengths, _ = decoding.make([40, 17], 8, 3)
    means = decoding.filled_means(k, lengths, 8, {}, "reference")
    expected = moba_decode(q, k, v, means, lengths, 8, 3)
    compiled = torch.compile(lambda *x: moba_decode(*x, 8, 3) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, means, lengths), expected + 1)


def arguments(**changed):
    given = dict(q=torch.zeros(2, 4, 16), k_cache=torch.zeros(2, 32, 2, 16), v_cache=torch.zeros(2, 32, 2, 8),
                 means_cache=torch.zeros(2, 4, 2, 16), cache_seqlens=torch.tensor([32, 5], dtype=torch.int32),
                 chunk_size=8, topk=2)
    return {**given, **changed}


@pytest.mark.parametrize("changed, message", [
    (dict(q=torch.zeros(2, 3, 16)), "q must have k_cache's head_dim 16 and a positive multiple of its 2 heads, got 3"),
    (dict(q=torch.zeros(4, 16)), "q must be a tensor .sequences, heads, head_dim. of .* sequences, got .4, 16."),
    (dict(q=torch.zeros(1, 4, 16)), "q must be a tensor .* of the caches' 2 sequences, got .1, 4, 16."),
    (dict(q=torch.zeros(3, 4, 16)), "q must be a tensor .* of the caches' 2 sequences, got .3, 4, 16."),
    (dict(q=torch.zeros(2, 4, 16).half()), "k_cache must be torch.float16 on cpu as q, got torch.float32"),
    (dict(k_cache=torch.zeros(32, 2, 16)), "k_cache must have 4 dimensions"),
    (dict(k_cache=torch.zeros(2, 32, 2, 16).int()), "k_cache must be bfloat16, float16, float32 or float64, got"),
    (dict(k_cache=torch.zeros(3, 32, 2, 16)), "k_cache must have the 2 sequences of means_cache, got 3: for a paged"),
    (dict(v_cache=torch.zeros(2, 31, 2, 8)), "v_cache must have k_cache's first dimensions"),
    (dict(means_cache=torch.zeros(2, 3, 2, 16)), "means_cache must have shape .B, at least 4, 2, 16."),
    (dict(means_cache=torch.zeros(2, 4, 2, 16).double()), "means_cache must be torch.float32 on cpu as k_cache"),
    (dict(means_cache=torch.zeros(2, 4, 2, 32)[..., ::2]), "means_cache must be contiguous in its last dimension"),
    (dict(cache_seqlens=torch.tensor([32, 5])), "cache_seqlens must be int32, got torch.int64"),
    (dict(cache_seqlens=torch.tensor([32], dtype=torch.int32)), "cache_seqlens must have shape .2., got .1,."),
    (dict(cache_starts=[0, 1]), "cache_starts must be a torch.Tensor, got list"),
    (dict(cache_seqlens=torch.ones(4, dtype=torch.int32)[::2]),
     "cache_seqlens must be contiguous in its last dimension"),
    (dict(block_table=torch.zeros(2, 8, dtype=torch.int32)[:, ::2]), "block_table must be contiguous in its last dim"),
    (dict(block_table=torch.zeros(2, dtype=torch.int32)), "block_table must have 2 dimensions, got shape .2,."),
    (dict(cache_seqlens=torch.tensor([33, 5], dtype=torch.int32)),
     "must lie within the 32 rows .*, got 33 keys from row 0 on in sequence 0"),
    (dict(cache_seqlens=torch.tensor([32, -1], dtype=torch.int32)), "got -1 keys from row 0 on in sequence 1"),
    (dict(cache_starts=torch.tensor([0, 28], dtype=torch.int32)), "got 5 keys from row 28 on in sequence 1"),
    (dict(cache_starts=torch.tensor([0, -4], dtype=torch.int32)), "got 5 keys from row -4 on in sequence 1"),
    (dict(cache_seqlens=torch.tensor([32, 33], dtype=torch.int32), block_table=torch.tensor([[0, 7], [1, -1]]).int(),
          means_cache=torch.zeros(2, 8, 2, 16)), "block_table must name pages from 0 to 1, got .1, -1. in sequence 1"),
    (dict(q=torch.zeros(2, 4, 0), k_cache=torch.zeros(2, 32, 2, 0), means_cache=torch.zeros(2, 4, 2, 0)),
     "k_cache must have at least one head, and head_dim 1, got shape .2, 32, 2, 0."),
    (dict(topk=0), "topk must be at least 1, got 0"),
    (dict(chunk_size=0), "chunk_size must be at least 1, got 0"),
    (dict(chunk_size=2 ** 70), "chunk_size must be below 2\\^31, got"),
    (dict(topk=2 ** 70), "topk must be below 2\\^31, got"),
    (dict(backend="triton"), "backend='triton' needs CUDA tensors"),
], ids=str)
def test_refusals(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        moba_decode(**arguments(**changed))


def test_no_gradient():
    """Nor a graph that grows with the steps, in the means."""
    given = {name: x.requires_grad_(x.is_floating_point()) if name in ("q", "k_cache", "v_cache") else x
             for name, x in arguments().items()}
    fill_chunk_means(*(given[name] for name in ("k_cache", "means_cache", "cache_seqlens", "chunk_size")))
    assert not moba_decode(**given).requires_grad and not given["means_cache"].requires_grad
