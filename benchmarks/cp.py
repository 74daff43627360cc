"""`benchmarks cp`, under torchrun: context parallel attention on P ranks against one GPU. Arguments, table, loop.

    torchrun --nproc-per-node 4 -m benchmarks cp --json cp.json
"""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from moba_megatron import environment

from . import report
from .cases import Case
from .cp_cases import COMMS, Row, find_rows
from .distributed import Ranks, add_options, join, leave, link_bytes_per_s


def add_cp(subcommands) -> None:
    p = subcommands.add_parser("cp", help="context parallelism: strong scaling, exposed communication, 1M tokens")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only shapes whose name contains one of these")
    p.add_argument("--comm", nargs="+", default=list(COMMS), choices=COMMS, help="ways to communicate (all)")
    add_options(p)
    p.add_argument("--repeats", type=int, default=10, help="timed runs of each row (10)")
    p.add_argument("--no-dense", action="store_true", help="do not time cuDNN's full attention")
    p.add_argument("--backend", default="auto", choices=("auto", "triton", "torch", "reference"))
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.set_defaults(run=run_cp)


def run_cp(arguments: argparse.Namespace) -> int:
    """Measures the rows and prints the table; 1 if a row failed or was wrong, 2 without a second rank."""
    if arguments.show:
        print(TABLE.markdown(report.load(arguments.show)))
        return 0
    rows = find_rows(arguments.rows, arguments.comm)
    ranks = join(arguments.device)
    if ranks.size == 1:
        print("cp compares ranks: start it with torchrun --nproc-per-node P, P at least 2", file=sys.stderr)
        leave()
        return 2
    result = _measure(rows, ranks, arguments)
    ranks.say(TABLE.text(result))
    leave()
    return int(any(row["status"] in ("failed", "wrong") for row in result["rows"]))


def _measure(rows: list[Row], ranks: Ranks, arguments: argparse.Namespace) -> dict:
    from . import cp_compile, cp_speed, precompile
    begin = time.perf_counter()
    result = {"environment": environment.describe(ranks.device) | {"ranks": ranks.size}, "rows": []}
    ranks.say(environment.line(result["environment"]), f"- {ranks.size} ranks")
    if arguments.precompile and ranks.rank == 0 and ranks.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(ranks.device)
        capability, workers = 10 * major + minor, arguments.precompile
        seconds = precompile.precompile(compiled_cases(rows), capability, workers)
        jobs = [cp_compile.job_of(row.case, row.comm, ranks.size, arguments.inner) for row in rows]
        seconds += cp_compile.compile_schedules(jobs, capability, workers)
        ranks.say(f"compiled in {seconds:.0f} s")
    ranks.barrier()
    result["link_bytes_per_s"] = link_bytes_per_s(ranks)
    settings = cp_speed.Settings(arguments.backend, arguments.repeats, arguments.inner, not arguments.no_dense,
                                 result["link_bytes_per_s"])
    for row in rows:
        started = {"name": row.name, "case": row.case.as_dict(), "comm": row.comm, "ranks": ranks.size}
        result["rows"].append(started | {"status": "failed", "reason": "the process ended in this row"})
        _save(arguments.json, result, ranks)  # stays if the row takes the job down
        if ranks.from_first(time.perf_counter() - begin > arguments.budget):
            result["rows"][-1] = started | {"status": "not run", "reason": "the time budget was spent"}
        else:
            result["rows"][-1] = cp_speed.measure_row(row, ranks, settings)
        _save(arguments.json, result, ranks)
        ranks.say(progress(result["rows"][-1]))
    return result


def compiled_cases(rows: list[Row]) -> list[Case]:
    """What one GPU will compile: whole shapes, and a kv head alone (the check)."""
    return [replace(case, heads=case.heads // n, kv_heads=case.kv_heads // n)
            for case in (row.case for row in rows) for n in (1, case.kv_heads)]


def _save(path: Path | None, result: dict, ranks: Ranks) -> None:
    if path and ranks.rank == 0:
        report.save(path, result)


def progress(row: dict) -> str:
    """One line for the row, and one for its communication."""
    if row["status"] != "ok":
        return f"{row['name']}: {row['status']}: {row['reason']}"
    lines = [f"{row['name']}: {row['ms']['median']:.2f} ms, wall {row['wall_s']:.0f} s"]
    if "efficiency" in row:
        lines[0] += f", one GPU {row['one_gpu_ms']['median']:.2f}, efficiency {row['efficiency']:.3f}"
    for stage, x in row.get("exposed", {}).items():
        lines.append(f"   {stage}: exposed {x['ms']:.3f} ms, sent {x['sent_bytes'] / 2 ** 20:.1f} MiB")
    return "\n".join(lines)


LEGEND = ("`ms`: forward and backward of the slowest rank; `efficiency`: 1 GPU ms / (P x ms), both measured in this "
          "job. `error`: relative, all ranks against one GPU. `exposed`: how long the compute stream stood still for "
          "collectives, all stages. Computed, not measured: `1/4 link`, an upper bound over a link with a quarter of "
          "the bytes a second; `full/P`, cuDNN's full attention measured on one GPU at 128K tokens, scaled by the "
          "square of the length, divided by P.")


def below(result: dict) -> str:
    """What the columns mean, and where it was measured."""
    about, link = result["environment"], result.get("link_bytes_per_s")
    sent = f" Link: {link / 1e9:.0f} GB/s sent by a rank in a large all-gather." if link else ""
    rest = report.not_run(result)
    return f"{LEGEND}{sent}{rest}\n\n{environment.line(about)}, {about['ranks']} ranks. {report.made_by(result)}"


_ROW = {"row": report.same("case", "name"), "heads x D": report.heads, "comm": report.same("comm"),
        "P": report.same("ranks")}
TABLE = report.Table(
    {**_ROW, "ms": report.median("ms"), "p20-p80": report.spread("ms"), "forward": report.median("forward_ms"),
     "1 GPU ms": lambda row: report.number(row["one_gpu_ms"]["median"]) if "efficiency" in row else "",
     "efficiency": lambda row: f"{row['efficiency']:.3f}" if "efficiency" in row else "",
     "exposed ms": lambda row: (report.number(sum(x["ms"] for x in row["exposed"].values()))
                                if "exposed" in row else ""),
     "1/4 link ms": lambda row: "< " + report.number(row["quarter_link_ms"]) if "exposed" in row else "",
     "full/P ms": lambda row: report.number(row["full"]["scaled_ms"]) if "full" in row else "",
     "extra GiB": report.extra_gib,
     "error o, dq, dk, dv": lambda row: " ".join(f"{e:.1e}" for e in row["errors"].values()),
     "note": report.nothing, "commit": report.same("commit")},
    failed={**_ROW, "ms": report.dash, "note": report.why, "commit": report.same("commit")}, below=below)
