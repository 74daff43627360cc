"""The package's rooms: how large they are, and that measuring stays outside."""
import ast
import re

from ranks import ROOT

from benchmarks import rooms
from benchmarks.__main__ import main
from tests.experimental.test_experimental import imports


def test_the_command_counts_every_line_once(capsys):
    files = (ROOT / "moba_megatron").rglob("*.py")
    total = sum(len(path.read_text().splitlines()) for path in files)
    assert sum(rooms.lines_by_room().values()) == total
    assert total <= rooms.LIMIT and main(["rooms"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].split() == ["all", f"{total:,}", "of", "at", "most", f"{rooms.LIMIT:,}"]
    assert any(line.startswith("moba_megatron/kernels ") for line in said)


def test_nothing_in_the_package_imports_what_measures_it():
    for path in (ROOT / "moba_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else [
                node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] in ("benchmarks", "tests", "examples")], path


def test_imports_point_down_in_the_drawing():
    """A room imports from lines below its own; the two that ask for more do so in a function."""
    page = (ROOT / "docs/architecture.md").read_text()
    drawing = re.search(r"## Who imports whom.*?```\n(.*?)```", page, re.DOTALL).group(1)
    level = {room: number for number, line in enumerate(drawing.splitlines()) for room in line[15:].split()}
    package = ROOT / "moba_megatron"
    rooms_there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(level) == rooms_there - {"__init__"}
    upward = set()
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for names, lazy in imports(path):
            others = {name.split(".")[1] for name in names if name.startswith("moba_megatron.")} - {room}
            for other in others & set(level):
                if room != "__init__" and level[other] <= level[room]:
                    upward.add((room, other, lazy))
    assert upward == {("context_parallel", "experimental", True), ("megatron", "inspect", True)}


def test_the_way_of_q_k_and_v_passes_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text()
    way = page[page.index("The way of q, k and v"):page.index("## Glossary")]
    files = re.findall(r"`([a-z_0-9/]+\.py)`", way)
    assert len(files) >= 10 and all((ROOT / "moba_megatron" / file).is_file() for file in files)
