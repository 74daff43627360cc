"""Selection and attention as two operators, and heads that choose together: against the fp64 oracle, on the CPU."""
import argparse
import warnings

import oracle
import pytest
import torch
from cases import Case, oracle_results
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moba_megatron import MoBAConfig, moba_attn_varlen, reference, select_chunks, sparse_attn_varlen
from moba_megatron.context_parallel import Sequences, context_parallel_attention
from moba_megatron.flops import scored_pairs
from moba_megatron.megatron.arguments import add_moba_arguments, config_from_args
from moba_megatron.ops import moba_attention, select_for_segments, sparse_attention, validation
from moba_megatron.ops.decode import decode_selection, fill_chunk_means, moba_decode
from moba_megatron.segments import Segments

CASES = {
    "one sequence": Case((70,), 8, 4),
    "GQA, packed": Case((33, 0, 5, 61), 8, 3, heads=4, kv_heads=2, v_dim=6, fused=True),
    "groups of three, ties": Case((60, 41), 4, 4, heads=6, kv_heads=2, data="ties"),
    "twins": Case((90,), 8, 5, heads=4, kv_heads=1, data="twins"),
    "topk 1": Case((40,), 8, 1, heads=4, kv_heads=2),
}
SHARED, BACKENDS = ("head", "group"), ("torch", "reference")


def results(function, case, dtype=torch.float64):
    """o, lse, dq, dk, dv of a function of q, k, v."""
    q, k, v, do, dlse = case.tensors(dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = function(*leaves)
    return o.detach(), lse.detach(), *torch.autograd.grad((o, lse), leaves, (do, dlse))


def whole(case, shared="head", **options):
    return lambda q, k, v: moba_attn_varlen(q, k, v, case.cu_seqlens(), case.max_seqlen, case.chunk_size, case.topk,
                                            softmax_scale=case.scale, return_lse=True, shared=shared, **options)


def halves(case, shared="head", **options):
    def attend(q, k, v):
        places = case.cu_seqlens(), case.max_seqlen, case.chunk_size
        selected = select_chunks(q, k, *places, case.topk, shared=shared, **options)
        return sparse_attn_varlen(q, k, v, selected, *places, softmax_scale=case.scale, return_lse=True, **options)
    return attend


def given_to(case, selected, backend):
    return lambda q, k, v: sparse_attn_varlen(q, k, v, selected, case.cu_seqlens(), case.max_seqlen, case.chunk_size,
                                              softmax_scale=case.scale, return_lse=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_halves_are_the_whole(case, shared, backend):
    """Bit for bit, gradients included."""
    for dtype in (torch.float64, torch.bfloat16):
        pairs = zip(*(results(f(case, shared, backend=backend), case, dtype) for f in (halves, whole)))
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_oracle(case, shared, backend):
    q, k, v, do, dlse = case.tensors()
    chosen = oracle.select(q, k, case.lengths, case.chunk_size, case.topk, shared == "group")
    mask = oracle.mask_of(chosen, case.lengths, case.heads, case.chunk_size)
    got = results(whole(case, shared, backend=backend), case)
    for a, b in zip(got, oracle_results(case, q, k, v, do, dlse, mask)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_best_first(case, shared):
    """By scores of fp64, of equals the later; the same list of both backends, -1 behind the last."""
    q, k, *_ = case.tensors()
    places = case.cu_seqlens(), case.max_seqlen, case.chunk_size
    selected, again = (select_chunks(q, k, *places, case.topk, shared=shared, backend=x) for x in BACKENDS)
    assert torch.equal(selected, again) and selected.dtype == torch.int32
    assert selected.shape == (case.total, case.kv_heads if shared == "group" else case.heads, case.topk - 1)
    scoring = q.unflatten(1, (case.kv_heads, -1)).sum(2) if shared == "group" else q
    means = reference.chunk_means(k, case.segments())
    for t, h in ((t, h) for t in range(case.total) for h in range(selected.shape[1])):
        row = [c for c in selected[t, h].tolist() if c >= 0]
        assert selected[t, h].tolist() == row + [-1] * (case.topk - 1 - len(row))
        scores = [float(scoring[t, h] @ means[c, h * case.kv_heads // selected.shape[1]]) for c in row]
        if case.data == "normal":
            assert scores == sorted(scores, reverse=True)
        elif case.data == "ties":
            assert [(-s, -c) for s, c in zip(scores, row)] == sorted((-s, -c) for s, c in zip(scores, row))


def cleaned(case, selected):
    """What counts of given choices, in plain Python: sets of chunk numbers as the oracle has them."""
    chosen, start = [], 0
    group = case.heads // selected.shape[1]
    for sequence, length in enumerate(case.lengths):
        first = start // case.chunk_size + sequence
        chosen.append([[{c - first for c in selected[start + t, h // group].tolist()
                         if first <= c < first + t // case.chunk_size} | {t // case.chunk_size}
                        for h in range(case.heads)] for t in range(length)])
        start += length
    return chosen


@st.composite
def given_choices(draw):
    lengths = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    heads, kv_heads = draw(st.sampled_from(((1, 1), (2, 1), (4, 2), (6, 2))))
    case = Case(lengths, draw(st.sampled_from((1, 4, 16))), 2, heads, kv_heads, seed=draw(st.integers(0, 99)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = case.total, draw(st.sampled_from((heads, kv_heads))), draw(st.integers(0, 5))
    selected = torch.randint(-2, case.total // case.chunk_size + len(lengths) + 2, shape, generator=generator)
    wild = torch.randint(0, 9, shape, generator=generator)
    selected[wild == 0], selected[wild == 1] = 2 ** 31 - 1, -2 ** 31
    return case, selected.int()


@pytest.mark.parametrize("backend", BACKENDS)
@examples(60)
@given(given_choices())
def test_what_is_given_is_made_harmless(backend, drawn):
    """Not earlier, of another sequence, out of range, or named twice: as if it were not there."""
    case, selected = drawn
    q, k, v, do, dlse = case.tensors()
    if not case.total:
        return
    kept = reference.keep_earlier(selected, case.segments())
    for row, was in zip(kept.flatten(0, 1).tolist(), selected.flatten(0, 1).tolist()):
        named = [c for c in row if c >= 0]
        assert len(set(named)) == len(named) and all(c in (-1, x) for c, x in zip(row, was))
    mask = oracle.mask_of(cleaned(case, selected), case.lengths, case.heads, case.chunk_size)
    for a, b in zip(results(given_to(case, selected, backend), case), oracle_results(case, q, k, v, do, dlse, mask)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments(backend):
    """The ends of sequences alone: what the whole gives for their rows."""
    case = CASES["GQA, packed"]
    q, k, v, do, dlse = case.tensors()
    rows = torch.cat([torch.arange(end - n, end) for n, end in ((20, 33), (30, 99))])
    segments = Segments(torch.tensor([0, 20, 50]).int(), case.cu_seqlens(), torch.tensor([0, 3]).int(),
                        torch.tensor([13, 31]).int(), 30, case.max_seqlen, case.chunk_size)
    for shared in SHARED:
        selected = select_for_segments(q[rows], k, segments, case.topk, shared=shared, backend=backend)
        everywhere = select_chunks(q, k, case.cu_seqlens(), case.max_seqlen, case.chunk_size, case.topk, shared=shared)
        assert torch.equal(selected, everywhere[rows])
        options = dict(softmax_scale=case.scale, return_lse=True, backend=backend)
        got = sparse_attention(q[rows], k, v, selected, segments, **options)
        assert all(map(torch.equal, got, moba_attention(q[rows], k, v, segments, case.topk, shared=shared, **options)))
        o, lse = whole(case, shared)(q, k, v)
        torch.testing.assert_close(got, (o[rows], lse[rows]))


def test_bad_choices_are_named(monkeypatch):
    monkeypatch.setattr(validation, "CHECK_CUDA_VALUES", True)
    case = Case((40, 24), 8, 3, heads=4, kv_heads=2)
    q, k, v, *_ = case.tensors()
    good = select_chunks(q, k, case.cu_seqlens(), case.max_seqlen, 8, 3)
    given_to(case, good, "auto")(q, k, v)
    for chunk, what in ((good[30, 1, 0], "0 to 2, got . at index .30, 1, 1. again"), (3, "got 3 at index .30, 1, 1.$"),
                        (6, "got 6"), (-2, "got -2"), (2 ** 31 - 1, "got 2147483647")):
        bad = good.clone()
        bad[30, 1, 1] = chunk
        with pytest.raises(ValueError, match=f"selected must hold earlier chunks .* token 30 has those from .*{what}"):
            given_to(case, bad, "auto")(q, k, v)


@pytest.mark.parametrize("change, error, what", [
    (lambda x: x.long(), TypeError, "selected must be int32, got torch.int64"),
    (lambda x: x[0], ValueError, "selected must have 3 dimensions, got shape"),
    (lambda x: x[:-1], ValueError, "selected must have q's 64 tokens, and a list for each of q's 4 heads or of k's 2"),
    (lambda x: x[:, :3], ValueError, "selected must have .* got shape .64, 3, 2."),
    (lambda x: x.to("meta"), ValueError, "selected must be on q's device cpu, got meta"),
    (lambda x: x.tolist(), TypeError, "selected must be a torch.Tensor, got list")])
def test_bad_tensors_are_named(change, error, what):
    case = Case((40, 24), 8, 3, heads=4, kv_heads=2)
    q, k, v, *_ = case.tensors()
    good = select_chunks(q, k, case.cu_seqlens(), case.max_seqlen, 8, 3)
    with pytest.raises(error, match=what):
        given_to(case, change(good), "auto")(q, k, v)
    with pytest.raises(ValueError, match="shared must be one of head, group; got 'all'"):
        select_chunks(q, k, case.cu_seqlens(), case.max_seqlen, 8, 3, shared="all")
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        select_chunks(q, k, case.cu_seqlens(), case.max_seqlen, 8, 0)


@pytest.mark.parametrize("shared", SHARED)
def test_compiled_fake_and_transformed(shared):
    case = CASES["GQA, packed"]
    want = results(halves(case, shared), case)
    compiled = torch.compile(halves(case, shared), backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, results(compiled, case), want))
    q, k, v, *_ = case.tensors()
    places = case.cu_seqlens(), case.max_seqlen, case.chunk_size
    real = select_chunks(q, k, *places, case.topk, shared=shared)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, places[0])]
        fake = select_chunks(*fakes[:2], fakes[3], *places[1:], case.topk, shared=shared)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        o, lse = sparse_attn_varlen(*fakes[:3], fake, fakes[3], *places[1:], return_lse=True)
        assert (o.shape, lse.shape, o.dtype) == (want[0].shape, want[1].shape, q.dtype)
    inputs = (q.detach().requires_grad_(), k, v, *places[:1], *places[:1], *places_of(case), real)
    torch.library.opcheck(torch.ops.moba_megatron.attention_fwd, inputs, test_utils=("test_schema", "test_faketensor"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own loop says that it is slow
        select = torch.func.vmap(lambda k: select_chunks(q, k, *places, case.topk, shared=shared), 2)
        both, none = select(torch.stack((k, -k), 2)), select(k[:, :, None][:, :, :0])
    assert torch.equal(both[0], real)
    assert torch.equal(both[1], select_chunks(q, -k, *places, case.topk, shared=shared))
    assert (none.shape, none.dtype) == ((0, *real.shape), torch.int32)
    doubled = torch.func.vmap(lambda q, s: sparse_attn_varlen(q, k, v, s, *places), randomness="error")(
        torch.stack((q, q + 1)), torch.stack((real, real.flip(2))))
    assert torch.equal(doubled[0], sparse_attn_varlen(q, k, v, real, *places))
    assert torch.equal(doubled[1], sparse_attn_varlen(q + 1, k, v, real.flip(2), *places))


def places_of(case):
    """The rest of the operator's arguments."""
    s = case.segments()
    return (s.seq_ids, s.offsets, case.max_seqlen, case.max_seqlen, case.chunk_size, True, False, case.topk, 0.5, False,
            "torch", None, "head")


@pytest.mark.parametrize("shared", SHARED)
def test_operations_are_counted(shared):
    """The halves' are the whole's; a group scores once."""
    case = Case((64,), 4, 3, heads=4, kv_heads=2)
    counts = []
    for function in (halves(case, shared), whole(case, shared), whole(case)):
        with FlopCounterMode(display=False) as counter:
            function(*case.tensors()[:3])
        counts.append(counter.get_total_flops())
    scored = 2 * case.head_dim * scored_pairs(64, 4, 3)
    assert counts[0] == counts[1] == counts[2] - (scored * 2 if shared == "group" else 0)


def test_deterministic_and_without_gradients():
    case = CASES["GQA, packed"]
    want = results(halves(case, "group", backend="reference"), case)
    attend = whole(case, "group", backend="reference", deterministic=True)
    assert all(map(torch.equal, results(attend, case), want))
    with torch.inference_mode():
        assert torch.equal(attend(*case.tensors()[:3])[0], want[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_decodes_as_its_prompt_attends(backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 70, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    means, lengths = torch.zeros(3, 9, 2, 8, dtype=torch.float64), torch.tensor([70, 33, 5]).int()
    fill_chunk_means(k, means, lengths, 8, backend=backend)
    query = torch.stack([x[n - 1] for x, n in zip(q, lengths.tolist())])
    o = moba_decode(query, k, v, means, lengths, 8, 3, shared="group", backend=backend)
    for b, n in enumerate(lengths.tolist()):
        cu = torch.tensor([0, n]).int()
        want = moba_attn_varlen(q[b, :n], k[b, :n], v[b, :n], cu, n, 8, 3, shared="group", backend=backend)
        torch.testing.assert_close(o[b], want[-1], rtol=1e-11, atol=1e-11)
    assert decode_selection(query, k, means, lengths, 8, 3, shared="group", backend=backend).shape == (3, 2, 2)


def test_the_flag():
    parser = add_moba_arguments(argparse.ArgumentParser())
    assert config_from_args(parser.parse_args(["--moba-selection", "group"])).selection == "group"
    assert config_from_args(parser.parse_args([])).selection == "head"
    with pytest.raises(ValueError, match="MoBAConfig.selection must be one of head, group; got 'kv'"):
        MoBAConfig(selection="kv")


def _rank(rank, size):
    """Relative errors against one rank, by communication type; and what is refused."""
    generator = torch.Generator().manual_seed(3)
    q, k, v, do = (torch.randn(96, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu = torch.tensor([0, 96]).int()
    o = moba_attn_varlen(*leaves, cu, 96, 8, 3, shared="group", backend="reference")
    want = o, *torch.autograd.grad(o, leaves, do)
    piece = 96 // (2 * size)
    rows = torch.cat((torch.arange(rank * piece, (rank + 1) * piece),
                      torch.arange(96 - (rank + 1) * piece, 96 - rank * piece)))
    group, sequences = torch.distributed.group.WORLD, Sequences.uniform(96, 1, torch.device("cpu"))
    errors = {}
    for comm_type in ("all_gather", "a2a"):
        mine = [x.detach()[rows].requires_grad_() for x in (q, k, v)]
        o = context_parallel_attention(*mine, sequences, 8, 3, group, comm_type=comm_type, shared="group",
                                       backend="reference")
        got = o, *torch.autograd.grad(o, mine, do[rows])
        errors[comm_type] = max(((a - b[rows]).norm() / b.norm()).item() for a, b in zip(got, want))
    with pytest.raises(ValueError, match="selection must be 'head' for cp_comm_type 'selective', got 'group'"):
        context_parallel_attention(*mine, sequences, 8, 3, group, comm_type="selective", shared="group")
    with pytest.raises(ValueError, match="selection must be 'head' for cp_comm_type 'a2a' where 2 ranks share 1 key"):
        context_parallel_attention(mine[0], mine[1][:, :1], mine[2][:, :1], sequences, 8, 3, group, comm_type="a2a",
                                   shared="group")
    return errors


def test_two_ranks(tmp_path):
    for errors in run_ranks(_rank, 2, tmp_path):
        assert errors.keys() == {"all_gather", "a2a"} and max(errors.values()) < 1e-12, errors
