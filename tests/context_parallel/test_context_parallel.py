"""Context parallel attention against one rank: row maps, means and selection bit for bit, o and gradients; groups."""
import itertools
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from moba_megatron import reference
from moba_megatron.context_parallel import (
    COMM_TYPES,
    CollectiveCheck,
    Sequences,
    canonical_comm_type,
    check_groups,
    check_zigzag,
    context_parallel_attention,
    record_waits,
    selective,
)
from moba_megatron.context_parallel.all_gather import MOST_BYTES, MUCH_BYTES, number_of_groups, split_heads
from moba_megatron.context_parallel.all_to_all import LocalAttention
from moba_megatron.context_parallel.transport.comm import copy_rows
from moba_megatron.ops import moba_attention, pipeline, sparse_attention
from moba_megatron.segments import Segments

# (name, lengths, uniform, chunk size, topk, heads, kv heads, D, DV, head groups, dtype)
# Chunks and SUM_BLOCKs cut by pieces and not; multiples of 24, so that P may be 2, 3 and 4; kv heads that divide among
# the ranks, that do not, and fewer than ranks.
CASES = [
    ("aligned", [384], True, 16, 3, 12, 12, 4, 4, None, torch.float64),
    ("aligned_groups", [384], True, 16, 3, 12, 12, 4, 6, 3, torch.float64),
    ("blocks_cut", [24 * 13], True, 48, 3, 12, 4, 8, 8, 2, torch.float64),
    ("long_chunks_cut", [24 * 23], True, 130, 2, 12, 1, 4, 6, None, torch.float64),
    ("tiny_pieces", [24, 24, 24], True, 5, 4, 12, 2, 4, 4, 2, torch.float64),
    ("fp32_batch", [24 * 13, 24 * 13], True, 72, 3, 12, 12, 8, 8, 3, torch.float32),
    ("bf16", [24 * 13], True, 72, 3, 12, 2, 8, 8, 2, torch.bfloat16),
    ("one_chunk", [72], True, 64, 3, 6, 6, 4, 4, 6, torch.float64),
    ("dense", [24 * 4, 24 * 4], True, 96, 1, 4, 2, 4, 4, None, torch.float64),
    ("packed", [24 * 3, 0, 24, 24 * 14], False, 24, 3, 12, 12, 4, 4, 3, torch.float64),
    ("packed_fp32", [24 * 14, 24], False, 80, 2, 4, 2, 8, 8, None, torch.float32),
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


def cu_seqlens_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make_sequences(lengths, uniform):
    if uniform:
        return Sequences.uniform(lengths[0], len(lengths), torch.device("cpu"))
    return Sequences.packed(cu_seqlens_of(lengths), max(lengths), sum(lengths))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths, uniform", [([24], True), ([24, 24], True), ([24] * 3, True), ([48, 0, 24], False)])
def test_row_maps(size, lengths, uniform):
    gathered = torch.cat([zigzag_rows(lengths, size, rank) for rank in range(size)])
    sequences = make_sequences(lengths, uniform)
    for rank in range(size):
        layout, mine = sequences.zigzag(size, rank, 7), zigzag_rows(lengths, size, rank)
        rows = layout.rows
        assert torch.equal(rows.rank_rows, gathered)
        assert torch.equal(gathered[rows.global_rows], torch.arange(sum(lengths)))
        assert torch.equal(sequences.rows(size, rank).own_rows, mine)
        sequence, position = layout.segments.query_positions(mine.numel())
        assert torch.equal(layout.segments.cu_seqlens_k.long()[sequence] + position, mine)
        assert (rows.runs is None) == (not uniform or len(lengths) > 2)
        if rows.runs is not None:
            everything = torch.arange(rows.total)
            for r in range(size):
                runs = sequences.rows(size, r).own_runs()
                assert len(runs) == len(rows.runs)
                for here, among_all in runs:
                    assert torch.equal(everything[among_all], zigzag_rows(lengths, size, r)[here])


def test_layouts_on_meta_are_those_of_the_cpu():
    """By which schedules are compiled ahead of time."""
    for seqlen, chunk_size in ((96, 8), (72, 20)):
        meta, cpu = (Sequences.uniform(seqlen, 1, torch.device(device)).zigzag(2, 1, chunk_size)
                     for device in ("meta", "cpu"))
        for part in ("segments", "rows", "blocks"):
            for name, x in vars(getattr(cpu, part)).items():
                y = getattr(getattr(meta, part), name)
                assert (y.is_meta and y.shape == x.shape) if isinstance(x, torch.Tensor) else x == y, (part, name)


@pytest.mark.parametrize("cu_seqlens", [(0, 24, 40), (0, 23, 48), (0, 47, 17, 48), (0, 60, 48), (0, 24, 72)])
@pytest.mark.parametrize("size", [2, 3])
def test_row_maps_of_bad_lengths_stay_inside(size, cu_seqlens):
    """On a GPU they are known only later: nothing may be read or written elsewhere until then."""
    sequences = Sequences.packed(torch.tensor(cu_seqlens, dtype=torch.int32), 48, 48)
    layout = sequences.zigzag(size, size - 1, 7)
    for rows in (layout.rows.global_rows, layout.rows.rank_rows):
        assert rows.min() >= 0 and rows.max() < 48
    assert layout.segments.cu_seqlens_k.max() <= 48 and layout.segments.cu_seqlens_q.max() <= 48 // size


def test_parts_of_a_hierarchy():
    """What an inner group holds together is what one rank of the outer group would hold."""
    for lengths, uniform in (([48], True), ([48, 96], False)):
        for inner, outer in ((2, 2), (3, 2), (2, 4)):
            sequences = make_sequences(lengths, uniform)
            for o, i in itertools.product(range(outer), range(inner)):
                expected = zigzag_rows(lengths, inner * outer, o * inner + i)
                held = zigzag_rows(lengths, outer, o)[sequences.part(outer).rows(inner, i).own_rows]
                assert torch.equal(held, expected)


def test_zigzag_length_refused():
    with pytest.raises(ValueError, match=r"multiple of 2 \* context_parallel_size = 4, got 6"):
        check_zigzag(6, 2, "the sequence length")


@pytest.mark.parametrize("kv_heads, number, sizes", [(16, 5, [2, 4, 4, 4, 2]), (8, 5, [1, 2, 2, 2, 1]),
                                                     (8, 3, [1, 6, 1]), (4, 4, [1] * 4), (5, 2, [3, 2]), (3, 1, [3]),
                                                     (12, 4, [1, 5, 5, 1]), (1, 1, [1])])
def test_head_groups(kv_heads, number, sizes):
    groups = split_heads(2 * kv_heads, kv_heads, number)
    assert [kv.stop - kv.start for _, kv in groups] == sizes
    assert all((q.start, q.stop) == (2 * kv.start, 2 * kv.stop) for q, kv in groups)
    assert [kv.start for _, kv in groups] == [0, *(kv.stop for _, kv in groups)][:-1]


def test_number_of_groups():
    little, much = 1 << 20, 1 << 29
    assert number_of_groups(9, 4, little, little) == 4
    assert number_of_groups(None, 8, little, little) == 1, "little work: one group"
    assert number_of_groups(None, 8, much, much) == 4
    assert number_of_groups(None, 4, much, much) == 3 and number_of_groups(None, 4, MUCH_BYTES, much) == 4
    assert number_of_groups(None, 8, much, 7 * MOST_BYTES) == 7, "memory asks for more"


@pytest.mark.parametrize("dtype, d", [(torch.bfloat16, 16), (torch.bfloat16, 4), (torch.float64, 6),
                                      (torch.float32, 3)])
def test_copy_rows(dtype, d):
    """Slices of heads, aligned and not, to and from."""
    x = torch.randn(5, 6, d).to(dtype)
    for heads, wanted in itertools.product((slice(0, 3), slice(2, 5)), (slice(1, 4), slice(3, 6))):
        out = torch.zeros_like(x)
        copy_rows(out[1:, wanted].transpose(0, 1), x[:4, heads].transpose(0, 1))
        expected = torch.zeros_like(x)
        expected[1:, wanted] = x[:4, heads]
        assert torch.equal(out, expected)


def whole_inputs(case):
    _, lengths, _, _, _, heads, kv_heads, d, dv, _, dtype = case
    generator = torch.Generator().manual_seed(5)
    total = sum(lengths)
    shapes = ((total, heads, d), (total, kv_heads, d), (total, kv_heads, dv), (total, heads, dv))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def single_rank(case):
    """o, selected, means and gradients of one rank."""
    _, lengths, _, chunk_size, topk, *_ = case
    q, k, v, do = whole_inputs(case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    segments = Segments.from_cu_seqlens(cu_seqlens_of(lengths), max(lengths), chunk_size)
    o = moba_attention(q, k, v, segments, topk, backend="reference")
    grads = torch.autograd.grad(o, leaves, do)
    means = reference.chunk_means(k.detach(), segments)
    earlier = min(topk - 1, (max(lengths) - 1) // chunk_size)
    selected = reference.gate(q.detach(), means, segments, earlier + 1)
    return o.detach(), selected, means, grads


def stage_by_stage(function, *args, workspace_mib=None, event=None, **named):
    """As the ``call`` of stages, each of which is then a call of its own."""
    result = function(*args, **named)
    if event is not None:
        event.record()
    return result


class RecordedGate:
    """Collects what the gate was given and chose, group of heads by group of heads."""

    def __init__(self, stages=reference):
        self._stages = stages

    def __enter__(self):
        self.means, self.selected, self._gate = [], [], self._stages.gate
        self._call, self._stages.call = self._stages.call, stage_by_stage  # whose stages see tensors

        def gate(q, means, *args):
            self.means.append(means)
            self.selected.append(self._gate(q, means, *args))
            return self.selected[-1]

        self._stages.gate = gate
        return self

    def __exit__(self, *_):
        self._stages.gate, self._stages.call = self._gate, self._call


def selecting_rows_and_heads(lengths, comm_type, group, heads):
    """Global rows and heads whose chunks this rank selects."""
    if comm_type in ("all_gather", "selective"):
        return zigzag_rows(lengths, group.size(), dist.get_rank(group)), slice(None)
    inner, outer = (group, None) if comm_type == "a2a" else group
    part = heads // inner.size()
    mine = slice(dist.get_rank(inner) * part, (dist.get_rank(inner) + 1) * part)
    rows = torch.arange(sum(lengths)) if outer is None else zigzag_rows(lengths, outer.size(), dist.get_rank(outer))
    return rows, mine


def compare(case, expected, comm_type, group, rows):
    """Runs one case on this rank; returns relative errors of o, dq, dk, dv."""
    name, lengths, uniform, chunk_size, topk, heads, kv_heads, *_, head_groups, _ = case
    o, selected, means, grads = expected
    q, k, v, do = whole_inputs(case)
    # strided views, as of a fused projection
    views = [torch.cat((x[rows], x[rows]), dim=2)[:, :, :x.shape[2]].requires_grad_() for x in (q, k, v)]
    with RecordedGate() as recorded:
        got = context_parallel_attention(*views, make_sequences(lengths, uniform), chunk_size, topk, group,
                                         comm_type=comm_type, head_groups=head_groups, backend="reference")
    got_grads = torch.autograd.grad(got, views, do[rows])
    if max(lengths) > topk * chunk_size:
        chosen_rows, chosen_heads = selecting_rows_and_heads(lengths, comm_type, group, heads)
        got_selected = torch.cat(recorded.selected, 1)
        assert torch.equal(got_selected.sort(2)[0], selected[chosen_rows][:, chosen_heads].sort(2)[0]), \
            f"{name}, {comm_type}: selection differs"
        kv_part = [h * kv_heads // heads for h in range(heads)][chosen_heads]
        got_means = torch.cat(recorded.means, 1)
        wanted = means[:, sorted(set(kv_part))]
        used = got_means.shape[0]  # means that travel leave a row out that no chunk has
        assert (used < wanted.shape[0]) == ((name, comm_type) == ("aligned_groups", "a2a")), "the means did not travel"
        assert torch.equal(got_means, wanted[:used]) and not wanted[used:].any(), f"{name}, {comm_type}: chunk means"
    else:
        assert not recorded.selected, "there is nothing to choose"
    return [((a - b).double().norm() / b.double().norm()).item()
            for a, b in zip((got, *got_grads), (o[rows], *(g[rows] for g in grads)))]


def given_chunks(case):
    """Lists of heads and of kv heads with whatever numbers, and what one rank makes of them: o and gradients."""
    _, lengths, _, chunk_size, _, heads, kv_heads, *_ = case
    q, k, v, do = whole_inputs(case)
    segments = Segments.from_cu_seqlens(cu_seqlens_of(lengths), max(lengths), chunk_size)
    results = {}
    for lists in {heads, kv_heads}:
        selected = torch.randint(-2, segments.num_chunks(sum(lengths)) + 1, (sum(lengths), lists, 3), dtype=torch.int32,
                                 generator=torch.Generator().manual_seed(lists))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = sparse_attention(*leaves, selected, segments, backend="reference")
        results[lists] = selected, o.detach(), torch.autograd.grad(o, leaves, do)
    return results


def compare_given(case, expected, comm_type, group, rows):
    """As :func:`compare`, of given chunks, by how many lists there are; the gate does not run."""
    _, lengths, uniform, chunk_size, topk, heads, kv_heads, *_, head_groups, _ = case
    q, k, v, do = whole_inputs(case)
    errors = {}
    for lists, (selected, o, grads) in expected.items():
        try:
            check_groups(group, comm_type, heads, kv_heads, "head" if lists == heads else "group")
        except ValueError:
            continue
        leaves = [x[rows].requires_grad_() for x in (q, k, v)]
        with RecordedGate() as recorded:
            got = context_parallel_attention(*leaves, make_sequences(lengths, uniform), chunk_size, topk, group,
                                             comm_type=comm_type, head_groups=head_groups, backend="reference",
                                             selected=selected[rows])
        got_grads = torch.autograd.grad(got, leaves, do[rows])
        assert not recorded.selected, "the gate ran"
        errors[lists] = [((a - b).double().norm() / b.double().norm()).item()
                         for a, b in zip((got, *got_grads), (o[rows], *(g[rows] for g in grads)))]
    return errors


def compare_with_single_rank(rank, size):
    """Runs every case on groups of 2, 3 and 4 ranks; returns errors by (case, P, communication type)."""
    errors = {}
    selective.GATHER_SHARE = 2  # rows are picked out although nearly all are chosen
    torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
    expected = {case[0]: single_rank(case) for case in CASES}
    given = {case[0]: given_chunks(case) for case in CASES}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    strided = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    three, four = dist.new_group([0, 1, 2]), dist.new_group([0, 1, 2, 3])
    for case in CASES:
        lengths, heads, kv_heads = case[1], case[5], case[6]
        for group in (pairs[rank // 2], three, four, [pairs[rank // 2], strided[rank % 2]]):
            if group is three and rank == 3:
                continue
            flat = four if isinstance(group, list) else group
            rows = zigzag_rows(lengths, flat.size(), dist.get_rank(flat))
            for comm_type in COMM_TYPES:
                try:
                    check_groups(group, comm_type, heads, kv_heads)
                except (TypeError, ValueError):
                    continue
                if comm_type == "selective" and not case[2]:
                    continue
                key = case[0], flat.size(), comm_type
                errors[key] = compare(case, expected[case[0]], comm_type, group, rows)
                for lists, found in compare_given(case, given[case[0]], comm_type, group, rows).items():
                    errors[(*key, lists)] = found
    return errors


def properties(rank, size):
    """Bytes that travel, and two runs in deterministic mode; on four ranks."""
    results = {}
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(rank)
    q, k, v, do = (torch.randn(16, heads, 8, generator=generator) for heads in (8, 4, 4, 8))
    sequences = Sequences.uniform(64, 1, torch.device("cpu"))
    for comm_type in ("all_gather", "a2a"):
        runs = []
        for _ in range(2):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            with record_waits() as record:
                o = context_parallel_attention(*leaves, sequences, 8, 3, group, comm_type=comm_type, head_groups=2,
                                               deterministic=True, backend="reference")
                runs.append([o, *torch.autograd.grad(o, leaves, do)])
        assert all(torch.equal(a, b) for a, b in zip(*runs)), "not reproducible"
        results[comm_type] = {stage: entry["sent_bytes"] for stage, entry in record.summary().items()}
        assert all(entry["calls"] > 0 and entry["exposed_ms"] >= 0 for entry in record.summary().values())
    results["selective"] = selective_bytes(q, k, v, do, sequences, group)
    with pytest.raises(ValueError, match="cp_comm_type 'selective' needs sequences of one length"):
        context_parallel_attention(q, k, v, make_sequences([64], False), 8, 3, group, comm_type="selective")
    with pytest.raises(ValueError, match="cp_comm_type 'a2a' exchanges heads among 4 ranks: key's heads must be a "
                                         "multiple of 4, or divide it with .* got 9 query and 3 key heads"):
        context_parallel_attention(torch.ones(16, 9, 8), torch.ones(16, 3, 8), torch.ones(16, 3, 8), sequences, 8, 3,
                                   group, comm_type="a2a")
    with pytest.raises(ValueError, match="group must be two groups, inner and outer, .* got ProcessGroup"):
        check_groups(group, "a2a+all_gather", 8, 4)
    with pytest.raises(TypeError, match="group must be one group for cp_comm_type 'all_gather', got 2"):
        check_groups([group, group], "all_gather", 8, 4)
    with pytest.raises(ValueError, match=r"q, k and v must have the 16 rows of one of 4 ranks, got \(15, 16, 16\)"):
        context_parallel_attention(q[1:], k, v, sequences, 8, 3, group)
    with pytest.raises(ValueError, match="head_groups must be at least 1, got 0"):
        context_parallel_attention(q, k, v, sequences, 8, 3, group, head_groups=0)
    return results


def selective_bytes(q, k, v, do, sequences, group):
    """Bytes sent where all queries choose the first chunk, and where they choose everything; the former checked."""
    selective.GATHER_SHARE = 0.5
    rank, sink = dist.get_rank(group), torch.ones(8)
    k, q = k.clone(), q * 0.1 + sink
    k[:8] += sink if rank == 0 else 0  # the first chunk is the first piece of rank 0
    sent = {}
    for name, topk in (("sink", 2), ("everything", 7)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with record_waits() as record:
            o = context_parallel_attention(*leaves, sequences, 8, topk, group, comm_type="selective", head_groups=2,
                                           backend="reference")
            grads = torch.autograd.grad(o, leaves, do)
        sent[name] = {stage: entry["sent_bytes"] for stage, entry in record.summary().items()}
        again = [x.clone().requires_grad_() for x in (q, k, v)]
        gathered = context_parallel_attention(*again, sequences, 8, topk, group, backend="reference")
        for a, b in zip((o, *grads), (gathered, *torch.autograd.grad(gathered, again, do))):
            assert ((a - b).norm() / b.norm()).item() <= 1e-6
    runs, fills = [], torch.utils.deterministic
    torch.use_deterministic_algorithms(True)
    for fills.fill_uninitialized_memory in (False, True):  # rows that did not come decide nothing
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = context_parallel_attention(*leaves, sequences, 8, 2, group, comm_type="selective", backend="torch")
        runs.append([o, *torch.autograd.grad(o, leaves, do)])
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs)), "not reproducible"
    return sent


def bad_input_everywhere(rank, size):
    """Rank 1 alone gets bad input; returns each rank's error text and how long it took."""
    texts = []
    for problem in ("raises", "other shape", "other dtype"):
        begin = time.monotonic()
        try:
            with CollectiveCheck(dist.group.WORLD) as collective:
                if rank == 1 and problem == "raises":
                    raise ValueError("the sequence length must be even")
                wrong = rank == 1 and problem != "raises"
                collective.signature = f"query (8, 2), {problem if wrong else 'as agreed'}"
            texts.append(None)
        except ValueError as error:
            assert time.monotonic() - begin < 60
            texts.append(str(error))
    with CollectiveCheck(dist.group.WORLD) as collective:  # the group is still usable
        collective.signature = "fine"
    return texts


def everything(rank, size):
    return compare_with_single_rank(rank, size), bad_input_everywhere(rank, size), properties(rank, size)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"))


# The arithmetic is the same but for the order of a few fp32 (fp64) additions of dk and dv over ranks; bf16 rounds o,
# dq, dk and dv once in either case, so a value may differ by one unit in the last place, 2^-8.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-3}


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_equals_single_rank(results, case):
    errors = {key: value for result, *_ in results for key, value in result.items() if key[0] == case[0]}
    ran = {key[1:] for key in errors}
    assert ran >= {(size, "all_gather") for size in (2, 3, 4)} | {(2, "a2a")}
    assert ran >= {(size, "all_gather", lists) for size in (2, 3, 4) for lists in case[5:7]} | {(2, "a2a", case[5])}
    assert not case[2] or {(3, "selective"), (3, "selective", case[5])} <= ran
    if case[6] in (1, 12):
        assert ran >= {(3, "a2a"), (4, "a2a"), (4, "a2a+all_gather")}
    for key, values in errors.items():
        assert max(values) <= TOLERANCE[case[-1]], (key, values)


def test_bytes_sent(results):
    """Counted against what should travel: 16 rows of 8 floats a head, 8 heads, 4 kv heads, 4 ranks."""
    row = 16 * 8 * 4
    blocks = 2 * 4 * 8 * 4  # two whole chunks of a block each, or its rows: never more than the keys
    for _, _, sent in results:
        gathered = 3 * 2 * 4 * row
        assert sent["all_gather"] == {"fwd sums": sent["all_gather"]["fwd sums"], "fwd gather": gathered,
                                      "bwd gather": gathered, "bwd reduce": gathered}
        assert blocks <= sent["all_gather"]["fwd sums"] <= gathered // 2
        inside, outside = 3 * (2 + 1 + 1) * row, 3 * 2 * row
        assert sent["a2a"] == {"fwd exchange in": inside, "fwd exchange out": outside, "bwd exchange in": outside,
                               "bwd exchange out": inside}


def test_selective_sends_what_was_chosen(results):
    """A sink goes from its owner to all others, and its gradients back; nothing else does."""
    row = 8 * 4
    sink = 8 * 4 * row * 2  # rows of a chunk, kv heads, K and V
    for rank, (_, _, sent) in enumerate(results):
        sent = sent["selective"]
        assert sent["sink"]["fwd gather"] == sent["sink"]["bwd gather"] == (3 * sink if rank == 0 else 0)
        assert sent["sink"]["bwd reduce"] == (0 if rank == 0 else sink)
        whole = 3 * 2 * 4 * 16 * row
        assert [sent["everything"][stage] for stage in ("fwd gather", "bwd gather", "bwd reduce")] == [whole] * 3


def test_bad_input_raises_on_every_rank(results):
    for texts in zip(*(texts for _, texts, _ in results)):
        assert texts[0] is not None and len(set(texts)) == 1, texts
    raised, shape, _ = results[0][1]
    assert raised == "context parallel rank 1: the sequence length must be even"
    assert "rank 0: query (8, 2), as agreed; rank 1: query (8, 2), other shape" in shape


@pytest.mark.parametrize("given, expected", [("allgather", "all_gather"), ("a2a+allgather", "a2a+all_gather"),
                                             *((name, name) for name in COMM_TYPES)])
def test_comm_types(given, expected):
    assert canonical_comm_type(given) == expected


@pytest.mark.parametrize("given", ["p2p", "a2a+p2p", "ring", 3])
def test_comm_type_refused(given):
    with pytest.raises(ValueError, match=r"must be one of all_gather, a2a, a2a\+all_gather, selective .* got"):
        canonical_comm_type(given)


@pytest.mark.parametrize("chunk_size, scale, dense", [(64, 0.3, True), (16, 0.3, False), (64, 0.0, False),
                                                      (64, -0.3, False)])
def test_dense_kernels_take_whole_sequences_alone(chunk_size, scale, dense, monkeypatch):
    """With topk 1 and shorter chunks nothing is chosen either, and attention is not causal over the sequence. Other
    implementations scale scores that they have masked with -inf."""
    taken = []
    monkeypatch.setattr(pipeline, "dense_causal", lambda *_, **__: taken.append("forward"))
    monkeypatch.setattr(pipeline, "dense_causal_bwd", lambda *_, **__: taken.append("backward"))
    segments = Segments.from_cu_seqlens(cu_seqlens_of([64, 40]), 64, chunk_size, exact=True)
    local = LocalAttention(pipeline.Pipeline(reference, 1, scale, False, True), segments)
    q, k, v, do = (torch.randn(104, 2, 8, dtype=torch.float64) for _ in range(4))
    o, saved = local.forward(q, k, v)
    local.backward(do, saved, torch.float64)
    assert taken == (["forward", "backward"] if dense else [])
    expected = moba_attention(q, k, v, segments, 1, softmax_scale=scale, backend="reference")
    torch.testing.assert_close(o, expected)
