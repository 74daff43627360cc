"""The package's rooms: how large they are, and that measuring stays outside."""
import ast
import re
from graphlib import TopologicalSorter

from ranks import ROOT

from benchmarks import rooms
from benchmarks.__main__ import main

PACKAGE = ROOT / "moba_megatron"


def imports(path):
    """(names of the package's modules, whether in a function) of each import statement of a file."""
    tree = ast.parse(path.read_text())
    functions = [x for x in ast.walk(tree) if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield [alias.name for alias in node.names], id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            package = ["moba_megatron", *path.relative_to(PACKAGE).parts[:-1]]
            base = ".".join(package[:len(package) + 1 - node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            yield [module, *(f"{module}.{alias.name}" for alias in node.names)], id(node) in inside


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
    """A room imports from lines below its own; the one that asks for more does so in a function."""
    page = (ROOT / "docs/architecture.md").read_text()
    drawing = re.search(r"## Who imports whom.*?```\n(.*?)```", page, re.DOTALL).group(1)
    level = {room: number for number, line in enumerate(drawing.splitlines()) for room in line[15:].split()}
    rooms_there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(level) == rooms_there - {"__init__"}
    upward = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for names, lazy in imports(path):
            others = {name.split(".")[1] for name in names if name.startswith("moba_megatron.")} - {room}
            for other in others & set(level):
                if room != "__init__" and level[other] <= level[room]:
                    upward.add((room, other, lazy))
    assert upward == {("megatron", "inspect", True)}


def test_files_of_context_parallelism_import_each_other_one_way():
    """No circle among them, and the transport nothing above itself."""
    names = {"moba_megatron." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
             for path in (PACKAGE / "context_parallel").rglob("[a-z]*.py")}
    graph = {name: {x for found, _ in imports(path) for x in found if x in names} for name, path in names.items()}
    assert all(".transport." in x for name in graph if ".transport." in name for x in graph[name])
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_way_of_q_k_and_v_passes_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text()
    way = page[page.index("The way of q, k and v"):page.index("## Glossary")]
    files = re.findall(r"`([a-z_0-9/]+\.py)`", way)
    assert len(files) >= 10 and all((ROOT / "moba_megatron" / file).is_file() for file in files)
