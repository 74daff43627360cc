"""The tuning table: every stage has a row for everything, rows are reachable, files and overrides are obeyed."""
import json
import os
import subprocess
import sys

import pytest
import torch
from triton.backends.nvidia.compiler import CUDAOptions

from moba_megatron import tune
from moba_megatron.kernels import tuning
from moba_megatron.kernels.tuning_table import TABLE

KEYS = [dict(head_dim=d, chunk_size=c, itemsize=i) for d in (16, 64, 128, 192, 256) for c in (16, 128, 500, 4096)
        for i in (2, 4)]


@pytest.mark.parametrize("arch", [*tuning.ARCHS, tuning.INTERPRETER])
@pytest.mark.parametrize("stage", TABLE)
def test_every_stage_has_a_row(stage, arch):
    with tuning.forced(arch=arch):
        for key in KEYS:
            config = tuning.config(stage, **key)
            if stage == "route":  # a program is one warp
                assert config.keys() == {"BLOCK"}
            else:
                assert config["num_warps"] in (1, 2, 4, 8, 16) and config["num_stages"] >= 1


@pytest.mark.parametrize("stage", TABLE)
def test_every_row_says_why_and_names_known_architectures(stage):
    for row in TABLE[stage]:
        assert row.why
        assert row.archs == "*" or set(row.archs.split()) <= {*tuning.ARCHS, tuning.INTERPRETER}


def test_the_first_row_that_fits_wins(monkeypatch):
    rows = (tuning.Row("sm_90", {"head_dim": 64}, {"BLOCK_M": 1}, "a"),
            tuning.Row("*", {"chunk_size": 128}, {"BLOCK_M": 2}, "b"),
            tuning.Row("*", {}, {"BLOCK_M": 3}, "c"))
    monkeypatch.setitem(TABLE, "made up", rows)

    def chosen(arch, **key):
        with tuning.forced(arch=arch):
            return tuning.config("made up", **key)["BLOCK_M"]

    assert chosen("sm_90", head_dim=64, chunk_size=512) == 1
    assert chosen("sm_90", head_dim=80, chunk_size=128) == 2
    assert chosen("sm_86", head_dim=64, chunk_size=512) == 3


def test_a_config_is_a_copy():
    stage = next(iter(TABLE))
    tuning.config(stage, **KEYS[0])["num_warps"] = 99
    assert tuning.config(stage, **KEYS[0])["num_warps"] != 99


@pytest.mark.parametrize("capability, arch", [
    ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_86"),
    ((13, 7), "sm_86")])
def test_architecture_of_a_card(capability, arch):
    assert tuning.arch_of_capability(*capability) == arch


def test_old_cards_are_refused():
    with pytest.raises(ValueError, match="compute capability 8.0 or later, got 7.5"):
        tuning.arch_of_capability(7, 5)


def test_missing_stage_and_missing_row(monkeypatch):
    with pytest.raises(KeyError, match="no stage 'nonsense'"):
        tuning.config("nonsense")
    monkeypatch.setitem(TABLE, "made up", (tuning.Row("sm_80", {}, {}, "x"),))
    with tuning.forced(arch="sm_90"), pytest.raises(LookupError, match="no row .* 'made up' fits sm_90"):
        tuning.config("made up")


def test_file_and_architecture_from_the_environment(monkeypatch, tmp_path):
    stage = next(iter(TABLE))
    path = tmp_path / "card.json"
    row = {"stage": stage, "archs": "sm_80", "upto": {"head_dim": 64}, "config": {"num_warps": 7}, "why": "test"}
    path.write_text(json.dumps({"rows": [row]}))
    monkeypatch.setenv("MOBA_TUNING_FILE", str(path))
    with tuning.forced(arch="sm_80"):
        assert tuning.config(stage, head_dim=64) == {"num_warps": 7}
        assert tuning.config(stage, head_dim=65, itemsize=2) != {"num_warps": 7}
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_arch_of_device", tuning._arch_of_device.__wrapped__)  # which asks once a process
    monkeypatch.setenv("MOBA_TUNING_ARCH", "sm_80")
    assert tuning.arch_of(torch.device("cpu")) == "sm_80"
    monkeypatch.setenv("MOBA_TUNING_ARCH", "sm_1")
    with pytest.raises(ValueError, match="MOBA_TUNING_ARCH must be one of"):
        tuning.arch_of(torch.device("cpu"))


@pytest.mark.parametrize("value", ["ieee", "bf16x6", "tf32"])
def test_products_of_fp32_by_the_environment(value):
    program = "import torch; from moba_megatron.kernels import host; print(host.precision(torch.float32))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          env={**os.environ, "MOBA_FP32_PRODUCTS": value, "TRITON_INTERPRET": "0"})
    if value == "tf32":
        assert done.returncode and "MOBA_FP32_PRODUCTS must be bf16x6 or ieee, got 'tf32'" in done.stderr
    else:
        known = value in CUDAOptions.allowed_dot_input_precisions
        assert done.stdout.split() == [value if known else "ieee"], done.stderr


def test_a_bad_file_is_named(monkeypatch, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"rows": [{"stage": "gate"}]}')
    monkeypatch.setenv("MOBA_TUNING_FILE", str(path))
    with pytest.raises(ValueError, match="MOBA_TUNING_FILE must name a file .*bad.json"):
        with tuning.forced(arch="sm_80"):
            tuning.config("gate", head_dim=64)


@pytest.mark.parametrize("stage", TABLE)
def test_a_file_for_kernels_that_take_other_options_is_refused(stage, monkeypatch, tmp_path):
    """By its name and the option's, before anything is launched."""
    config = {**TABLE[stage][0].config, "BY_ROWS": 1}
    path = tmp_path / "older.json"
    path.write_text(json.dumps({"rows": [{"stage": stage, "archs": "*", "upto": {}, "config": config, "why": "x"}]}))
    monkeypatch.setenv("MOBA_TUNING_FILE", str(path))
    with pytest.raises(ValueError, match=f"older.json.* row for {stage} sets BY_ROWS, which no kernel"):
        tuning.rows(stage)


def test_climb_finds_the_best_of_single_steps_and_skips_what_does_not_work():
    def measure(config):
        if config["num_stages"] == 3:
            return None
        return 1 + abs(config["BLOCK_M"] - 128) / 64 + abs(config["num_warps"] - 8) / 4

    best, ms, first = tune.climb({"BLOCK_M": 32, "num_warps": 4, "num_stages": 2}, measure, lambda: True)
    assert best == {"BLOCK_M": 128, "num_warps": 8, "num_stages": 2}
    assert ms == 1 and first == 3.5


def test_climb_stops_when_time_is_up():
    assert tune.climb({"BLOCK_M": 32}, lambda config: 1 / config["BLOCK_M"], lambda: False)[0] == {"BLOCK_M": 32}


def test_the_interpreter_gets_small_tiles_unless_a_row_is_its_own(monkeypatch):
    monkeypatch.setitem(TABLE, "made up", (tuning.Row("*", {"head_dim": 64}, {"BLOCK_M": 128, "SPLIT": 4096}, "x"),
                                           tuning.Row("interpreter", {}, {"BLOCK_M": 64}, "x")))
    with tuning.forced(arch=tuning.INTERPRETER):
        assert tuning.config("made up", head_dim=64) == {"BLOCK_M": 32, "SPLIT": 4096}
        assert tuning.config("made up", head_dim=65) == {"BLOCK_M": 64}


def test_a_file_of_version_0_1_is_read(monkeypatch, tmp_path):
    """Its words for stages and keys; where Gluon can run needs no bound any more."""
    row = {"archs": "sm_86", "config": {"BLOCK_M": 16}, "why": "x"}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"rows": [{**row, "stage": "attention_fwd_own", "upto": {"slots": 7, "head_dim": 64}},
                                         {**row, "stage": "attention_bwd_dkv", "upto": {"portable": 1}}]}))
    monkeypatch.setenv("MOBA_TUNING_FILE", str(path))
    assert tuning.rows("attention_fwd_diagonal")[0].upto == {"choices": 7, "head_dim": 64}
    assert tuning.rows("attention_bwd_dkdv")[0].upto == {}
