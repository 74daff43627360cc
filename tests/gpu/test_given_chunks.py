"""Selection and attention as two operators, and heads that choose together, on a GPU: portable and Gluon kernels."""
import pytest
import torch

import comparison
from moba_megatron import kernels, moba_attn_varlen, reference, select_chunks, sparse_attn_varlen
from moba_megatron.ops import moba_attention
from moba_megatron.ops.decode import fill_chunk_means, moba_decode
from moba_megatron.segments import Segments

pytestmark = pytest.mark.gpu
NAMES = ("o", "lse", "dq", "dk", "dv")
CASES = {
    "Gluon, chunk 128": dict(lengths=[2048], chunk=128, topk=4, heads=8, kv_heads=2),
    "Gluon, chunk 512": dict(lengths=[3000], chunk=512, topk=3, heads=4, kv_heads=1),
    "Gluon, chunk 500, packed": dict(lengths=[2100, 0, 17, 1333], chunk=500, topk=3, heads=4, kv_heads=2, tail=9),
    "Gluon, groups of three": dict(lengths=[1700], chunk=128, topk=3, heads=6, kv_heads=2),
    "groups of five, D 80": dict(lengths=[900, 333], chunk=48, topk=4, heads=10, kv_heads=2, dim=80),
    "a long list": dict(lengths=[2000], chunk=16, topk=64, heads=4, kv_heads=2, dim=64),
    "fp32": dict(lengths=[700], chunk=64, topk=3, heads=4, kv_heads=2, dim=64, dtype=torch.float32),
    "one group": dict(lengths=[1100], chunk=64, topk=4, heads=16, kv_heads=1),
}


def inputs(lengths, chunk, topk, heads, kv_heads, tail=0, dim=128, dtype=torch.bfloat16):
    total = sum(lengths) + tail
    q, k, v, do = (torch.randn(total, n, dim, device="cuda", dtype=dtype) for n in (heads, kv_heads, kv_heads, heads))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    return q, k, v, do, torch.randn(total, heads, device="cuda"), (cu_seqlens, max(lengths), chunk)


def run(function, q, k, v, do, dlse):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = function(*leaves)
    return o.detach(), lse.detach(), *torch.autograd.grad((o, lse), leaves, (do, dlse))


def given(selected, places, **options):
    return lambda q, k, v: sparse_attn_varlen(q, k, v, selected, *places, return_lse=True, **options)


@pytest.mark.parametrize("shared", ["head", "group"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_halves_are_the_whole(case, shared):
    *tensors, places = inputs(**case)
    selected = select_chunks(*tensors[:2], *places, case["topk"], shared=shared)
    whole = run(lambda q, k, v: moba_attn_varlen(q, k, v, *places, case["topk"], return_lse=True, shared=shared),
                *tensors)
    assert all(map(torch.equal, run(given(selected, places), *tensors), whole))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_group_is_its_heads_with_equal_lists(case):
    """Bit for bit, where their lists are cut at the same places."""
    *tensors, places = inputs(**case)
    group = case["heads"] // case["kv_heads"]
    selected = select_chunks(*tensors[:2], *places, case["topk"], shared="group")
    together, apart = (run(given(x, places), *tensors) for x in (selected, selected.repeat_interleave(group, 1)))
    for name, a, b in zip(NAMES, together, apart):
        if name[0] == "d" and group & (group - 1):
            assert ((a - b).double().norm() / b.double().norm()).item() < 1e-2
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("lists", ["of heads", "of groups"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_fp64(case, lists):
    """Random choices, most of them bad."""
    *tensors, places = inputs(**case)
    total = sum(case["lengths"])
    q, k, v, do, dlse = (x[:total] for x in tensors)
    shape = total, case["heads" if lists == "of heads" else "kv_heads"], case["topk"] - 1
    selected = torch.randint(-2, total // case["chunk"] + 9, shape, device="cuda").int()
    selected[torch.rand(shape, device="cuda") < 0.1] = 2 ** 31 - 1
    got = run(given(selected, places), q, k, v, do, dlse)
    segments = Segments.from_cu_seqlens(*places)
    kept = reference.keep_earlier(selected, segments)
    assert torch.equal(kernels.keep_earlier(selected, segments), kept)
    mask = comparison.dense_mask(kept.repeat_interleave(case["heads"] // shape[1], 1), segments, total, total)
    exact, eager = (comparison.attend(q, k, v, do, dlse, mask, q.shape[2] ** -0.5, dtype)
                    for dtype in (torch.float64, q.dtype))
    comparison.assert_as_good_as_eager(dict(zip(NAMES, got)), exact, eager, q.dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_group_chooses_by_the_sum(case):
    """Scores of the kernels' choices against fp64 scores of the rounded sums: off by near-ties alone; best first."""
    q, k, *_, places = inputs(**case)
    scoring = reference.group_queries(q, case["kv_heads"])
    assert torch.equal(kernels.group_queries(q, case["kv_heads"]), scoring)
    segments = Segments.from_cu_seqlens(*places)
    selected = select_chunks(q, k, *places, case["topk"], shared="group")
    same = kernels.gate(scoring, kernels.chunk_means(k, segments), segments, case["topk"])
    assert torch.equal(selected[:, :, :same.shape[2]], same)
    means = kernels.chunk_means(k, segments).double()
    score = torch.einsum("thd,chd->thc", scoring.double(), means)
    first, own = reference.gating.earlier_chunks(segments, len(q))
    ids = torch.arange(len(means), device="cuda")
    score = score.masked_fill(~((ids >= first[:, None]) & (ids < own[:, None]))[:, None], -torch.inf)
    wanted = score.topk(case["topk"] - 1, 2)[0]
    got = score.gather(2, selected.long().clamp(min=0)).masked_fill(selected < 0, -torch.inf)
    off = torch.where(wanted.isfinite(), (got - wanted).abs(), (got != wanted).double())
    assert off.max() <= 1e-5 * score[score.isfinite()].abs().max()


@pytest.mark.parametrize("shared", ["head", "group"])
def test_no_sync_graphs_and_compiled(shared):
    *tensors, places = inputs(**CASES["Gluon, chunk 128"])
    q, k, v, do, dlse = tensors

    def both():
        selected = select_chunks(q, k, *places, 4, shared=shared)
        return run(given(selected, places), *tensors)

    want = both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, again, want))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, want))
    compiled = torch.compile(lambda q, k, v: given(select_chunks(q, k, *places, 4, shared=shared), places)(q, k, v),
                             fullgraph=True)
    assert all(map(torch.equal, run(compiled, *tensors), want))


def test_a_group_decodes_as_its_prompt_attends():
    q, k, v = (torch.randn(4, 1000, n, 128, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2))
    lengths = torch.tensor([1000, 513, 64, 7]).int().cuda()
    means = torch.zeros(4, 15, 2, 128, device="cuda", dtype=torch.bfloat16)
    fill_chunk_means(k, means, lengths, 64)
    query = torch.stack([x[n - 1] for x, n in zip(q, lengths.tolist())])
    o = moba_decode(query, k, v, means, lengths, 64, 4, shared="group")
    for b, n in enumerate(lengths.tolist()):
        cu = torch.tensor([0, n]).int().cuda()
        places = Segments.from_cu_seqlens(cu, n, 64)
        want = moba_attention(q[b, :n], k[b, :n], v[b, :n], places, 4, shared="group")
        torch.testing.assert_close(o[b], want[-1], rtol=2e-2, atol=2e-2)
