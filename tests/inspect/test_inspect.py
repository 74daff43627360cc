"""Looking at the router: statistics against brute force, what watching costs, traces, pictures and the page."""
import argparse
import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import Case

from moba_megatron import MoBAConfig
from moba_megatron.inspect import __main__ as command
from moba_megatron.inspect import picture, statistics
from moba_megatron.inspect.choices import look, watching
from moba_megatron.inspect.recorder import TraceRecorder
from moba_megatron.inspect.report import as_record, as_scalars, as_table, summary
from moba_megatron.inspect.router_log import RouterLog
from moba_megatron.inspect.trace import RoutingTrace, load_trace, save_trace
from moba_megatron.megatron import core_attention, patching
from moba_megatron.ops import get_stages
from tests.megatron.test_core_attention import fused_qkv, make_config, make_core

CASES = [
    pytest.param(Case((80,), 8, 3, heads=4, kv_heads=2), id="one sequence"),
    pytest.param(Case((61, 7, 0, 45), 8, 2, heads=2), id="packed, short and empty ones"),
    pytest.param(Case((64,), 4, 5, heads=2, data="ties"), id="ties"),
    pytest.param(Case((40, 40), 10, 3, heads=2), id="two of one length"),
]


def choices_of(case, dtype=torch.float64):
    q, k, *_ = case.tensors(dtype)
    module = SimpleNamespace(layer_number=1, selector=None, softmax_scale=case.scale,
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


def values_of(choices, samples):
    """The statistics of one layer, ``[H, len(NAMES)]``."""
    places = statistics.Places.of(choices, samples)
    total = statistics.sums([statistics.tally(choices, places)])
    return statistics.layer_statistics(total, places.first, choices.topk, 1, choices.num_chunks)[0]


def statistics_of(case, samples=10 ** 6, dtype=torch.float64):
    choices = choices_of(case, dtype)
    values = values_of(choices, samples)
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
        whole, sample = (values_of(choices, n) for n in (640, 200))
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
        module = SimpleNamespace(layer_number=1, selector=None, softmax_scale=None, moba_config=MoBAConfig(8, 2))
        seen = values_of(look(module, q, k, case.segments()), 64)
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
        module = SimpleNamespace(layer_number=1, selector=None, softmax_scale=None, moba_config=MoBAConfig(8, 3))
        values = values_of(look(module, q, k, segments), 8)
        assert values.isnan().all()


class Layers(torch.nn.Module):
    """Core attention of three layers, the last dense, on given q, k and v."""

    def __init__(self):
        super().__init__()
        moba = MoBAConfig(chunk_size=8, topk=3, full_attention_layers="3")
        self.layers = torch.nn.ModuleList(make_core(moba, number) for number in (1, 2, 3))

    def forward(self, *qkv):
        return [layer(*qkv, None) for layer in self.layers]


def router_log(interval):
    config = make_config()
    return RouterLog(interval, config.num_layers, config.num_attention_heads, samples=10 ** 6)


class TestWatching:
    def test_off_nobody_is_called_and_no_gate_runs_twice(self, monkeypatch):
        gates = []
        stages = get_stages("auto", torch.device("cpu"))
        monkeypatch.setattr(stages, "gate", lambda *args, gate=stages.gate: gates.append(1) or gate(*args))
        layers, qkv, log = Layers(), fused_qkv(80, 1), router_log(5)
        for step, expected in ((1, 2), (4, 2), (5, 4), (6, 2)):  # two layers have a gate
            gates.clear()
            with log.watch(step):
                assert (core_attention._observer is not None) == (step == 5)
                layers(*qkv)
            assert len(gates) == expected
            assert (log.report is not None) == (step == 5)
        assert core_attention._observer is None

    def test_results_and_gradients_stay(self):
        qkv = fused_qkv(80, 2)
        with router_log(1).watch(1):
            watched = Layers()(*qkv)
        assert all(torch.equal(a, b) for a, b in zip(watched, Layers()(*qkv)))
        assert watched[0].grad_fn is not None

    def test_is_over_after_an_error(self):
        with pytest.raises(KeyError), router_log(1).watch(1):
            raise KeyError
        assert core_attention._observer is None

    def test_two_may_watch(self):
        seen = []
        with watching(lambda *args: seen.append("outer")), watching(lambda *args: seen.append("inner")):
            Layers()(*fused_qkv(80, 1))
        assert seen == ["outer", "inner"] * 2 and core_attention._observer is None

    def test_first_micro_batch_of_sparse_layers_counts(self):
        log, first = router_log(1), fused_qkv(80, 2)
        with log.watch(1):
            Layers()(*first)
        alone = log.report
        with log.watch(2):
            Layers()(*first)
            Layers()(*fused_qkv(80, 2, seed=2))
        assert sorted(alone) == [1, 2] and log.report == alone
        assert all(len(values) == 4 for heads in alone.values() for values in heads.values())

    def test_report_is_that_of_the_tally(self):
        log, (q, k, v) = router_log(1), fused_qkv(80, 1)
        with log.watch(1):
            Layers()(q, k, v)
        case = Case((80,), 8, 3, heads=4, kv_heads=2, head_dim=8)
        module = SimpleNamespace(layer_number=1, selector=None, softmax_scale=None, moba_config=MoBAConfig(8, 3))
        choices = look(module, q[:, 0], k[:, 0], case.segments())
        expected = brute_force(case, choices)
        for name in statistics.NAMES:
            assert log.report[1][name] == pytest.approx(expected[name], rel=1e-9)

    def test_layers_share_places_only_where_sequences_are_the_same(self, monkeypatch):
        made, of = [], statistics.Places.of
        monkeypatch.setattr(statistics.Places, "of", lambda *args: made.append(1) or of(*args))
        long, short = Case((80,), 8, 3, heads=4, kv_heads=2), Case((41, 39), 8, 3, heads=4, kv_heads=2)
        segments = [long.segments(), short.segments()]
        again = dataclasses.replace(segments[0])  # of another object, with the same sequences
        log, expected = RouterLog(1, 4, 4, samples=10 ** 6), {}
        with log.watch(1):
            for layer, case, places in ((1, long, segments[0]), (2, long, again), (3, short, segments[1]),
                                        (4, long, segments[0])):
                q, k, *_ = dataclasses.replace(case, seed=layer).tensors(torch.float64)
                module = SimpleNamespace(layer_number=layer, selector=None, softmax_scale=case.scale,
                                         moba_config=MoBAConfig(chunk_size=8, topk=3))
                core_attention._observer(module, q, k, places)
                expected[layer] = brute_force(case, look(module, q, k, places))
        assert len(made) == 3
        for layer, values in expected.items():
            for name in statistics.NAMES:
                assert log.report[layer][name] == pytest.approx(values[name], rel=1e-9), (layer, name)

    def test_nothing_to_report(self):
        log = router_log(1)
        with log.watch(1):
            Layers()(*fused_qkv(20, 1))
        assert log.report == {} and as_record({}) == as_scalars({}) == {}
        assert "no query has a choice" in summary(log.report)

    def test_interval_must_be_positive(self):
        with pytest.raises(ValueError, match="interval must be at least 1 step, got 0"):
            RouterLog(0, 1, 1)

    def test_forms_of_a_report(self):
        report = {2: {"recall": [0.25, 0.75]}, 7: {"recall": [1.0, 0.12345678]}}
        record = as_record(report)
        assert json.loads(json.dumps(record)) == record
        assert record["7"] == {"recall": 0.5617, "heads": {"recall": [1.0, 0.1235]}}
        assert as_scalars(report)["router-recall/layer-002"] == 0.5
        assert as_scalars(report)["router/recall"] == pytest.approx((0.5 + 0.56172839) / 2)
        assert summary(report) == "router: recall 0.531"
        assert as_table(report).split() == ["layer", "recall", "2", "0.500", "7", "0.562"]


class TestMegatronLM:
    @pytest.fixture
    def host(self, monkeypatch):
        """What megatron.training has at run time, as far as it is used."""
        parser = patching.moba_arguments(lambda parser: parser)(argparse.ArgumentParser())
        args = parser.parse_args(["--attention", "moba", "--moba-chunk-size", "8", "--moba-topk", "3"])
        args.curr_iteration, args.num_layers, args.num_attention_heads = 0, 4, 4
        written = []
        writer = SimpleNamespace(add_scalar=lambda *values: written.append(values))
        layers = Layers()
        training = SimpleNamespace(train_step=lambda *qkv: layers(*qkv))
        for name, module in (("training", training), ("global_vars", SimpleNamespace(
                _GLOBAL_ARGS=args, _GLOBAL_TENSORBOARD_WRITER=writer))):
            monkeypatch.setitem(sys.modules, f"megatron.training.{name}", module)
        return SimpleNamespace(args=args, training=training, written=written)

    def _set_up(self):
        patching.moba_model_check(lambda: ([], None, None))()

    def test_without_the_flag_the_step_is_megatrons_own(self, host):
        before = host.training.train_step
        self._set_up()
        assert host.training.train_step is before

    def test_every_nth_step_is_logged(self, host, tmp_path, capsys):
        host.args.moba_log_router_interval, host.args.moba_log_router_file = 2, str(tmp_path / "logs" / "router.jsonl")
        for _ in range(2):  # a second call changes nothing
            self._set_up()
        for host.args.curr_iteration in range(5):
            assert len(host.training.train_step(*fused_qkv(80, 1))) == 3
        lines = [json.loads(line) for line in (tmp_path / "logs" / "router.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == [2, 4]
        assert sorted(lines[0]["layers"]) == ["1", "2"]
        assert {step for _, _, step in host.written} == {2, 4}
        assert "router/recall" in {name for name, _, _ in host.written}
        assert capsys.readouterr().out.count("| router: first chunk ") == 2


def random_trace(layers=(2, 5), heads=4, num_chunks=6, sequences=2, last=3):
    """A trace of random choices: chunks of 8, the last of ``last`` tokens, topk 3."""
    generator = np.random.default_rng(0)
    queries = np.array([8] * (num_chunks - 1) + [last]) * sequences
    counts = {}
    for layer in layers:
        table = np.zeros((heads, num_chunks, num_chunks), dtype=np.int64)
        for head, i in np.ndindex(heads, num_chunks):
            for _ in range(queries[i]):
                table[head, i, generator.permutation(i)[:2]] += 1
        counts[layer] = table
    trace = RoutingTrace.from_counts(chunk_size=8, topk=3, seq_length=8 * (num_chunks - 1) + last, num_kv_heads=2,
                                     counts=counts, sequences=sequences, about={"text": "a", "iteration": 3})
    return trace, counts


class TestTrace:
    def test_round_trip(self, tmp_path):
        trace, counts = random_trace()
        save_trace(trace, tmp_path / "deep" / "trace.npz")
        again = load_trace(tmp_path / "deep" / "trace.npz")
        assert again.layers == (2, 5) and again.about == {"text": "a", "iteration": 3}
        for name in ("chunk_size", "topk", "seq_length", "sequences", "num_heads", "num_kv_heads", "num_chunks"):
            assert getattr(again, name) == getattr(trace, name), name
        for layer in again.layers:
            assert np.array_equal(again.counts(layer), counts[layer])

    def test_pairs_shares_and_queries_say_the_same(self):
        trace, counts = random_trace()
        head, row, column, count = trace.pairs(5)
        table = np.zeros_like(counts[5])
        table[head, row, column] = count
        assert np.array_equal(table, counts[5])
        assert trace.queries().tolist() == [16] * 5 + [6]
        shares = trace.shares(5)
        assert (shares[:, range(6), range(6)] == 1).all()
        assert np.allclose(shares.sum(2), [1, 2, 3, 3, 3, 3])

    def test_is_compact(self, tmp_path):
        trace, _ = random_trace(num_chunks=40, last=8)
        save_trace(trace, tmp_path / "trace.npz")
        pairs = 2 * 4 * 40 * 39 / 2
        assert (tmp_path / "trace.npz").stat().st_size < 2 * pairs + 4000  # a byte or so a number, and the names

    def test_recorded_counts_are_the_gates(self):
        case = Case((75, 75), 8, 3, heads=4, kv_heads=2, head_dim=8)
        recorder, (q, k, v) = TraceRecorder(), fused_qkv(75, 2)
        with watching(recorder):
            Layers()(q, k, v)
            Layers()(*fused_qkv(75, 2, seed=2))  # a second micro batch is not recorded
        trace = recorder.trace()
        module = SimpleNamespace(layer_number=1, selector=None, softmax_scale=None, moba_config=MoBAConfig(8, 3))
        choices = look(module, *(x.transpose(0, 1).flatten(0, 1) for x in (q, k)), case.segments())
        expected = np.zeros((4, 10, 10), dtype=int)
        for rows in case.chunk_numbers(choices.selected, own=False):
            for t, heads in enumerate(rows):
                for head, chosen in enumerate(heads):
                    expected[head, t // 8, list(chosen)] += 1
        assert trace.layers == (1, 2) and trace.sequences == 2 and trace.seq_length == 75
        assert trace.num_kv_heads == 2
        assert np.array_equal(trace.counts(1), expected)

    def test_recording_needs_one_length_and_a_choice(self):
        recorder = TraceRecorder()
        with watching(recorder):
            Layers()(*fused_qkv(20, 1))
        with pytest.raises(ValueError, match="no layer has a choice"):
            recorder.trace()
        case = Case((80, 40), 8, 3)
        q, k, *_ = case.tensors()
        with pytest.raises(ValueError, match="sequences of one length, got 2 packed"):
            recorder(make_core(MoBAConfig(chunk_size=8, topk=3)), q, k, case.segments())

    @pytest.mark.parametrize("changes, message", [
        (dict(topk=0), "topk of a routing trace must be at least 1"),
        (dict(num_kv_heads=3), "multiple of num_kv_heads, got 4 and 3"),
        (dict(seq_length=30), r"each of shape \[heads, 4, 4\]"),
        (dict(sequences=1), "at most once a query"),
        (dict(counts={1: np.triu(np.ones((4, 6, 6), dtype=int))}), "earlier, full chunks only"),
    ])
    def test_numbers_that_cannot_be(self, changes, message):
        _, counts = random_trace()
        values = dict(chunk_size=8, topk=3, seq_length=43, num_kv_heads=2, counts=counts, sequences=2) | changes
        with pytest.raises(ValueError, match=message):
            RoutingTrace.from_counts(**values)

    def test_other_files_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="there is no routing trace"):
            load_trace(tmp_path / "nothing.npz")
        (tmp_path / "text.npz").write_text("no archive")
        np.savez(tmp_path / "other.npz", chunk_size=3)
        for name in ("text.npz", "other.npz"):
            with pytest.raises(ValueError, match=f"{name} is no routing trace"):
                load_trace(tmp_path / name)


class Reader(HTMLParser):
    """The elements, the attributes that would load something, and the text of the element with the id "data"."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.data, self.ids = [], [], "", set()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.loads += [value for name, value in attributes.items() if name in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "br", "img", "link"):
            self.open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == ("script", "data"):
            self.data += data


class TestPictures:
    def test_page_holds_the_numbers_and_loads_nothing(self, tmp_path):
        trace, counts = random_trace()
        report = {layer: {"recall": [0.1, 0.2, 0.3, 0.45678]} for layer in trace.layers}
        excerpts = ["</script><b>", "\u2028 \"x\"", "{{data}}", "", "", ""]
        picture.write_page(trace, tmp_path / "router.html", report, excerpts)
        text = (tmp_path / "router.html").read_text(encoding="utf-8")
        reader = Reader()
        reader.feed(text)
        reader.close()
        assert reader.open == [] and reader.loads == []
        assert not any(word in text for word in ("http:", "https:", "//cdn", "@import", "url("))
        data = json.loads(reader.data)
        assert data["excerpts"] == excerpts and data["statistics"]["5"]["recall"][3] == 0.4568
        assert set(data["shares"]) == {"2", "5"} and data["width"] == 1
        below = np.tril_indices(6)
        for head in range(4):
            share = counts[5][head] / trace.queries()[:, None]
            np.fill_diagonal(share, 1)
            assert data["shares"]["5"][head] == np.rint(1000 * share[below]).tolist()

    def test_script_finds_its_elements(self):
        text = picture.TEMPLATE.read_text(encoding="utf-8")
        reader = Reader()
        reader.feed(text)
        assert set(re.findall(r'at\("(\w+)"\)', text)) <= reader.ids
        assert text.count(picture.MARK) == 1

    def test_long_sequences_are_averaged(self):
        trace, _ = random_trace(layers=(1,), heads=2, num_chunks=300, sequences=1, last=8)
        data = picture.page_data(trace)
        assert data["width"] == 3 and len(data["shares"]["1"][0]) == 100 * 101 // 2
        assert picture.coarse(np.eye(5), 2).tolist() == [[1 / 3, 0], [0, 1 / 2]]
        assert picture.spread(range(20), 4) == [0, 6, 13, 19] and picture.spread((3, 1), 4) == [3, 1]

    def test_command_draws_a_trace(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        save_trace(random_trace()[0], tmp_path / "trace.npz")
        assert command.main(["--from-trace", str(tmp_path / "trace.npz"), "--output", str(tmp_path / "look")]) == 0
        assert sorted(path.name for path in (tmp_path / "look").iterdir()) == ["router.html", "selection.png"]
        assert (tmp_path / "look" / "selection.png").stat().st_size > 5000

    @pytest.mark.parametrize("flags, message", [
        (["--load", "c", "--output", "o"], "--load needs --text"),
        (["--from-trace", "t"], "--output or --trace must say"),
        (["--output", "o"], "one of the arguments --load --from-trace is required"),
    ])
    def test_flags_that_do_not_suffice(self, capsys, flags, message):
        with pytest.raises(SystemExit) as error:
            command.main(flags)
        assert error.value.code == 2 and message in capsys.readouterr().err

    def test_no_trace_is_said(self, tmp_path, capsys):
        assert command.main(["--from-trace", str(tmp_path / "t.npz"), "--output", str(tmp_path)]) == 2
        assert "there is no routing trace" in capsys.readouterr().err
