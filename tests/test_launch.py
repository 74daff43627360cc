"""The launch scripts: what DRY_RUN=1 prints, and what is said where something is missing. Nothing is installed."""
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["quickstart.sh", "test.sh", "pretrain_single_gpu.sh", "pretrain_multi_gpu.sh", "pretrain_multi_node.sh",
           "pretrain_deepspeed.sh"]
TOOLS = ["bash", "awk", "cat", "cksum", "cut", "df", "dirname", "grep", "head", "mkdir", "rm"]


def launch(script: str, *flags: str, path: str | None = None, **variables: str) -> subprocess.CompletedProcess:
    """A script in an environment with nothing but PATH, HOME and these variables."""
    environment = {"PATH": path or os.environ["PATH"], "HOME": os.environ["HOME"], "PYENV_ROOT": "", **variables}
    return subprocess.run(["bash", str(ROOT / "launch" / script), *flags], env=environment, cwd="/", text=True,
                          capture_output=True, timeout=60)


def command(name: str, directory: Path, script: str) -> None:
    """A command of that name whose body is the shell script."""
    file = directory / name
    file.write_text("#!/bin/sh\n" + script)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def bare_path(tmp_path) -> Path:
    """A directory for PATH with the shell's tools and no Python."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in TOOLS:
        (directory / tool).symlink_to(shutil.which(tool))
    return directory


class TestDryRun:
    @pytest.fixture
    def dry(self, tmp_path):
        return {"DRY_RUN": "1", "VENV": str(tmp_path / "venv"), "GPUS": "4", "NNODES": "2", "MASTER_ADDR": "first",
                "DATA_PATH": "data/mine"}

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_prints_every_step_and_does_nothing(self, tmp_path, dry, script):
        result = launch(script, **dry)
        assert result.returncode == 0, result.stderr
        commands = [line for line in result.stderr.splitlines() if line.startswith("+ ")]
        assert any("-m venv" in line for line in commands)
        assert any("pip install" in line and "--editable" in line for line in commands)
        goal = {"test.sh": "-m pytest", "pretrain_deepspeed.sh": "examples/pretrain_deepspeed.py"}.get(
            script, "examples/pretrain_gpt.py")
        assert any(goal in line for line in commands)
        assert not (tmp_path / "venv").exists()

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_flags_are_passed_on_last(self, dry, script):
        flag = ["-k", "gate"] if script == "test.sh" else ["--seq-length", "4096"]
        result = launch(script, *flag, **dry)
        ends = [line for line in result.stderr.splitlines() if line.endswith(" ".join(flag))]
        assert len(ends) == (2 if script in ("quickstart.sh", "test.sh") else 1), result.stderr

    def test_quickstart_stops_and_resumes(self, dry):
        lines = launch("quickstart.sh", **dry, ITERS="100").stderr.splitlines()
        first, second = [line for line in lines if "pretrain_gpt.py" in line]
        assert "--exit-interval 50" in first and "--exit-interval" not in second
        for line in (first, second):
            assert "--train-iters 100" in line and "--load runs/quickstart/checkpoints" in line

    def test_multi_gpu_splits_over_context(self, dry):
        line = launch("pretrain_multi_gpu.sh", **dry, TP="2").stderr.splitlines()[-1]
        assert "--nproc-per-node 4" in line
        assert "--tensor-model-parallel-size 2" in line and "--context-parallel-size 2" in line

    def test_multi_node_reads_slurm(self, dry, tmp_path):
        commands = tmp_path / "commands"
        commands.mkdir()
        command("scontrol", commands, 'echo "$3-001"; echo "$3-002"\n')
        for name in ("NNODES", "MASTER_ADDR", "GPUS"):
            del dry[name]
        result = launch("pretrain_multi_node.sh", path=f"{commands}:{os.environ['PATH']}", **dry, SLURM_NNODES="2",
                        SLURM_JOB_NODELIST="node", SLURM_GPUS_ON_NODE="8", SLURM_JOB_ID="77")
        line = result.stderr.splitlines()[-1]
        assert "--nnodes 2 --nproc-per-node 8" in line and "--rdzv-endpoint node-001:29500 --rdzv-id 77" in line

    @pytest.mark.parametrize("name", ["NNODES", "MASTER_ADDR", "DATA_PATH"])
    def test_multi_node_names_what_is_missing(self, dry, name):
        del dry[name]
        result = launch("pretrain_multi_node.sh", **dry)
        assert result.returncode == 1 and f"{name} is not set" in result.stderr


class TestMissingThings:
    def test_no_python(self, bare_path):
        result = launch("test.sh", path=str(bare_path), VENV=str(bare_path / "venv"))
        assert result.returncode == 1 and "needs Python 3.10 to 3.13" in result.stderr

    def test_old_python_is_named(self, bare_path):
        command("python3", bare_path, 'case "$2" in pass) ;; *platform*) echo 3.8.10 ;; *) exit 1 ;; esac\n')
        result = launch("test.sh", path=str(bare_path), VENV=str(bare_path / "venv"))
        assert result.returncode == 1 and "python3 is 3.8.10" in result.stderr

    def test_python_without_venv(self, bare_path):
        command("python3", bare_path, 'case "$2" in *ensurepip*) exit 1 ;; esac\n')
        result = launch("test.sh", path=str(bare_path), VENV=str(bare_path / "venv"))
        assert result.returncode == 1 and "apt install python3-venv" in result.stderr

    def test_no_room(self, bare_path):
        command("python3", bare_path, "")
        (bare_path / "df").unlink()
        command("df", bare_path, 'echo header; echo "/dev/x 100 100 2097152 100% /"\n')
        result = launch("test.sh", path=str(bare_path), VENV=str(bare_path / "venv"))
        assert result.returncode == 1 and "needs 4 GB" in result.stderr and "2 GB are free" in result.stderr


def test_ci_runs_the_tests():
    assert "bash launch/test.sh" in (ROOT / ".ci/run").read_text()
