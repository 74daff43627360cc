"""The 50M model's example: its size, its attentions, its batches, and the A6000's smoke script with a toy model."""
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from benchmarks import compare_50m, train_50m, training
from benchmarks.gpt_50m import attention, text
from benchmarks.gpt_50m.loop import Plan, Trainer
from benchmarks.gpt_50m.model import GPT, TOY, Shape, rotate

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def _toy(name, chunk_size=8, topk=3, length=64, seed=1):
    torch.manual_seed(seed)
    found = attention.build(name, TOY.layers, TOY.head_dim, chunk_size, topk, CPU)
    return Trainer(GPT(TOY, found, length), found, Plan(4, 2, 2, length, log_interval=2), CPU)


@pytest.fixture
def windows(tmp_path):
    path = tmp_path / "text.bin"
    path.write_bytes(b"def f(x):\n    return x + 1\n\n\n" * 400)
    return text.Windows(path, 64, CPU, seed=1)


def test_it_has_50m_parameters():
    with torch.device("meta"):
        model = GPT(Shape(), attention.build("moba", 16, 64, 512, 3, CPU), 8192)
    assert 50e6 < sum(p.numel() for p in model.parameters()) < 51e6


def test_layers_attend_as_named():
    assert attention.dense_layers("hybrid", 16) == [False] * 13 + [True] * 3
    assert attention.dense_layers("moba", 16) == [False] * 16 and all(attention.dense_layers("full", 16))
    with pytest.raises(ValueError, match="--attention must be one of moba"):
        attention.build("nonsense", 16, 64, 512, 3, CPU)


def test_losses_at_the_start_are_those_of_chance_and_every_attention_starts_alike():
    tokens, targets = torch.randint(0, 256, (2, 128))
    trainers = {name: _toy(name) for name in ("moba", "hybrid", "full")}
    losses = {name: trainer.losses(tokens, targets) for name, trainer in trainers.items()}
    assert losses["moba"].shape == (128,) and losses["moba"].mean().item() == pytest.approx(5.545, abs=0.05)
    weights = [[p for _, p in sorted(t.model.named_parameters())] for t in trainers.values()]
    assert all(torch.equal(a, b) for other in weights[1:] for a, b in zip(weights[0], other))
    torch.testing.assert_close(losses["moba"][:24], losses["full"][:24])  # 3 chunks: everything is chosen
    assert not torch.allclose(losses["moba"][24:64], losses["full"][24:64], rtol=1e-6, atol=1e-6)


def test_positions_that_see_everything_train_as_with_full_attention(windows):
    weights = []
    for name, topk in (("full", 3), ("moba", 3), ("moba", 2)):
        trainer = _toy(name, topk=topk)
        for number in range(3):  # by the losses of 3 chunks of 8
            trainer.losses(*windows.batch(2 * number, 2)).view(2, -1)[:, :24].mean().backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    full, covered, fewer = weights
    torch.testing.assert_close(covered, full, rtol=0, atol=1e-5)
    assert (fewer - full).abs().max() > 1e-3


def test_a_token_sees_no_later_one():
    tokens, targets = torch.randint(0, 256, (2, 128))
    trainer = _toy("hybrid")
    before = trainer.losses(tokens, targets)
    tokens[40] = (tokens[40] + 1) % 256
    after = trainer.losses(tokens, targets)
    assert torch.equal(before[:40], after[:40]) and torch.equal(before[64:], after[64:])
    assert not torch.equal(before[40:64], after[40:64])


def test_rotation_depends_on_the_distance_alone():
    shape = Shape(width=16, heads=1)
    model = GPT(Shape(layers=0, width=16, heads=1), attention.Attention((), None, True), 32)
    q, k = torch.randn(2, 1, 1, shape.head_dim).expand(2, 32, 1, shape.head_dim)
    q, k = (rotate(x, model.cos, model.sin)[:, 0] for x in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores.diagonal(-3), scores[3, 0].expand(29))


def test_training_learns_and_times_every_step(windows):
    trainer = _toy("moba")
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-2
    steps = list(trainer.train(windows))
    assert [step.step for step in steps] == [1, 2, 3, 4] and all(step.ms > 0 for step in steps)
    assert steps[-1].loss < steps[0].loss
    found = trainer.validate(windows, 5)
    assert found["tokens"] == 4 * 64 and len(found["by_position"]) == 16
    assert sum(loss for _, _, loss in found["by_position"]) / 16 == pytest.approx(found["loss"])


def test_batches_cover_the_text_once_an_epoch_in_an_order_of_the_seed(windows, tmp_path):
    def seen(seed, first):
        view = text.Windows(tmp_path / "text.bin", 64, CPU, seed)
        return [view._order(n // view.count)[n % view.count].item() for n in range(first, first + view.count)]

    assert sorted(seen(1, 0)) == list(range(windows.count)) == seen(None, 0)
    assert seen(1, 0) == seen(1, 0) != seen(2, 0) and seen(1, 0) != seen(1, windows.count)
    tokens, targets = windows.batch(windows.count - 1, 2)  # over the end of an epoch
    assert tokens.shape == (128,) and torch.equal(tokens[1:64], targets[:63])


def test_text_is_split_by_file_and_made_once(tmp_path):
    files = []
    for i in range(200):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(f"file {i}\0.\n")
    train, validation = text.prepare(tmp_path / "out" / "text", files, 10 ** 6)
    parts = [path.read_bytes().split(b"\0")[:-1] for path in (train, validation)]
    assert parts[1] and not set(parts[0]) & set(parts[1]) and len(parts[0]) + len(parts[1]) == 200
    files[0].unlink()
    assert text.prepare(tmp_path / "out" / "text", files, 10 ** 6) == (train, validation)
    with pytest.raises(ValueError, match="--text must name files that can be read"):
        text.prepare(tmp_path / "other", files, 10 ** 6)


def test_a_validation_of_hardly_anything_is_the_end_of_the_text_instead(tmp_path):
    names = (tmp_path / f"{i}.py" for i in range(1000))
    kept = next(path for path in names if zlib.crc32(path.name.encode() + b"x = 1\n") % text.VALIDATION_SHARE == 0)
    kept.write_text("x = 1\n")
    (tmp_path / "long.txt").write_text("a b c d e\n" * 1000)
    train, validation = text.prepare(tmp_path / "out" / "text", [kept, tmp_path / "long.txt"], 10 ** 6)
    assert validation.stat().st_size == 10008 // text.VALIDATION_SHARE
    assert train.read_bytes() + validation.read_bytes() == b"a b c d e\n" * 1000 + b"\0x = 1\n\0"


@pytest.mark.parametrize("flags, message", [
    (["--seq-length", "100"], "--seq-length must be a positive multiple of 16"),
    (["--seq-length", "96", "--tokens-per-step", "1000"], "--tokens-per-step must be a multiple"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--attention", "flash-moba"], "flash_moba"),
])
def test_bad_flags_are_said(flags, message, tmp_path, capsys):
    assert train_50m.main([*flags, "--toy", "--output", str(tmp_path)]) in (2, train_50m.ABSENT)
    assert message in capsys.readouterr().err


def test_floor_counts_weights_and_attended_keys():
    args = train_50m.parse_args(["--seq-length", "32768", "--tokens-per-step", "65536", "--chunk-size", "512",
                                 "--attention", "full", "--output", "x"])
    dense = train_50m.floor_ms(Shape(), args)
    args.attention = "moba"
    sparse = train_50m.floor_ms(Shape(), args)
    pairs = 65536 * 32769 / 2
    assert dense == pytest.approx(1e3 * (6 * 50.46e6 * 65536 + 3.5 * 4 * 512 * 16 * pairs) / 790e12, rel=2e-3)
    assert 25 < sparse < 45


def test_smoke_script_trains_a_toy_and_prints_the_table(tmp_path):
    environment = {**os.environ, "USE_SYSTEM_PYTHON": "1", "PYTHON": sys.executable, "OUTPUT": str(tmp_path),
                   "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "STEPS": "2"}
    done = subprocess.run(["bash", str(ROOT / "launch/smoke_a6000.sh"), "--attention", "moba", "full", "flash-moba"],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "1000 steps" in done.stdout and "NVIDIA RTX A6000" in done.stdout and "No GPU" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(row["attention"], row["status"]) for row in result["rows"]] == [
        ("moba", "ok"), ("full", "ok"), ("flash-moba", "absent")]
    assert result["environment"]["command"].startswith("python -m benchmarks.compare_50m")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "moba-default-1/log.jsonl").read_text().splitlines()]
    assert kinds == ["start", "step", "step", "validation"]


def test_a_run_that_fails_costs_its_row_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert compare_50m.main(["--attention", "moba", "--output", str(tmp_path), "--", "--toy", "--steps",
                             "nonsense"]) == 1
    row, = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert row["status"] == "failed" and "nonsense" in row["reason"] and "failed" in capsys.readouterr().out


def _row(attention, n, ms, seed=1, loss=1.0, tail=0.9):
    return {"attention": attention, "dense_kernel": "cuDNN" if attention == "full" else None, "seq_length": n,
            "seed": seed, "status": "ok", "ms_per_65536_tokens": ms, "tokens_per_s": 1e6, "peak_memory_gib": 10.0,
            "step_ms": {"median": ms}, "minutes_per_1000_steps": 1.0, "losses": [2.0], "steps": 10,
            "tokens_per_step": 100, "chunk_size": 512, "topk": 3,
            "validations": [{"loss": loss, "by_position": [(0, 8, 2.0), (8, 16, tail)]}]}


def test_speed_table_has_measured_rows_only():
    rows = [_row("moba", n, ms) for n, ms in zip((8192, 32768), (100, 110))] + [_row("full", 32768, 300)]
    lines = {line["attention"]: line for line in training.SPEED.lines({"rows": rows})}
    assert list(lines) == ["moba", "full (cuDNN)"] and lines["full (cuDNN)"]["32K"] == "300.0"


def test_learning_table_pairs_runs_by_seed():
    rows = [_row("full", 8192, 1, 1, 1.0, 0.9), _row("full", 8192, 1, 2, 1.2, 1.0),
            _row("moba", 8192, 1, 1, 1.1, 0.9), _row("moba", 8192, 1, 2, 1.26, 1.0)]
    full, moba = training.LEARNING.lines({"rows": rows})
    assert full["validation loss"] == "1.1000 ± 0.1000" and full["minus full"] == ""
    assert moba["minus full"] == "+0.0800 ± 0.0200" and moba["minus full, last 1/16"] == "+0.0000 ± 0.0000"
