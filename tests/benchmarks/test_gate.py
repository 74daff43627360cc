"""The gate: this checkout beside a copy of it, and beside a copy that computes something else."""
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton
from ranks import ROOT

from benchmarks import gate, gate_worker
from benchmarks.__main__ import main

TRY = ["--device", "cpu", "--backend", "reference", "--turns", "2", "--repeats", "1"]


@pytest.fixture
def other(tmp_path):
    """A copy of the package: its operator adds a little where sequences are packed, and it has no decoding."""
    shutil.copytree(ROOT / "moba_megatron", tmp_path / "other/moba_megatron", ignore=shutil.ignore_patterns("*.pyc"))
    with open(tmp_path / "other/moba_megatron/__init__.py", "a") as file:
        file.write("\nright = moba_attn_varlen\n\n\ndef moba_attn_varlen(q, k, v, cu_seqlens, *a, **kw):\n"
                   "    return right(q, k, v, cu_seqlens, *a, **kw) + (1e-3 if len(cu_seqlens) > 2 else 0)\n")
    (tmp_path / "other/moba_megatron/ops/decode.py").write_text("raise ImportError('not in this version')\n")
    return tmp_path / "other"


def test_both_sides_are_timed_and_compared(other, tmp_path, capsys):
    stored, page = tmp_path / "gate.json", tmp_path / "gate.md"
    assert main(["gate", "--against", str(other), "--rows", "tiny-decode", "tiny-packed", "tiny", *TRY, "--limit",
                 "1e-6", "--json", str(stored), "--write", str(page)]) == 1
    result = json.loads(stored.read_text())
    decode, packed, alone = result["rows"]
    assert packed["status"] == alone["status"] == "slower" and packed["ratio"] > 0 and result["against"]
    assert len(packed["turns"]["this"]) == len(packed["turns"]["other"]) == 2 + 4  # above the limit: timed again
    assert 1e-5 < packed["difference"] < 1e-1 and alone["difference"] == 0
    assert decode["status"] == "failed" and "ImportError: not in this version" in decode["reason"]
    assert "| tiny-packed |" in page.read_text() and "same bits" in capsys.readouterr().out


def test_one_checkout_with_two_tritons(tmp_path, capsys):
    """This side runs with the Triton of the folder that is named; the table says which made it."""
    (tmp_path / "triton-99.0.dist-info").mkdir()
    (tmp_path / "triton-99.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 99.0\n")
    assert main(["gate", "--against", str(ROOT), "--triton", str(tmp_path), *TRY]) == 2
    assert "--triton must be a folder that holds a folder triton" in capsys.readouterr().err
    (tmp_path / "triton").symlink_to(Path(triton.__file__).parent)
    main(["gate", "--against", str(ROOT), "--triton", str(tmp_path), "--rows", "tiny", *TRY,
          "--json", str(tmp_path / "x.json")])
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert row["triton"] == {"this": "99.0", "other": triton.__version__} and row["difference"] == 0
    assert f"Triton 99.0 for {triton.__version__}" in capsys.readouterr().out


def test_context_parallel_is_timed_on_what_the_operator_gives():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        row = asdict(next(row for row in gate.TINY if row.kind == "cp"))
        run, alone = (make(row, torch.device("cpu"), "reference")() for make in (
            gate_worker.context_parallel, gate_worker.operator))
        for ours, want in zip(run, alone):
            torch.testing.assert_close(ours, want)
    finally:
        torch.distributed.destroy_process_group()


def test_bad_input_and_missing_gpus(tmp_path, monkeypatch, capsys):
    assert main(["gate", "--against", str(tmp_path), *TRY]) == 2
    assert "--against must be a checkout" in capsys.readouterr().err
    assert main(["gate", "--against", str(ROOT), "--rows", "nonsense", *TRY]) == 2
    assert "--rows must name rows, got 'nonsense'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = dict.fromkeys(("device", "driver", "torch", "triton", "cudnn", "commit", "when"), "x")
    monkeypatch.setattr(gate.environment, "describe", lambda device: about)
    assert main(["gate", "--against", str(ROOT), "--rows", "cp2"]) == 0
    assert "two GPUs are needed" in capsys.readouterr().out


def test_rows_are_those_that_the_gate_promises():
    kinds = [row.kind for row in gate.ROWS]
    assert kinds.count("operator") == 8 and kinds.count("decode") == kinds.count("cp") == 1
    every = *gate.ROWS, *gate.BY_NAME, *gate.TINY
    assert len({row.name for row in every}) == len(every)


def test_rows_of_the_host_wait_for_nothing():
    """Each call is timed alone, and there are many: the least of them is the host's own time."""
    host = next(row for row in gate.BY_NAME if row.kind == "host")
    row = asdict(host) | {"tokens": 64, "chunk_size": 16, "head_dim": 16}
    state = {}
    gate_worker.answer({"do": "prepare", "row": row, "backend": "reference", "path": "/dev/null"}, state,
                       torch.device("cpu"))
    assert len(gate_worker.answer({"do": "time", "repeats": 2}, state, torch.device("cpu"))["ms"]) == 40


def test_a_folder_within_another_repository_has_not_its_commit(tmp_path):
    def git(*command):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    inner = tmp_path / "copy"
    inner.mkdir()
    assert len(gate.commit_of(tmp_path)) == 12
    assert gate.commit_of(inner) == "copy"
