"""Context parallel attention against one rank: layout maps, means and selection bit for bit, o and gradients."""
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from moba_megatron import reference
from moba_megatron.context_parallel import (Agreement, check_zigzag, context_parallel_attention, zigzag_packed,
                                            zigzag_uniform)
from moba_megatron.context_parallel import attention as schedule
from moba_megatron.ops import moba_attention
from moba_megatron.segments import Segments

# (name, lengths, uniform, chunk size, topk, heads, kv heads, D, DV, dtype): chunks and SUM_BLOCKs cut by pieces and not
CASES = [
    ("aligned", [256], True, 32, 3, 4, 2, 8, 8, torch.float64),
    ("blocks_cut", [8 * 37], True, 48, 3, 2, 2, 8, 8, torch.float64),
    ("long_chunks_cut", [8 * 67], True, 130, 2, 2, 1, 4, 6, torch.float64),
    ("tiny_pieces", [24, 24, 24], True, 5, 4, 4, 1, 4, 4, torch.float64),
    ("fp32_batch", [8 * 37, 8 * 37], True, 72, 3, 4, 2, 8, 8, torch.float32),
    ("bf16", [8 * 37], True, 72, 3, 4, 2, 8, 8, torch.bfloat16),
    ("one_chunk", [64], True, 64, 3, 2, 2, 4, 4, torch.float64),
    ("dense", [8 * 11, 8 * 11], True, 88, 1, 2, 1, 4, 4, torch.float64),
    ("packed", [8 * 9, 0, 8, 8 * 40], False, 24, 3, 4, 2, 8, 8, torch.float64),
    ("packed_fp32", [8 * 40, 8 * 3], False, 80, 2, 2, 2, 8, 8, torch.float32),
]


def zigzag_rows(lengths, size, rank):
    """Global rows of a rank, written from Megatron's rule: pieces ``rank`` and ``2 * size - 1 - rank`` of each."""
    rows, start = [], 0
    for n in lengths:
        piece = n // (2 * size)
        for i in (rank, 2 * size - 1 - rank):
            rows += range(start + i * piece, start + (i + 1) * piece)
        start += n
    return torch.tensor(rows, dtype=torch.long)


def make_layout(lengths, uniform, size, rank, chunk_size):
    if uniform:
        return zigzag_uniform(lengths[0], len(lengths), size, rank, chunk_size, torch.device("cpu"))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return zigzag_packed(cu_seqlens, max(lengths), sum(lengths), size, rank, chunk_size)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "packed"])
def test_layout_maps(size, uniform):
    lengths = [24, 24] if uniform else [48, 0, 24]
    gathered = torch.cat([zigzag_rows(lengths, size, rank) for rank in range(size)])
    for rank in range(size):
        layout = make_layout(lengths, uniform, size, rank, 7)
        assert torch.equal(layout.rank_rows, gathered)
        assert torch.equal(gathered[layout.global_rows], torch.arange(sum(lengths)))
        segments, mine = layout.segments, zigzag_rows(lengths, size, rank)
        sequence, position = segments.query_positions(mine.numel())
        assert torch.equal(segments.cu_seqlens_k.long()[sequence] + position, mine)


def test_zigzag_length_refused():
    with pytest.raises(ValueError, match=r"multiple of 2 \* context_parallel_size = 4, got 6"):
        check_zigzag(6, 2, "the sequence length")


def whole_inputs(case):
    _, lengths, _, chunk_size, topk, heads, kv_heads, d, dv, dtype = case
    generator = torch.Generator().manual_seed(5)
    total = sum(lengths)
    shapes = ((total, heads, d), (total, kv_heads, d), (total, kv_heads, dv), (total, heads, dv))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def single_rank(case):
    """o, selected, means and gradients of one rank."""
    _, lengths, _, chunk_size, topk, *_ = case
    q, k, v, do = whole_inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    segments = Segments.from_cu_seqlens(cu_seqlens, max(lengths), chunk_size)
    o = moba_attention(q, k, v, segments, topk, backend="reference")
    grads = torch.autograd.grad(o, leaves, do)
    means = reference.chunk_means(k.detach(), segments)
    earlier = min(topk - 1, (max(lengths) - 1) // chunk_size)
    selected = reference.gate(q.detach(), means, segments, earlier + 1)
    return o.detach(), selected, means, grads


def compare_with_single_rank(rank, size):
    """Runs every case on each subgroup size; returns the largest relative errors by (case, P)."""
    errors = {}
    for parallel in (2, 3, 4):
        groups = [dist.new_group(list(range(i, i + parallel))) for i in range(0, size - parallel + 1, parallel)]
        if rank >= len(groups) * parallel:
            continue
        group = groups[rank // parallel]
        me = dist.get_rank(group)
        for case in CASES:
            name, lengths, uniform, chunk_size, topk, *_ = case
            if any(n % (2 * parallel) for n in lengths):
                continue
            o, selected, means, grads = single_rank(case)
            rows = zigzag_rows(lengths, parallel, me)
            layout = make_layout(lengths, uniform, parallel, me, chunk_size)
            q, k, v, do = whole_inputs(case)
            # strided views, as of a fused projection
            views = [torch.cat((x[rows], x[rows]), dim=2)[:, :, :x.shape[2]].requires_grad_() for x in (q, k, v)]
            got = context_parallel_attention(*views, layout, topk, group, backend="reference")
            got_grads = torch.autograd.grad(got, views, do[rows])
            _, _, got_selected, _ = schedule._forward(reference, *(x.detach() for x in views), layout, topk, group, 0.5)
            assert torch.equal(got_selected.sort(2)[0], selected[rows].sort(2)[0]), f"{name}: selection differs"
            if layout.blocks is not None and got_selected.shape[2]:
                messages = schedule._send_sums(reference, views[1].detach(), layout.blocks, group).wait()
                got_means = schedule._receive_means(reference, messages, layout.blocks, chunk_size, k.dtype)
                assert torch.equal(got_means, means), f"{name}: chunk means differ"
            pairs = zip(("o", "dq", "dk", "dv"), (got, *got_grads), (o[rows], *(g[rows] for g in grads)))
            for what, a, b in pairs:
                scale = b.double().square().mean().sqrt()
                errors[name, parallel, what] = ((a - b).double().square().mean().sqrt() / scale).item()
    return errors


def bad_input_everywhere(rank, size):
    """Rank 1 alone gets bad input; returns each rank's error text and how long it took."""
    texts = []
    for problem in ("raises", "other shape", "other dtype"):
        begin = time.monotonic()
        try:
            with Agreement(dist.group.WORLD) as agreement:
                if rank == 1 and problem == "raises":
                    raise ValueError("the sequence length must be even")
                wrong = rank == 1 and problem != "raises"
                agreement.signature = f"query (8, 2), {problem if wrong else 'as agreed'}"
            texts.append(None)
        except ValueError as error:
            assert time.monotonic() - begin < 5
            texts.append(str(error))
    with Agreement(dist.group.WORLD) as agreement:  # the group is still usable
        agreement.signature = "fine"
    return texts


def all_cases(rank, size):
    return compare_with_single_rank(rank, size), bad_input_everywhere(rank, size)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(all_cases, 4, tmp_path_factory.mktemp("ranks"))


# The arithmetic is the same but for the order of a few fp32 (fp64) additions in the reduce-scatter of dk and dv; bf16
# rounds o, dq, dk and dv once in either case, so a value may differ by one unit in the last place, 2^-8.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-3}


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_equals_single_rank(results, case):
    errors = {key: value for result, _ in results for key, value in result.items() if key[0] == case[0]}
    assert {parallel for _, parallel, _ in errors} >= {2, 4}
    for key, value in errors.items():
        assert value <= TOLERANCE[case[-1]], (key, value)


def test_bad_input_raises_on_every_rank(results):
    for texts in zip(*(result[1] for result in results)):
        assert texts[0] is not None and len(set(texts)) == 1, texts
    raised, shape, _ = results[0][1]
    assert raised == "context parallel rank 1: the sequence length must be even"
    assert "rank 0: query (8, 2), as agreed; rank 1: query (8, 2), other shape" in shape
