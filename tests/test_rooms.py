"""The package's rooms: how large they are, and that measuring stays outside."""
import ast

from ranks import ROOT

from benchmarks import rooms
from benchmarks.__main__ import main


def test_the_command_counts_every_line_once(capsys):
    files = (ROOT / "moba_megatron").rglob("*.py")
    total = sum(len(path.read_text().splitlines()) for path in files)
    assert sum(rooms.lines_by_room().values()) == total
    assert main(["rooms"]) == int(total > rooms.LIMIT)
    said = capsys.readouterr().out.splitlines()
    assert said[-1].split() == ["all", f"{total:,}", "of", "at", "most", f"{rooms.LIMIT:,}"]
    assert any(line.startswith("moba_megatron/kernels ") for line in said)


def test_nothing_in_the_package_imports_what_measures_it():
    for path in (ROOT / "moba_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else [
                node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] in ("benchmarks", "tests", "examples")], path
