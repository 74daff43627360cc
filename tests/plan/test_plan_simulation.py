"""The simulation of what context parallelism moves: expected values against counts on selections that were drawn."""
import json

import numpy
import pytest
import torch
from ranks import run_ranks

from benchmarks.__main__ import main
from benchmarks.distributed import Ranks
from benchmarks.planner.measure import FETCH, Job, counted_bytes, make_inputs, measure_way, one_rank
from benchmarks.planner.routing import SYNTHETIC, inclusion_of, of_trace, sink, uniform
from benchmarks.planner.simulate import (
    Layer,
    RankTraffic,
    chunks_travel,
    exchanged,
    gathered,
    limits,
    sweep,
    traffic_of_selection,
    zigzag_tokens,
)
from moba_megatron.inspect.trace import RoutingTrace, save_trace
from moba_megatron.plan.attention_cost import stored
from moba_megatron.plan.hardware import find_card

SMALL = Layer(chunk_size=2, topk=2, heads=4, kv_heads=2, head_dim=16)
KEY_ROW = 2 * 16 * 2
"""Bytes of one key and value of one kv head of SMALL."""


def draw(layer, chunks, seed):
    """A selection ``[T, H, topk - 1]`` that is uniform over earlier chunks."""
    generator = numpy.random.default_rng(seed)
    selected = numpy.full((chunks * layer.chunk_size, layer.heads, layer.topk - 1), -1)
    for token in range(len(selected)):
        earlier = token // layer.chunk_size
        for head in range(layer.heads):
            chosen = generator.permutation(earlier)[:layer.topk - 1]
            selected[token, head, :len(chosen)] = chosen
    return selected


def rank_of_tokens(chunks, layer, ranks):
    pieces = numpy.arange(chunks * layer.chunk_size) // (chunks * layer.chunk_size // (2 * ranks))
    return numpy.where(pieces < ranks, pieces, 2 * ranks - 1 - pieces)


@pytest.mark.parametrize("make", SYNTHETIC)
def test_rows_of_a_routing_add_up_to_the_choices(make):
    routing = make(40, 5)
    assert routing.inclusion.sum(1) == pytest.approx(numpy.minimum(numpy.arange(40), 4))
    assert not numpy.triu(routing.inclusion).any() and routing.inclusion.max() <= 1


def test_uniform_and_sink():
    assert uniform(40, 5).inclusion[30, :30] == pytest.approx(numpy.full(30, 4 / 30))
    assert (sink(40, 5).inclusion[5:, 0] > 0.99).all()
    weights = numpy.ones((8, 8))
    weights[:, 2] = 3.0
    missed = 1 - inclusion_of(weights, 3)[7]
    assert missed[2] == pytest.approx(missed[0] ** 3)


def test_zigzag_cuts_chunks():
    assert zigzag_tokens(3, 4, 2).tolist() == [[3, 0, 3], [1, 4, 1]]  # pieces of three: 0 3 | 1 2
    for ranks in (2, 4, 16):
        tokens = zigzag_tokens(32, 8, ranks)
        assert (tokens.sum(0) == 8).all() and (tokens.sum(1) == 32 * 8 / ranks).all()
    with pytest.raises(ValueError, match="multiple of 2 \\* ranks = 10"):
        zigzag_tokens(3, 4, 5)


def test_counts_by_hand():
    """Two ranks, four chunks of two tokens, one head: rank 0 has chunks 0 and 3, rank 1 the others."""
    selected = numpy.array([-1, -1, 0, 0, 1, -1, 2, 0]).reshape(8, 1, 1)
    rank = rank_of_tokens(4, Layer(2, 2, 1, 1, 8), 2)
    assert rank.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    found = traffic_of_selection(selected, rank, rank, 2, 1, 2)
    assert found.tolist() == [2, 2]  # chunk 2 to rank 0; chunk 0 to rank 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_expected_bytes_are_what_drawn_selections_move(ranks):
    chunks, seeds = 48, 12
    rank = rank_of_tokens(chunks, SMALL, ranks)
    found = [traffic_of_selection(draw(SMALL, chunks, seed), rank, rank, 2, 2, ranks) for seed in range(seeds)]
    keys = numpy.mean(found, 0) * KEY_ROW
    assert chunks_travel(SMALL, uniform(chunks, 2), ranks).forward == pytest.approx(keys, rel=0.1, abs=KEY_ROW)


def test_what_does_not_depend_on_routing():
    layer = Layer(16, 4, 8, 4, 32)
    kv, q = 64 * 16 * 4 * 2 * 32 * 2, 64 * 16 * 8 * 32 * 2
    assert gathered(layer, 64, 4).forward.tolist() == [kv * 3 / 4] * 4
    assert gathered(layer, 64, 4).backward.tolist() == [3 * kv * 3 / 4] * 4
    assert exchanged(layer, 64, 4).forward.tolist() == [(2 * q + kv) / 4 * 3 / 4] * 4
    with pytest.raises(ValueError, match="8 heads and 16 ranks"):
        exchanged(layer, 64, 16)


@pytest.mark.parametrize("make", SYNTHETIC)
def test_chunks_move_less_than_a_gather_and_take_longer_over_a_network(make):
    """A gather enters a machine once; chunks go to each rank that wants them."""
    found = sweep(Layer(256, 4, 8, 4, 64), [make(256, 4)], [64], find_card("h100"), stored())
    assert [row["comm"] for row in found] == ["all_gather", "chunks travel"]
    gather, chunks = found
    assert 0.5 < chunks["union"] <= 0.75, "of what is earlier"
    assert chunks["forward_bytes"] < gather["forward_bytes"] and chunks["efficiency"] < gather["efficiency"]


def measured_bytes(rank, size):
    """What plan-measure says of chunks that are fetched: (sent, counted) by all ranks, for each routing."""
    job, found = Job(tokens=384, chunk_size=16, topk=3, heads=4, kv_heads=2, dim=16, backend="reference"), []
    for routing in ("local", "sink"):
        inputs = make_inputs(job, routing, torch.device("cpu"))
        expected, selected = one_rank(job, inputs)
        row = measure_way(FETCH, job, inputs, expected, Ranks(rank, size, torch.device("cpu")), repeats=1)
        assert max(row["errors"].values()) < 1e-5
        found.append((sum(row["sent_bytes"]), sum(counted_bytes(FETCH, job, selected, size, 4))))
    return found


def test_measured_bytes_are_counted_bytes(tmp_path):
    for found in run_ranks(measured_bytes, 3, tmp_path):
        assert all(sent == counted > 0 for sent, counted in found) and found[0] != found[1]


def test_a_trace_keeps_its_routing_when_it_is_stretched(tmp_path):
    chunks, topk, queries = 32, 4, 64
    made = sink(chunks, topk)
    counts = numpy.rint(made.inclusion * queries).astype(numpy.int64)[None].repeat(4, 0)
    trace = RoutingTrace.from_counts(chunk_size=queries, topk=topk, seq_length=chunks * queries, num_kv_heads=2,
                                     counts={3: counts})
    routing = of_trace(trace, 3, 128, topk)
    assert routing.chunks == 128 and routing.name == "layer 3"
    assert routing.inclusion.sum(1) == pytest.approx(numpy.minimum(numpy.arange(128), topk - 1))
    assert routing.inclusion[8:, 0].mean() > 0.95
    assert routing.inclusion[100, 30:60].mean() == pytest.approx(2 / 99, rel=0.4)
    assert routing.coherence >= 1
    save_trace(trace, tmp_path / "trace.npz")
    assert main(["plan-simulate", str(tmp_path / "out"), "--seq", "32K", "--chunk-size", "1024", "--topk", "4",
                 "--trace", str(tmp_path / "trace.npz")]) == 0
    result = json.loads((tmp_path / "out" / "exchange.json").read_text())
    assert {row["routing"] for row in result["rows"]} == {"any", "uniform", "local", "sink", "layer 3"}
    assert result["simulated"] and (tmp_path / "out" / "exchange_0.03125M.png").stat().st_size > 1000


def test_the_limit_is_the_last_efficient_number_of_ranks():
    rows = [{"tokens": 1, "comm": "a", "routing": "x", "ranks": p, "efficiency": e}
            for p, e in ((8, 1.0), (16, 0.5), (32, 0.4))]
    assert limits(rows) == [{"tokens": 1, "comm": "a", "routing": "x", "ranks": 16}]


def test_worst_is_the_busiest_rank():
    assert RankTraffic(numpy.array([1.0, 5.0]), numpy.array([2.0, 0.0])).worst == 5.0
