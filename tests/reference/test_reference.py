"""The stages in torch, both, against the independent oracle: results, gradients, selection, in every awkward shape."""
import math

import oracle
import pytest
import torch
from cases import Case, oracle_results
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_megatron import reference
from moba_megatron.ops import causal_attn_varlen, get_stages, moba_attention, moba_attn_varlen
from moba_megatron.reference import attention, gating
from moba_megatron.reference.chunk_means import block_rows, halving_sum
from moba_megatron.segments import SUM_BLOCK, Segments

NAMES = ("o", "lse", "dq", "dk", "dv")

NAMED = {
    "one token": Case((1,), 1, 1, heads=1),
    "own chunk only": Case((37,), 5, 1),
    "seventy chunks of one key": Case((70,), 1, 9),
    "seventy chunks, the last of one key": Case((139,), 2, 5, heads=1),
    "every chunk": Case((70,), 1, 70, heads=1),
    "topk beyond the chunks": Case((29,), 8, 50),
    "chunk beyond the sequence": Case((31, 7), 100, 3),
    "chunk longer than a summation block": Case((281,), SUM_BLOCK + 6, 2, heads=1),
    "full last chunk": Case((32, 16), 8, 2),
    "empty sequences": Case((0, 13, 0, 0, 9, 0), 4, 2),
    "nothing at all": Case((0, 0), 4, 2),
    "GQA, DV above D": Case((41, 22), 6, 3, heads=6, kv_heads=2, head_dim=5, v_dim=9),
    "MQA, DV below D": Case((50,), 7, 2, heads=5, kv_heads=1, head_dim=6, v_dim=1),
    "MHA, views of a fused projection": Case((33, 20), 5, 3, heads=3, kv_heads=3, fused=True),
    "ties": Case((64, 17), 4, 3, heads=4, kv_heads=2, head_dim=2, data="ties"),
    "all scores tie": Case((60,), 3, 4, heads=2, head_dim=1, data="ties"),
    "equal chunks": Case((65, 30), 5, 4, data="twins", fused=True),
}


@st.composite
def cases(draw):
    """A sequence of 1 to 70 chunks among up to three others, empty ones too; sampled_from spreads the draws."""
    chunks = draw(st.sampled_from(range(1, 71)))
    sizes = [size for size in (1, 2, 3, 4, 7, 16, 31, 64, 65, 130) if size * chunks <= 210]
    chunk_size = draw(st.sampled_from(sizes))
    last = draw(st.sampled_from(range(1, chunk_size + 1)))
    lengths = draw(st.lists(st.sampled_from(range(40)), max_size=3))
    lengths.insert(draw(st.integers(0, len(lengths))), (chunks - 1) * chunk_size + last)
    kv_heads, group = draw(st.sampled_from(((1, 1), (1, 2), (1, 5), (2, 1), (2, 2), (3, 1))))
    topk = draw(st.sampled_from(sorted({1, 2, 3, max(1, chunks // 2), chunks, chunks + 2})))
    return Case(tuple(lengths), chunk_size, topk, kv_heads * group, kv_heads, draw(st.sampled_from(range(1, 9))),
                draw(st.sampled_from(range(1, 10))), draw(st.sampled_from(("normal", "ties", "twins"))),
                draw(st.booleans()), draw(st.integers(0, 2 ** 20)))


@pytest.fixture(scope="module", params=("reference", "torch"))
def backend(request):
    return request.param


def run(case, q, k, v, do, dlse, backend="reference"):
    """o, lse, dq, dk, dv by the public operator."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = moba_attn_varlen(q, k, v, case.cu_seqlens(), case.max_seqlen, case.chunk_size, case.topk,
                              softmax_scale=case.scale, backend=backend, return_lse=True)
    return (o.detach(), lse.detach(), *torch.autograd.grad((o, lse), (q, k, v), (do, dlse)))


def select(case, q, k, backend="reference"):
    segments, stages = case.segments(), get_stages(backend, "cpu")
    return stages.gate(q, stages.chunk_means(k, segments), segments, case.topk)


def assert_matches_oracle(case, backend):
    inputs = case.tensors()
    chosen = oracle.select(*inputs[:2], case.lengths, case.chunk_size, case.topk)
    assert case.chunk_numbers(select(case, *inputs[:2], backend)) == chosen
    mask = oracle.mask_of(chosen, case.lengths, case.heads, case.chunk_size)
    for name, got, want in zip(NAMES, run(case, *inputs, backend), oracle_results(case, *inputs, mask)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", NAMED)
def test_named_case_matches_oracle(name, backend):
    assert_matches_oracle(NAMED[name], backend)


@settings(max_examples=200)
@given(cases())
def test_random_case_matches_oracle(backend, case):
    assert_matches_oracle(case, backend)


def zigzag(case, size, rank):
    """The two pieces of every sequence that a context-parallel rank holds: (rows of the whole, Segments)."""
    rows, cu, seq_ids, offsets, start = [], [0], [], [], 0
    for sequence, length in enumerate(case.lengths):
        cuts = [length * i // (2 * size) for i in range(2 * size + 1)]
        for piece in (rank, 2 * size - 1 - rank):
            rows += range(start + cuts[piece], start + cuts[piece + 1])
            cu.append(len(rows))
            seq_ids.append(sequence)
            offsets.append(cuts[piece])
        start += length
    return torch.tensor(rows, dtype=torch.long), part_of(case, cu, seq_ids, offsets)


def part_of(case, cu, seq_ids, offsets):
    cu, seq_ids, offsets = (torch.tensor(x, dtype=torch.int32) for x in (cu, seq_ids, offsets))
    return Segments(cu, case.cu_seqlens(), seq_ids, offsets, int(cu.diff().max()), case.max_seqlen, case.chunk_size)


def assert_parts_match_whole(case, parts, backend):
    """Queries attended part by part give the rows of the whole; their dk and dv add up to the whole's."""
    q, k, v, do, dlse = case.tensors()
    want = dict(zip(NAMES, run(case, q, k, v, do, dlse, backend)))
    selected = select(case, q, k)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows, segments in parts:
        means, stages = reference.chunk_means(k, segments), get_stages(backend, "cpu")
        assert torch.equal(stages.gate(q[rows], means, segments, case.topk).sort(2)[0], selected[rows].sort(2)[0])
        leaves = q[rows].requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()
        o, lse = moba_attention(*leaves, segments, case.topk, softmax_scale=case.scale, backend=backend,
                                return_lse=True)
        dq, dk_part, dv_part = torch.autograd.grad((o, lse), leaves, (do[rows], dlse[rows]))
        dk, dv = dk + dk_part, dv + dv_part
        for name, got in (("o", o), ("lse", lse), ("dq", dq)):
            torch.testing.assert_close(got, want[name][rows], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dk, want["dk"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dv, want["dv"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", (1, 2, 4))
@pytest.mark.parametrize("case", (Case((64,), 8, 3, heads=4, kv_heads=2), Case((61, 0, 3, 40), 7, 3, data="twins"),
                                  Case((45, 50), 4, 2, data="ties", fused=True)), ids=("even", "ragged", "ties"))
def test_zigzag_pieces_match_whole(case, size, backend):
    assert_parts_match_whole(case, [zigzag(case, size, rank) for rank in range(size)], backend)


@settings(max_examples=60)
@given(cases(), st.integers(1, 5))
def test_random_zigzag_pieces_match_whole(backend, case, size):
    assert_parts_match_whole(case, [zigzag(case, size, rank) for rank in range(size)], backend)


def test_prefill_over_a_cache_matches_whole(backend):
    """The head of a prompt, then its tail over all keys; segments in any order, one sequence without queries."""
    case = Case((50, 13, 31), 6, 3, heads=4, kv_heads=2)
    head = torch.cat((torch.arange(63, 63 + 20), torch.arange(33)))
    tail = torch.cat((torch.arange(33, 50), torch.arange(50, 63), torch.arange(83, 94)))
    assert_parts_match_whole(case, [(head, part_of(case, (0, 20, 53), (2, 0), (0, 0))),
                                    (tail, part_of(case, (0, 17, 30, 41), (0, 1, 2), (33, 0, 20)))], backend)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("chunk_size", (1, 5, 64, 65, 150))
def test_means_are_block_sums_added_in_order(dtype, chunk_size):
    case = Case((301, 0, 149, 160), chunk_size, 2, heads=2, kv_heads=2, head_dim=3)
    k, segments = case.tensors(dtype)[1], case.segments()
    means = reference.chunk_means(k, segments)
    starts, counts = block_rows(segments, case.total)
    # each block alone, out of a buffer that was cut right at its ends
    sums = [reference.block_sums(k[start:start + count], torch.zeros(1, dtype=torch.int32), torch.tensor([count]).int())
            for start, count in zip(starts.flatten().tolist(), counts.flatten().tolist())]
    sums = torch.cat(sums).unflatten(0, starts.shape)
    assert sums.dtype == torch.promote_types(dtype, torch.float32) and means.dtype == dtype
    assert torch.equal(reference.means_from_block_sums(sums, chunk_size, dtype), means)
    start = 0
    for sequence, length in enumerate(case.lengths):
        for i in range(length // chunk_size):
            rows = k[start + i * chunk_size:start + (i + 1) * chunk_size].double()
            got = means[start // chunk_size + sequence + i].double()
            bound = unit(dtype) * rows.mean(0).abs() + chunk_size * unit(sums.dtype) * rows.abs().mean(0)
            assert ((got - rows.mean(0)).abs() <= bound * (1 + 1e-3)).all()
        start += length


def test_incomplete_chunks_have_zero_means():
    case = Case((10, 3), 4, 2)
    means = reference.chunk_means(case.tensors()[1], case.segments())
    assert means.shape[0] == case.segments().num_chunks(13) == 5
    assert means[:2].abs().min() > 0 and not means[2:].any()


@pytest.mark.parametrize("case", (Case((90, 40), 6, 3, heads=4, kv_heads=2), Case((70,), 1, 9, data="twins")),
                         ids=("GQA", "equal chunks"))
@pytest.mark.parametrize("limit", (1, 100, 1000))
def test_memory_is_bounded_by_blocks(case, limit, monkeypatch):
    inputs = case.tensors()
    want, selected = run(case, *inputs), select(case, *inputs[:2])
    sizes, scores = [], attention._scores

    def recorded_scores(q, k, *rest):
        sizes.append((q.shape[0], k.shape[0]))
        return scores(q, k, *rest)

    monkeypatch.setattr(attention, "SCORE_ELEMENTS", limit)
    monkeypatch.setattr(gating, "SCORE_ELEMENTS", limit)
    monkeypatch.setattr(attention, "_scores", recorded_scores)
    assert torch.equal(select(case, *inputs[:2]), selected)
    for name, got, expected in zip(NAMES, run(case, *inputs), want):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}")
    assert all(rows == 1 or rows * keys * case.heads <= limit for rows, keys in sizes)
    assert sum(rows for rows, _ in sizes) == 2 * case.total  # forward and backward


def test_nan_query_selects_no_earlier_chunk(backend):
    case = Case((40, 25), 4, 3, heads=2)
    q, k, v, do, dlse = case.tensors()
    want, selected = run(case, q, k, v, do, dlse), select(case, q, k)  # the reference takes what is not finite
    t, h = 30, 1
    q[t, h, 2] = math.nan
    others = torch.ones(case.total, case.heads, dtype=torch.bool)
    others[t, h] = False
    got = run(case, q, k, v, do, dlse, backend)
    found = select(case, q, k, backend)
    assert (found[t, h] == -1).all() and torch.equal(found[others], selected[others])
    for i in (0, 1, 2):
        assert got[i][t, h].isnan().all() and torch.equal(got[i][others], want[i][others]), NAMES[i]
    attended = torch.zeros(case.total, dtype=torch.bool)
    attended[28:31] = True  # its own chunk up to itself
    for i in (3, 4):
        assert torch.equal(got[i].isnan().flatten(1).any(1), attended), NAMES[i]


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf), ids=str)
def test_bad_key_is_met_only_by_who_attends_to_its_chunk(bad, backend):
    case = Case((40, 25), 4, 3, heads=4, kv_heads=2, fused=True)
    q, k, v, do, dlse = case.tensors()
    k[9, 0, 1], k[10, 1] = bad, bad  # in chunk 2 of the first sequence, both kv heads
    chosen = oracle.select(q, k, case.lengths, case.chunk_size, case.topk)
    assert case.chunk_numbers(select(case, q, k, backend)) == chosen
    mask = oracle.mask_of(chosen, case.lengths, case.heads, case.chunk_size)
    meets = mask[:, :, 8:12].any(2).T  # [T, H]: in the chunk or chose it (a score of +inf does)
    if math.isnan(bad):
        assert not meets[12:].any()
    assert (~meets[12:40]).any()
    want = oracle_results(case, q, torch.where(k.isfinite(), k, 0), v, do, dlse, mask)
    got = run(case, q, k, v, do, dlse, backend)
    for i in (0, 1, 2):
        torch.testing.assert_close(got[i][~meets], want[i][~meets], rtol=1e-10, atol=1e-10)
    assert torch.isfinite(got[3][40:]).all() and torch.isfinite(got[4][40:]).all()  # the other sequence


def test_bad_value_reaches_only_who_attends_to_it(backend):
    case = Case((40,), 4, 2, heads=2)
    q, k, v, do, dlse = case.tensors()
    want = run(case, q, k, v, do, dlse)
    mask = oracle.mask_of(oracle.select(q, k, case.lengths, 4, 2), case.lengths, 2, 4)
    v[10, 0, 3] = math.nan
    got = run(case, q, k, v, do, dlse, backend)
    meets = mask[:, :, 10].T
    assert torch.equal(got[0][..., :3], want[0][..., :3]) and torch.equal(got[0][..., 3].isnan(), meets)
    assert torch.equal(got[1], want[1]) and torch.equal(got[2][~meets], want[2][~meets])


@pytest.mark.parametrize("lengths", ((24,), (23, 5, 24, 1)), ids=str)
@pytest.mark.parametrize("operator", ("moba", "dense"))
def test_all_chunks_fit_is_causal_attention(lengths, operator, backend):
    case = Case(lengths, 6, 4, heads=4, kv_heads=2, head_dim=8, v_dim=8)
    q, k, v, do, _ = case.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if operator == "moba":
        o = moba_attn_varlen(*leaves, case.cu_seqlens(), 24, case.chunk_size, case.topk, backend=backend)
    else:
        o = causal_attn_varlen(*leaves, case.cu_seqlens(), 24, backend=backend)
    want = torch.cat([torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in parts), is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        for parts in zip(*(x.split(lengths) for x in leaves))])
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)
    for got, expected in zip(torch.autograd.grad(o, leaves, do), torch.autograd.grad(want, leaves, do)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def unit(dtype):
    """Unit roundoff: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def error_bounds(case, q, k, v, do, dlse, mask, unit_io, unit_acc):
    """First-order bounds of the errors of o, lse, dq, dk, dv, where sums run at unit_acc and results round to unit_io.

    A score is off by ``delta_s``, so a weight is off by the factor ``1 + rel``; what follows carries these through the
    formulas of the backward pass, with absolute values in place of terms. The backward reads the rounded o.
    """
    group = case.heads // case.kv_heads
    q, do, dlse = (x.double() for x in (q, do, dlse))
    kh, vh = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    score = torch.einsum("thd,shd->hts", q, kh) * case.scale
    score = score.masked_fill(~mask, -torch.inf)
    p, lse = torch.softmax(score, 2), torch.logsumexp(score, 2)
    n = case.max_seqlen
    size = torch.einsum("thd,shd->hts", q.abs(), kh.abs()).masked_fill(~mask, 0).amax(2) * case.scale
    delta_s = (case.head_dim + 3) * unit_acc * size  # [H, T]
    delta_lse = delta_s + (n + 4) * unit_acc * (1 + lse.abs() + size)
    rel = (delta_s + delta_lse + 4 * unit_acc)[..., None]
    o = torch.einsum("hts,shd->thd", p, vh)
    p_abs_v = torch.einsum("hts,shd->thd", p, vh.abs())
    o_error = unit_io * o.abs() + (rel.transpose(0, 1) + (n + 1) * unit_acc) * p_abs_v
    delta = ((do * o).sum(2) - dlse).T[..., None]
    delta_error = (do.abs() * (o_error + case.v_dim * unit_acc * o.abs())).sum(2) + unit_acc * dlse.abs()
    delta_error = delta_error.T[..., None]
    dp, dp_abs = torch.einsum("thd,shd->hts", do, vh), torch.einsum("thd,shd->hts", do.abs(), vh.abs())
    ds = p * (dp - delta)
    ds_error = (p * (delta_error + (case.v_dim + 3) * unit_acc * (dp_abs + delta.abs())) + rel * ds.abs()) * case.scale
    ds = ds.abs() * case.scale
    total = ds_error + (case.total + 3) * unit_acc * ds
    dq = torch.einsum("hts,shd->thd", total, kh.abs())
    dk = torch.einsum("hts,thd->shd", total, q.abs())
    dv = torch.einsum("hts,thd->shd", p * (rel + (case.total + 3) * unit_acc), do.abs())
    dk, dv = (x.unflatten(1, (case.kv_heads, group)).sum(2) for x in (dk, dv))
    return o_error, delta_lse.T, dq, dk, dv


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("case", (Case((97, 30), 8, 3, heads=4, kv_heads=2, head_dim=16, v_dim=8, seed=3),
                                  Case((150,), 2, 20, heads=2, kv_heads=1, head_dim=32, v_dim=32, fused=True)),
                         ids=("GQA", "many chunks"))
def test_low_precision_error_is_bounded(case, dtype, backend):
    inputs = case.tensors(dtype)
    chosen = case.chunk_numbers(select(case, *inputs[:2], backend))
    mask = oracle.mask_of(chosen, case.lengths, case.heads, case.chunk_size)
    want = oracle_results(case, *inputs, mask)
    bounds = error_bounds(case, *inputs, mask, unit(dtype), unit(torch.float32))
    for name, got, exact, bound in zip(NAMES, run(case, *inputs, backend), want, bounds):
        assert got.dtype == (torch.float32 if name == "lse" else dtype)
        if name in ("dq", "dk", "dv"):
            bound = bound + unit(dtype) * exact.abs()
        # fp16 underflow adds half its smallest step; 1 % pays for the second order
        excess = (got.double() - exact).abs() - 1.01 * bound - torch.finfo(dtype).smallest_normal * unit(dtype)
        assert excess.max() <= 0, f"{name} is {excess.max():.2e} beyond its bound"
        assert bound.mean() < 0.1 * exact.abs().mean(), f"the bound of {name} proves nothing"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_low_precision_selection_loses_at_most_the_rounding(dtype, backend):
    """No unchosen chunk beats a chosen one by more than twice the error of a score."""
    case = Case((150,), 5, 6, heads=2, kv_heads=1, head_dim=32, seed=5)
    q, k = case.tensors(dtype)[:2]
    means = k.double().unflatten(0, (-1, 5)).mean(1)[:, 0]  # [chunks, D]
    score = q.double() @ means.T
    error = (q.double().abs() @ means.abs().T) * (unit(dtype) + (case.head_dim + 5 + 1) * unit(torch.float32)) * 1.01
    for t, row in enumerate(case.chunk_numbers(select(case, q, k, backend), own=False)[0]):
        for h, numbers in enumerate(row):
            others = set(range(t // 5)) - numbers
            assert len(numbers) == min(5, t // 5)
            for i in others:
                assert all(score[t, h, j] + error[t, h, j] >= score[t, h, i] - error[t, h, i] for j in numbers)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_low_precision_ties_are_exact(dtype, backend):
    case = Case((100, 41), 4, 5, heads=4, kv_heads=2, data="ties")
    q, k = case.tensors()[:2]
    chosen = oracle.select(q, k, case.lengths, case.chunk_size, case.topk)
    assert case.chunk_numbers(select(case, q.to(dtype), k.to(dtype), backend)) == chosen


def test_ties_go_to_the_later_chunk(backend):
    case = Case((40,), 4, 3, heads=1)
    q, k = torch.ones(40, 1, 4), torch.ones(40, 1, 4)
    assert select(case, q, k, backend)[39, 0].sort()[0].tolist() == [7, 8]


def test_kv_gradients_in_a_chosen_dtype(backend):
    case = Case((40,), 4, 3, heads=4, kv_heads=2)
    q, k, v, do, dlse = case.tensors(torch.bfloat16)
    segments, selected = case.segments(), select(case, q, k, backend)
    stages = get_stages(backend, "cpu")
    o, lse = stages.attention_fwd(q, k, v, selected, segments, case.scale)
    results = [stages.attention_bwd(do, dlse, q, k, v, o, lse, selected, segments, case.scale, kv_grad_dtype=dtype)
               for dtype in (None, torch.float32)]
    assert [x.dtype for x in results[0]] == [torch.bfloat16] * 3
    assert [x.dtype for x in results[1]] == [torch.bfloat16, torch.float32, torch.float32]
    for low, high in zip(*results):
        assert torch.equal(low, high.bfloat16())


@pytest.mark.parametrize("use", ("o", "lse"))
def test_gradient_of_one_output_alone(use, backend):
    case = Case((50,), 6, 3, heads=2)
    q, k, v, do, dlse = case.tensors()
    do, dlse = (do, 0 * dlse) if use == "o" else (0 * do, dlse)
    want = run(case, q, k, v, do, dlse, backend)[2:]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = moba_attn_varlen(*leaves, case.cu_seqlens(), 50, 6, 3, softmax_scale=case.scale, backend=backend,
                              return_lse=True)
    got = torch.autograd.grad(*((o, leaves, do) if use == "o" else (lse, leaves, dlse)))
    for a, b in zip(got, want):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", (1, 2, 3, 5, 31, 32, 33, 64))
def test_halving_sum_ignores_padding_and_batch(n):
    x = torch.randn(n, 7)
    padded = [torch.cat((x, torch.zeros(size - n, 7))) for size in (64, 1 << (n - 1).bit_length())]
    assert torch.equal(halving_sum(padded[0], 0), halving_sum(padded[1], 0))
    assert torch.equal(halving_sum(x, 0)[3], halving_sum(x[:, 3:4].clone(), 0)[0])


def test_routing_lists_each_choice_once_in_order():
    selected = torch.randint(-1, 5, (40, 4, 3), dtype=torch.int32)
    routing = reference.route(selected, 2, 5)
    starts, entries = routing.indptr.tolist(), routing.indices.tolist()
    flat = selected.flatten().tolist()
    for bucket in range(10):
        kv_head, chunk = divmod(bucket, 5)
        wanted = [i for i, chosen in enumerate(flat) if chosen == chunk and i // 3 % 4 // 2 == kv_head]
        assert entries[starts[bucket]:starts[bucket + 1]] == wanted
    assert starts[-1] == int((selected >= 0).sum())
