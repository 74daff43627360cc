"""Decoding on a GPU: values of every dtype and layout, long caches, CUDA graphs, torch.compile."""
import pytest
import torch

import decoding
from moba_megatron.ops.decode import moba_decode

pytestmark = pytest.mark.gpu

MORE_CASES = {
    "bf16, gqa 32:8, D 128": dict(lengths=[2100, 700], chunk=128, topk=4, heads=32, kv_heads=8, dim=128,
                                  dtype=torch.bfloat16),
    "bf16, mha, pages": dict(lengths=[1500, 64, 2049], chunk=64, topk=8, heads=4, kv_heads=4, dim=64, page=16,
                             dtype=torch.bfloat16),
    "bf16, chunk 100": dict(lengths=[1777], chunk=100, topk=5, heads=8, kv_heads=2, dim=128, dtype=torch.bfloat16),
    "fp32, D 128": dict(lengths=[1300], chunk=128, topk=4, heads=8, kv_heads=2, dim=128),
    "fp16, D 192, DV 128": dict(lengths=[900], chunk=64, topk=4, heads=6, kv_heads=2, dim=192, dim_v=128,
                                dtype=torch.float16),
    "bf16, mqa of 64 heads, D 256": dict(lengths=[900], chunk=64, topk=4, heads=64, kv_heads=1, dim=256,
                                         dtype=torch.bfloat16),
    "bf16, topk 64": dict(lengths=[3000], chunk=16, topk=64, heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16),
}
CASES = {**decoding.CASES, **MORE_CASES}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_reference_and_fp64(case):
    decoding.check(*decoding.make(**case, device="cuda"), case["chunk"], case["topk"])


@pytest.mark.parametrize("chunk, topk, tokens", [(16, 8, 1 << 16), (128, 8, 1 << 17), (512, 8, 1 << 17)])
def test_long_caches(chunk, topk, tokens):
    """Thousands of chunks: real scores, of which none that was chosen is below one that was not."""
    q, k, v, lengths, places = decoding.make([tokens, tokens - 3], chunk, topk, heads=8, kv_heads=2, dim=128,
                                             dtype=torch.bfloat16, device="cuda", integers=False)
    means = decoding.filled_means(k, lengths, chunk, places, "triton")
    o, lse = moba_decode(q, k, v, means, lengths, chunk, topk, return_lse=True)
    selected = decoding.stages.decode_gate(q, k, means, lengths, chunk, topk).long()
    for b in range(2):
        own = (int(lengths[b]) - 1) // chunk
        score = torch.einsum("kgd,ckd->kgc", q[b].double().unflatten(0, (2, 4)), means[b, :own].double()).flatten(0, 1)
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, selected[b], True)
        assert (chosen.sum(1) == topk - 1).all()
        worst = score.masked_fill(~chosen, torch.inf).amin(1)
        assert (score.masked_fill(chosen, -torch.inf).amax(1) <= worst + 1e-5 * score.abs().amax(1)).all()
    decoding.check_values(o, lse, q, k, v, selected.int(), lengths, places, chunk)


def test_steps_in_a_cuda_graph():
    """One graph, replayed while the lengths grow, gives the bits of eager steps and completes the means."""
    chunk, topk, first = 64, 4, 1000
    q, k, v, lengths, _ = decoding.make([first + 200, first + 100], chunk, topk, heads=8, kv_heads=2, dim=64,
                                        dtype=torch.bfloat16, device="cuda")
    lengths -= 200
    eager_lengths = lengths.clone()
    means = decoding.filled_means(k, lengths, chunk, {}, "triton")
    eager_means = means.clone()
    queries = torch.randn(150, *q.shape, device="cuda").bfloat16()

    def step():
        return moba_decode(q, k, v, means, lengths, chunk, topk)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for query in queries:
        q.copy_(query)
        graph.replay()
        expected = moba_decode(query, k, v, eager_means, eager_lengths, chunk, topk)
        assert torch.equal(captured, expected)
        lengths += 1
        eager_lengths += 1
    assert torch.equal(means.nan_to_num(), eager_means.nan_to_num())


def test_torch_compile():
    q, k, v, lengths, _ = decoding.make([500, 129], 64, 3, heads=8, kv_heads=2, dim=64, dtype=torch.bfloat16,
                                        device="cuda")
    means = decoding.filled_means(k, lengths, 64, {}, "triton")
    expected_means = means.clone()
    expected = moba_decode(q, k, v, expected_means, lengths, 64, 3)
    compiled = torch.compile(lambda *x: moba_decode(*x, 64, 3) * 2, fullgraph=True)
    assert torch.equal(compiled(q, k, v, means, lengths), expected * 2)
    assert torch.equal(means.nan_to_num(), expected_means.nan_to_num())


@pytest.mark.parametrize("chunk", [70, 512])
def test_means_are_those_of_training(chunk):
    _, k, _, lengths, _ = decoding.make([3000, 1400], chunk, 3, kv_heads=2, dim=128, dtype=torch.bfloat16,
                                        device="cuda", integers=False)
    decoding.assert_means_of_training(k, lengths, chunk)
