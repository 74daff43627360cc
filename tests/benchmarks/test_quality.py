"""benchmarks/quality: retrieval tasks, runs that go on after a stop, a pretrained model, tables and pictures."""
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import report, train_50m
from benchmarks.gpt_50m import attention, loop, pretrained, tasks, text
from benchmarks.quality import pages
from benchmarks.quality.__main__ import main
from benchmarks.quality.variants import Variant, grid

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LENGTH = 2048


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.bin"
    path.write_bytes(bytes(np.random.default_rng(0).choice(np.frombuffer(b"etaoin shrdlu\n", np.uint8), 40_000)))
    return text.Windows(path, LENGTH, CPU, None)


def _copier(reach, context=5):
    """Says what followed the last ``context`` tokens the last time that they stood within ``reach`` before; else 0."""
    def predict(tokens):
        said = torch.zeros_like(tokens)
        for row, out in zip(tokens.view(-1, LENGTH).tolist(), said.view(-1, LENGTH)):
            seen = {}
            for t in range(context - 1, LENGTH):
                key = tuple(row[t - context + 1:t + 1])
                if key in seen and t - seen[key] <= reach:
                    out[t] = row[seen[key] + 1]
                seen[key] = t
        return said

    return predict


def test_a_model_that_copies_gets_everything_and_one_that_sees_less_only_what_it_sees(windows):
    found = tasks.Tasks.of_bytes(LENGTH)
    everything = tasks.evaluate(found, windows, _copier(LENGTH), 2, 2)
    assert list(everything["copying"]) == ["256", "512", "1024", "1953"]
    assert set(everything["recall"]) == {f"{n}@{depth:g}" for n in (8, 16, 32, 64) for depth in tasks.DEPTHS}
    assert all(share == 1 for cells in everything.values() for share in cells.values())
    near = tasks.evaluate(found, windows, _copier(600), 2, 2)
    assert [near["copying"][d] for d in ("256", "512")] == [1, 1] and near["copying"]["1024"] == 0
    assert near["recall"]["8@1"] == 1 and near["recall"]["8@0"] == 0
    nothing = tasks.evaluate(found, windows, torch.zeros_like, 2, 2)
    assert all(share == 0 for cells in nothing.values() for share in cells.values())


def test_recall_counts_whole_values_and_copying_tokens():
    edits = tasks.Edits.none()
    edits.write(3, b"abcd", 0)
    edits.write(9, b"efgh", 1)
    hit = np.ones(20, bool)
    hit[3] = False  # the token at place 4
    assert tasks._answered(hit, edits, whole=True) == [False, True]
    assert tasks._answered(hit, edits, whole=False) == [True, False, *[True] * 6]


@pytest.mark.parametrize("pairs, depth", [(8, 0.0), (16, 0.5), (64, 1.0)])
def test_a_recall_example_asks_for_listed_pairs(windows, pairs, depth):
    found = tasks.Tasks.of_bytes(LENGTH)
    before = windows.rows(0, 1)
    row = tasks.overwritten(before.clone(), [found.recall(np.random.default_rng(1), pairs, depth)])[0]
    words = bytes(row.tolist())
    listed, asked = (dict(re.findall(mark + rb"(\w{4}):(\w{4})\n", words)) for mark in (b"@", rb"\?"))
    assert len(listed) == pairs and len(asked) == min(pairs, 16) and asked.items() <= listed.items()
    questions = 11 * len(asked)
    assert words.index(b"@") == round(depth * (LENGTH + 1 - questions - 11 * pairs)) and words.endswith(b"\n")
    changed = (row != before[0]).sum()
    assert changed <= 11 * (pairs + len(asked))


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="seq_length must hold 64 pairs"):
        tasks.Tasks.of_bytes(512).recall(np.random.default_rng(0), 64, 0.5)


def test_a_share_of_training_holds_tasks_whatever_the_batches(windows):
    found = tasks.Tasks.of_bytes(LENGTH)
    mixed = tasks.Mixed(windows, found, 0.25, seed=3)
    whole = mixed.batch(0, 100)
    parts = [mixed.batch(i, 20) for i in range(0, 100, 20)]
    assert all(torch.equal(x, torch.cat([part[i] for part in parts])) for i, x in enumerate(whole))
    plain = windows.batch(0, 100)[0].view(100, -1)
    changed = (whole[0].view(100, -1) != plain).any(1).sum()
    assert 15 <= changed <= 35
    assert not torch.equal(whole[0], tasks.Mixed(windows, found, 0.25, seed=4).batch(0, 100)[0])


FLAGS = ["--toy", "--steps", "6", "--log-interval", "2", "--eval-interval", "4", "--save-seconds", "1e-9",
         "--corpus-bytes", "300000", "--task-share", "0.5", "--task-sequences", "1"]


def _run(output, *flags, base=FLAGS):
    words = output.parent / "words"  # the same on every machine
    words.write_bytes(bytes(np.random.default_rng(1).choice(np.frombuffer(b"etaoin shrdlu\n", np.uint8), 300_000)))
    return train_50m.run(train_50m.parse_args([*base, "--text", str(words), "--corpus", str(output.parent / "text"),
                                               *flags, "--output", str(output)]))


def _weights(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize("flags", [["--attention", "moba", "--key-conv", "3", "--full-attention-layers", "every:2"],
                                   ["--attention", "full"]], ids=lambda flags: flags[1])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, flags):
    whole = _run(tmp_path / "whole", *flags)
    losses, calls = loop.Trainer.losses, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) > 6:  # a validation, four steps, a validation, and the fifth step
            raise KeyboardInterrupt
        return losses(self, *args)

    monkeypatch.setattr(loop.Trainer, "losses", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "parts", *flags)
    monkeypatch.setattr(loop.Trainer, "losses", losses)
    saved = json.loads(torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)["records"])
    parts = _run(tmp_path / "parts", *flags)
    assert [record["kind"] for record in saved] == ["start", "validation", *["step"] * 4, "validation"]
    assert parts["losses"] == whole["losses"] and parts["validations"] == whole["validations"]
    assert all(torch.equal(x, y) for x, y in zip(_weights(tmp_path / "whole").values(),
                                                 _weights(tmp_path / "parts").values()))
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert kinds == ["start", "validation", *["step"] * 4, "validation", *["step"] * 2, "validation"]
    with pytest.raises(ValueError, match="--seed must be 1, with which the run in parts began, got 2"):
        _run(tmp_path / "parts", *flags, "--seed", "2")


def test_a_run_out_of_time_is_saved_and_goes_on(tmp_path):
    stopped = _run(tmp_path / "run", "--minutes", "0")
    assert (stopped["status"], len(stopped["losses"]), len(stopped["validations"])) == ("stopped", 2, 1)
    assert _run(tmp_path / "run")["status"] == "ok"


def test_a_filter_of_zeros_changes_nothing_and_is_trained(tmp_path):
    flags = "--attention", "moba", "--steps", "2", "--lr", "0.1"
    for taps in (0, 3):
        _run(tmp_path / f"{taps}", *flags, "--key-conv", str(taps))
    logs = [map(json.loads, (tmp_path / taps / "log.jsonl").read_text().splitlines()) for taps in "03"]
    plain, filtered = ([each["loss"] for each in log if each["kind"] == "step"] for log in logs)
    assert len(plain) == len(filtered) == 2
    assert filtered[0] == pytest.approx(plain[0], rel=1e-6) and abs(filtered[1] - plain[1]) > 1e-4
    filters = [x for name, x in _weights(tmp_path / "3").items() if name.endswith("filter")]
    assert len(filters) == 4 and all(x.shape == (2, 3, 16) and x.abs().sum() > 0 for x in filters)


def test_runs_are_stored_with_intervals_and_drawn(tmp_path):
    command = ["scratch", "--output", str(tmp_path / "runs"), "--json", str(tmp_path / "scratch.json"), "--tokens",
               "10240", "--variants", "full", "moba-32-3", "--seeds", "7"]
    assert main([*command, "--seconds", "0"]) == 0
    assert {row["status"] for row in report.load(tmp_path / "scratch.json")["rows"]} == {"not run"}
    assert main(command) == 0
    result = report.load(tmp_path / "scratch.json")
    assert [(row["variant"], row["seed"], row["status"]) for row in result["rows"]] == [
        ("full", 7, "ok"), ("moba-32-3", 7, "ok")]
    log = tmp_path / "runs/full-7/log.jsonl"
    before = log.stat().st_mtime_ns
    assert main(command) == 0 and log.stat().st_mtime_ns == before and report.load(
        tmp_path / "scratch.json")["rows"] == result["rows"]  # nothing is repeated
    for row in json.loads(json.dumps(result["rows"])):  # a second seed, which MoBA is 0.5 worse at
        row["seed"], row["validations"][-1]["loss"] = 8, 5.5 if row["variant"] == "moba-32-3" else 5.0
        result["rows"].append(row)
    full, moba = pages.SCRATCH.lines(result)
    losses = [row["validations"][-1]["loss"] for row in result["rows"]]
    difference = losses[1] - losses[0]
    assert full["minus full"] == ""
    assert moba["minus full"] == f"{(difference + 0.5) / 2:+.4f} ± {12.706 * (0.5 - difference) / 2:.4f}"
    for name in (name for name, (part, _) in pages.TABLES.items() if part == "scratch"):
        assert pages.markdown(name, result).startswith("| ")
    pytest.importorskip("matplotlib")
    assert all(path.stat().st_size > 5000 for path in pages.PICTURES["scratch"](result, tmp_path))
    text = result["rows"][-1]["text"]  # of another machine: no pair
    result["rows"][-1]["text"] = text | {"train": text["train"] | {"sha256": "another"}}
    assert pages.SCRATCH.lines(result)[1]["minus full"] == f"{difference:+.4f}"
    assert pages.markdown("quality-scratch", result).count(f"tokens, sha256 {text['train']['sha256'][:16]}") == 1
    assert "sha256 another" in pages.markdown("quality-scratch", result)


def _trained(variant, seed, *losses, copied=0.5, **more):
    """A stored run of three validations at most; the last sixteenth is 1 above the loss."""
    validations = [{"step": 100 * i, "loss": loss, "by_position": [loss] * 15 + [loss + 1],
                    "copying": {"256": copied, "512": 0.0},
                    "recall": {"8@0": 0.0, "8@1": 1.0, "64@0": 0.0, "64@1": 0.5}}
                   for i, loss in enumerate(losses)]
    return {"variant": variant, "seed": seed, "status": "ok" if len(losses) == 3 else "stopped", "steps": 200,
            "tokens_per_step": 10_000, "micro_batch_tokens": 2048, "seq_length": 1024, "task_share": 0.5,
            "task_sequences": 5, "tokens_per_s": 1.0, "validations": validations,
            "text": {name: {"tokens": 9, "sha256": "abc"} for name in ("train", "validation")}} | more


def _stored(*rows):
    about = dict.fromkeys(("driver", "torch", "triton", "cudnn", "commit")) | {
        "device": "none", "when": "never", "command": "nothing"}
    return {"environment": about, "rows": list(rows)}


def test_a_run_that_stopped_is_compared_as_far_as_it_went(tmp_path):
    result = _stored(_trained("full", 1, 5.0, 4.0, 3.0), _trained("moba-32-3", 1, 6.0, 4.5, 3.25),
                     _trained("moba-16-4", 1, 7.0, 4.75), _trained("moba-64-8", 1, status="not run"))
    lines = pages.RECOVERY.lines(result)
    assert list(lines[0]) == ["after", "attention", "0.0M", "1.0M", "2.0M"]
    assert [list(line.values()) for line in lines[:3]] == [
        ["loss", "full", "5.0000", "4.0000", "3.0000"],
        ["loss", "MoBA (32, 3) minus full", "+1.0000", "+0.5000", "+0.2500"],
        ["loss", "MoBA (16, 4) minus full", "+2.0000", "+0.7500", ""]]
    assert [line["after"] for line in lines[3:]] == ["last 1/16"] * 3 + ["recalled, %"] * 3
    assert "tested on 2 sequences a cell, at the end on 6." in pages.markdown("quality-recovery", result)
    assert [line["attention"] for line in pages.CONTINUED.lines(result)] == ["full", "MoBA (32, 3)"]
    assert ("Not ended: moba-16-4, seed 1 (stopped, validated to 1.0M tokens), moba-64-8, seed 1 (not run)."
            in pages.markdown("quality-continued", result))
    pytest.importorskip("matplotlib")
    assert all(path.stat().st_size > 5000 for path in pages.PICTURES["continued"](result, tmp_path))
    alone = _stored(*result["rows"][:1], *result["rows"][3:])  # nothing to compare with yet
    assert all(path.is_file() for part in ("scratch", "continued") for path in pages.PICTURES[part](alone, tmp_path))


def test_every_two_attentions_are_paired_by_seed():
    runs = {"full": (3.0, 3.5, 4.0), "moba-32-3": (3.5, 3.75, 4.0), "moba-16-4": (3.0, 3.25)}
    result = _stored(*(_trained(name, seed, 9, 9, loss, copied=loss / 10) for name, losses in runs.items()
                       for seed, loss in enumerate(losses)))
    lines = {line["difference"]: line for line in pages.DIFFERENCES.lines(result)}
    assert list(lines) == ["MoBA (32, 3) minus full", "MoBA (16, 4) minus full", "MoBA (16, 4) minus MoBA (32, 3)"]
    assert lines["MoBA (32, 3) minus full"]["loss"] == f"+0.2500 ± {4.303 * 0.25 / 3 ** 0.5:.4f}"
    assert list(lines["MoBA (16, 4) minus MoBA (32, 3)"].values())[1:] == [
        "2", "-0.5000 ± 0.0000", "-0.5000 ± 0.0000", "-2.5 ± 0.0", "+0.0 ± 0.0"]


def test_retrieval_is_shown_by_distance_and_depth_with_its_interval():
    result = _stored(_trained("full", 1, 9, 9, 3.0), _trained("full", 2, 9, 9, 3.0, copied=0.6))
    copied, recalled = (pages.retrieval(task).lines(result) for task in ("copying", "recall"))
    assert copied == [{"attention": "full", "256": "55 ± 64", "512": "0 ± 0"}]
    assert recalled == [{"attention": "full", "0": "0 ± 0", "1": "75 ± 0"}]


def test_what_was_generated_is_shown_by_decoding():
    said = {"loss": 1.5, "right": 3, "answers": 4, "pairs": 8}
    result = _stored(_trained("full", 1, 9, 9, 3, generation={"dense": said}),
                     _trained("moba-32-3", 1, 9, 9, 3, generation={"dense": said, "moba": said | {"right": 1}}))
    assert [list(line.values()) for line in pages.GENERATION.lines(result)] == [
        ["full", "dense", "1.5000", "3 of 4"], ["MoBA (32, 3)", "dense", "1.5000", "3 of 4"],
        ["MoBA (32, 3)", "by MoBA", "1.5000", "1 of 4"]]


def test_interval_is_students():
    assert pages.interval([1.0]) == (1.0, None)
    mean, half = pages.interval([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.303 * statistics.stdev([1, 2, 6]) / 3 ** 0.5)


@pytest.mark.parametrize("name", ["moba", "moba-512", "flash-512-3", "moba-512-3-nonsense", "moba-512-3-conv4"])
def test_a_variant_that_is_none_is_said(name, tmp_path, capsys):
    with pytest.raises(ValueError, match="a variant must"):
        Variant.of(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama over bytes, as Transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<end>"])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                 num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
                                 bos_token_id=None, eos_token_id=256)).save_pretrained(folder)
    return folder


def test_a_pretrained_model_goes_on_and_generates(model, tmp_path):
    flags = ["--pretrained", str(model), "--attention", "moba", "--chunk-size", "32", "--topk", "8", "--generate", "2"]
    run = _run(tmp_path / "run", *flags)
    assert run["status"] == "ok" and run["losses"][-1] < run["losses"][0] and run["pretrained"] == model.name
    assert set(run["generation"]) == {"dense", "moba"}
    # 8 chunks of 32 are all of 256 tokens: what Transformers attends to again is full attention
    assert run["generation"]["dense"] == run["generation"]["moba"]
    assert json.loads((tmp_path / "text.json").read_text())["train"]["tokens"] > 0
    full = _run(tmp_path / "full", "--pretrained", str(model), "--attention", "full")
    assert full["losses"] == pytest.approx(run["losses"], abs=1e-4) and "generation" not in full
    with pytest.raises(ValueError, match="--key-conv must be 0 with --pretrained"):
        _run(tmp_path / "other", *flags, "--key-conv", "3")
    with pytest.raises(ValueError, match="--pretrained must name a GGUF file or a folder"):
        _run(tmp_path / "other", "--pretrained", "nowhere")


def test_a_pretrained_models_positions_that_see_everything_train_as_with_full_attention():
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens, targets = torch.randint(0, 64, (2, 512), generator=torch.Generator().manual_seed(1))
    grads = []
    for name, topk in (("full", 4), ("moba", 4), ("moba", 2)):
        torch.manual_seed(0)
        inner = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=72, intermediate_size=64, num_hidden_layers=3,
                                             num_attention_heads=9, num_key_value_heads=3))
        inner.set_attn_implementation(pretrained.implementation(name, 32, topk))
        trainer = loop.Trainer(pretrained.Pretrained(inner.train(), 256), attention.Attention((), None, False),
                               loop.Plan(3, 2, 1, 256), CPU)
        steps = []
        for _ in range(3):  # by the losses of 4 chunks of 32
            trainer.losses(tokens, targets).view(2, -1)[:, :128].mean().backward()
            steps += [p.grad.flatten().clone() for p in inner.parameters()]
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        grads.append(torch.cat(steps))
    full, covered, fewer = grads
    # gradients, not weights: Adam makes whole steps of the rounding errors of gradients that are nearly 0
    assert (covered - full).norm() < 1e-5 * full.norm()
    assert (fewer - full).norm() > 1e-2 * full.norm()


def test_without_training_everything_chosen_costs_nothing(model, tmp_path, capsys):
    texts = []
    (tmp_path / "texts").mkdir()
    for i in range(4):
        texts.append(tmp_path / f"texts/{i}.txt")
        texts[-1].write_text("".join(np.random.default_rng(i).choice(list("abcde fgh\n"), 300 - 200 * (i == 3))))
    (tmp_path / "texts/within").mkdir()
    command = ["untrained", "--pretrained", str(model), "--text", str(tmp_path / "texts"), "--lengths", "256", "--json",
               str(tmp_path / "untrained.json"), "--variants", "full", "moba-64-4", "moba-32-2", "moba-32-2-last:4"]
    assert main(command) == 0
    rows = report.load(tmp_path / "untrained.json")["rows"]
    losses = {row["variant"]: row["losses"] for row in rows}
    assert [len(x) for x in losses.values()] == [3] * 4 and rows[0]["texts"] == ["0.txt", "1.txt", "2.txt"]
    assert losses["moba-64-4"] == pytest.approx(losses["full"], abs=2e-5)
    assert losses["moba-32-2-last:4"] == pytest.approx(losses["full"], abs=2e-5)
    assert losses["moba-32-2"] != pytest.approx(losses["full"], abs=2e-5)
    assert main(command) == 0 and report.load(tmp_path / "untrained.json")["rows"] == rows  # nothing is measured again
    lines = pages.UNTRAINED.lines(report.load(tmp_path / "untrained.json"))
    assert [line["keys, %"] for line in lines] == ["100", "100", "25", "25"] and lines[0]["minus full"] == ""
    assert main([*command[:3], "--text", str(texts[3]), *command[-9:]]) == 2
    assert "--text must name texts of more than 256 tokens" in capsys.readouterr().err


def test_the_grid_leaves_out_what_is_full_attention():
    names = grid(2048)
    assert "moba-512-2" in names and "moba-512-4" not in names and "moba-512-4" in grid(8192)


def test_page_has_what_is_stored():
    words = (ROOT / pages.PAGE).read_text()
    for name, (part, _) in pages.TABLES.items():
        begin, end = report.between_markers(words, name)
        stored = report.load(pages.STORED[part]) if pages.STORED[part].is_file() else None
        assert words[begin:end] == pages.markdown(name, stored) + "\n", "python -m benchmarks.quality draw"
