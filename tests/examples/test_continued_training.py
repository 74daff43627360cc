"""The example that switches attention in the middle of a run: its commands, and the table at its end."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
from benchmarks import compare_switch

SETTINGS = dict.fromkeys(compare_switch.SETTINGS, 7) | {"moba_chunk_size": 512, "moba_topk": 3}


def write_log(path, losses, validations):
    path.parent.mkdir(parents=True)
    records = [{"kind": "start", "iteration": 0, "device": "CPU", "torch": "2",
                "args": SETTINGS | {"attention": a}} for a in ("full", "moba")]
    records += [{"kind": "step", "iteration": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    records += [{"kind": "validation", "iteration": i, "loss": loss} for i, loss in validations.items()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_jump_at_the_switch_is_seen(tmp_path, capsys):
    dense = [5 - 0.01 * i for i in range(60)]
    switched = [loss + (0.5 if i == 20 else 0.1 if 20 < i < 40 else 0) for i, loss in enumerate(dense)]
    write_log(tmp_path / "switched" / "log.jsonl", switched, {20: 4.8, 40: 4.7})
    write_log(tmp_path / "dense" / "log.jsonl", dense, {20: 4.8, 40: 4.6})
    assert compare_switch.main([str(tmp_path), "--switches", "20", "40"]) == 0
    result = json.loads((tmp_path / "switch.json").read_text())
    windows = {row["window"]: round(row["difference"], 6) for row in result["windows"]}
    assert windows == {"before switch 1": 0, "step after switch 1": 0.5, "after switch 1": 0.14, "before switch 2": 0.1,
                       "step after switch 2": 0, "after switch 2": 0, "end": 0}
    assert result["environment"]["device"] == "CPU" and result["environment"]["command"].startswith("python ")
    assert result["settings"]["seq_length"] == 7 and result["settings"]["topk"] == 3
    assert result["validations"]["switched"] == {"20": 4.8, "40": 4.7}
    assert "validation after step 40: switched 4.7000, dense 4.6000" in capsys.readouterr().out


def test_missing_log_is_bad_input(tmp_path, capsys):
    assert compare_switch.main([str(tmp_path), "--switches", "3"]) == 2
    assert "there is no log" in capsys.readouterr().err


def test_commands_of_the_script(tmp_path):
    environment = os.environ | {"DRY_RUN": "1", "USE_SYSTEM_PYTHON": "1", "PYTHON": sys.executable, "DENSE": "30",
                                "MOBA": "20", "BACK": "10", "DATA_PATH": str(tmp_path / "data"),
                                "RUN": str(tmp_path / "run")}
    done = subprocess.run(["bash", "examples/megatron_lm/dense_moba_dense.sh", "--seq-length", "1024"], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    trained = [line for line in done.stderr.splitlines() if "pretrain_gpt.py" in line]
    kinds = [("moba" if "--attention moba" in line else "full", "/switched/" in line) for line in trained]
    assert kinds == [("full", False), ("moba", True), ("full", True), ("full", False)]
    assert all("--train-iters 60" in line and line.endswith("--seq-length 1024") for line in trained)
    last = shlex.split(done.stderr.splitlines()[-1])
    assert last[-1] == ("DATA_PATH=data DENSE=30 MOBA=20 BACK=10 bash examples/megatron_lm/dense_moba_dense.sh "
                        "--seq-length 1024")
    assert "--exit-interval 30" in trained[0] and "--exit-interval 50" in trained[1]
