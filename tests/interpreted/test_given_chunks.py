"""Selection and attention as two operators, and heads that choose together, under the interpreter."""
import importlib

import pytest
import torch

import comparison
from decoding import check_values, filled_means, make, oracle_stages
from moba_megatron import kernels, moba_attn_varlen, reference, select_chunks, sparse_attn_varlen
from moba_megatron.kernels import routing, tuning
from moba_megatron.kernels.routing import route_in_tiles
from moba_megatron.ops.decode import moba_decode
from moba_megatron.segments import Segments

CASES = {
    "groups of two": dict(lengths=[50], chunk=16, topk=2, heads=4, kv_heads=2),
    "groups of three, packed, strided": dict(lengths=[19, 0, 37], chunk=16, topk=2, heads=3, kv_heads=1, tail=3),
    "chunks of several tiles": dict(lengths=[84], chunk=40, topk=2, heads=2, kv_heads=1),
}


def inputs(lengths, chunk, topk, heads, kv_heads, tail=0, dtype=torch.float32):
    """q, k, v, do, dlse, and the arguments of the call; q and do are slices of wider tensors."""
    total = sum(lengths) + tail
    q, do = (torch.randn(total, heads + 1, 16).to(dtype)[:, 1:] for _ in range(2))
    k, v = (torch.randn(total, kv_heads, 16).to(dtype) for _ in range(2))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return q, k, v, do, torch.randn(total, heads), (cu_seqlens, max(lengths), chunk)


def run(function, q, k, v, do, dlse):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = function(*leaves)
    return o.detach(), lse.detach(), *torch.autograd.grad((o, lse), leaves, (do, dlse))


def given(selected, places, **options):
    return lambda q, k, v: sparse_attn_varlen(q, k, v, selected, *places, return_lse=True, backend="triton", **options)


@pytest.mark.parametrize("shared", ["head", "group"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_halves_are_the_whole(case, shared):
    *tensors, places = inputs(**case)
    selected = select_chunks(*tensors[:2], *places, case["topk"], shared=shared, backend="triton")
    whole = run(lambda q, k, v: moba_attn_varlen(q, k, v, *places, case["topk"], return_lse=True, backend="triton",
                                                 shared=shared), *tensors)
    assert all(map(torch.equal, run(given(selected, places), *tensors), whole))


@pytest.mark.parametrize("pieces", ["whole lists", "cut lists"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_group_is_its_heads_with_equal_lists(case, pieces, monkeypatch):
    """Bit for bit, whatever its size, where their lists are cut at the same places."""
    if pieces == "cut lists":
        config = tuning.config
        monkeypatch.setattr(tuning, "config", lambda stage, *args, **key: config(stage, *args, **key) | (
            {"SPLIT": 16} if stage == "attention_bwd_dkdv" else {}))
        monkeypatch.setattr(importlib.import_module("moba_megatron.kernels.attention_bwd"), "MIN_PIECES", 1000)
    *tensors, places = inputs(**case)
    group = case["heads"] // case["kv_heads"]
    selected = select_chunks(*tensors[:2], *places, case["topk"], shared="group", backend="triton")[:, :, :5]
    together, apart = (run(given(x, places), *tensors) for x in (selected, selected.repeat_interleave(group, 1)))
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), together, apart):
        if name[0] == "d" and pieces == "cut lists" and 16 % group:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_fp64(case):
    *tensors, places = inputs(**case)
    q, k, v, do, dlse = (x[:sum(case["lengths"])] for x in tensors)
    selected = torch.randint(-2, 9, (q.shape[0], case["kv_heads"], 4), dtype=torch.int32)
    segments = Segments.from_cu_seqlens(*places)
    got = run(given(selected, places), q, k, v, do, dlse)
    kept = reference.keep_earlier(selected, segments).repeat_interleave(q.shape[1] // k.shape[1], 1)
    mask = comparison.dense_mask(kept, segments, q.shape[0], k.shape[0])
    exact, eager = (comparison.attend(q, k, v, do, dlse, mask, 0.25, x) for x in (torch.float64, torch.float32))
    comparison.assert_as_good_as_eager(dict(zip(("o", "lse", "dq", "dk", "dv"), got)), exact, eager, q.dtype)


@pytest.mark.parametrize("choices", [1, 3, 17])
def test_what_is_given_is_made_harmless(choices):
    """As the reference does it; rows of no sequence too."""
    cu_seqlens = torch.tensor([0, 40, 40, 90]).int()
    segments = Segments.from_cu_seqlens(cu_seqlens, 50, 8)
    selected = torch.randint(-3, 18, (95, 3, choices), dtype=torch.int32)
    wild = torch.randint(0, 9, selected.shape)
    selected[wild == 0], selected[wild == 1] = 2 ** 31 - 1, -2 ** 31
    assert torch.equal(kernels.keep_earlier(selected, segments), reference.keep_earlier(selected, segments))
    parts = Segments(torch.tensor([0, 30, 50]).int(), cu_seqlens, torch.tensor([2, 0]).int(),
                     torch.tensor([20, 0]).int(), 30, 50, 8)
    strided = selected[:50].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(kernels.keep_earlier(strided, parts), reference.keep_earlier(strided, parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads, kv_heads, dim", [(6, 2, 16), (8, 1, 24), (3, 3, 4)])
def test_the_sum_of_a_groups_queries(heads, kv_heads, dim, dtype):
    q = torch.randn(37, heads + 1, dim).to(dtype)[:, :-1]
    got = kernels.group_queries(q, kv_heads)
    assert torch.equal(got, reference.group_queries(q, kv_heads)) and got.dtype == dtype
    largest = torch.full((2, heads, dim), torch.finfo(torch.float16).max, dtype=dtype)
    assert kernels.group_queries(largest, kv_heads).isfinite().all()


@pytest.mark.parametrize("groups", [1, 1000], ids=lambda n: f"{n} groups at most")
@pytest.mark.parametrize("shared, kv_heads, choices", [(2, 3, 3), (3, 2, 5), (8, 1, 1)])
def test_routing(shared, kv_heads, choices, groups, monkeypatch):
    """The lists are those of all heads, one number for each group."""
    monkeypatch.setattr(routing, "PROGRAMS", groups * kv_heads)
    selected = torch.rand(61, kv_heads, 7).argsort(2)[:, :, :choices].int()
    selected[torch.rand(selected.shape) < 0.1] = -1
    got, tiles = route_in_tiles(selected, kv_heads, 7, 48, shared)
    want = reference.route(selected, kv_heads, 7, shared)
    used = want.indptr[-1] // shared
    assert torch.equal(got.indptr, want.indptr) and torch.equal(got.indices[:used], want.indices[:used])
    apart = reference.route(selected.repeat_interleave(shared, 1), kv_heads, 7)
    assert torch.equal(got.indptr, apart.indptr)
    spread = (got.indices[:used, None] + torch.arange(shared) * choices).flatten()
    assert torch.equal(spread, apart.indices[:apart.indptr[-1]])
    covered = torch.zeros(int(got.indptr[-1]))
    for begin, end in zip(tiles.begin.tolist(), tiles.end.tolist()):
        covered[begin:max(begin, end)] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 1)])
def test_decoding(heads, kv_heads):
    q, k, v, lengths, places = make([83, 33, 0, 5], 16, 4, heads, kv_heads, page=8)
    means = filled_means(k, lengths, 16, places, "triton")
    options = dict(shared="group", return_lse=True, **places)
    o, lse = moba_decode(q, k, v, means, lengths, 16, 4, backend="triton", **options)
    want, _ = moba_decode(q, k, v, means, lengths, 16, 4, backend="reference", **options)
    torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-5)
    selected = oracle_stages.decode_gate(reference.group_queries(q, kv_heads), k, means, lengths, 16, 4, **places)
    check_values(o, lse, q, k, v, selected.repeat_interleave(heads // kv_heads, 1), lengths, places, 16)
