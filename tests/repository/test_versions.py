"""The versions that are promised: Python's syntax in every file, and constraints that pip can meet."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("moba_megatron", "examples", "tests", "patches", "launch")
COMPILE = "import sys; [compile(open(name, encoding='utf-8').read(), name, 'exec') for name in sys.argv[1:]]"


def oldest_python() -> str | None:
    """A Python 3.10 of this machine, by any of the names under which it is usually found."""
    homes = [Path(home) for home in (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv") if home]
    pyenv = shutil.which("pyenv")
    homes += [Path(pyenv).resolve().parents[1]] if pyenv else []
    names = [sys.executable, shutil.which("python3.10"), *(str(found) for home in homes
                                                           for found in home.glob("versions/3.10.*/bin/python"))]
    for name in filter(None, names):
        probe = subprocess.run([name, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
        if probe.stdout.split() == ["3", "10"]:
            return name
    return None


def test_every_file_compiles_for_the_oldest_python():
    files = [str(path) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 200
    python = oldest_python()
    if python:
        command = [python, "-c", COMPILE, *files]
    else:  # its parser knows what each release of Python added
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "E9",
                   "--target-version", "py310", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def pins(name: str) -> dict[str, list[str]]:
    """Package to its lines in a constraints file and in those that it reads."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "launch" / name).read_text().splitlines():
        if line.startswith("-c "):
            found |= pins(line[3:])
        elif line and not line.startswith("#"):
            found.setdefault(re.match(r"[a-z0-9-]+", line).group(), []).append(line)
    return found


@pytest.mark.parametrize("name", ["constraints-cpu.txt", "constraints-cuda.txt"])
def test_every_requirement_has_one_exact_version(name):
    """For each Python, whatever pyproject.toml asks for; the lower bounds there stay for those who install by hand."""
    markers = pytest.importorskip("packaging.requirements")
    found = pins(name)
    wanted = re.findall(r'^ +"([a-z-]+)(?:[>\[]|")', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    wanted = [package for package in wanted if package != "moba"] + ["deepspeed", "transformers", "accelerate"]
    assert {"torch", "triton", "megatron-core", "numpy", "pytest", "hypothesis"} <= set(wanted)
    for package, lines in found.items():
        for python in ("3.10", "3.11", "3.12", "3.13"):
            settings = {"python_version": python, "python_full_version": f"{python}.0"}
            parsed = [markers.Requirement(line) for line in lines]
            holding = [one for one in parsed if one.marker is None or one.marker.evaluate(settings)]
            assert len(holding) <= 1 and all(str(one.specifier).startswith("==") for one in holding), lines
            assert holding or package not in wanted, (package, python)
    assert set(wanted) <= set(found)


def test_the_table_of_tested_combinations_agrees():
    """docs/support.md names what the constraints install."""
    table = (ROOT / "docs" / "support.md").read_text()
    for name in ("constraints-cpu.txt", "constraints-cuda.txt"):
        found = pins(name)
        for package in ("torch", "triton", "megatron-core", "transformers", "deepspeed"):
            for line in found[package]:
                version = re.search(r"==([0-9.]+)", line).group(1)
                assert re.search(rf"\b{re.escape(version)}\b", table), (package, version)


def runs(where: str) -> set[tuple[str, str]]:
    """The rows of docs/support.md's table of what runs there: the command, and the versions that it names."""
    page = (ROOT / "docs" / "support.md").read_text()
    table = page[page.index("### What runs where"):page.index("## The operator")]
    return {(command, version) for command, with_ in re.findall(rf"^\| `(.*?)` \| (.*?) \| {where} \|$", table, re.M)
            for version in re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", with_)}


def test_the_page_says_what_ci_runs():
    said = {command for command, _ in runs("CI")}
    assert said == set(re.findall(r"^bash launch/test.*?(?= \|\|)", (ROOT / ".ci" / "run").read_text(), re.M)) and said
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    matrices = dict(re.findall(r'^ +(python|triton): \[(.*)\]$', workflow, re.M))
    commands = {"python": "bash launch/test.sh", "triton": "bash launch/test_tritons.sh"}
    assert set(re.findall(r"bash launch/test\w*\.sh", workflow)) == set(commands.values())
    assert runs("workflow") == {(commands[name], version) for name, versions in matrices.items()
                                for version in re.findall(r"[0-9.]+", versions)}
    assert set(matrices) == set(commands)


def test_the_page_names_the_floors():
    page, project = (ROOT / "docs" / "support.md").read_text(), (ROOT / "pyproject.toml").read_text()
    for package in ("torch", "triton"):
        oldest = re.search(rf'"{package}>=([0-9.]+)', project).group(1)
        assert re.search(rf"^\| {package} \| {oldest} (to|and) ", page, re.M | re.I)


def test_the_rest_of_a_removed_package_is_no_version(tmp_path):
    (tmp_path / "triton-3.4.0.dist-info").mkdir()
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")  # 2.13's CUDA build stops at it
    done = subprocess.run([sys.executable, "-c", "import moba_megatron"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.stderr.splitlines()[-1] == "torch was imported"


@pytest.mark.parametrize("package, oldest", [("torch", "2.9"), ("triton", "3.5")])
def test_older_ones_are_refused_at_import(tmp_path, package, oldest):
    """In one sentence, before anything of them is imported; the oldest that pyproject.toml asks for is taken."""
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'"{package}>=([0-9.]+)', project).group(1) == oldest
    major, minor = map(int, oldest.split("."))
    for version in (f"{major}.{minor - 1}.1", f"{major - 1}.99.0", f"{major}.{minor}.0a0+git1", f"{major}.{minor}.1"):
        place = tmp_path / version
        found = place / f"{package}-{version}.dist-info"
        found.mkdir(parents=True)
        (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        for name in ("torch", "triton"):  # what stops the import is the check, or else these
            (place / f"{name}.py").write_text("raise SystemExit(__name__ + ' was imported')\n")
        done = subprocess.run([sys.executable, "-c", "import moba_megatron"], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{ROOT}"})
        said = done.stderr.splitlines()[-1]
        if tuple(map(int, version.split(".")[:2])) < (major, minor):
            assert said == f"ImportError: moba_megatron needs {package} {oldest} or later, found {version}"
        else:
            assert said == "torch was imported"
