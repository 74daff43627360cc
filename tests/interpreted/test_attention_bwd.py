"""Attention backward, interpreted: dq, dk, dv of every path of its kernels against fp64, for random selections."""
import importlib

import pytest
import torch

import comparison
from moba_megatron import kernels, reference
from moba_megatron.kernels import tuning
from moba_megatron.kernels.attention_call import AttentionCall
from moba_megatron.segments import Routing, Segments
from tests.interpreted.test_attention_fwd import CASES, problem

stage = importlib.import_module("moba_megatron.kernels.attention_bwd")

MORE_CASES = {
    "chunk 160, its own dq kernel": dict(lengths=[350], chunk=160, topk=2),
    "chunk 129, odd tiles": dict(lengths=[300], chunk=129, topk=2, heads=2, kv_heads=1),
    "fp16, chunk 160": dict(lengths=[330], chunk=160, topk=2, dtype=torch.float16),
    "parts of a chunk": dict(lengths=[100], chunk=64, topk=2, parts=[(0, 5, 10), (0, 70, 3), (0, 75, 20)]),
    "keys that nobody sees": dict(lengths=[200], chunk=32, topk=2, parts=[(0, 10, 20)]),
}


def backward(q, k, v, selected, segments, scale=None, lse_gradient=False, **options):
    """What attention_bwd gives, its inputs, and the mask; do is a view with gaps."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    o, lse = reference.attention_fwd(q, k, v, selected, segments, scale)
    do = torch.randn(q.shape[1], q.shape[0], v.shape[2] + 1).to(q.dtype).transpose(0, 1)[..., :-1]
    dlse = torch.randn(lse.shape) if lse_gradient else None
    got = kernels.attention_bwd(do, dlse, q, k, v, o, lse, selected, segments, scale, **options)
    return dict(zip(("dq", "dk", "dv"), got)), do, dlse, scale


def check(q, k, v, selected, segments, **options):
    got, do, dlse, scale = backward(q, k, v, selected, segments, **options)
    mask = comparison.dense_mask(selected, segments, q.shape[0], k.shape[0])
    exact, eager = (comparison.attend(q, k, v, do, dlse, mask, scale, dtype) for dtype in (torch.float64, q.dtype))
    comparison.assert_as_good_as_eager(got, exact, eager, q.dtype)
    assert got["dq"].dtype == q.dtype and all(x.is_contiguous() for x in got.values())
    return got


@pytest.mark.parametrize("case", [*CASES.values(), *MORE_CASES.values()], ids=[*CASES, *MORE_CASES])
def test_against_fp64(case):
    check(*problem(**case))


@pytest.mark.parametrize("block_n", [32, 16])
def test_gradient_of_lse(block_n):
    """A chunk in one tile of keys, whose program writes partial dq, and a chunk in two."""
    row = {"BLOCK_M": 16, "BLOCK_N": block_n, "SPLIT": 4096, "num_warps": 4, "num_stages": 1}
    with tuning.forced(configs={"attention_bwd_dkdv": row}):
        check(*problem([150], 32, 3, heads=4), lse_gradient=True)


@pytest.mark.parametrize("limit", ["0.01", "1024"])
@pytest.mark.parametrize("case", [dict(lengths=[150], chunk=32, topk=3, heads=4, kv_heads=2),
                                  dict(lengths=[150, 70], chunk=64, topk=2, heads=4, kv_heads=2)],
                         ids=["fused", "two kernels"])
def test_cut_lists(case, limit, monkeypatch):
    """Every query picks the first chunk: its list is cut into many pieces, whose partials are added."""
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", limit)
    q, k, v, selected, segments = problem(**case)
    sequence, position = segments.query_positions(q.shape[0])
    first = segments.first_chunk()[sequence].int()
    selected = torch.where(selected == first[:, None, None], -1, selected)
    selected[:, :, 0] = torch.where(position >= segments.chunk_size, first, -1)[:, None]
    row = {"BLOCK_M": 16, "BLOCK_N": 32, "SPLIT": 48, "num_warps": 4, "num_stages": 1}
    with tuning.forced(configs={"attention_bwd_dkdv": row}):
        assert kernels.call(lambda q, k, v, selected, segments, routing: stage._cuts(
            inputs(q, k, v, selected, segments), routing, 2, 1 << 30).num_extra(2),
            q, k, v, selected, segments, kernels_routing(selected, k, segments)) > 0
        check(q, k, v, selected, segments)


@pytest.mark.parametrize("kv_heads, together", [(3, 2), (7, 3), (4, 2)])
@pytest.mark.parametrize("tokens, split", [(101, 7), (87, 40)])
def test_pieces_of_every_group_are_numbered(tokens, split, kv_heads, together, monkeypatch):
    """The last group of kv heads may be smaller: its extra pieces end before the table of them does."""
    q, k, v, selected, segments = problem([tokens], 16, 4, heads=2 * kv_heads, kv_heads=kv_heads, dim=8)
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", "1000000")

    def compare(q, k, v, selected, segments, routing):
        x = inputs(q, k, v, selected, segments)
        cuts = stage._cuts(x, routing, together, 1 << 40)
        for begin, end in stage.head_groups(kv_heads, 1, limit=together):
            most_before = x.rows_per_kv_head * x.choices * begin  # choices that are not there are in no list
            last = cuts.num_extra(end - begin) - 1 + most_before // split
            assert last < cuts.extra_csr_rows.numel()
        return True

    with tuning.forced(configs={"attention_bwd_dkdv": {"BLOCK_M": 16, "BLOCK_N": 16, "SPLIT": split}}):
        assert kernels.call(compare, q, k, v, selected, segments, kernels_routing(selected, k, segments))


def inputs(q, k, v, selected, segments, terms=None):
    return AttentionCall(q, k, v, selected, segments, 1.0, "ieee", q, terms)


def kernels_routing(selected, k, segments):
    return stage.route(selected, k.shape[1], segments.num_chunks(k.shape[0]))


@pytest.mark.parametrize("chunk, tokens", [(32, 50), (64, 70)])
def test_groups_of_heads(chunk, tokens, monkeypatch):
    """The same bits however many kv heads run at a time."""
    tensors = problem([tokens], chunk, 2, heads=6, kv_heads=3)
    results = []
    for limit in ("1024", "0.001", "0.035"):
        monkeypatch.setenv("MOBA_WORKSPACE_MIB", limit)
        torch.manual_seed(5)
        results.append(backward(*tensors)[0])
    whole, *others = results
    assert all(torch.equal(whole[name], parts[name]) for parts in others for name in whole)


def test_kv_grad_dtype():
    """fp32 dk and dv for fp16 inputs: as without the rounding to fp16 that the default adds."""
    tensors = problem([130], 32, 3, dtype=torch.float16)
    torch.manual_seed(5)
    rounded, *_ = backward(*tensors)
    torch.manual_seed(5)
    full, *_ = backward(*tensors, kv_grad_dtype=torch.float32)
    assert full["dk"].dtype == full["dv"].dtype == torch.float32 and full["dq"].dtype == torch.float16
    assert all(torch.equal(full[name].half(), rounded[name]) for name in ("dk", "dv"))


def test_another_sequence_s_nan_stays_there():
    q, k, v, selected, segments = problem([40, 50], 32, 2)
    k[:40], v[:40] = float("nan"), float("nan")
    got, *_ = backward(q, k, v, selected, segments)
    assert all(not x[40:].isnan().any() for x in got.values())


def test_no_queries():
    q, k, v, selected, segments = problem([0, 0], 32, 1)
    assert [tuple(x.shape) for x in backward(q, k, v, selected, segments)[0].values()] == [(0, 2, 32)] * 3
    q, k, v, selected, segments = problem([70], 32, 2, parts=[(0, 0, 0)])
    assert all(not x.any() for x in backward(q, k, v, selected, segments)[0].values())


@pytest.mark.parametrize("number", [2, 64, 150])
def test_segments_in_the_order_of_their_sequences(number):
    cu_seqlens = torch.randint(0, 9, (number + 1,), dtype=torch.int32).cumsum(0).int()
    seq_ids, offsets = (torch.randint(0, 20, (number,), dtype=torch.int32) for _ in range(2))
    got = kernels.call(stage._segments_by_sequence, Segments(cu_seqlens, cu_seqlens, seq_ids, offsets, 9, 9, 16))
    order = torch.sort(seq_ids, stable=True).indices
    for a, b in zip(got, (seq_ids, cu_seqlens[:-1], cu_seqlens[1:], offsets), strict=True):
        assert torch.equal(a, b[order])


@pytest.mark.parametrize("rows, split", [(1, 10), (64, 7), (1000, 100)])
def test_rows_of_extra_pieces(rows, split):
    """``extra_csr_rows[n]``: one more than the last row that begins before index ``(n + 1) * split``."""
    indptr = torch.cat((torch.zeros(1, dtype=torch.int32), torch.randint(0, 40, (rows,)).cumsum(0).int()))
    routing = Routing(torch.empty(int(indptr[-1]), dtype=torch.int32), indptr)
    x = torch.ones(1, 1, 16)
    got = torch.empty(routing.indices.numel() // split + 2, dtype=torch.int32)
    kernels.call(lambda x, lse, terms, routing, got: stage._preprocess(
        inputs(x, x, x, None, None, terms), x, None, lse, routing, stage._Cuts(split, 0, got, 0), None),
        x, torch.zeros(1, 1), torch.empty(2, 4), routing, got)
    numbers = torch.arange(got.numel())
    assert got.numel() == routing.indices.numel() // split + 2
    assert torch.equal(got.long(), torch.searchsorted(indptr[:-1] // split, numbers, right=True))
