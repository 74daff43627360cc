"""The gate: the speed and the results of this checkout against another one's, alternating on one card in one call.

    python -m benchmarks gate --against ../other --json gate.json

Each checkout runs in processes of its own, which keep a row's inputs while the two take turns. A ratio is the median
over the turns of this checkout's time over the other's; a row beyond the limit gets twice as many turns again, and all
count. 0 where every ratio is within the limit, 1 where one is not or a row failed. With ``--triton FOLDER`` this side
runs with the Triton of that folder, the other with the environment's: with ``--against .`` two Tritons are compared.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moba_megatron import environment

from . import ROOT, report
from .cases import K

WORKER = Path(__file__).with_name("gate_worker.py")
NEW, OLD = "this", "other"


@dataclass(frozen=True)
class Row:
    """What is timed: ``sequences`` of ``tokens`` each, forward and backward (``decode``: 32 steps, ``cp``: 2 ranks,
    ``host``: the host alone, the device being idle)."""

    name: str
    tokens: int
    chunk_size: int
    topk: int
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    sequences: int = 1
    kind: str = "operator"
    comm: str = ""


ROWS = (
    Row("4K-512-3-gqa", 4 * K, 512, 3, 32, 8),
    Row("8K-512-8", 8 * K, 512, 8),
    Row("32K-512-3", 32 * K, 512, 3),
    Row("32K-128-8", 32 * K, 128, 8),
    Row("128K-128-8", 128 * K, 128, 8),
    Row("128K-512-8-gqa", 128 * K, 512, 8, 32, 8),
    Row("packed-16x8K-512-3", 8 * K, 512, 3, sequences=16),
    Row("d64-32K-512-8", 32 * K, 512, 8, head_dim=64),
    Row("decode-128K-512-8", 128 * K, 512, 8, 32, 8, kind="decode"),
    Row("cp2-128K-512-8", 128 * K, 512, 8, 32, 8, kind="cp", comm="all_gather"),
)
BY_NAME = (Row("128K-128-16", 128 * K, 128, 16),
           Row("128K-128-32", 128 * K, 128, 32),
           Row("128K-32-32", 128 * K, 32, 32),
           Row("cp2-128K-512-8-mha", 128 * K, 512, 8, kind="cp", comm="all_gather"),
           Row("cp2-128K-128-8-a2a", 128 * K, 128, 8, kind="cp", comm="a2a"),
           Row("host-1head-32K-512-3", 32 * K, 512, 3, 1, 1, kind="host"),
           Row("host-4K-128-3", 4 * K, 128, 3, kind="host"))
"""Not among the rows of a run that names none. The host's rows: a virtual machine's varies by tens of percent."""
TINY = (Row("tiny", 96, 16, 3, 4, 2, 16), Row("tiny-packed", 48, 16, 2, 2, 2, 16, sequences=2),
        Row("tiny-decode", 64, 16, 3, 4, 2, 16, kind="decode"),
        Row("tiny-cp2", 96, 16, 3, 4, 2, 16, kind="cp", comm="all_gather"))
"""To try the gate without a GPU."""


def find_rows(names: list[str] | None) -> list[Row]:
    """The rows of these names, or whose names contain them; all but the tiny ones for None.

    Raises:
        ValueError: a name matches nothing.
    """
    found = []
    for name in names or []:
        rows = ([row for row in (*ROWS, *BY_NAME, *TINY) if row.name == name]
                or [row for row in (*ROWS, *BY_NAME) if name in row.name])
        if not rows:
            known = ", ".join(row.name for row in (*ROWS, *BY_NAME))
            raise ValueError(f"--rows must name rows, got {name!r}; rows: {known}")
        found += [row for row in rows if row not in found]
    return found if names else list(ROWS)


class Side:
    """The processes of one checkout: one, or two ranks of a job."""

    def __init__(self, checkout: Path, device: str, ranks: int, folder: Path, triton: Path | None = None):
        self.checkout, self.folder, self.processes = checkout, folder, []
        paths = os.pathsep.join(map(str, filter(None, (triton, checkout, os.environ.get("PYTHONPATH")))))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(ranks):
            job = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port, "NCCL_NVLS_ENABLE": "0"} if ranks > 1 else {}
            name = f"{device}:{rank}" if device == "cuda" else device
            with open(folder / f"said{rank}.txt", "w") as log:
                self.processes.append(subprocess.Popen(
                    [sys.executable, str(WORKER), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    text=True, cwd=folder, env={**os.environ, **job, "PYTHONPATH": paths}))

    def send(self, **request) -> None:
        for rank, process in enumerate(self.processes):
            with contextlib.suppress(BrokenPipeError):  # it is gone; the missing answer says so
                words = json.dumps(request | {"path": str(self.folder / f"rank{rank}.pt")})
                print(words, file=process.stdin, flush=True)

    def answers(self) -> list[dict]:
        """What each process says to what was sent; ``error`` where it could not, or is gone."""
        found = []
        for rank, process in enumerate(self.processes):
            said = process.stdout.readline()
            last = (self.folder / f"said{rank}.txt").read_text().strip().splitlines()[-1:]
            found.append(json.loads(said) if said else {"error": f"the process ended: {' '.join(last)[:300]}"})
        return found

    def milliseconds(self, repeats: int) -> float:
        """Median of so many calls, of the slower rank."""
        self.send(do="time", repeats=repeats)
        return statistics.median(map(max, zip(*(said["ms"] for said in checked(self.answers())))))

    def samples(self) -> list[torch.Tensor]:
        return [x for rank in range(len(self.processes)) for x in torch.load(self.folder / f"rank{rank}.pt")]

    def end(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def checked(answers: list[dict]) -> list[dict]:
    """The answers.

    Raises:
        RuntimeError: one of them is an error.
    """
    for said in answers:
        if "error" in said:
            raise RuntimeError(said["error"])
    return answers


def difference(sides: dict[str, Side], sums: dict[str, list]) -> float:
    """0 where every bit of every result is the same, else the largest relative error of the sampled rows (or the least
    number above 0 where those are the same)."""
    if sums[NEW] == sums[OLD]:
        return 0.0
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item()
              for a, b in zip(sides[NEW].samples(), sides[OLD].samples())]
    return max(*errors, sys.float_info.min)


def compare(row: Row, sides: dict[str, Side], arguments: argparse.Namespace) -> dict:
    """One row: results first, then times in turns."""
    result = {"name": row.name, "row": asdict(row), "status": "ok"}
    try:
        for side in sides.values():  # at the same time: each compiles its kernels
            side.send(do="prepare", row=asdict(row), backend=arguments.backend)
        answers = {name: side.answers() for name, side in sides.items()}
        for name, said in answers.items():
            ran = {Path(one["package"]).resolve() for one in checked(said)}
            if ran != {(sides[name].checkout / "moba_megatron").resolve()}:
                raise RuntimeError(f"{sides[name].checkout} was to be measured, and {', '.join(map(str, ran))} ran")
        result["triton"] = {name: said[0]["triton"] for name, said in answers.items()}
        result["difference"] = difference(sides, {name: [one["sums"] for one in answers[name]] for name in answers})
        ms: dict[str, list[float]] = {NEW: [], OLD: []}
        for turns in (arguments.turns, 2 * arguments.turns):
            for turn in range(turns):
                for name in (NEW, OLD) if turn % 2 else (OLD, NEW):
                    ms[name].append(sides[name].milliseconds(arguments.repeats))
            ratio = statistics.median(new / old for new, old in zip(ms[NEW], ms[OLD]))
            if ratio <= arguments.limit:
                break
        result |= {"ms": {name: statistics.median(times) for name, times in ms.items()}, "turns": ms, "ratio": ratio}
        if ratio > arguments.limit:
            result["status"] = "slower"
    except RuntimeError as error:
        result |= {"status": "failed", "reason": str(error)}
    for side in sides.values():
        side.send(do="drop")
        side.answers()
    return result


def add_gate(subcommands) -> None:
    p = subcommands.add_parser("gate", help="speed and results against another checkout, alternating on one card")
    p.add_argument("--against", type=Path, required=True, metavar="DIR", help="the other checkout")
    p.add_argument("--triton", type=Path, metavar="DIR", help="a folder with another Triton, for this side alone")
    p.add_argument("--limit", type=float, default=1.02, metavar="R", help="largest ratio of times, this/other (1.02)")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    p.add_argument("--turns", type=int, default=9, help="how often each side is timed, in turns (9)")
    p.add_argument("--repeats", type=int, default=5, help="calls of a turn (5)")
    p.add_argument("--backend", default="auto", choices=("auto", "triton", "torch", "reference"))
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured, after every row")
    p.add_argument("--write", type=Path, metavar="PAGE.md", help="write the table")
    p.set_defaults(run=run_gate)


def run_gate(arguments: argparse.Namespace) -> int:
    """Prints each row and the table; 1 where a row is too slow or failed, 2 on bad input."""
    if not (arguments.against / "moba_megatron" / "__init__.py").is_file():
        print(f"error: --against must be a checkout of this repository, got {arguments.against}", file=sys.stderr)
        return 2
    if arguments.triton and not (arguments.triton / "triton" / "__init__.py").is_file():
        print(f"error: --triton must be a folder that holds a folder triton, got {arguments.triton}", file=sys.stderr)
        return 2
    try:
        rows = find_rows(arguments.rows)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    enough = arguments.device == "cpu" or torch.cuda.device_count() >= 2
    about = environment.describe(torch.device(arguments.device))
    result = {"environment": about, "against": commit_of(arguments.against), "limit": arguments.limit, "rows": []}
    print(f"{environment.line(about)}; against {result['against']}", flush=True)
    for ranks in (1, 2):
        wanted = [row for row in rows if (row.kind == "cp") == (ranks == 2)]
        if ranks == 2 and not enough:
            absent = {"status": "not run", "reason": "two GPUs are needed"}
            result["rows"] += [{"name": row.name, **absent} for row in wanted]
        elif wanted:
            with running(arguments, ranks) as sides:
                for row in wanted:
                    result["rows"].append(compare(row, sides, arguments))
                    print(line(result["rows"][-1]), flush=True)
                    if arguments.json:
                        report.save(arguments.json, result)
    if arguments.json:
        report.save(arguments.json, result)
    print(TABLE.text(result))
    if arguments.write:
        arguments.write.write_text(TABLE.markdown(result) + "\n")
    return int(any(row["status"] in ("slower", "failed") for row in result["rows"]))


@contextlib.contextmanager
def running(arguments: argparse.Namespace, ranks: int):
    """Both checkouts' processes."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        triton = arguments.triton and arguments.triton.resolve()
        for name, checkout, other in ((NEW, ROOT, triton), (OLD, arguments.against.resolve(), None)):
            Path(folder, name).mkdir()
            sides[name] = Side(checkout, arguments.device, ranks, Path(folder, name), other)
        try:
            yield sides
        finally:
            for side in sides.values():
                side.end()


def commit_of(checkout: Path) -> str:
    """The other checkout's commit, or its folder's name where it is no repository of its own."""
    command = "git", "-C", str(checkout), "rev-parse", "--show-toplevel", "--short=12", "HEAD"
    top, *commit = subprocess.run(command, capture_output=True, text=True).stdout.splitlines() or [""]
    return commit[-1] if commit and Path(top).resolve() == checkout.resolve() else checkout.resolve().name


def _difference(row: dict) -> str:
    return "" if "difference" not in row else "same bits" if row["difference"] == 0 else f"{row['difference']:.1e}"


def _ms(name: str) -> report.Cell:
    return lambda row: f"{row['ms'][name]:.3f}" if "ms" in row else ""


def _tritons(row: dict) -> str:
    """The Tritons of both sides, where they differ."""
    versions = row.get("triton", {})
    return f"Triton {versions[NEW]} for {versions[OLD]}" if len(set(versions.values())) > 1 else ""


def _note(row: dict) -> str:
    return "; ".join(filter(None, (_tritons(row), row.get("reason", row["status"].removeprefix("ok")))))


TABLE = report.Table({
    "row": report.same("name"), "this, ms": _ms(NEW), "other, ms": _ms(OLD),
    "ratio": lambda row: f"{row['ratio']:.3f}" if "ms" in row else "", "difference": _difference,
    "note": _note},
    below=lambda result: f"Against {result['against']}. {report.measured_at(result)}", keep_empty=True)


def line(row: dict) -> str:
    """A row for the screen, when it is done."""
    told, = TABLE.lines({"rows": [row]})
    return ", ".join(f"{name} {value}" if name != "row" else value for name, value in told.items() if value)
