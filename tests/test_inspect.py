"""Looking at the router: statistics against brute force, what watching costs, traces, pictures and the page."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cases import Case
from moba_megatron import MoBAConfig, MoBACoreAttention
from moba_megatron.inspect import statistics
from moba_megatron.inspect.choices import look, watching
from moba_megatron.inspect.router_log import RouterLog, as_record, as_scalars, summary
from moba_megatron.inspect.trace import RoutingTrace, load_trace, save_trace

CASES = [
    pytest.param(Case((80,), 8, 3, heads=4, kv_heads=2), id="one sequence"),
    pytest.param(Case((61, 7, 0, 45), 8, 2, heads=2), id="packed, short and empty ones"),
    pytest.param(Case((64,), 4, 5, heads=2, data="ties"), id="ties"),
    pytest.param(Case((40, 40), 10, 3, heads=2), id="two of one length"),
]


def choices_of(case, dtype=torch.float64):
    q, k, *_ = case.tensors(dtype)
    module = SimpleNamespace(layer_number=1, softmax_scale=case.scale,
                             moba_config=MoBAConfig(chunk_size=case.chunk_size, topk=case.topk))
    return look(module, q, k, case.segments())


def brute_force(case, choices) -> dict[str, list[float]]:
    """The statistics by their definitions, query by query."""
    earlier, size = case.topk - 1, case.chunk_size
    chosen_sets = case.chunk_numbers(choices.selected, own=False)
    result = {name: [] for name in statistics.NAMES}
    for head in range(case.heads):
        chosen, even, number, first, recall, best = {}, {}, 0, 0, 0.0, 0.0
        start = 0
        for sequence, length in enumerate(case.lengths):
            keys = choices.k[start:start + length, head * case.kv_heads // case.heads].numpy()
            for t in range(length):
                own = t // size
                if own < case.topk:
                    continue
                number += 1
                mine = chosen_sets[sequence][t][head]
                first += 0 in mine
                for j in range(own):
                    even[sequence, j] = even.get((sequence, j), 0) + earlier / own
                    chosen[sequence, j] = chosen.get((sequence, j), 0) + (j in mine)
                score = keys[:t + 1] @ choices.q[start + t, head].numpy() * case.scale
                weight = np.exp(score - score.max())
                mass = np.add.reduceat(weight / weight.sum(), np.arange(0, t + 1, size))
                recall += mass[own] + mass[list(mine)].sum()
                best += mass[own] + np.sort(mass[:own])[-earlier:].sum()
            start += length
        load = np.array([chosen[chunk] / even[chunk] for chunk in even])
        p = load / load.sum()
        values = (first / number, load.max() / (sum(chosen.values()) / sum(even.values())),
                  -sum(x * math.log(x) for x in p if x) / math.log(len(p)), recall / number, best / number)
        for name, value in zip(statistics.NAMES, values):
            result[name].append(value)
    return result


def statistics_of(case, samples=10 ** 6, dtype=torch.float64):
    choices = choices_of(case, dtype)
    values = statistics.layer_statistics(statistics.tally(choices, samples))
    return choices, dict(zip(statistics.NAMES, values.T.tolist()))


class TestStatistics:
    @pytest.mark.parametrize("case", CASES)
    def test_are_what_their_definitions_say(self, case):
        choices, values = statistics_of(case)
        expected = brute_force(case, choices)
        for name in statistics.NAMES:
            assert values[name] == pytest.approx(expected[name], rel=1e-9), name

    @pytest.mark.parametrize("case", CASES)
    def test_stay_within_their_bounds(self, case):
        _, values = statistics_of(case)
        for head in range(case.heads):
            first, imbalance, entropy, recall, best = (values[name][head] for name in statistics.NAMES)
            assert 0 <= first <= 1 <= imbalance and 0 < entropy <= 1
            assert 0 < recall <= best <= 1 + 1e-12

    def test_half_precision_is_near(self):
        case = Case((320,), 16, 3, heads=2, head_dim=16)
        exact, rounded = (statistics_of(case, dtype=dtype)[1] for dtype in (torch.float64, torch.bfloat16))
        assert rounded["recall"] == pytest.approx(exact["recall"], rel=1e-2)

    def test_a_sample_estimates_the_recall_of_all(self):
        case = Case((640,), 8, 3, heads=2, head_dim=8)
        choices = choices_of(case)
        whole, sample = (statistics.layer_statistics(statistics.tally(choices, n)) for n in (640, 200))
        assert torch.equal(whole[:, :3], sample[:, :3])
        assert not torch.equal(whole[:, 3], sample[:, 3])
        # A query's recall lies in 0..1: its deviation is at most 1/2, that of a mean of 200 at most 0.036.
        assert (whole[:, 3:] - sample[:, 3:]).abs().max() < 3 * 0.036

    def test_sampled_queries_are_spread_over_those_with_a_choice(self):
        has_choice = torch.arange(100) >= 40
        rows, weight = statistics._sample(has_choice, 6)
        assert rows.tolist() == [45, 55, 65, 75, 85, 95] and weight.tolist() == [1.0] * 6

    def test_all_attention_on_the_chosen_chunks_is_recall_one(self):
        # Keys of chunk 0 match every query, keys of others oppose it, the own chunk's too.
        case = Case((64,), 8, 2, heads=1)
        q, k = torch.ones(64, 1, 4), -30 * torch.ones(64, 1, 4)
        k[:8] = 30
        module = SimpleNamespace(layer_number=1, softmax_scale=None, moba_config=MoBAConfig(chunk_size=8, topk=2))
        seen = statistics.layer_statistics(statistics.tally(look(module, q, k, case.segments()), 64))
        values = dict(zip(statistics.NAMES, seen[0].tolist()))
        assert values["recall"] == values["best_recall"] == pytest.approx(1, abs=1e-6)
        assert values["first_chunk"] == 1 and values["entropy"] == 0
        # chunks 2..7 choose: 48 choices on chunk 0, whose even share is 8 * (1/2 + ... + 1/7)
        assert values["imbalance"] == pytest.approx(48 / (8 * sum(1 / i for i in range(2, 8))))

    @pytest.mark.parametrize("topk, lengths", [(1, (64,)), (8, (64,)), (9, (30, 64))])
    def test_without_a_choice_there_is_nothing_to_see(self, topk, lengths):
        assert choices_of(Case(lengths, 8, topk)) is None

    def test_short_sequences_beside_a_bound_that_is_too_large(self):
        case = Case((16, 16), 8, 3)
        q, k, *_ = case.tensors()
        segments = type(case.segments()).from_cu_seqlens(case.cu_seqlens(), 100, 8)
        module = SimpleNamespace(layer_number=1, softmax_scale=None, moba_config=MoBAConfig(chunk_size=8, topk=3))
        values = statistics.layer_statistics(statistics.tally(look(module, q, k, segments), 8))
        assert values.isnan().all()
