"""The pretraining example end to end on CPU: data, training on two ranks, stop and resume, other layouts, bad input."""
import argparse
import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import prepare_data
import pytest
import torch
from check_run import check
from megatron.core.datasets.indexed_dataset import IndexedDataset
from plot_run import main as plot_run
from pretraining import checkpointing
from pretraining.agreement import RunError, SharedError
from pretraining.arguments import parse_args
from pretraining.data import build_datasets, read_tokenizer
from pretraining.monitor import Monitor, read_log
from ranks import pretrain_gpt, run_program, run_ranks, torchrun

from moba_megatron.inspect.__main__ import main as inspect
from moba_megatron.inspect.checkpoint import find_checkpoint, read_common, single_process
from moba_megatron.inspect.trace import load_trace
from moba_megatron.megatron.arguments import add_moba_arguments

MODEL = ["--num-layers", "3", "--hidden-size", "64", "--num-attention-heads", "4", "--group-query-attention",
         "--num-query-groups", "2", "--seq-length", "128", "--moba-chunk-size", "16", "--moba-topk", "3",
         "--moba-full-attention-layers", "last:1"]
TRAINING = ["--train-iters", "6", "--lr", "1e-2", "--lr-warmup-iters", "1", "--global-batch-size", "2",
            "--log-interval", "1", "--eval-iters", "2", "--eval-interval", "6", "--loss-position-bins", "8",
            "--split", "50,50,0"]


def train(processes: int, log: Path, data_path: Path, *flags: str, launched: bool = False) -> dict:
    """Trains, under torchrun if ``launched``, and returns the log's records."""
    flags = [*MODEL, *TRAINING, "--data-path", str(data_path), "--log-jsonl", str(log), *flags]
    if launched:
        result = torchrun(processes, "pretrain_gpt", *flags, fork=False)  # the one that starts as users do
        assert result.returncode == 0, result.stderr[-4000:]
    else:
        run_ranks(pretrain_gpt, processes, log.parent, flags)
    return read_log(log)


def load_weights(rank, size, places: list[Path]) -> str:
    """What a rank says on stderr where weights are in another place on each rank."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(
            SharedError, match=r"--pretrained-checkpoint .* the ranks see different checkpoints, \[3, None\]"):
        checkpointing.load_weights(SimpleNamespace(pretrained_checkpoint=str(places[rank])), None)
    return err.getvalue()


def losses(records: dict) -> list[tuple]:
    """Everything of the steps and validations that must be reproducible."""
    return [(r["iteration"], r["loss"], r["grad_norm"], r["lr"]) for r in records["step"]] + [
        (r["iteration"], r["loss"], r["by_position"]) for r in records["validation"]]


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> Path:
    """Four documents of text that a small model learns fast."""
    directory = tmp_path_factory.mktemp("data")
    words = "the quick brown fox jumps over the lazy dog and the dog sleeps on".split()
    rng = np.random.default_rng(0)
    for i in range(4):
        (directory / f"{i}.txt").write_text(" ".join(rng.choice(words, 400)))
    prefix = directory / "words"
    files = [str(file) for file in sorted(directory.glob("*.txt"))]
    assert prepare_data.main(["--input", *files, "--output-prefix", str(prefix)]) == 0
    return prefix


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_path) -> tuple[dict, Path]:
    """Six steps on two context parallel ranks; (records, directory)."""
    run = tmp_path_factory.mktemp("uninterrupted")
    records = train(2, run / "log.jsonl", data_path, "--context-parallel-size", "2", "--use-distributed-optimizer",
                    "--save-selection", str(run / "selection.npz"), "--tensorboard-dir", str(run / "tensorboard"),
                    "--router-log-interval", "3")
    return records, run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data_path) -> Path:
    """A run of the same that stopped after three steps, with a checkpoint."""
    run = tmp_path_factory.mktemp("stopped")
    records = train(2, run / "log.jsonl", data_path, "--context-parallel-size", "2", "--use-distributed-optimizer",
                    "--save", str(run / "checkpoints"), "--exit-interval", "3")
    assert len(records["step"]) == 3
    return run


class TestData:
    def test_bytes_come_back(self, tmp_path):
        texts = ["Grüße, 世界\n", "second document", "third"]
        (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
        (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts[1:]) + "\n")
        prefix = tmp_path / "deep" / "data"
        assert prepare_data.main(["--input", str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "--json-key", "body",
                                  "--output-prefix", str(prefix)]) == 0
        dataset, tokenizer = IndexedDataset(str(prefix)), prepare_data.ByteLevelTokenizer()
        assert [tokenizer.detokenize(dataset[i]) for i in range(len(dataset))] == texts
        assert all(dataset[i][-1] == tokenizer.eod for i in range(len(dataset)))
        facts = json.loads(Path(f"{prefix}.json").read_text())
        assert facts["documents"] == 3 and facts["vocab_size"] == 257

    def test_hugging_face_tokenizer_from_a_directory(self, tmp_path):
        pytest.importorskip("transformers")
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_text(json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": {"<end>": 0, "a": 1, "b": 2}, "unk_token": "<end>"}}))
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}))
        (tmp_path / "a.txt").write_text("a b b a")
        assert prepare_data.main(["--input", str(tmp_path / "a.txt"), "--output-prefix", str(tmp_path / "data"),
                                  "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]) == 0
        dataset = IndexedDataset(str(tmp_path / "data"))  # owns the memory that its arrays show
        assert dataset[0].tolist() == [1, 2, 2, 1, 0]

    @pytest.mark.parametrize("content, flags, message", [
        pytest.param(None, [], "is none", id="no file"),
        pytest.param("", [], "no text", id="empty"),
        pytest.param('{"other": 1}\n', [], "line 1", id="no such key"),
        pytest.param("not json\n", [], "line 1", id="not json"),
        pytest.param('{"text": "x"}\n', ["--tokenizer-type", "HuggingFaceTokenizer"], "--tokenizer-model",
                     id="no tokenizer"),
    ])
    def test_bad_input_is_named(self, tmp_path, capsys, content, flags, message):
        if content is not None:
            (tmp_path / "a.jsonl").write_text(content)
        status = prepare_data.main(["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "d"),
                                    *flags])
        assert status == 2 and message in capsys.readouterr().err


class TestTraining:
    def test_loss_falls(self, uninterrupted):
        records, _ = uninterrupted
        assert records["step"][-1]["loss"] < records["step"][0]["loss"] - 1

    def test_loss_by_position_averages_to_the_loss(self, uninterrupted):
        result = uninterrupted[0]["validation"][-1]
        parts = result["by_position"]
        assert [part[:2] for part in parts] == [[16 * i, 16 * (i + 1)] for i in range(8)]
        assert np.mean([part[2] for part in parts]) == pytest.approx(result["loss"], rel=1e-6)
        assert result["trailing_loss"] == parts[-1][2]

    def test_selection_counts_every_choice_of_sparse_layers(self, uninterrupted):
        trace = load_trace(uninterrupted[1] / "selection.npz")
        assert trace.layers == (1, 2) and (trace.num_heads, trace.num_kv_heads) == (4, 2)
        assert (trace.seq_length, trace.sequences, trace.about["iteration"]) == (128, 1, 6)
        expected = 16 * np.minimum(np.arange(8), 2)
        assert all((trace.counts(layer).sum(2) == expected).all() for layer in trace.layers)

    def test_router_is_logged_every_third_step(self, uninterrupted):
        records, run = uninterrupted
        assert [record["iteration"] for record in records["router"]] == [3, 6]
        for record in records["router"]:
            assert sorted(record["layers"]) == ["1", "2"]
            for layer in record["layers"].values():
                assert 0 < layer["recall"] <= layer["best_recall"] <= 1
                assert np.mean(layer["heads"]["recall"]) == pytest.approx(layer["recall"], rel=1e-3)
        [events] = (run / "tensorboard").glob("events.*")
        assert b"router-recall/layer-002" in events.read_bytes()

    def test_plots_and_tensorboard_are_written(self, uninterrupted):
        pytest.importorskip("matplotlib")
        _, run = uninterrupted
        assert plot_run([str(run)]) == 0
        for name in ("loss.png", "position.png", "selection.png"):
            assert (run / name).stat().st_size > 5000
        assert list((run / "tensorboard").glob("events.*"))

    def test_resumed_run_is_bitwise_the_uninterrupted_one(self, tmp_path, data_path, uninterrupted, stopped):
        run = shutil.copytree(stopped, tmp_path / "run")
        records = train(2, run / "log.jsonl", data_path, "--context-parallel-size", "2", "--use-distributed-optimizer",
                        "--load", str(run / "checkpoints"), launched=True)
        assert [r["iteration"] for r in records["start"]] == [0, 3]
        assert losses(records) == losses(uninterrupted[0])

    def test_resumes_on_one_rank(self, tmp_path, data_path, uninterrupted, stopped):
        run = shutil.copytree(stopped, tmp_path / "run")
        records = train(1, run / "log.jsonl", data_path, "--use-distributed-optimizer",
                        "--load", str(run / "checkpoints"))
        self._assert_close(records, uninterrupted[0])

    def test_tensor_and_sequence_parallel_ranks_train_the_same(self, tmp_path, data_path, uninterrupted):
        # Half the multiple a rank: the padded vocabulary, over which the softmax runs, stays the same.
        records = train(2, tmp_path / "log.jsonl", data_path, "--tensor-model-parallel-size", "2",
                        "--sequence-parallel", "--make-vocab-size-divisible-by", "64")
        self._assert_close(records, uninterrupted[0])

    def test_pipeline_stages_train_and_resume(self, tmp_path, data_path):
        flags = ["--pipeline-model-parallel-size", "2", "--num-layers", "4", "--bf16", "--moba-key-conv", "3",
                 "--recompute-granularity", "full", "--save", str(tmp_path / "c"), "--load", str(tmp_path / "c"),
                 "--save-selection", str(tmp_path / "s.npz")]
        train(2, tmp_path / "log.jsonl", data_path, *flags, "--exit-interval", "3")
        records = train(2, tmp_path / "log.jsonl", data_path, *flags)
        assert [r["iteration"] for r in records["step"]] == [1, 2, 3, 4, 5, 6]
        assert records["step"][-1]["loss"] < records["step"][0]["loss"] - 1
        assert load_trace(tmp_path / "s.npz").layers == (1, 2, 3)

    def _assert_close(self, records, expected):
        got, want = ([r["loss"] for r in x["step"] + x["validation"]] for x in (records, expected))
        # Sums in another order differ by fp32 rounding, which six steps of Adam enlarge.
        assert got == pytest.approx(want, rel=2e-4)

    def test_a_run_that_would_drop_trained_filters_stops(self, monkeypatch):
        flags = ["--moba-key-conv", "3", "--moba-full-attention-layers", "last:1"]
        saved = vars(add_moba_arguments(argparse.ArgumentParser()).parse_args(flags)) | {"num_layers": 4}
        args = argparse.Namespace(**saved | {"moba_key_conv": 0}, load="c", use_distributed_optimizer=False)
        monkeypatch.setattr(checkpointing, "_ARCHITECTURE", ("num_layers",))
        saved |= {"use_distributed_optimizer": False, "bf16": False}
        args.bf16 = False
        monkeypatch.setattr(checkpointing.dist_checkpointing, "load_common_state_dict", lambda _: {"run": saved})
        dropped = pytest.raises(ValueError, match="--load c: .*key convolutions in layers 1, 2, 3, .*--moba-key-conv 3")
        with single_process(torch.device("cpu")), dropped:
            checkpointing.load_checkpoint(args, 1, None, None, None)


class TestInspect:
    def test_a_checkpoint_shows_what_the_run_itself_recorded(self, tmp_path):
        # Every sample is the same text: the documents repeat it, and its length is the sequence's.
        pytest.importorskip("matplotlib")
        text = "".join(np.random.default_rng(0).choice(list("abcdefgh "), 128))
        (tmp_path / "text.txt").write_text(text)
        for i in range(2):
            (tmp_path / f"{i}.txt").write_text(20 * text)
        assert prepare_data.main(["--input", str(tmp_path / "0.txt"), str(tmp_path / "1.txt"),
                                  "--output-prefix", str(tmp_path / "data")]) == 0
        train(2, tmp_path / "log.jsonl", tmp_path / "data", "--tensor-model-parallel-size", "2", "--qk-layernorm",
              "--train-iters", "3", "--global-batch-size", "1", "--eval-iters", "1", "--save", str(tmp_path / "c"),
              "--save-selection", str(tmp_path / "run.npz"))
        result = run_program(["-m", "moba_megatron.inspect", "--load", tmp_path / "c", "--text", tmp_path / "text.txt",
                              "--trace", tmp_path / "trace.npz", "--output", tmp_path / "look", "--device", "cpu"])
        assert result.returncode == 0, result.stderr[-4000:]
        of_run, of_checkpoint = load_trace(tmp_path / "run.npz"), load_trace(tmp_path / "trace.npz")
        assert of_run.layers == of_checkpoint.layers == (1, 2)
        for layer in of_run.layers:
            # A score may round otherwise where the sums of two tensor parallel ranks are added.
            assert np.abs(of_run.counts(layer) - of_checkpoint.counts(layer)).sum() <= 4
        for name in ("router.html", "selection.png", "statistics.png"):
            assert (tmp_path / "look" / name).stat().st_size > 5000
        layers = json.loads((tmp_path / "look" / "statistics.json").read_text())["layers"]
        assert sorted(layers) == ["1", "2"] and 0 < layers["1"]["recall"] <= 1
        assert text[16:32] in (tmp_path / "look" / "router.html").read_text()

    def test_a_directory_without_a_checkpoint_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="--load must be a distributed checkpoint"):
            find_checkpoint(tmp_path)


    def test_a_checkpoint_of_another_release_is_refused(self, tmp_path, stopped, capsys):
        """Megatron main writes no common.pt, without which 0.16 ended in a traceback."""
        [saved] = (stopped / "checkpoints").glob("iter_*")
        checkpoint = shutil.copytree(saved, tmp_path / "checkpoint")
        assert read_common(checkpoint)["iteration"] == 3
        for part in ("common.pt", ".metadata"):
            (checkpoint / part).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"--load .*checkpoint: Megatron-Core .* cannot read its common part"):
            read_common(str(checkpoint))
        with pytest.raises(SystemExit):
            inspect(["--help"])
        assert "it must be trusted" in " ".join(capsys.readouterr().out.split())


class TestBadInput:
    def test_missing_data_ends_all_ranks_with_one_message(self, tmp_path):
        result = torchrun(2, "pretrain_gpt", *MODEL, *TRAINING, "--context-parallel-size", "2",
                          "--data-path", str(tmp_path / "nothing"))
        assert result.returncode != 0
        assert result.stderr.count("there is no file") == 1

    @pytest.mark.parametrize("documents, split, name", [(1, "969,30,1", "validation"), (2, "10,90,0", "training"),
                                                        (3, "100,0,0", "validation")])
    def test_a_split_without_documents_is_refused(self, tmp_path, capsys, documents, split, name):
        """Megatron counts epochs of nothing for ever."""
        (tmp_path / "a.jsonl").write_text('{"text": "a b c d"}\n' * documents)
        prefix = str(tmp_path / "data")
        assert prepare_data.main(["--input", str(tmp_path / "a.jsonl"), "--output-prefix", prefix]) == 0
        assert ("one document cannot be split" in capsys.readouterr().err) == (documents == 1)
        args = parse_args([*MODEL, *TRAINING, "--data-path", prefix, "--split", split])
        with pytest.raises(SharedError, match=rf"--split {split} leaves none of the {documents} document.* for {name}"):
            build_datasets(args, *read_tokenizer([prefix]))

    def test_another_architecture_is_refused(self, tmp_path, data_path, stopped):
        with pytest.raises(AssertionError, match="SharedError: .*--ffn-hidden-size 192, this run has 128"):
            train(1, tmp_path / "log.jsonl", data_path, "--use-distributed-optimizer",
                  "--load", str(stopped / "checkpoints"), "--ffn-hidden-size", "128")

    def test_weights_that_do_not_fit_are_refused(self, tmp_path, data_path, stopped):
        log, weights = tmp_path / "log.jsonl", str(stopped / "checkpoints")
        with pytest.raises(AssertionError, match="SharedError: --pretrained-checkpoint .*--ffn-hidden-size 192, this"):
            train(1, log, data_path, "--pretrained-checkpoint", weights, "--ffn-hidden-size", "128")
        with pytest.raises(AssertionError, match="SharedError: --pretrained-checkpoint .* must be a directory of ch"):
            train(1, log, data_path, "--pretrained-checkpoint", str(tmp_path))
        with pytest.raises(AssertionError, match="ValueError: --vocab-size must be at least 257.*got 256"):
            train(1, log, data_path, "--vocab-size", "256")

    def test_weights_that_ranks_see_differently_are_refused(self, tmp_path, stopped):
        """And that a later checkpoint is damaged is said."""
        shutil.copytree(stopped / "checkpoints", tmp_path / "whole")
        (tmp_path / "whole/iter_0000005").mkdir()
        (tmp_path / "whole/latest_checkpointed_iteration.txt").write_text("5")
        said = run_ranks(load_weights, 2, tmp_path, [tmp_path / "whole", tmp_path / "nothing"])
        assert "warning: --pretrained-checkpoint" in said[0] and "going back to iter_0000003, the" in said[0]

    @pytest.mark.parametrize("world, flags, message", [
        pytest.param(3, ["--context-parallel-size", "2"], "multiple of tensor x pipeline x context", id="world size"),
        pytest.param(2, ["--context-parallel-size", "2", "--seq-length", "126"], "--seq-length must be a multiple of 4",
                     id="sequence does not divide"),
        pytest.param(4, ["--context-parallel-size", "4", "--hierarchical-context-parallel-sizes", "2", "1"],
                     "--context-parallel-size (4), got 2 1", id="two levels"),
        pytest.param(4, ["--context-parallel-size", "4", "--hierarchical-context-parallel-sizes", "2", "2"],
                     "needs --cp-comm-type a2a+all_gather, got all_gather", id="levels that nothing uses"),
        pytest.param(1, ["--hidden-size", "65"], "--hidden-size must be a multiple", id="hidden size"),
        pytest.param(1, ["--num-query-groups", "3"], "--num-query-groups must divide", id="groups"),
        pytest.param(4, ["--tensor-model-parallel-size", "4"], "key/value heads (2)", id="more ranks than kv heads"),
        pytest.param(1, ["--sequence-parallel"], "--tensor-model-parallel-size 1", id="sequence parallel alone"),
        pytest.param(1, ["--global-batch-size", "3", "--micro-batch-size", "2"],
                     "--global-batch-size must be a multiple", id="batch"),
        pytest.param(1, ["--min-lr", "1"], "--min-lr must be between", id="lr"),
        pytest.param(1, ["--lr-warmup-iters", "6"], "--lr-warmup-iters must be below", id="warmup"),
        pytest.param(1, ["--train-iters", "0"], "--train-iters must be at least 1", id="no steps"),
        pytest.param(1, ["--save-interval", "2"], "needs --save", id="save interval"),
        pytest.param(2, ["--pipeline-model-parallel-size", "2"], "--num-layers must be a multiple", id="stages"),
        pytest.param(1, ["--loss-position-bins", "7"], "--loss-position-bins must divide", id="bins"),
        pytest.param(1, ["--moba-topk", "0"], "topk must be at least 1", id="topk"),
        pytest.param(1, ["--moba-full-attention-layers", "9"], "names layer 9", id="layer beyond the model"),
        pytest.param(1, ["--router-log-interval", "0"], "--router-log-interval must be at least 1", id="router log"),
        pytest.param(1, ["--router-log-interval", "5", "--attention", "full"], "there is no router", id="no router"),
        pytest.param(1, ["--overlap-param-gather"], "--overlap-param-gather needs", id="overlap"),
        pytest.param(1, ["--vocab-size", "0"], "--vocab-size must be at least 1", id="vocabulary"),
        pytest.param(1, ["--no-such-flag"], "unrecognized", id="unknown flag"),
        pytest.param(1, ["--global-batch-size", "-4"], "--global-batch-size must be at least 1", id="batch below 0"),
        pytest.param(1, ["--ffn-hidden-size", "-3"], "--ffn-hidden-size must be at least 1", id="feed-forward"),
        pytest.param(1, ["--exit-interval", "0"], "--exit-interval must be at least 1", id="exit interval"),
        pytest.param(1, ["--save-interval", "-1"], "--save-interval must be at least 1", id="save interval below 0"),
        pytest.param(1, ["--clip-grad", "-1"], "--clip-grad must be at least 0 and finite", id="clipping"),
        pytest.param(1, ["--adam-beta1", "2"], "--adam-beta1 must be at least 0 and below 1", id="beta"),
        pytest.param(1, ["--weight-decay", "nan"], "--weight-decay must be at least 0 and finite", id="weight decay"),
        pytest.param(1, ["--distributed-timeout-minutes", "0"], "--distributed-timeout-minutes must", id="timeout"),
    ])
    def test_flags_are_judged_before_anything_starts(self, monkeypatch, capsys, world, flags, message):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SystemExit) as exit:
            parse_args([*MODEL, *TRAINING, "--data-path", "x", *flags])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err

    def test_a_usage_error_ends_the_screen_and_comes_once(self):
        result = torchrun(2, "pretrain_gpt", *MODEL, *TRAINING, "--data-path", "x", "--moba-topk", "0")
        assert result.returncode != 0 and result.stderr.count("topk must be at least 1") == 1
        *_, said, rule = result.stderr.rstrip().splitlines()
        assert "error: " in said and "topk must be at least 1, got 0" in said and set(rule) == {"="}

    def test_other_ranks_are_silent(self, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(SystemExit):
            parse_args([*MODEL, *TRAINING, "--data-path", "x", "--moba-topk", "0"])
        assert capsys.readouterr().err == ""


class TestLogs:
    def _monitor(self, path, first):
        args = parse_args([*MODEL, *TRAINING, "--data-path", "x", "--log-jsonl", str(path)])
        return Monitor(args, 0, first)

    def test_resuming_drops_steps_past_the_checkpoint(self, tmp_path):
        path = tmp_path / "log.jsonl"
        for first, last in ((0, 5), (3, 6)):
            monitor = self._monitor(path, first)
            monitor.record("start", iteration=first)
            for i in range(first + 1, last + 1):
                monitor.step(i, 10.0 * first + i, 1.0, 0.1, 5.0)
            monitor.close()
        assert [r["loss"] for r in read_log(path)["step"]] == [1, 2, 3, 34, 35, 36]

    def test_a_fresh_run_starts_the_log_anew(self, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text('{"kind": "step", "iteration": 1, "loss": 9}\n{"kind": "st')
        monitor = self._monitor(path, 0)
        monitor.step(1, 2.0, 1.0, 0.1, 5.0)
        monitor.close()
        assert [r["loss"] for r in read_log(path)["step"]] == [2.0]

    @pytest.mark.parametrize("after, resumed, problem", [
        pytest.param(2.0, True, None, id="sound"),
        pytest.param(4.5, True, "jumped", id="weights lost"),
        pytest.param(2.0, False, "never resumed", id="not resumed"),
    ])
    def test_check_tells_a_sound_run_from_a_broken_one(self, after, resumed, problem):
        curve = [5.0] * 10 + [2.0] * 20 + [after] * 10 + [2.0] * 10
        records = {"step": [{"iteration": i + 1, "loss": loss + 0.01 * (i % 2)} for i, loss in enumerate(curve)],
                   "start": [{"iteration": 0}] + [{"iteration": 30}] * resumed, "validation": []}
        problems = check(records)
        assert (problems == []) if problem is None else any(problem in p for p in problems)

    def test_check_notices_a_flat_loss(self):
        records = {"step": [{"iteration": i, "loss": 5.0} for i in range(1, 41)], "start": [{"iteration": 20}],
                   "validation": []}
        assert any("fell too little" in p for p in check(records))


@pytest.mark.parametrize("reason, kind", [("[unbound_buffer.cc:78] Timed out waiting 12000ms", RuntimeError),
                                          ("no space left", RunError)])
def test_a_save_whose_other_ranks_are_lost_does_not_speak_of_the_disk(reason, kind, tmp_path, monkeypatch):
    def save(*_):
        raise RuntimeError(reason)

    monkeypatch.setattr(checkpointing, "on_first_rank", lambda *_: None)
    monkeypatch.setattr(checkpointing.dist_checkpointing, "save", save)
    args = mock.MagicMock(save=str(tmp_path), distributed_timeout_minutes=0.2)
    with pytest.raises(kind, match=re.escape(reason)) as raised:
        checkpointing.save_checkpoint(args, 4, SimpleNamespace(sharded_state_dict=dict))
    assert type(raised.value) is kind
