"""The planner's arithmetic: hand-computed cases, what must grow with what, units, and the commands that it prints."""
import argparse
import json
import re
from dataclasses import replace

import numpy
import pytest
from pretraining.arguments import parse_args
from ranks import ROOT

from benchmarks import report
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.cases import CASES, flops
from benchmarks.cp_cases import find_rows
from benchmarks.gpt_cases import rows_for
from benchmarks.planner import calibration, check
from benchmarks.planner.calibration import Observation, fit, non_negative, shape_of
from moba_megatron import MoBAConfig
from moba_megatron.launch import check_flags
from moba_megatron.megatron.arguments import add_moba_arguments, config_from_args
from moba_megatron.plan import CARDS, MODELS, Model, Run, find_card, parse_size, plan, predict
from moba_megatron.plan.__main__ import main
from moba_megatron.plan.attention_cost import LINK_SHARE, STAGES, TERMS, AttentionShape, stored, term_seconds
from moba_megatron.plan.collectives import (
    Group,
    all_gather,
    all_to_all,
    exchange,
    point_to_point,
    union_share,
)
from moba_megatron.plan.command import as_text, flags, torchrun
from moba_megatron.plan.hardware import ASSUMED, DERIVED, MEASURED, VENDOR, Figure
from moba_megatron.plan.layout import RECOMPUTE, Layout, candidates, refusals
from moba_megatron.plan.memory import estimate

CARD = replace(find_card("h200"), name="round numbers", reached=Figure(1e12, MEASURED, "test"),
               reached_bandwidth=Figure(1e9, MEASURED, "test"), issue=Figure(1e9, VENDOR, "test"))
SMALL = Model(layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocabulary=256)


def run(**changes):
    values = dict(model=MODELS["8b"], seqlen=1 << 18, gpus=64, batch=16, moba=MoBAConfig(4096, 12))
    return Run(**{**values, **changes})


def predicted(layout, card=find_card("h100"), **changes):
    return predict(run(**changes), layout, card, stored())


def test_layers_of_their_own_and_a_schedule():
    """Each layer costs what a model of such layers costs; memory holds the choices of all."""
    layout = Layout(tp=8, cp=8, pp=1, dp=1, comm_type="all_gather", recompute="none")
    alike = [predicted(layout, moba=MoBAConfig(*settings)) for settings in ((4096, 12), (1024, 32))]
    own = predicted(layout, moba=MoBAConfig(4096, 12, per_layer="9-16:chunk=1024,topk=32"))
    for of in (lambda p: p.parts["attention"].seconds, lambda p: p.run.step_flops(False),
               lambda p: p.memory.activations):
        assert of(own) == pytest.approx(0.75 * of(alike[0]) + 0.25 * of(alike[1]), rel=1e-9)
    assert own.memory.working == alike[1].memory.working
    schedule = MoBAConfig(4096, 99, topk_schedule="0:32,1000:12")
    for iteration, topk in ((999, 32), (1000, 12)):
        found, plain = (predicted(layout, moba=moba, iteration=iteration)
                        for moba in (schedule, MoBAConfig(4096, topk)))
        assert (found.seconds, found.memory, found.mfu_moba) == (plain.seconds, plain.memory, plain.mfu_moba)
    words = flags(run(moba=schedule), layout)
    assert words[words.index("--moba-topk-schedule") + 1] == "0:32,1000:12"


def test_the_command_of_a_model_with_layers_of_their_own(capsys):
    few = ["--seq", "128K", "--model", "1b", "--gpus", "8", "--topk-schedule", "0:12,9:4"]
    assert main([*few, "--per-layer", "1-8:chunk=256"]) == 0
    said = capsys.readouterr().out
    assert "MoBA chunk 512 topk 12 (1-8:chunk=256), 0 of 16" in said and "--moba-per-layer 1-8:chunk=256" in said
    assert main([*few, "--iteration", "9"]) == 0 and "chunk 512 topk 4," in capsys.readouterr().out
    assert main([*few, "--per-layer", "17:chunk=256"]) == 2
    assert "per_layer names layer 17, but the model has 16" in capsys.readouterr().err


@pytest.mark.parametrize("text, tokens", [("4096", 4096), ("128K", 131072), ("1M", 1 << 20), ("0.5m", 1 << 19)])
def test_sizes(text, tokens):
    assert parse_size(text) == tokens


@pytest.mark.parametrize("text", ["", "M", "1G", "-4", "0", "0.3", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="must be a number of tokens"):
        parse_size(text)


def test_every_figure_of_a_card_has_a_kind_and_a_source():
    for card in CARDS.values():
        for figure in card.figures().values():
            assert figure.value > 0 and figure.source and figure.kind in (VENDOR, MEASURED, DERIVED, ASSUMED)
        assert card.flops < card.peak.value and card.bytes_per_second < card.bandwidth.value
    assert find_card("RTX PRO-6000") is CARDS["rtxpro6000"]
    with pytest.raises(ValueError, match="--card must be one of a6000"):
        find_card("b9000")


@pytest.mark.parametrize("name, billions", [("1b", 1.236), ("8b", 8.030), ("70b", 70.55)])
def test_parameters_of_the_presets_are_llamas(name, billions):
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_parameters_by_hand():
    matrices = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
    assert SMALL.matrix_parameters == matrices
    assert SMALL.parameters == 4 * (matrices + 128) + 2 * 256 * 64 + 64
    assert SMALL.padded_vocabulary(4) == 512


def test_terms_of_attention_by_hand():
    shape = AttentionShape(seqlen=16, chunk_size=4, topk=2, heads=1, kv_heads=1, head_dim=8)
    assert (shape.own_pairs, shape.earlier_pairs, shape.choices, shape.scores) == (32, 48, 16, 20)
    terms = term_seconds(shape, CARD)
    assert set(terms) == set(TERMS)
    assert terms["sparse products"] == pytest.approx(4 * 8 * 48 / 1e12)
    assert terms["bwd own products"] == pytest.approx(2.5 * 4 * 8 * 32 / 1e12)
    assert terms["gate scores"] == pytest.approx(2 * 8 * 20 / 1e12)
    assert terms["means bytes"] == pytest.approx(16 * 16 / 1e9)
    assert terms["sparse bytes"] == pytest.approx((16 * (16 + 20) + 2 * 16 * 16) / 1e9)
    assert terms["route choices"] == pytest.approx(16 / 1e9)


def test_products_agree_with_the_benchmarks_count():
    case = next(c for c in CASES if c.name == "128K-512-8")
    shape = shape_of(case.as_dict())
    ours = 4 * case.head_dim * (shape.own_pairs + shape.earlier_pairs) * 3.5
    assert ours == pytest.approx(flops(case), rel=1e-3)  # they count the diagonal in full


def test_ranks_that_share_the_queries_share_the_work():
    whole = AttentionShape(1 << 17, 512, 8, 32, 8, 128)
    part = replace(whole, share=0.25, key_share=0.25)
    kv = 2 * 8 * 256 * (1 << 17) / 1e9
    a, b = term_seconds(whole, CARD), term_seconds(part, CARD)
    assert b["bwd products"] == pytest.approx(a["bwd products"] / 4)
    assert b["means bytes"] == pytest.approx(a["means bytes"] / 4)
    assert b["own bytes"] - kv == pytest.approx((a["own bytes"] - kv) / 4)  # all keys are read by each


def test_fit_finds_the_coefficients_behind_made_up_rows():
    card = find_card("h200")
    truth = {name: 1.1 + 0.3 * i for i, name in enumerate(TERMS)}
    shapes = [AttentionShape(s, c, k, h, kv, d) for s in (256, 4096, 65536) for c, k in ((64, 3), (128, 8), (2048, 1))
              for h, kv, d in ((16, 16, 128), (32, 4, 64))]
    rows = [Observation("x", stage, shape, sum(truth[t] * term_seconds(shape, card)[t] for t in terms), "made up")
            for shape in shapes for stage, terms in STAGES.items()]
    for name, value in fit(rows, card).items():
        assert value == pytest.approx(truth[name], rel=0.1), name


def test_least_squares_without_negative_values():
    matrix, goal = numpy.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), numpy.array([3.0, 2.0, 1.0])
    assert non_negative(matrix, goal) == pytest.approx([2.0, 0.0])  # a line without the bound would fall
    assert non_negative(numpy.eye(2), numpy.array([3.0, -1.0])) == pytest.approx([3.0, 0.0])


def test_gathers_enter_a_machine_once():
    card = replace(CARD, node=Figure(8, VENDOR, "test"))
    group = Group(size=16, stride=2)  # four of its ranks in each machine, four machines
    assert group.inside(card) == 4
    traffic = all_gather(group, 1e9, card)
    assert (traffic.network, traffic.link) == (3e9, 12e9)  # 12 GB from outside through four ports
    exchanged = all_to_all(group, 16e9, card)
    assert (exchanged.network, exchanged.link) == (12e9, 3e9)
    assert all_gather(Group(4, 2), 1e9, card).network == 0
    assert all_gather(Group(1), 1e9, card).seconds == 0
    assert point_to_point(8, 1e9, card).network == 1e9 and point_to_point(4, 1e9, card).network == 0


def test_a_slower_network_costs_time_only_where_it_is_used():
    slow = replace(CARD, network=Figure(1e9, ASSUMED, "test"))
    assert all_gather(Group(8), 1e9, slow) == all_gather(Group(8), 1e9, CARD)
    assert all_gather(Group(16), 1e9, slow).seconds > 10 * all_gather(Group(16), 1e9, CARD).seconds


LOCAL = AttentionShape(seqlen=4096, chunk_size=128, topk=4, heads=8, kv_heads=4, head_dim=16, share=1 / 4)


def test_bytes_of_the_comm_types_by_hand():
    kv, q = 1024 * 4 * 2 * 16 * 2, 1024 * 8 * 16 * 2
    gathered = exchange("all_gather", LOCAL, 4, 1, 1, CARD)
    assert gathered.forward.total.link == pytest.approx(3 * kv)
    assert gathered.backward.total.link == pytest.approx(3 * kv + 3 * 2 * kv)  # again, and fp32 sums
    a2a = exchange("a2a", LOCAL, 4, 1, 1, CARD)
    assert a2a.forward.total.link == pytest.approx(3 / 4 * (q + kv + q)) == a2a.backward.total.link
    both = exchange("a2a+all_gather", LOCAL, 4, 1, 2, CARD)
    assert both.forward.total.link == pytest.approx((q + kv + q) / 2 + kv)
    repeated = exchange("a2a", replace(LOCAL, kv_heads=2), 4, 1, 1, CARD)
    assert repeated.forward.total.link == pytest.approx(3 / 4 * (2 * q + kv / 2 * 2))
    assert exchange("all_gather", LOCAL, 1, 1, 1, CARD).forward.total.link == 0
    with pytest.raises(ValueError, match="comm_type must be one of all_gather, a2a"):
        exchange("ring", LOCAL, 4, 1, 1, CARD)


def test_selective_moves_what_the_cheaper_way_moves():
    assert union_share(LOCAL) == pytest.approx(1)  # 6144 choices of 32 chunks
    assert union_share(replace(LOCAL, share=1 / 4096, kv_heads=8)) == pytest.approx(1 - numpy.exp(-3 / 32))
    few = replace(LOCAL, seqlen=1 << 20, share=256 / (1 << 20), kv_heads=8)  # 768 choices of 8192 chunks
    for local, ranks, ratio in ((replace(LOCAL, seqlen=64 << 18, share=1 / 64), 64, 1.0),
                                (few, 4096, 1 - numpy.exp(-768 / 8192))):
        selective, gather = (exchange(name, local, ranks, 1, 1, CARD) for name in ("selective", "all_gather"))
        received = [e.forward.total.link + e.forward.total.network for e in (selective, gather)]
        assert received[0] / received[1] == pytest.approx(ratio, rel=0.01)


def test_memory_by_hand():
    small = run(model=SMALL, seqlen=1024, gpus=1, batch=1, moba=MoBAConfig(128, 3))
    memory = estimate(small, Layout(1, 1, 1, 1))
    n = SMALL.parameters
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * n, 4 * n, 12 * n)
    kept = 2 * (4 * 64 + 12 * 16 + 3 * 128)
    assert memory.activations == 4 * 1024 * (kept + 4 * (4 + 8 * 2))
    attention_again = estimate(small, Layout(1, 1, 1, 1, recompute="selective")).activations
    assert attention_again == 4 * 1024 * (kept + 2 * 6 * 16), "v keeps the whole projection"
    assert estimate(small, Layout(1, 1, 1, 1, recompute="full")).activations == 4 * 1024 * 64 * 2
    assert memory.gathered == 0


def test_what_splits_memory():
    one = estimate(run(batch=64), Layout(1, 1, 1, 64))
    assert estimate(run(), Layout(1, 8, 1, 8, "all_gather")).activations == pytest.approx(one.activations / 8)
    assert estimate(run(), Layout(8, 1, 1, 8)).weights < one.weights / 7.9
    assert estimate(run(), Layout(1, 1, 4, 16)).weights < one.weights / 2
    assert one.optimizer == pytest.approx(12 / 2 * one.weights / 64)
    assert estimate(run(distributed_optimizer=False), Layout(1, 1, 1, 64)).optimizer == pytest.approx(6 * one.weights)


def test_recompute_trades_memory_for_time():
    none, selective, full = (predicted(Layout(1, 8, 1, 8, "all_gather", recompute=r)) for r in RECOMPUTE)
    assert none.seconds < selective.seconds < full.seconds
    assert min(none.memory.activations, selective.memory.activations) > 10 * full.memory.activations
    forward = selective.parts["attention"].seconds - none.parts["attention"].seconds
    assert full.parts["attention"].seconds == selective.parts["attention"].seconds
    assert full.parts["matrices"].seconds == pytest.approx(4 / 3 * none.parts["matrices"].seconds)
    assert 0 < forward < none.parts["attention"].seconds / 2


def test_parts_add_up_and_mfu_is_operations_over_the_peak():
    p = predicted(Layout(2, 8, 1, 4, "all_gather", recompute="full"))
    assert p.seconds == pytest.approx(sum(part.seconds for part in p.parts.values()))
    assert p.tokens_per_second == pytest.approx(p.run.tokens / p.seconds)
    assert p.cost == pytest.approx(64 * 1e6 / p.tokens_per_second)
    rate = p.run.step_flops(dense=True) / p.seconds / 64
    assert p.mfu == pytest.approx(rate / 989.5e12)
    assert 0 < p.mfu_moba < min(p.mfu, 1)


def test_pipeline_bubble():
    flat = run(model=replace(SMALL, layers=8), seqlen=1 << 15, gpus=4, batch=12, moba=MoBAConfig(512, 4))
    card = find_card("h200")
    piped = predict(flat, Layout(1, 1, 4, 1), card, stored())
    stage = sum(piped.parts[n].seconds for n in ("matrices", "elementwise", "attention", "host", "output")) / 12
    output = piped.parts["output"].seconds / 12
    bubble = piped.parts["pipeline"].seconds - piped.parts["pipeline"].traffic.seconds
    assert bubble == pytest.approx(3 * (stage - output), rel=1e-6)  # three other stages, none of which has the output


@pytest.mark.parametrize("more", [dict(seqlen=1 << 19, batch=8), dict(moba=MoBAConfig(4096, 24)),
                                  dict(moba=MoBAConfig(4096, 12, "last:3")), dict(attention="full"),
                                  dict(model=MODELS["70b"])])
def test_what_makes_a_step_slower(more):
    layout = Layout(8, 8, 1, 1, "all_gather")
    assert predicted(layout, **more).seconds > predicted(layout).seconds


def test_faster_links_and_cards_are_not_slower():
    layout = Layout(2, 32, 1, 1, "all_gather")
    times = [predicted(layout, card=find_card(name)).seconds for name in ("a6000", "a100", "h100", "h200", "b200")]
    assert times == sorted(times, reverse=True)
    wide = replace(find_card("h100"), network=Figure(400e9, ASSUMED, "test"))
    assert predicted(layout, card=wide).exposed < predicted(layout).exposed


def test_short_sequences_cost_what_full_attention_costs():
    layout = Layout(1, 1, 1, 64)
    short = dict(seqlen=12 * 4096, batch=64)
    assert predicted(layout, **short).seconds == predicted(layout, attention="full", **short).seconds


def test_search_finds_all_and_says_why_not():
    asked = run(gpus=16, seqlen=1 << 17)
    fit, out = plan(asked, find_card("h100"), stored())
    assert len(fit) + len(out) == len(list(candidates(asked, 8)))
    assert all(p.layout.gpus == 16 and p.memory.total <= 80e9 and not refusals(asked, p.layout) for p in fit)
    assert [p.cost for p in fit] == sorted(p.cost for p in fit)
    assert {"all_gather", "a2a", "a2a+all_gather", "selective"} <= {p.layout.comm_type for p in fit}
    assert all(why for _, why in out)
    assert plan(asked, find_card("h100"), stored(), {"cp": 4, "comm_type": "a2a"})[0][0].layout.cp == 4


@pytest.mark.parametrize("layout, word", [
    (Layout(3, 1, 1, 1), "32 heads do not divide by TP 3"),
    (Layout(16, 1, 1, 1), "8 kv heads"),
    (Layout(1, 1, 5, 1), "32 layers do not divide by PP 5"),
    (Layout(1, 1, 1, 3), "16 sequences a step do not divide by DP 3"),
    (Layout(1, 3, 1, 1, "all_gather"), "no multiple of 6"),
    (Layout(1, 64, 1, 1, "a2a"), "do not go with a2a over 64"),
])
def test_refusals_say_what_is_wrong(layout, word):
    assert any(word in why for why in refusals(run(), layout))


@pytest.mark.parametrize("layout", [Layout(2, 16, 2, 1, "a2a+all_gather", 4, "full"),
                                    Layout(1, 8, 1, 8, "all_gather", recompute="selective"), Layout(8, 1, 1, 8)],
                         ids=Layout.name)
def test_printed_commands_are_understood(layout, monkeypatch):
    asked = run(moba=MoBAConfig(4096, 12, "last:3"))
    words = torchrun(asked, layout, find_card("h100"))
    assert words[:3] == ["torchrun", "--nproc-per-node", "8"] and words[words.index("--nnodes") + 1] == "8"
    given = flags(asked, layout)
    assert words[-len(given):] == given and check_flags(given) == "moba"
    parser = add_moba_arguments(argparse.ArgumentParser(), default="full")
    assert config_from_args(parser.parse_known_args(given)[0]) == asked.moba
    # the pretraining example spells its flags as Megatron-LM does; these it does not have
    only_megatron = {"--swiglu": 0, "--disable-bias-linear": 0, "--normalization": 1, "--position-embedding-type": 1,
                     "--max-position-embeddings": 1, "--attention-dropout": 1, "--hidden-dropout": 1,
                     "--hierarchical-context-parallel-sizes": 2}
    ours, i = [], 0
    while i < len(given):
        skip = only_megatron.get(given[i])
        ours += [given[i]] if skip is None else []
        i += 1 + (skip or 0)
    monkeypatch.setenv("WORLD_SIZE", "64")
    parsed = parse_args([*ours, "--data-path", "x", "--train-iters", "1", "--lr", "1"])
    sizes = (parsed.tensor_model_parallel_size, parsed.context_parallel_size, parsed.pipeline_model_parallel_size)
    assert sizes == (layout.tp, layout.cp, layout.pp) and parsed.seq_length == asked.seqlen
    assert " ".join(as_text(words).replace("\\\n", " ").split()[1:]) == " ".join(words)


def test_predictions_hold_against_the_stored_measurements():
    sections = check.sections()
    assert len(sections) >= 3
    for section in sections:
        assert section.median <= check.GOAL, section.title
        assert any(not row["fitted"] for row in section.rows)


def test_results_of_several_ranks_are_read(tmp_path):
    """Rows as `benchmarks cp` and `benchmarks gpt` write them, with what the planner predicts as the measured value."""
    report.save(tmp_path / "kernels.json", report.load(report.RESULTS / "h200" / "kernels.json"))
    timed = {"status": "ok", "ms": {"median": 10.0}, "ranks": 2}
    rows = [{**timed, "name": row.name, "case": row.case.as_dict(), "comm": row.comm,
             "exposed": {"fwd gather": {"ms": 1.0, "sent_bytes": 2 ** 28}}}
            for row in find_rows(None, ["all_gather", "a2a"])]
    report.save(tmp_path / "cp.json", {"rows": [*rows, {"status": "failed", "reason": "x"}]})
    steps = [{**timed, "name": row.name, "row": row.as_dict(), "peak_bytes": 2 ** 36}
             for row in rows_for(2, None, tiny=False)]
    report.save(tmp_path / "gpt.json", {"rows": steps})
    times, sent, step_times, peaks = check.sections(tmp_path)[3:]
    assert len(times.rows) == len(sent.rows) == len(rows)
    whole = next(row for row in sent.rows if row["row"].startswith("128K-512-8/all_gather"))
    assert whole["predicted"] == pytest.approx(0.5 + 0.5 + 1.0)  # GiB: K and V of half the tokens, twice, and in fp32
    assert len(step_times.rows) == len(peaks.rows) == len([s for s in steps if not s["row"]["fp8"]])
    faster = {row["row"]: row["predicted"] for row in step_times.rows}
    assert faster["128K/moba-512-8/all_gather on 2"] < faster["128K/full/p2p on 2"]


def test_command_line(capsys, tmp_path):
    picture, everything = tmp_path / "time.png", tmp_path / "plan.json"
    assert main(["--seq", "128K", "--model", "1b", "--gpus", "8", "--card", "a100", "--batch", "4", "--why",
                 "--picture", str(picture), "--json", str(everything)]) == 0
    out = capsys.readouterr().out
    assert "8 x A100" in out and "GPU s/Mtok" in out and "moba_megatron.launch" in out and "do not divide" in out
    assert picture.stat().st_size > 1000
    rows = json.loads(everything.read_text())["layouts"]
    assert rows[0]["step_s"] == pytest.approx(sum(part["seconds"] for part in rows[0]["parts"].values()))
    assert main(["--cards"]) == 0 and "vendor" in capsys.readouterr().out
    assert benchmarks_main(["plan-check", "--json", str(everything)]) == 0
    assert "median error" in capsys.readouterr().out
    assert json.loads(everything.read_text())["sections"][0]["median_error"] < check.GOAL


@pytest.mark.parametrize("words, message", [
    (["--card", "x"], "--card must be one of"), (["--heads", "30"], "heads must be a multiple"),
    (["--topk", "0"], "topk must be at least 1"), (["--full-attention-layers", "99"], "names layer 99"),
    (["--gpus", "0"], "gpus must be at least 1"), (["--network", "-1"], "must be positive"),
])
def test_wrong_arguments_are_named(words, message, capsys):
    assert main(["--seq", "128K", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_moved_says_where(capsys):
    for flag, command in (("--check", "plan-check"), ("--fit", "plan-fit"), ("--simulate=out", "plan-simulate")):
        with pytest.raises(SystemExit) as ended:
            main(["--seq", "128K", flag])
        assert ended.value.code == 2 and f"python -m benchmarks {command}" in capsys.readouterr().err
    assert benchmarks_main(["plan-check", "--results", "/nowhere"]) == 2
    assert "must be a folder with kernels.json" in capsys.readouterr().err


def test_nothing_fits_is_said(capsys):
    assert main(["--seq", "1M", "--model", "70b", "--gpus", "1", "--card", "a6000"]) == 1
    assert "0 layouts fit" in capsys.readouterr().out


def test_the_page_says_what_the_check_says():
    """Medians of the stored check, as the planner's page prints them."""
    stored = json.loads((ROOT / "benchmarks/results/planner/check.json").read_text())["sections"]
    medians = [f"{section['median_error']:.1%}".replace("%", " %") for section in stored]
    kernels, memory, full, cp, sent, steps, peaks, chosen = medians
    text = (ROOT / "docs/planner.md").read_text()
    table = text[re.search(r"\| predicted .*median error", text).start():].split("\n\n")[0].splitlines()[2:]
    assert [line.strip("| ").split(" | ")[2] for line in table] == [kernels, memory, full, steps, peaks, cp, sent,
                                                                    chosen]


def test_stored_coefficients_are_those_of_the_stored_rows():
    """What the wheel holds; after a new measurement: python -m benchmarks plan-fit"""
    rows = json.loads(calibration.MEASURED.read_text())["rows"]
    fresh = calibration.calibrate(rows, find_card("h200"), stored().source)
    assert stored().coefficients == pytest.approx(fresh.coefficients, rel=1e-6)
    for name in ("dense", "host_forward", "host_backward", "elementwise"):
        assert getattr(stored(), name) == pytest.approx(getattr(fresh, name)), name
    assert LINK_SHARE == pytest.approx(calibration.link_share())


def test_the_page_says_what_was_measured():
    """The table of the selective exchange, of its stored measurement."""
    rows = json.loads((ROOT / "benchmarks/results/h200/selective.json").read_text())["rows"]
    page = (ROOT / "docs/planner.md").read_text()
    for way in dict.fromkeys(row["way"] for row in rows):
        times = []
        for routing in ("uniform", "local", "sink"):
            row, = (row for row in rows if (row["way"], row["routing"]) == (way, routing))
            times.append(f"{row['ms']['median']:.1f}")
        assert f"| {way} | {' | '.join(times)} |" in page
