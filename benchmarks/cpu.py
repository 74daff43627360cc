"""Attention on the CPU: the backend ``torch`` beside torch's causal attention and the reference, in turns.

Beside the clock stand seconds of processor time: other processes on the machine change them least.
"""
from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moba_megatron import environment, moba_attn_varlen

from . import report, speed, timing
from .cases import Case, make_inputs

CASES = tuple(Case(f"{tokens // 1024}K-{size}-{topk}", tokens, size, topk, 9, 3, 64, "float32")
              for tokens in (4096, 16384) for size, topk in ((256, 4), (128, 8)))
REFERENCE_TOKENS = 4096
"""The reference is measured up to here, and once."""


def measure_case(case: Case, turns: int) -> dict:
    """A row: errors against fp64 of this very case, then times of forward and backward and of forward, by who attends.

    ``ms`` and ``cpu_ms`` (processor time of all threads), and ``forward_ms``, are summaries by ``sdpa`` (causal, full),
    ``torch`` and ``reference``.
    """
    device = torch.device("cpu")
    row = {"name": case.name, "tokens": case.tokens, "case": case.as_dict(), "load": os.getloadavg()[0]}  # before it
    row |= speed.errors(case, device, "torch")
    if row["status"] != "ok":
        return row
    *leaves, do = make_inputs(case, device, seed=1)
    for x in leaves:
        x.requires_grad_()
    cu_seqlens = torch.tensor([0, case.tokens], dtype=torch.int32)
    runs = {"sdpa": lambda: _sdpa(*leaves)} | {backend: lambda backend=backend: moba_attn_varlen(
        *leaves, cu_seqlens, case.tokens, case.chunk_size, case.topk, backend=backend)
        for backend in ("torch", "reference")[:1 + (case.tokens <= REFERENCE_TOKENS)]}
    times = {name: [] for name in runs}
    for turn in range(-1, turns):  # the first warms up
        for name, run in runs.items():
            if name == "reference" and turn:
                continue
            begin = time.perf_counter(), time.process_time()
            o = run()
            middle = time.perf_counter()
            torch.autograd.grad(o, leaves, do)
            if turn >= 0:
                times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1], middle - begin[0]))
    for i, kind in enumerate(("ms", "cpu_ms", "forward_ms")):
        row[kind] = {name: timing.summary([1e3 * each[i] for each in found]) for name, found in times.items()}
    return row


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _of(kind: str, name: str, value: str = "median") -> report.Cell:
    return lambda row: report.number(row[kind][name][value]) if name in row.get(kind, {}) else ""


def _ratio(kind: str, value: str) -> report.Cell:
    return lambda row: f"{row[kind]['torch'][value] / row[kind]['sdpa'][value]:.2f}" if kind in row else ""


def below(result: dict) -> str:
    loads, threads = [row["load"] for row in result["rows"]], result["threads"]
    return (f"fp32, {threads} thread{'s' * (threads > 1)} on {result['cores']} cores, medians of {result['turns']} "
            f"turns (the reference once), load of the machine, this program in it, {min(loads):.1f} to "
            f"{max(loads):.1f}. {report.measured_at(result)}")


TABLE = report.Table({
    "row": report.same("case", "name"), "heads x D": report.heads, "ms": _of("ms", "torch"),
    "forward": _of("forward_ms", "torch"), "SDPA": _of("ms", "sdpa"), "reference": _of("ms", "reference"),
    "x SDPA": _ratio("ms", "median"), "x SDPA, fastest": _ratio("ms", "min"),
    "x SDPA, processor time": _ratio("cpu_ms", "min"), "error o, dq, dk, dv": report.errors("o", "dq", "dk", "dv"),
    "status": lambda row: row["status"] if row["status"] == "ok" else report.why(row)}, below=below)


def add_cpu(subcommands) -> None:
    p = subcommands.add_parser("cpu", help="attention without a GPU, against torch's")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    p.add_argument("--turns", type=int, default=5, help="timed turns (5)")
    p.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    p.set_defaults(run=run_cpu, device="cpu")


def run_cpu(arguments: argparse.Namespace) -> int:
    """Measures the rows, prints the table; 1 if a row was wrong."""
    torch.set_num_threads(arguments.threads)
    result = {"environment": environment.describe(torch.device("cpu")), "threads": arguments.threads,
              "cores": os.cpu_count(), "turns": arguments.turns, "rows": []}
    for case in CASES:
        if not arguments.rows or any(name in case.name for name in arguments.rows):
            result["rows"].append(measure_case(case, arguments.turns))
            print(f"{case.name}: {result['rows'][-1]['status']}", flush=True)
            if arguments.json:
                report.save(arguments.json, result)
    print(TABLE.text(result), flush=True)
    return int(any(row["status"] != "ok" for row in result["rows"]))
