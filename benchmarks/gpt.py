"""`benchmarks gpt`, under torchrun: a GPT's forward and backward, MoBA beside full attention. Arguments, table, loop.

    torchrun --nproc-per-node 4 -m benchmarks gpt --json gpt.json
"""
from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from moba_megatron import environment

from . import ROOT, report
from .distributed import Ranks, add_options, join, leave
from .gpt_cases import SHAPE, TINY_SHAPE, Row, compiled_case, rows_for


def add_gpt(subcommands) -> None:
    p = subcommands.add_parser("gpt", help="a GPT of 24 layers, forward and backward: MoBA beside full attention")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    p.add_argument("--text", type=Path, help="a text file whose first bytes are the sequence (random bytes)")
    add_options(p)
    p.add_argument("--repeats", type=int, default=5, help="timed steps of each row (5; 3 where a step takes over 3 s)")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                   help="cpu: a tiny model and local layers, to try the benchmark (cuda)")
    p.set_defaults(run=run_gpt)


def run_gpt(arguments: argparse.Namespace) -> int:
    """Measures the rows and prints the table; 1 if a row failed."""
    if arguments.show:
        print(TABLE.markdown(report.load(arguments.show)))
        return 0
    if arguments.device == "cpu":
        sys.path.insert(0, str(ROOT / "examples"))
        importlib.import_module("megatron_on_cpu").enable()  # before Megatron is imported
    ranks = join(arguments.device)
    rows = rows_for(ranks.size, arguments.rows, tiny=arguments.device == "cpu")
    result = _measure(rows, ranks, arguments)
    ranks.say(TABLE.text(result))
    leave()
    return int(any(row["status"] == "failed" for row in result["rows"]))


def _measure(rows: list[Row], ranks: Ranks, arguments: argparse.Namespace) -> dict:
    from . import gpt_speed
    begin = time.perf_counter()
    shape = SHAPE if ranks.device.type == "cuda" else TINY_SHAPE
    about = environment.describe(ranks.device) | {"ranks": ranks.size} | _versions()
    result = {"environment": about, "rows": []}
    ranks.say(environment.line(about), f"- {ranks.size} ranks, Megatron-Core {about['megatron_core']}, "
              f"Transformer Engine {about['transformer_engine']}")
    _precompile(rows, shape, ranks, arguments.precompile)
    data = arguments.text.read_bytes() if arguments.text else None
    for row in rows:
        started = {"name": row.name, "row": row.as_dict(), "ranks": ranks.size}
        result["rows"].append(started | {"status": "failed", "reason": "the process ended in this row"})
        _save(arguments.json, result, ranks)  # stays if the row takes the job down
        if ranks.from_first(time.perf_counter() - begin > arguments.budget):
            result["rows"][-1] = started | {"status": "not run", "reason": "the time budget was spent"}
        else:
            result["rows"][-1] = gpt_speed.measure_row(row, shape, ranks, arguments.repeats, arguments.inner, data)
        _save(arguments.json, result, ranks)
        ranks.say(progress(result["rows"][-1]))
    return result


def _precompile(rows: list[Row], shape, ranks: Ranks, workers: int) -> None:
    if workers and ranks.rank == 0 and ranks.device.type == "cuda":
        from . import cp_compile, precompile
        major, minor = torch.cuda.get_device_capability(ranks.device)
        cases, jobs = [], []
        for row in (row for row in rows if row.moba):
            case, size = compiled_case(row, shape), ranks.size // row.tp
            if size > 1:
                jobs.append(cp_compile.job_of(case, row.comm or "all_gather", size))
            else:
                cases.append(case)
        seconds = precompile.precompile(cases, 10 * major + minor, workers)
        seconds += cp_compile.compile_schedules(jobs, 10 * major + minor, workers)
        ranks.say(f"compiled in {seconds:.0f} s")
    ranks.barrier()


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.import_module(name).__version__
        except ImportError:
            return None

    return {"megatron_core": version("megatron.core"), "transformer_engine": version("transformer_engine")}


def _save(path: Path | None, result: dict, ranks: Ranks) -> None:
    if path and ranks.rank == 0:
        report.save(path, result)


def progress(row: dict) -> str:
    """One line for the row."""
    if row["status"] != "ok":
        return f"{row['name']}: {row['status']}: {row['reason']}"
    ran = row["attention"]
    cores = ", ".join(f"{count} {name}" for name, count in ran["modules"].items())
    te = f" (Transformer Engine: {ran['transformer_engine']})" if ran["transformer_engine"] else ""
    norm = f", gradient norm {row['grad_norm']:.5f}" if row["grad_norm"] else ""
    return (f"{row['name']}: {row['ms']['median']:.1f} ms a step; {cores}{te}, {ran['sparse_calls']} sparse calls a "
            f"step; loss {row['loss']:.5f}{norm}; wall {row['wall_s']:.0f} s")


LEGEND = ("24 layers, 1024 wide, 8 heads of 128, 2 kv groups, SwiGLU 2816, RoPE, RMSNorm, 256 byte tokens, bf16, one "
          "sequence; forward and backward, no optimizer, no gradient reduction over ranks. `x full`: against the "
          "fastest row of full attention (Transformer Engine's own) at that length and precision. `linear floor`, "
          "computed: the linear layers at 790 TFLOP/s. `sparse calls`: MoBA attentions in a step, counted. Loss and "
          "gradient norm are those of the first step, over the whole sequence.")


def _with_full(result: dict) -> list[dict]:
    """The rows, those of MoBA with the fastest full attention's ms at their length and precision."""
    full: dict[tuple[int, bool], float] = {}
    for row in result["rows"]:
        if row["status"] == "ok" and row["row"]["attention"] == "full":
            kind = row["row"]["tokens"], row["row"]["fp8"]
            full[kind] = min(row["ms"]["median"], full.get(kind, float("inf")))
    return [row | {"full_ms": full.get((row["row"]["tokens"], row["row"]["fp8"]))}
            if row["row"]["attention"] == "moba" else row for row in result["rows"]]


def below(result: dict) -> str:
    """What the columns mean, and where it was measured."""
    about = result["environment"]
    return (f"{LEGEND}{report.not_run(result)}\n\n{environment.line(about)}, Megatron-Core {about['megatron_core']}, "
            f"Transformer Engine {about['transformer_engine']}, {about['ranks']} rank{'s' * (about['ranks'] > 1)}. "
            f"{report.made_by(result)}")


_ROW = {"row": report.same("name"), "P": report.same("ranks")}
TABLE = report.Table(
    {**_ROW, "ms/step": report.median("ms"), "p20-p80": report.spread("ms"),
     "tokens/s": lambda row: f"{row['tokens_per_s']:.0f}",
     "x full": lambda row: f"{row['full_ms'] / row['ms']['median']:.2f}" if row.get("full_ms") else "",
     "linear floor": lambda row: report.number(row["linear_floor_ms"]),
     "peak GiB": lambda row: f"{row['peak_bytes'] / report.GIB:.1f}" if row["peak_bytes"] else "",
     "loss": lambda row: f"{row['loss']:.4f}",
     "grad norm": lambda row: f"{row['grad_norm']:.4f}" if row["grad_norm"] else "",
     "sparse calls": report.same("attention", "sparse_calls"), "note": report.nothing,
     "commit": report.same("commit")},
    _with_full, {**_ROW, "ms/step": report.dash, "note": report.why}, below)


def _gains(result: dict) -> list[tuple]:
    """((chunk size, topk), length -> gain over full attention) of plain rows."""
    rows = [row for row in result["rows"] if row["status"] == "ok" and not row["row"]["fp8"]
            and row["row"]["full_layers"] == "none" and not row["row"]["recompute"]]
    full = {row["row"]["tokens"]: row["ms"]["median"] for row in rows if row["row"]["attention"] == "full"}
    found: dict[tuple[int, int], dict[int, float]] = {}
    for row in rows:
        about = row["row"]
        if about["attention"] == "moba" and about["tokens"] in full:
            gain = full[about["tokens"]] / row["ms"]["median"]
            found.setdefault((about["chunk_size"], about["topk"]), {})[about["tokens"]] = gain
    return sorted(found.items())


def _lengths(result: dict) -> report.Columns:
    """A column a length at which MoBA gained."""
    def column(tokens: int) -> report.Cell:
        return lambda item: f"{item[1][tokens]:.2f}x" if tokens in item[1] else ""

    lengths = sorted({tokens for _, gains in _gains(result) for tokens in gains})
    return {"chunk size, topk": lambda item: "{}, {}".format(*item[0])} | {
        f"{tokens // 1024}K tokens": column(tokens) for tokens in lengths}


SPEEDUP = report.Table(_lengths, _gains)
"""What MoBA's chunk size and topk gain over full attention in the whole model, at each length."""
