"""Turns measured rows into tables: aligned text for the terminal, markdown for the pages."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_megatron import environment
from moba_megatron.environment import as_text, save

from .cases import Case, plain_twin

Cell = Callable[[Any], str | None]
Columns = dict[str, Cell]
RESULTS = Path(__file__).parent / "results"
GIB = 2 ** 30
RENAMED = {
    "-m moba_megatron.bench ": "-m benchmarks ", "examples/megatron_lm/check_mla.py": "-m benchmarks.check_mla",
    "examples/compare_50m.py": "-m benchmarks.compare_50m",
    "examples/compare_deepspeed.py": "-m benchmarks.compare_deepspeed",
    "-m moba_megatron.plan.measure ": "-m benchmarks plan-measure "}
"""Programs that stored results name -> what they are called now."""


def case_of(row: dict) -> Case:
    return Case(**{name: value for name, value in row["case"].items() if name in Case.__dataclass_fields__})


@dataclass(frozen=True)
class Table:
    """A table as data: what its lines are of, and what stands in each column.

    Args:
        columns: name -> what stands there, of an item (nothing for None); or a function that gives them for a result.
        items: what the lines are of; the result's rows.
        failed: the same for an item whose ``status`` is not ok, whose other columns are empty.
        below: what stands under the table in a page.
        keep_empty: columns that are empty throughout stay.
    """

    columns: Columns | Callable[[dict], Columns]
    items: Callable[[dict], Iterable] = lambda result: result["rows"]
    failed: Columns | None = None
    below: Callable[[dict], str] | None = None
    keep_empty: bool = False

    def lines(self, result: dict, page: bool = False) -> list[dict[str, str]]:
        """Column -> text, a line an item; in a page without rows that no time was left for."""
        columns = self.columns(result) if callable(self.columns) else self.columns
        lines = []
        for item in self.items(result):
            status = item.get("status", "ok") if isinstance(item, dict) else "ok"
            if page and status == "not run":
                continue
            bad = self.failed is not None and status != "ok"
            given = self.failed if bad else columns
            lines.append({name: (given[name](item) if name in given else "") or "" for name in columns})
        used = [name for name in columns if self.keep_empty or any(line[name] for line in lines)]
        return [{name: line[name] for name in used} for line in lines]

    def text(self, result: dict) -> str:
        """For the terminal."""
        return as_text(self.lines(result))

    def markdown(self, result: dict) -> str:
        """For a page: the table, and below it where and how it was measured."""
        table = as_markdown(self.lines(result, page=True))
        return f"{table}\n\n{self.below(result)}" if self.below else table


def same(*path: str) -> Cell:
    """The column that shows an entry of an item as it is, nothing where there is none."""
    def cell(item: dict) -> str:
        for name in path:
            item = item.get(name, {})
        return str(item) if item not in ({}, None) else ""

    return cell


def median(name: str) -> Cell:
    """The column that shows the median of an entry's times."""
    return lambda item: number(item[name]["median"]) if item.get(name) else ""


def spread(name: str) -> Cell:
    return lambda item: f"{number(item[name]['p20'])}-{number(item[name]['p80'])}"


def dash(item) -> str:
    return "-"


def nothing(item) -> str:
    return ""


def why(item: dict) -> str:
    """The note of a row that is not ok."""
    return f"{item['status']}: {item['reason']}"


def heads(item: dict) -> str:
    case = item["case"]
    return f"{case['heads']}:{case['kv_heads']} x {case['head_dim']}"


def extra_gib(item: dict) -> str:
    return f"{item['extra_peak_bytes'] / GIB:.2f}" if item.get("extra_peak_bytes") else ""


def errors(*names: str) -> Cell:
    """The column that shows relative errors, of these or of all that were checked."""
    def cell(item: dict) -> str:
        found = item.get("errors") or {}
        return " ".join(f"{found[name]['error']:.1e}" for name in (names or found)) if found else ""

    return cell


def measured_at(result: dict) -> str:
    """Where and how: below every table."""
    return f"{environment.line(result['environment'])}. {made_by(result)}"


def number(x: float | None) -> str:
    """A time with about three digits; nothing for None."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 200 else f"{x:.1f}" if x >= 20 else f"{x:.2f}"


def as_markdown(lines: list[dict[str, str]]) -> str:
    """A pipe table."""
    if not lines:
        return ""
    out = ["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0])]
    out += ["| " + " | ".join(value.replace("|", "/") for value in line.values()) + " |" for line in lines]
    return "\n".join(out)


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def finish(path: Path, result: dict, table: Table) -> int:
    """Saves a result, prints its table and why rows are not in it; 1 if there are such rows, else 0."""
    save(path, result)
    print(table.text(result))
    failed = [row for row in result["rows"] if row["status"] != "ok"]
    for row in failed:
        print(f"{row['name']}: {row['reason']}", file=sys.stderr)
    return int(bool(failed))


def added(stored: dict, more: dict) -> dict:
    """A stored result with the rows that a later run measured in place of its own, or behind them.

    Such rows carry the ``commit`` of their run; ``added`` lists the environments of these runs. Where rows carry none,
    an environment's ``rows`` may name them.
    """
    commit, fresh = more["environment"]["commit"], {_key(r): r for r in more["rows"] if r["status"] == "ok"}
    rows = [{**fresh.pop(_key(row)), "commit": commit} if _key(row) in fresh else row for row in stored["rows"]]
    rows += [{**row, "commit": commit} for row in fresh.values()]
    return stored | {"rows": rows, "added": [*stored.get("added", []), more["environment"]]}


def _key(row: dict) -> tuple[str, int | None]:
    """What a row is of: its name, and the length where rows of several lengths have one name."""
    return row["name"] if "name" in row else row["case"]["name"], row.get("tokens")


def made_by(result: dict) -> str:
    """The commands behind a result, as a sentence or two."""
    text = f"Made by `{called(result['environment'])}`."
    for about in result.get("added", []):
        which = f" ({'; '.join(about['rows'])})" if "rows" in about else ""
        text += f" Rows of commit {about['commit']}{which} by `{called(about)}`."
    return text


def called(about: dict) -> str:
    """The command of a measurement, by the name that its program has now."""
    command = about["command"]
    for before, now in RENAMED.items():
        command = command.replace(before, now)
    return command


def between_markers(text: str, name: str) -> tuple[int, int]:
    """Where in a text the table ``name`` stands: after ``<!-- table: name -->``, before ``<!-- end -->``.

    Raises:
        ValueError: the markers are not there.
    """
    opening, closing = f"<!-- table: {name} -->\n", "<!-- end -->"
    begin = text.find(opening)
    end = text.find(closing, begin)
    if begin < 0 or end < 0:
        raise ValueError(f"the text must have a line {opening.strip()!r} and after it a line {closing!r}")
    return begin + len(opening), end


def not_run(result: dict) -> str:
    """A sentence that names the rows that no time was left for; nothing where there are none."""
    left = [row["name"] for row in result["rows"] if row["status"] == "not run"]
    return f" Not run: {', '.join(left)}." if left else ""


def _with_twins(result: dict) -> list[dict]:
    """The rows, each with the ratio to the plain row that it is compared with."""
    times = {row["case"]["name"]: row["ms"]["median"] for row in result["rows"] if "ms" in row}
    twins = [(row, plain_twin(case_of(row))) for row in result["rows"]]
    return [row | {"twin": f"{row['ms']['median'] / times[twin.name]:.2f}x {twin.name}"}
            if twin and twin.name in times and "ms" in row else row for row, twin in twins]


_ALWAYS = {"row": same("case", "name"), "heads x D": heads, "floor": lambda row: number(row["floor_ms"]),
           "extra GiB": extra_gib, "commit": same("commit"),
           "error o, dq, dk, dv": lambda row: errors("o", "dq", "dk", "dv")(row) or "-"}
_KERNELS = {"ms": median("ms"), "p20-p80": spread("ms"), "forward": median("forward_ms"), "graph": median("graph_ms"),
            "x floor": lambda row: f"{row['ms']['median'] / row['floor_ms']:.1f}", "cuDNN full": median("cudnn_ms"),
            "note": same("twin"), **_ALWAYS}
KERNELS = Table(
    {name: _KERNELS[name] for name in ("row", "heads x D", "ms", "p20-p80", "forward", "graph", "floor", "x floor",
                                       "cuDNN full", "extra GiB", "error o, dq, dk, dv", "note", "commit")},
    _with_twins, _ALWAYS | dict.fromkeys(("ms", "p20-p80", "forward", "x floor"), dash) | {"note": why}, measured_at)
"""The speed table of the operator."""
