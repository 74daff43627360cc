"""The wheel: code, type marker, templates, coefficients; small; and it works where there is no checkout."""
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from ranks import ROOT

import moba_megatron

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DATA = {"py.typed", "inspect/page.html", "plan/coefficients.json"}
LARGEST = 400_000
ARCHIVED = "pyproject.toml", "README.md", "LICENSE"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built by the project's own backend as `python -m build` does: a source archive of a copy, since building writes
    into the tree, and the wheel of that archive."""
    build_meta = pytest.importorskip("setuptools.build_meta")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in (*ARCHIVED, "moba_megatron"):
        for path in (ROOT / part).rglob("*") if (ROOT / part).is_dir() else [ROOT / part]:
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def build(what: str, folder: Path) -> None:
        code = f"import {build_meta.__name__} as backend; backend.build_{what}({str(output)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, timeout=300)

    build("sdist", source)
    archive, = output.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(output)
    build("wheel", output / archive.name.removesuffix(".tar.gz"))
    path, = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_it_holds_code_and_little_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("moba_megatron/") for name in archive.namelist() if ".dist-info/" not in name}
    assert {name for name in names if not name.endswith(".py")} == DATA
    code = {str(path.relative_to(ROOT / "moba_megatron")) for path in (ROOT / "moba_megatron").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    assert wheel.stat().st_size < LARGEST


COMMANDS = [
    (["plan", "--seq", "128K", "--gpus", "8", "--card", "h200"], 0, "torchrun"),
    (["plan", "--check"], 2, "python -m benchmarks plan-check"),
    (["inspect", "--help"], 0, "--from-trace"),
    (["bench", "kernels"], 2, "python -m benchmarks"),
    (["tune", "--help"], 0, "MOBA_TUNING_FILE"),
    (["launch", "--help"], 0, "SCRIPT"),
]
RUN_ALL = """
import contextlib, io, json, runpy, sys
found = []
for module, *flags in json.loads(sys.argv[1]):
    sys.argv, status = [module, *flags], 0
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            runpy.run_module(f"moba_megatron.{module}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
    found.append([status, said.getvalue()])
import moba_megatron
print(json.dumps([moba_megatron.__file__, found]))
"""


@pytest.fixture(scope="module")
def started(installed, tmp_path_factory) -> list:
    """What each command ends with and says, one after the other in a process: importing PyTorch takes most of it."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", RUN_ALL, json.dumps([command for command, *_ in COMMANDS])],
                          cwd=tmp_path_factory.mktemp("elsewhere"), env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    file, found = json.loads(done.stdout)
    assert Path(file).is_relative_to(installed)
    return found


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[" ".join(command[:2]) for command, *_ in COMMANDS])
def test_entry_points_start_outside_the_checkout(started, number):
    _, status, says = COMMANDS[number]
    assert started[number][0] == status and says in started[number][1], started[number]


def test_every_documented_module_is_an_entry_point_of_the_wheel(installed):
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    for module in {m for page in pages for m in re.findall(r"-m (moba_megatron[\w.]*)", page.read_text())}:
        path = installed / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("name, target", sorted(PROJECT["project"]["scripts"].items()))
def test_console_commands_exist(name, target):
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_one_version():
    version = moba_megatron.__version__
    for path, words in (("README.md", f"Version {version};"), ("CHANGELOG.md", f"## {version}"),
                        ("CITATION.cff", f"version: {version}\n")):
        assert words in (ROOT / path).read_text(), path


def test_a_read_only_checkout_is_installed_from_all_that_the_build_reads():
    """launch/common.sh copies what an editable installation needs."""
    copied = " ".join(re.findall(r"run cp -r (.*) \"\$source", (ROOT / "launch/common.sh").read_text())).split()
    assert {*ARCHIVED, "moba_megatron"} <= set(copied)
