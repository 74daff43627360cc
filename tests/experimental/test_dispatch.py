"""Queries that are dispatched to chunks' owners or copies, against one rank: selection, o, gradients; bytes counted."""
from unittest import mock

import numpy
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from benchmarks.distributed import Ranks
from benchmarks.planner.measure import SELECTIVE, Job, choices_of, counted_bytes, make_inputs, measure_way, one_rank
from benchmarks.planner.simulate import traffic_of_selection
from moba_megatron import reference
from moba_megatron.context_parallel import Sequences, context_parallel_attention, record_waits, selective
from moba_megatron.context_parallel.selective import HANDLING, PLANNING, pieces_are_chunks
from moba_megatron.experimental import cost_model, dispatch
from moba_megatron.experimental.chunk_attention import chunk_attention_bwd, chunk_attention_fwd, cut
from moba_megatron.experimental.cost_model import (
    DISPATCH,
    FETCH,
    GATHER,
    MIXED,
    MODES,
    RELAYED_FROM,
    RowSizes,
    cheapest_mode,
    owner_of_chunks,
    reckon,
    replicas_of,
    seconds_of,
    seconds_of_modes,
)
from moba_megatron.experimental.dispatch import by_chunk
from moba_megatron.experimental.dispatch_plan import chunks_of_ranks, ranges
from moba_megatron.ops import moba_attention
from moba_megatron.plan.collectives import query_bytes
from moba_megatron.segments import Segments

# (name, tokens of a sequence, sequences, chunk size, topk, heads, kv heads, D, DV, head groups, dtype)
CASES = [
    ("gqa", 240, 1, 5, 4, 6, 2, 4, 4, None, torch.float64),
    ("mha_batch_groups", 240, 2, 5, 3, 4, 4, 4, 6, 3, torch.float64),
    ("sink", 480, 1, 10, 3, 4, 1, 8, 8, None, torch.float64),
    ("all_chunks_but_one", 48, 1, 1, 47, 2, 1, 4, 4, None, torch.float64),
    ("fp32", 240, 1, 5, 4, 4, 2, 8, 8, 2, torch.float32),
    ("bf16", 240, 1, 5, 4, 4, 2, 8, 8, None, torch.bfloat16),
]
SIZES = (2, 3, 4, 8)
COMPUTED_BY = {"owners": [case[0] for case in CASES], "mixed": ["sink"], "model": ["bf16"],
          "anywhere": ["gqa", "mha_batch_groups"]}
"""Who computes, and for which cases: owners; what the model says where products cost and bytes are nearly free, so that
busy owners are relieved; what it says with its own figures; any rank for every rank, head and chunk, in rounds."""
TWICE = (("owners", "gqa"), ("mixed", "sink"), ("anywhere", "gqa"))
"""Run a second time: the same bits."""
ROUND = 40
"""Rows that a rank takes at once in those rounds."""
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6e-3}
"""bf16: parts of o and dq travel rounded, as the kernels' partial results are: two roundings of 2^-9 for one."""


def whole_inputs(case):
    name, tokens, batch, chunk_size, _, heads, kv_heads, d, dv, _, dtype = case
    generator = torch.Generator().manual_seed(7)
    total = tokens * batch
    shapes = ((total, heads, d), (total, kv_heads, d), (total, kv_heads, dv), (total, heads, dv))
    q, k, v, do = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if name == "sink":  # everybody chooses the first chunk
        q, k = q * 0.3 + 1, k.clone()
        k[:chunk_size] += 2
    return [x.to(dtype) for x in (q, k, v, do)]


def single_rank(case):
    _, tokens, batch, chunk_size, topk, *_ = case
    q, k, v, do = whole_inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = Segments.from_cu_seqlens(torch.arange(batch + 1, dtype=torch.int32) * tokens, tokens, chunk_size)
    o = moba_attention(q, k, v, segments, topk, backend="reference")
    selected = reference.gate(q.detach(), reference.chunk_means(k.detach(), segments), segments, topk)
    return o.detach(), torch.autograd.grad(o, leaves, do), selected


@pytest.mark.parametrize("counts", [(0, 1, 9, 0, 4, 5, 0), (8,), (0,), (3, 3), (0, 0, 17)])
def test_lists_are_cut(counts):
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    begins, of = cut(starts, sum(counts), 4)
    expected = [(i, starts[i].item() + n, min(starts[i] + n + 4, starts[i + 1]).item())
                for i, count in enumerate(counts) for n in range(0, count, 4)]
    parts = list(zip(of.tolist(), begins.tolist(), begins[1:].tolist()))
    assert parts[:len(expected)] == expected
    assert all(begin == end == sum(counts) for _, begin, end in parts[len(expected):])


def compute_ranks_for(who, table, rank_chunks, sizes, group):
    """Stands for cheapest_mode."""
    if who == "model":
        return cheapest_mode(table, rank_chunks, sizes, group)
    owner = owner_of_chunks(rank_chunks, table.shape[2])
    if who == "anywhere":
        return MIXED, torch.randint(len(table), table.shape, generator=torch.Generator().manual_seed(3))
    if who == "owners":
        return MIXED, owner.expand(table.shape)
    with mock.patch.object(cost_model, "HANDLING", 0):
        return MIXED, reckon(table, owner, sizes, 1e18)[1][MIXED]


def compare(case, who, expected, group):
    """Relative errors of o, dq, dk, dv on this rank, and bytes sent beside those that the selection tells."""
    _, tokens, batch, chunk_size, topk, heads, kv_heads, d, dv, head_groups, dtype = case
    o, grads, selected = expected
    size, rank = group.size(), dist.get_rank(group)
    sequences = Sequences.uniform(tokens, batch, torch.device("cpu"))
    layout = sequences.zigzag(size, rank, chunk_size)
    assert pieces_are_chunks(layout)
    rows = sequences.rows(size, rank).own_rows
    q, k, v, do = whole_inputs(case)
    leaves = [torch.cat((x[rows], x[rows]), 2)[:, :, :x.shape[2]].requires_grad_() for x in (q, k, v)]  # strided
    runs, chosen, gate = [], [], reference.gate
    limit = ROUND * 2 * (d + dv) * dtype.itemsize if who == "anywhere" else dispatch.DISPATCHED_BYTES
    with mock.patch.object(dispatch, "cheapest_mode", lambda *given: compute_ranks_for(who, *given)), \
            mock.patch.object(reference, "gate", lambda *x: chosen.append(gate(*x)) or chosen[-1]), \
            mock.patch.object(dispatch, "DISPATCHED_BYTES", limit):
        for _ in range(2 if (who, case[0]) in TWICE else 1):
            with record_waits() as record:
                got = context_parallel_attention(*leaves, sequences, chunk_size, topk, group, comm_type="selective",
                                                 head_groups=head_groups, deterministic=True, backend="reference")
                runs.append([got, *torch.autograd.grad(got, leaves, do[rows])])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[-1])), "not reproducible"
    assert torch.equal(torch.cat(chosen[:len(chosen) // len(runs)], 1).sort(2)[0], selected[rows].sort(2)[0])
    errors = [((a - b).double().norm() / b.double().norm()).item()
              for a, b in zip(runs[0], (o[rows], *(g[rows] for g in grads)))]
    sent = {stage: entry["sent_bytes"] for stage, entry in record.summary().items()}
    return errors, sent, told(case, selected, rank, size)


def told(case, selected, rank, size):
    """(rows that this rank's choices make leave, rows that come), counted on the selection of one rank."""
    _, tokens, batch, chunk_size, topk, heads, kv_heads, *_ = case
    leaving = coming = 0
    pieces = torch.arange(tokens) // (tokens // (2 * size))
    owner = torch.where(pieces < size, pieces, 2 * size - 1 - pieces)
    for b in range(batch):
        chosen = selected[b * tokens:(b + 1) * tokens].long()
        chunk = chosen - (b * tokens // chunk_size + b)
        of_chunk = torch.where(chosen < 0, owner[:, None, None], owner[(chunk * chunk_size).clamp(0, tokens - 1)])
        leaving += int(((of_chunk != rank) & (owner == rank)[:, None, None]).sum())
        coming += int(((of_chunk == rank) & (owner != rank)[:, None, None]).sum())
    return leaving, coming


def on_rank(rank, size):
    torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
    selective.DISPATCH_FROM = 2
    groups = [dist.new_group(list(range(n))) for n in SIZES]
    expected = {case[0]: single_rank(case) for case in CASES}
    results = {(who, case[0], n): compare(case, who, expected[case[0]], group)
               for n, group in zip(SIZES, groups) if rank < n for who, names in COMPUTED_BY.items()
               for case in CASES if case[0] in names}
    results["modes"] = [cheapest_mode(*table_for(size, 4, 8, choices), SIZES_OF_ROWS, groups[-1])[0]
                       for choices in (200, 400000)]
    results["measured"] = measured_bytes(Ranks(rank, size, torch.device("cpu")))
    return results


def with_new_memory_filled_and_not(rank, size):
    """Results of the torch backend where new memory is filled with NaN, and where it is not."""
    case, fills, runs = next(case for case in CASES if case[0] == "fp32"), torch.utils.deterministic, []
    _, tokens, batch, chunk_size, topk, *_ = case
    sequences = Sequences.uniform(tokens, batch, torch.device("cpu"))
    rows = sequences.rows(size, rank).own_rows
    *leaves, do = (x[rows].requires_grad_() for x in whole_inputs(case))
    torch.use_deterministic_algorithms(True)
    with mock.patch.object(dispatch, "cheapest_mode", lambda *given: compute_ranks_for("anywhere", *given)), \
            mock.patch.object(selective, "DISPATCH_FROM", 2):
        for fills.fill_uninitialized_memory in (True, False):
            o = context_parallel_attention(*leaves, sequences, chunk_size, topk, dist.group.WORLD,
                                           comm_type="selective", deterministic=True, backend="torch")
            runs.append([o.detach(), *torch.autograd.grad(o, leaves, do)])
    return runs


def test_memory_that_is_not_written_decides_nothing(tmp_path):
    for filled, found in run_ranks(with_new_memory_filled_and_not, 3, tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(filled, found, strict=True))


def measured_bytes(ranks):
    """What plan-measure says of the modes of selective: (sent, counted) by all ranks, by routing and mode."""
    job = Job(tokens=512, chunk_size=16, topk=3, heads=4, kv_heads=2, dim=16, backend="reference")
    found = {}
    for routing in ("local", "sink"):
        inputs = make_inputs(job, routing, torch.device("cpu"))
        expected, selected = one_rank(job, inputs)
        choices = choices_of(job, selected, ranks.size)
        for name in list(SELECTIVE)[2 * (routing == "sink"):]:
            row = measure_way(name, job, inputs, expected, ranks, repeats=1)
            assert max(row["errors"].values()) < 1e-5
            found[routing, name] = sum(row["sent_bytes"]), sum(counted_bytes(name, job, *choices, 4))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(on_rank, max(SIZES), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("who, name", [(who, name) for who, names in COMPUTED_BY.items() for name in names])
def test_equals_one_rank(results, who, name, size):
    dtype = next(case[-1] for case in CASES if case[0] == name)
    for errors, *_ in (result[who, name, size] for result in results[:size]):
        assert max(errors) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_bytes_sent_are_those_of_the_choices(results, case, size):
    *_, d, dv, _, dtype = case
    item, wide = dtype.itemsize, 8 if dtype == torch.float64 else 4  # of lse
    for _, sent, (leaving, coming) in (result["owners", case[0], size] for result in results[:size]):
        assert sent["fwd dispatch"] == leaving * d * item
        assert sent["fwd return"] == coming * (dv * item + wide)
        assert sent["bwd dispatch"] == leaving * ((d + 2 * dv) * item + wide)
        assert sent["bwd return"] == coming * d * item
        assert sent["fwd gather"] == sent["bwd gather"] == sent["bwd reduce"] == 0, "nothing is copied"


@pytest.mark.parametrize("size", SIZES)
def test_a_sink_is_copied_and_its_queries_stay(results, size):
    """All choose the first chunk, of rank 0: the others fetch it; what else they choose they fetch or dispatch."""
    case = next(c for c in CASES if c[0] == "sink")
    *_, chunk_size, _, _, _, d, dv, _, dtype = case
    row = (d + dv) * dtype.itemsize
    found = [result["mixed", "sink", size][1:] for result in results[:size]]
    for rank, (sent, (leaving, _)) in enumerate(found):
        assert sent["fwd gather"] == sent["bwd gather"] and sent["fwd gather"] % row == 0
        assert sent["bwd reduce"] >= chunk_size * row * (rank > 0), "fp64 sums of dk and dv"
        assert sent["fwd dispatch"] < leaving * d * dtype.itemsize or leaving == 0
    owner, rest = found[0][0]["fwd gather"], sum(sent["fwd gather"] for sent, _ in found[1:])
    assert owner >= (size - 1) * chunk_size * row if size <= RELAYED_FROM else 0 < owner < rest / 2


@pytest.mark.parametrize("size", SIZES)
def test_what_exceeds_a_round_comes_in_the_next_and_is_counted(results, size):
    """All that is dispatched is sent, in rounds of at most ROUND rows, a fair share of each other rank."""
    for name in COMPUTED_BY["anywhere"]:
        first, later = (sum(result["anywhere", name, size][1].get(stage, 0) for result in results[:size])
                        for stage in ("fwd dispatch", "fwd dispatch later"))
        case = next(c for c in CASES if c[0] == name)
        row = case[7] * case[-1].itemsize
        groups = case[9] or 1
        assert 0 < first <= groups * size * (size - 1) * -(-ROUND // (size - 1)) * row
        assert later > 0 and (first + later) % row == 0


def test_the_planner_expects_these_bytes(results):
    """Rows of bf16: what all ranks send, forward and backward, is the planner's bytes of a row times the choices."""
    case = next(c for c in CASES if c[0] == "bf16")
    for size in SIZES:
        found = [result["owners", "bf16", size] for result in results[:size]]
        rows = sum(leaving for *_, (leaving, _) in found)
        sent = sum(sum(sent[f"{mode} {what}"] for mode in ("fwd", "bwd") for what in ("dispatch", "return"))
                   for _, sent, _ in found)
        assert sent == rows * sum(query_bytes(case[7]))
        _, tokens, _, chunk_size, topk, _, kv_heads, *_ = case
        selected = single_rank(case)[2].numpy()
        pieces = numpy.arange(tokens) // (tokens // (2 * size))
        owner = numpy.where(pieces < size, pieces, 2 * size - 1 - pieces)
        queries = traffic_of_selection(selected, owner, owner, chunk_size, kv_heads, size)["visits"].sum()
        assert queries <= rows <= (topk - 1) * queries  # the planner sends a query to an owner once for several chunks


def test_dispatched_queries_attend_to_their_chunk_alone():
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(3, 7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    q, do = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    chunk = torch.tensor([0, 0, 2, 2, 2])
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    score = torch.einsum("nd,nsd->ns", q, k[chunk]) * 0.5
    o = torch.einsum("ns,nsd->nd", score.softmax(1), v[chunk])
    grads = torch.autograd.grad(o, (q, k, v), do)
    cu_queries = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    with torch.no_grad():
        got, lse = chunk_attention_fwd(q, k, v, cu_queries, 3, 0.5)
        torch.testing.assert_close((got, lse), (o, score.logsumexp(1)))
        for a, b in zip(chunk_attention_bwd(do, q, k, v, got, lse, cu_queries, 3, 0.5), grads):
            torch.testing.assert_close(a, b)


SIZES_OF_ROWS = RowSizes(item=2, dim=128, v_dim=128, chunk_size=4096)


def table_for(ranks, chunks_each, heads, choices):
    """A table and chunks of ranks where every rank chooses each chunk of others, and its own, ``choices`` times."""
    rank_chunks = torch.arange(ranks * chunks_each).view(ranks, chunks_each)
    table = torch.full((ranks, heads, ranks * chunks_each + 1), choices, dtype=torch.int32)
    table[:, :, -1] = 0  # an id that no chunk has
    return table, rank_chunks


def times(table, rank_chunks, **given):
    """Seconds by mode."""
    return dict(zip(MODES, seconds_of_modes(table, rank_chunks, SIZES_OF_ROWS, **given)[0].tolist()))


def test_seconds_of_the_modes_by_hand():
    table, rank_chunks = table_for(2, 1, 3, 10)
    found = times(table, rank_chunks, link=1e9)
    row, chunk, work = 512, 2 * 4096 * 512, 60 * 2 * 256 * 4096 * 3.5 / 300e12
    dispatched = 30 * (2 * row + 4 + row + 4) / 1e9 + 60 * HANDLING + work
    assert found[DISPATCH] == found[MIXED] == pytest.approx(PLANNING + dispatched)
    fetch = 3 * (chunk + 4096 * 1024) / 1e9 + work  # K, V twice, fp32 sums of dk, dv
    assert found[FETCH] == pytest.approx(PLANNING + fetch) and found[GATHER] == pytest.approx(fetch)


def test_a_rank_fetches_what_many_of_its_choices_want():
    table, rank_chunks = table_for(4, 2, 2, 5)  # a copy is worth 2 * 4096 * 1024 bytes / (1544 + 5) = 5416 choices
    table[1, :, 0], table[2, :, 0], table[3, 1, 3] = 6000, 5000, 6000
    owner = owner_of_chunks(rank_chunks, table.shape[2])
    assert owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0]
    computed_by = reckon(table, owner, SIZES_OF_ROWS, 1e9)[1][MIXED]
    copies = replicas_of(table, computed_by, owner)
    assert copies.nonzero().tolist() == [[1, 0, 0], [1, 1, 0], [3, 1, 3]]
    assert torch.equal(torch.where(copies, owner, computed_by), owner.expand(table.shape)), "all others are dispatched"
    found = times(table, rank_chunks, link=1e9)
    assert found[MIXED] < min(found[DISPATCH], found[FETCH])


def test_a_busy_owner_is_relieved():
    """All choose the chunks of two ranks of eight; copies elsewhere serve them, in the rank order of the queries."""
    table, rank_chunks = table_for(8, 1, 1, 0)
    table[:, :, 0], table[:, :, 1] = 2000, 1200
    owner = owner_of_chunks(rank_chunks, table.shape[2])
    computed_by = reckon(table, owner, SIZES_OF_ROWS, 280e9)[1][MIXED]
    work = torch.zeros(8, dtype=torch.int64).scatter_add_(0, computed_by.flatten(), table.long().flatten())
    assert work.sum() == 8 * 3200 and work.max() <= 2 * work.sum() / 8 < 8 * 1200
    copies = replicas_of(table, computed_by, owner)
    assert (computed_by[copies] == copies.nonzero()[:, 0]).all(), "who has a copy uses it"
    assert copies.sum() <= 12
    before = seconds_of(table, owner.expand(table.shape), owner, SIZES_OF_ROWS, 280e9)
    assert seconds_of(table, computed_by, owner, SIZES_OF_ROWS, 280e9) < 0.5 * before
    even, rank_chunks = table_for(8, 1, 1, 1000)
    assert torch.equal(reckon(even, owner, SIZES_OF_ROWS, 280e9)[1][MIXED], owner.expand(even.shape))


def test_measured_bytes_are_counted_bytes(results):
    for result in results:
        for sent, counted in result["measured"].values():
            assert sent == counted > 0
    sent = {key: sent for key, (sent, _) in results[0]["measured"].items()}
    fetch, dispatched, mixed = (sent["local", name] for name in SELECTIVE)
    assert mixed < min(fetch, dispatched)


def test_all_ranks_decide_alike(results):
    assert [result["modes"] for result in results] == [[DISPATCH, GATHER]] * len(results)


@pytest.mark.parametrize("ranks, choices, mode", [(64, 2000, DISPATCH), (8, 40000, GATHER), (64, 40000, GATHER)])
def test_many_choices_of_everything_are_gathered(ranks, choices, mode):
    table, rank_chunks = table_for(ranks, 4, 8, choices)
    found = times(table, rank_chunks, link=30e9, members_a_node=2)
    assert min(found, key=found.get) == mode


def test_a_sink_is_fetched_and_does_not_overload_its_owner():
    table, rank_chunks = table_for(64, 4, 8, 0)
    table[:, :, 100] = 100000
    found = times(table, rank_chunks, link=30e9, members_a_node=8)
    assert found[FETCH] == found[MIXED] == min(found.values())
    table[:, :, :256] += 20  # and a few choices of everything: those are dispatched
    found = times(table, rank_chunks, link=30e9)
    assert found[MIXED] < 0.8 * min(found[mode] for mode in (DISPATCH, FETCH, GATHER))
    table[:] = 0
    table[0, :, 100] = 3  # few queries of one rank
    found = times(table, rank_chunks, link=30e9)
    assert found[DISPATCH] == min(found.values())


def test_chunks_of_ranks():
    layout = Sequences.uniform(24, 2, torch.device("cpu")).zigzag(2, 0, 3)  # eight chunks and one unused id a sequence
    assert chunks_of_ranks(layout).tolist() == [[0, 1, 6, 7, 9, 10, 15, 16], [2, 3, 4, 5, 11, 12, 13, 14]]


def test_rows_by_ranges_and_chunks():
    assert ranges(torch.tensor([4, 0, 9]), torch.tensor([2, 0, 3]), 5).tolist() == [4, 5, 9, 10, 11]
    x = torch.arange(24).view(6, 2, 2)  # three tokens a chunk, two heads
    chunks = by_chunk(x, 3)
    assert chunks.shape == (4, 3, 2) and torch.equal(chunks[1], x[3:, 0]) and torch.equal(chunks[2], x[:3, 1])


@pytest.mark.parametrize("tokens, size, chunk_size, whole", [(48, 2, 4, True), (48, 2, 12, True), (48, 2, 8, False),
                                                             (48, 3, 8, True), (48, 4, 5, False)])
def test_whole_chunks(tokens, size, chunk_size, whole):
    layout = Sequences.uniform(tokens, 1, torch.device("cpu")).zigzag(size, 0, chunk_size)
    assert pieces_are_chunks(layout) is whole
    packed = Sequences.packed(torch.tensor([0, tokens], dtype=torch.int32), tokens, tokens)
    assert not pieces_are_chunks(packed.zigzag(size, 0, chunk_size))
