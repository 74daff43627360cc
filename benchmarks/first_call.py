"""The first call of a process that finds no compiled kernel: its kernels compiled side by side, or one by one."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from moba_megatron import environment, moba_attn_varlen

from . import child_environment, report, speed
from .cases import find_cases, make_inputs

WAYS = ("side by side", "one by one")


def first_call(name: str, way: str) -> dict:
    """Seconds of the first and the second forward and backward of a row in this process, and errors against fp64."""
    from moba_megatron.kernels import launcher

    if way == "one by one":
        launcher._compile = lambda plan: None
    (case,), device = find_cases([name]), environment.use_device("cuda")
    *leaves, do = make_inputs(case, device, seed=1)
    for x in leaves:
        x.requires_grad_()
    cu_seqlens = torch.tensor([0, case.tokens], dtype=torch.int32, device=device)
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        o = moba_attn_varlen(*leaves, cu_seqlens, case.tokens, case.chunk_size, case.topk)
        torch.autograd.grad(o, leaves, do)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"first_s": seconds[0], "second_s": seconds[1], **speed.errors(case, device, "triton")}


WHICH = {"row": report.same("name"), "kernels are compiled": report.same("way")}
TABLE = report.Table({
    **WHICH, "first call s": lambda row: f"{row['first_s']:.1f}", "second call s": lambda row: f"{row['second_s']:.3f}",
    "status": report.same("status")}, failed={**WHICH, "status": report.why},
    below=lambda result: f"{result['cores']} cores, an empty cache of Triton each time. {report.measured_at(result)}")


def add_first_call(subcommands) -> None:
    p = subcommands.add_parser("first-call", help="seconds of a first call, which compiles the kernels")
    p.add_argument("--rows", nargs="+", default=["128K-512-8"], metavar="NAME", help="rows by their whole name")
    p.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of a child, which measures one row
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    p.set_defaults(run=run_first_call, device="cuda", only_cuda=True)


def run_first_call(arguments: argparse.Namespace) -> int:
    """Measures each row in processes of their own and prints the table; 1 if a row failed or was wrong."""
    if arguments.way:
        print(json.dumps(first_call(arguments.rows[0], arguments.way)))
        return 0
    result = {"environment": environment.describe(torch.device("cuda")), "cores": len(os.sched_getaffinity(0)),
              "rows": []}
    for name in arguments.rows:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as cache:
                done = subprocess.run([sys.executable, "-m", "benchmarks", "first-call", "--rows", name, "--way", way],
                                      env=child_environment() | {"TRITON_CACHE_DIR": cache}, capture_output=True,
                                      text=True)
            found = (json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else
                     {"status": "failed", "reason": done.stderr[-300:]})
            result["rows"].append({"name": name, "way": way, **found})
            if arguments.json:
                report.save(arguments.json, result)
    print(TABLE.text(result), flush=True)
    return int(any(row["status"] != "ok" for row in result["rows"]))
