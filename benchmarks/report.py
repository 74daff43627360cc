"""Turns measured rows into tables: aligned text for the terminal, markdown for the pages."""
from __future__ import annotations

import json
import sys
from pathlib import Path

from moba_megatron import environment
from moba_megatron.environment import as_text, save

from .cases import Case, plain_twin

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


def cells(row: dict, times: dict[str, float]) -> dict[str, str]:
    """One line of the table: column -> text."""
    case = case_of(row)
    ms, forward, cudnn = row.get("ms"), row.get("forward_ms"), row.get("cudnn_ms")
    twin = plain_twin(case)
    note = "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
    if ms and twin and twin.name in times:
        note = f"{ms['median'] / times[twin.name]:.2f}x {twin.name}"
    return {
        "row": case.name,
        "heads x D": f"{case.heads}:{case.kv_heads} x {case.head_dim}",
        "ms": number(ms["median"]) if ms else "-",
        "p20-p80": f"{number(ms['p20'])}-{number(ms['p80'])}" if ms else "-",
        "forward": number(forward["median"]) if forward else "-",
        "graph": number(row["graph_ms"]["median"]) if "graph_ms" in row else "",
        "floor": number(row["floor_ms"]),
        "x floor": f"{ms['median'] / row['floor_ms']:.1f}" if ms else "-",
        "cuDNN full": number(cudnn["median"]) if cudnn else "",
        "extra GiB": f"{row['extra_peak_bytes'] / GIB:.2f}" if row.get("extra_peak_bytes") else "",
        "error o, dq, dk, dv": _errors(row),
        "note": note, "commit": row.get("commit", ""),
    }


def number(x: float | None) -> str:
    """A time with about three digits; nothing for None."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 200 else f"{x:.1f}" if x >= 20 else f"{x:.2f}"


def _errors(row: dict) -> str:
    errors = row.get("errors")
    return " ".join(f"{errors[name]['error']:.1e}" for name in ("o", "dq", "dk", "dv")) if errors else "-"


def table(rows: list[dict]) -> list[dict[str, str]]:
    """All rows as cells, without the columns that are empty throughout."""
    times = {row["case"]["name"]: row["ms"]["median"] for row in rows if "ms" in row}
    lines = [cells(row, times) for row in rows]
    used = [name for name in (lines[0] if lines else ()) if any(line[name] for line in lines)]
    return [{name: line[name] for name in used} for line in lines]


def as_markdown(lines: list[dict[str, str]]) -> str:
    """A pipe table."""
    if not lines:
        return ""
    out = ["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0])]
    out += ["| " + " | ".join(value.replace("|", "/") for value in line.values()) + " |" for line in lines]
    return "\n".join(out)


def markdown_of(result: dict) -> str:
    """What stands in the page between its markers: the table, and below it where and how it was measured."""
    about = result["environment"]
    return f"{as_markdown(table(result['rows']))}\n\n{environment.line(about)}. {made_by(result)}"


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def finish(path: Path, result: dict, lines: list[dict[str, str]]) -> int:
    """Saves a result, prints its table and why rows are not in it; 1 if there are such rows, else 0."""
    save(path, result)
    print(as_text(lines))
    failed = [row for row in result["rows"] if row["status"] != "ok"]
    for row in failed:
        print(f"{row['name']}: {row['reason']}", file=sys.stderr)
    return int(bool(failed))


def added(stored: dict, more: dict) -> dict:
    """A stored result with the rows that a later run measured in place of its own, or behind them.

    Such rows carry the ``commit`` of their run; ``added`` lists the environments of these runs.
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
        text += f" Rows of commit {about['commit']} by `{called(about)}`."
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


def measured_and_rest(rows: list[dict]) -> tuple[list[dict], str]:
    """The rows but those that no time was left for, and a sentence that names these."""
    left = [row["name"] for row in rows if row["status"] == "not run"]
    return [row for row in rows if row["status"] != "not run"], f" Not run: {', '.join(left)}." if left else ""
