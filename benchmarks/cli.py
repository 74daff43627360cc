"""Benchmarks of the operator and its kernels.

The arguments and the running of each subcommand; what they print and write is made elsewhere in this package.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from moba_megatron import environment

from . import child_environment, report
from .cases import find_cases


def add_kernels(subcommands) -> None:
    p = subcommands.add_parser("kernels", help="the speed table: time, memory and error of every row")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    p.add_argument("--repeats", type=int, default=10, help="timed runs of each row (10)")
    p.add_argument("--stages", action="store_true", help="also the time of each stage and each kernel")
    p.add_argument("--graph", action="store_true", help="also the time of a CUDA graph's replay")
    p.add_argument("--dense-limit", type=float, default=1.5, metavar="S",
                   help="skip cuDNN's full attention where a run would take longer than this many seconds (1.5)")
    p.add_argument("--no-dense", action="store_true", help="do not time cuDNN's full attention")
    p.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no row after so many seconds")
    p.add_argument("--isolate", action="store_true", help="each row in a process of its own: a crash costs one row")
    p.add_argument("--precompile", type=int, default=0, metavar="N", help="first compile all rows in N processes")
    p.add_argument("--backend", default="triton", choices=("triton", "torch", "reference", "auto"))
    p.add_argument("--device", default="cuda", help="cpu: to try it, slowly (cuda)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    p.set_defaults(run=run_kernels)


def run_kernels(arguments: argparse.Namespace) -> int:
    """Measures the rows, prints the table; 1 if a row failed or was wrong."""
    from . import precompile, speed
    begin = time.perf_counter()
    device = environment.use_device(arguments.device)
    cases = find_cases(arguments.rows)
    result = {"environment": environment.describe(device), "rows": []}
    print(environment.line(result["environment"]), flush=True)
    if arguments.precompile and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        seconds = precompile.precompile(cases, 10 * major + minor, arguments.precompile)
        print(f"compiled in {seconds:.0f} s", flush=True)
    for case in cases:
        if time.perf_counter() - begin > arguments.budget:
            row = {"case": case.as_dict(), "status": "not run", "reason": "the time budget was spent"}
            row["floor_ms"] = speed.floor_ms(case)
        elif arguments.isolate:
            row = _isolated(case.name, arguments)
        else:
            row = speed.measure_case(case, device, arguments.backend, arguments.repeats, arguments.stages,
                                     arguments.graph, 0 if arguments.no_dense else 1e3 * arguments.dense_limit)
        result["rows"].append(row)
        _progress(row)
        if arguments.json:
            report.save(arguments.json, result)
    print(report.KERNELS.text(result), flush=True)
    return int(any(row["status"] in ("failed", "wrong") for row in result["rows"]))


def _progress(row: dict) -> None:
    head = f"{row['case']['name']}: {row['status']}"
    if row["status"] != "ok":
        print(f"{head}: {row['reason']}", flush=True)
        return
    print(f"{head}, {row['ms']['median']:.3f} ms, floor {row['floor_ms']:.3f}, wall {row['wall_s']:.0f} s", flush=True)
    for kind in ("stages_ms", "kernels_ms"):
        if row.get(kind):
            print("   " + ", ".join(f"{name} {ms:.3f}" for name, ms in row[kind].items()), flush=True)


def _isolated(name: str, arguments: argparse.Namespace) -> dict:
    """One row, measured by a process of its own."""
    from .cases import floor_ms
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "row.json")
        command = [sys.executable, "-m", "benchmarks", "kernels", "--rows", name, "--json", str(path),
                   "--repeats", str(arguments.repeats), "--dense-limit", str(arguments.dense_limit), "--backend",
                   arguments.backend, "--device", arguments.device]
        command += [f"--{flag.replace('_', '-')}" for flag in ("stages", "graph", "no_dense")
                    if getattr(arguments, flag)]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
        rows = report.load(path)["rows"] if path.exists() else []
    if rows:
        return rows[0]
    case = find_cases([name])[0]
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"case": case.as_dict(), "floor_ms": floor_ms(case), "status": "failed",
            "reason": f"the process ended with {done.returncode}: {last[:300]}"}


def add_compile(subcommands) -> None:
    p = subcommands.add_parser("compile", help="compile every kernel for each architecture; no GPU needed")
    p.add_argument("--capability", nargs="+", type=int, metavar="N", help="80 86 89 90 100 120 (all)")
    p.add_argument("--head-dims", nargs="+", type=int, metavar="D", help="64 128 (and more for a few architectures)")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    p.add_argument("--json", type=Path, metavar="PATH", help="write the report")
    p.add_argument("--store", action="store_true",
                   help="refresh what tests/kernels/test_compile.py knows of this Triton; only changes are compiled")
    p.set_defaults(run=run_compile)


def run_compile(arguments: argparse.Namespace) -> int:
    """Prints what each compiled kernel needs; 1 if one does not fit."""
    from . import compile_report
    if arguments.store and (arguments.capability or arguments.head_dims):
        raise ValueError("--store is of all cards and head dims: give neither --capability nor --head-dims")
    problems = partial(compile_report.problems_for, head_dims=arguments.head_dims)
    rows, failures, _ = compile_report.report_all(
        arguments.capability, compile_report.covering if arguments.store else problems, arguments.workers,
        compile_report.load_stored() if arguments.store else {})
    print(compile_report.as_text(rows))
    for failure in failures:
        print(failure, file=sys.stderr)
    if arguments.json:
        compile_report.store(rows, arguments.json)
    if arguments.store and not failures:
        compile_report.store(rows, compile_report.stored_path())
    return int(bool(failures) or not all(row.fits for row in rows))
