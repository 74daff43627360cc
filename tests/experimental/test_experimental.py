"""The room for what no hardware has shown: who may import it, what it says of itself, until when it may stay."""
import ast
import datetime
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moba_megatron
from moba_megatron import experimental

ROOT = Path(moba_megatron.__file__).parent
DOOR = "context_parallel/selective.py"


def imports(path):
    """(names of the package's modules, whether in a function) of each import statement of a file."""
    tree = ast.parse(path.read_text())
    functions = [x for x in ast.walk(tree) if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield [alias.name for alias in node.names], id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            package = ["moba_megatron", *path.relative_to(ROOT).parts[:-1]]
            base = ".".join(package[:len(package) + 1 - node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            yield [module, *(f"{module}.{alias.name}" for alias in node.names)], id(node) in inside


def test_nothing_imports_it_but_the_comm_type_that_asks_for_it():
    found = [(path.relative_to(ROOT).as_posix(), lazy) for path in sorted(ROOT.rglob("*.py"))
             if path.relative_to(ROOT).parts[0] != "experimental"
             for names, lazy in imports(path) if any(re.match(r"moba_megatron\.experimental\b", x) for x in names)]
    assert found and set(found) == {(DOOR, True)}, found


def test_files_of_context_parallelism_import_each_other_one_way():
    """No circle among them, and the transport nothing above itself."""
    names = {"moba_megatron." + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
             for path in (ROOT / "context_parallel").rglob("[a-z]*.py")}
    graph = {name: {x for found, _ in imports(path) for x in found if x in names} for name, path in names.items()}
    assert all(".transport." in x for name in graph if ".transport." in name for x in graph[name])
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_it_says_why_it_is_there_what_would_bring_it_in_and_until_when():
    text = " ".join(experimental.__doc__.split())
    for word in ("Why it is here:", "What would bring it in:", "Until when:", "REMOVE_BY"):
        assert word in text
    for path in (ROOT / "experimental").glob("[a-z]*.py"):
        assert f"``{path.stem}``" in text, "a module that the room does not explain"


def test_it_goes_by_its_date():
    last = datetime.date.fromisoformat(experimental.REMOVE_BY)
    if not (ROOT.parent / ".git").exists():
        pytest.skip("not a checkout")
    assert datetime.date.today() <= last, f"it was to go by {last}: remove it, or show that it pays and move it"


def test_one_line_says_so_once(caplog):
    experimental.say_once.cache_clear()
    for _ in range(2):
        experimental.say_once("something")
    assert [x.getMessage() for x in caplog.records] == [
        "something is experimental: no hardware has shown that it pays (moba_megatron/experimental)"]
