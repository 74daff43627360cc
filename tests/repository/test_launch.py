"""The launch scripts: what DRY_RUN=1 prints, and what is said where something is missing. Nothing is installed."""
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main as bench
from moba_megatron import tune
from tests import conftest
from tests.fault import on_gpus

ROOT = Path(__file__).parents[2]
SCRIPTS = ["quickstart.sh", "test.sh", "test_newest.sh", "pretrain_single_gpu.sh", "pretrain_multi_gpu.sh",
           "pretrain_multi_node.sh", "pretrain_deepspeed.sh"]
TOOLS = ["bash", "awk", "cat", "cksum", "cut", "df", "dirname", "grep", "head", "mkdir", "realpath", "rm", "sed",
         "sleep", "timeout"]
NOBODY = 65534


def launch(script: str, *flags: str, path: str | None = None, root: Path = ROOT, user: int | None = None,
           **variables: str) -> subprocess.CompletedProcess:
    """A script in an environment with nothing but PATH, HOME and these variables."""
    environment = {"PATH": path or os.environ["PATH"], "HOME": os.environ["HOME"], "PYENV_ROOT": "", **variables}
    return subprocess.run(["bash", str(root / "launch" / script), *flags], env=environment, cwd="/", text=True,
                          capture_output=True, timeout=300, user=user)


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
                "DATA_PATH": "data/mine", "TORCH_CPU": "torch==2.13.0"}  # nothing has to be asked

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_prints_every_step_and_does_nothing(self, tmp_path, dry, script):
        result = launch(script, **dry)
        assert result.returncode == 0, result.stderr
        commands = [line for line in result.stderr.splitlines() if line.startswith("+ ")]
        assert any("-m venv" in line for line in commands)
        assert any("pip install" in line and "--editable" in line for line in commands)
        goal = {"test.sh": "-m pytest", "test_newest.sh": "-m pytest",
                "pretrain_deepspeed.sh": "examples/pretrain_deepspeed.py"}.get(script, "examples/pretrain_gpt.py")
        assert any(goal in line for line in commands)
        assert not (tmp_path / "venv").exists()

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_flags_are_passed_on_last(self, dry, script):
        flag = ["-k", "gate"] if script.startswith("test") else ["--seq-length", "4096"]
        result = launch(script, *flag, **dry)
        ends = [line for line in result.stderr.splitlines() if line.endswith(" ".join(flag))]
        assert len(ends) == (2 if script in ("quickstart.sh", "test.sh", "test_newest.sh") else 1), result.stderr

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

    def test_other_tritons_are_put_beside_and_both_kinds_of_tests_run(self, dry, tmp_path):
        lines = launch("test_tritons.sh", "3.9.0", "--", "-k", "gate", **dry).stderr.splitlines()
        fetch, _, asked, compiled, interpreted = lines[-5:]
        place = f"{tmp_path}/venv/tritons/3.9.0"
        assert f"--no-deps --target {place}.part triton==3.9.0" in fetch
        assert all(f"PYTHONPATH={place}:{ROOT} " in line for line in (asked, compiled, interpreted))
        assert "triton.__version__" in asked and "3.9.0" in asked.split("-c")[1]
        assert compiled.endswith("tests/kernels/test_compile.py") and interpreted.endswith("tests/interpreted -k gate")
        assert "TRITON_INTERPRET" not in compiled and "TRITON_INTERPRET=1" in interpreted

    def test_the_oldest_and_the_newest_triton_are_the_default(self, dry):
        fetched = re.findall(r"triton==([0-9.]+)", launch("test_tritons.sh", **dry).stderr)
        oldest = re.search(r'"triton>=([0-9.]+)', (ROOT / "pyproject.toml").read_text()).group(1)
        assert fetched[0].startswith(oldest + ".") and len(fetched) == 2

    def test_a_triton_that_is_no_release_is_refused(self, dry):
        result = launch("test_tritons.sh", "newest", **dry)
        assert result.returncode == 1 and "such as 3.9.0, got newest" in result.stderr


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


    @pytest.mark.parametrize("script", ["pretrain_single_gpu.sh", "pretrain_multi_gpu.sh", "pretrain_multi_node.sh"])
    def test_no_gpu_is_said_before_anything_is_installed(self, bare_path, script):
        command("python3", bare_path, "")
        result = launch(script, path=str(bare_path), VENV=str(bare_path / "venv"), NNODES="2", MASTER_ADDR="first",
                        DATA_PATH="data/mine")
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: no GPU is visible here")

    def test_no_sanitizer(self, bare_path):
        result = launch("sanitize.sh", path=str(bare_path))
        assert result.returncode == 1 and result.stderr.startswith("error: there is no compute-sanitizer")


PYTHON = """echo "python3 $*" >>"$CALLS"
case "$*" in
    *"-m venv"*) mkdir -p "$VENV/bin"; cat "$0" >"$VENV/bin/python"; chmod +x "$VENV/bin/python" ;;
    *"index versions torch"*) echo "Available versions: 2.15.0, ${PIP_HAS:-}, 2.13.0" ;;
esac
"""


class TestWhichTorch:
    """What is announced is what is installed, on machines made of stubs: of Python, uv and the driver."""

    @pytest.fixture
    def install(self, tmp_path, bare_path):
        for tool in ("chmod", "mkdir"):
            (bare_path / tool).unlink(missing_ok=True)
            (bare_path / tool).symlink_to(shutil.which(tool))
        command("python3", bare_path, PYTHON)
        command("df", tmp_path, "echo header; echo /dev/x 100 100 99999999 1%")
        (bare_path / "df").unlink()
        shutil.copy(tmp_path / "df", bare_path / "df")
        calls = tmp_path / "calls"

        def install(**variables) -> tuple[str, list[str]]:
            calls.write_text("")
            result = launch("smoke_a6000.sh", path=str(bare_path), VENV=str(tmp_path / "venv"), CALLS=str(calls),
                            **variables)
            assert result.returncode == 0, result.stderr
            installs = [line for line in calls.read_text().splitlines() if "pip install" in line]
            printed = [line for line in result.stderr.splitlines() if line.startswith("+") and "pip install" in line]
            ran = [line for line in installs if "--dry-run" not in line]
            assert len(printed) == len(ran) or variables.get("DRY_RUN")
            return result.stderr, ran or printed

        return install

    @pytest.mark.parametrize("dry", ["0", "1"])
    @pytest.mark.parametrize("has, says, torch", [
        ("2.13.0+cpu", "the CPU build of torch==2.13.0, which pip finds", ["torch==2.13.0+cpu"]),
        ("", "no CPU build of torch==2.13.0 that uv or pip finds: the standard build", []),
    ], ids=["the CPU build", "no CPU build"])
    def test_pip(self, install, dry, has, says, torch):
        said, ran = install(PIP_HAS=has, DRY_RUN=dry)
        assert says in said and said.index(says) < said.index("pip install") and " GB to download" in said
        assert [line.split()[-1] for line in ran[:-2]] == torch
        assert "--constraint launch/constraints-cpu.txt --editable" in ran[-2]

    def test_uv_is_asked_first(self, install, bare_path):
        command("uv", bare_path, 'echo "uv $*" >>"$CALLS"')
        said, ran = install(PIP_HAS="2.13.0+cpu")
        assert "the CPU build of torch==2.13.0, which uv finds" in said
        assert ran[0].startswith("uv pip install") and ran[0].endswith("--torch-backend=cpu torch==2.13.0")
        assert not any("+cpu" in line for line in ran)

    @pytest.mark.parametrize("script", ["exit 1", "sleep 60"], ids=["fails", "hangs"])
    def test_uv_that_finds_nothing(self, install, bare_path, script):
        command("uv", bare_path, script)
        said, ran = install(PIP_HAS="2.13.0+cpu", UV_SECONDS="1")
        assert "which pip finds" in said and ran[0].endswith("pip install --quiet torch==2.13.0+cpu")

    def test_uv_that_breaks_in_the_middle(self, install, bare_path):
        command("uv", bare_path, 'echo "uv $*" >>"$CALLS"; case "$*" in *--dry-run*) ;; *) exit 1 ;; esac')
        said, ran = install()
        assert "uv failed; pip goes on" in said and "--constraint launch/constraints-cpu.txt" in ran[-2]

    def test_cuda(self, install, bare_path):
        command("nvidia-smi", bare_path, 'echo "GPU 0: a card"')
        said, ran = install()
        assert "A GPU is here: torch==2.11.0 with CUDA" in said and "3 GB to download" in said
        assert len(ran) == 2 and "--constraint launch/constraints-cuda.txt --editable" in ran[0]

    def test_other_versions(self, install):
        said, ran = install(TORCH_CPU="torch==2.14.1 triton==3.8.0")
        assert "TORCH_CPU asks for torch==2.14.1 triton==3.8.0" in said
        assert ran[0].endswith("torch==2.14.1 triton==3.8.0") and "--constraint launch/constraints.txt" in ran[1]
        said, ran = install(CONSTRAINTS="", PIP_HAS="2.13.0+cpu")
        assert "the CPU build of torch==2.13.0, which pip finds" in said
        assert "--upgrade --upgrade-strategy eager --editable" in ran[-2] and "--constraint" not in "".join(ran)


@pytest.fixture
def read_only():
    """A copy of the checkout that the user who runs the scripts cannot write to, and a folder that this user can.

    Root can write everywhere: then nobody runs them, who would not get through pytest's own folders.
    """
    user = NOBODY if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory() as folder:
        checkout, outside = Path(folder, "checkout"), Path(folder, "outside")
        for part in ("launch", "examples", "moba_megatron"):
            shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, checkout / part)
        outside.mkdir()
        places = [checkout, *checkout.rglob("*")]
        for place in places:
            place.chmod(0o555)
        if user:
            Path(folder).chmod(0o755)
            os.chown(outside, user, -1)
        yield checkout, outside, user
        for place in places:
            place.chmod(0o755)


def test_a_checkout_that_cannot_be_written_to(read_only):
    """All goes into VENV, also where one script follows another; a script that writes elsewhere ends with an error."""
    checkout, outside, user = read_only
    venv, calls, commands = outside / "venv", outside / "calls", outside / "bin"
    commands.mkdir()
    for tool in (*TOOLS, "chmod", "cp", "env"):
        (commands / tool).symlink_to(shutil.which(tool))
    command("python3", commands, 'case "$*" in *device_count*) echo 0 ;; esac\n' + PYTHON)
    (commands / "python3").chmod(0o755)
    variables = {"VENV": str(venv), "CALLS": str(calls), "PIP_HAS": "2.13.0+cpu", "HOME": str(outside)}
    for script, flags in (("quickstart.sh", ()), ("test.sh", ("-k", "gate")), ("smoke_a6000.sh", ())):
        done = launch(script, *flags, path=str(commands), root=checkout, user=user, **variables)
        assert done.returncode == 0, done.stderr
        assert "denied" not in done.stderr and "ead-only" not in done.stderr
    ran = calls.read_text()
    copy = venv / "checkout"
    for extras in ("plot", "test"):
        assert (venv / f"installed.{extras}").is_file() and f"--editable {copy}[{extras}]" in ran
    assert {path.relative_to(copy) for path in copy.rglob("*.py")} == {
        path.relative_to(checkout) for path in (checkout / "moba_megatron").rglob("*.py")}
    assert f"examples/prepare_data.py --plays --output-prefix {venv}/runs/data/plays" in ran
    assert f"--save {venv}/runs/quickstart/checkpoints" in ran and f"--output {venv}/runs/smoke_a6000" in ran
    assert ran.count("-p no:cacheprovider") == 2
    assert not [path for path in checkout.rglob("*") if not (ROOT / path.relative_to(checkout)).exists()]
    assert subprocess.run(["touch", str(checkout / "new")], user=user, capture_output=True).returncode != 0


@pytest.mark.parametrize("command", ["kernels", "decode", "readme --json out.json", "gpt", "cp", "tune",
                                     "plan-measure"])
def test_a_measurement_without_a_gpu_ends_at_once(monkeypatch, capsys, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        if command == "tune":
            tune.main(["card.json"])
        else:
            bench(command.split())
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert ("error: it measures on a CUDA device, and torch sees none here") in said[-1]


@pytest.mark.parametrize("command", ["kernels", "cliffs", "selection", "first-call"])
def test_what_that_error_advises_is_possible(monkeypatch, capsys, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench([command])
    advised = "; --device cpu tries it out all the same" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench([command, "--help"])
    assert advised == ("--device" in capsys.readouterr().out)


class TestMissionSmoke:
    CHECKOUTS = {"MEGATRON_LM": "/there/Megatron-LM", "MEGATRON_LM_ALL": "/there/0.13 /there/main"}

    def test_every_step_is_shown(self, tmp_path):
        said = launch("mission_smoke.sh", DRY_RUN="1", GPUS="2", VENV=str(tmp_path / "venv"), DATA_PATH="data/mine",
                      TORCH_CPU="torch==2.13.0", **self.CHECKOUTS)
        assert said.returncode == 0, said.stderr
        commands = [line for line in said.stderr.splitlines() if line.startswith("+ ")]
        for words in ("launch/quickstart.sh", "ZERO=3 SP=2 METHOD=ulysses", "LIMIT=1 STEPS=6",
                      "--spec moba_megatron.layer_specs moba_layer_te_spec", "-m moba_megatron.launch pretrain_gpt.py",
                      "patches/apply.sh /there/Megatron-LM", "patched /there/0.13", "patched /there/main"):
            assert any(words in line for line in commands), words
        assert len([line for line in said.stderr.splitlines() if line.endswith(" not run")]) == 12

    def test_steps_by_name(self, tmp_path):
        options = dict(DRY_RUN="1", GPUS="2", VENV=str(tmp_path / "venv"), DATA_PATH="data/mine",
                       TORCH_CPU="torch==2.13.0", **self.CHECKOUTS)
        said = launch("mission_smoke.sh", STEPS="quickstart-.*|a6000", **options)
        assert said.returncode == 0, said.stderr
        assert re.findall(r"^(\S+) +not run$", said.stderr, re.M) == ["quickstart-1", "quickstart-2-nccl", "a6000"]
        said = launch("mission_smoke.sh", STEPS="quickstart", **options)
        assert said.returncode and "STEPS names no step, got 'quickstart'" in said.stderr

    def test_what_fails_and_what_is_skipped_is_said(self, tmp_path):
        """Every script but one is good, as far as a shell that runs none of them says."""
        command("bash", tmp_path, 'case "$*" in *smoke_a6000*) echo out of memory; exit 3 ;; esac')
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "USE_SYSTEM_PYTHON": "1",
                       "PYTHON": sys.executable, "GPUS": "1", "DATA_PATH": "data/mine", "OUTPUT": str(tmp_path / "out")}
        done = subprocess.run(["/bin/bash", str(ROOT / "launch/mission_smoke.sh")], capture_output=True, text=True,
                              env=environment, timeout=300)
        table = done.stderr[done.stderr.rindex("step  "):]
        assert done.returncode == 1, done.stderr
        assert re.search(r"quickstart-1 +good", table) and re.search(r"a6000 +FAILED .*status 3: .*a6000.log", table)
        assert re.search(r"quickstart-2-nccl +skipped +two GPUs are needed", table)
        assert re.search(r"te-spec +skipped +MEGATRON_LM names no checkout", table) and "out of memory" in done.stderr


def test_fault_drills_without_a_gpu_end_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("sys.argv", ["on_gpus.py", str(tmp_path / "fault.json")])
    assert on_gpus.main() == 2
    assert capsys.readouterr().err.startswith("error: two GPUs are needed and 0 are visible")


def test_the_longest_files_come_first():
    """A name of a file that is gone would order nothing."""
    assert set(conftest.LONGEST) <= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert "--no-loadscope-reorder" in (ROOT / "launch/test.sh").read_text()


def test_ci_runs_the_tests():
    assert "bash launch/test.sh" in (ROOT / ".ci/run").read_text()
