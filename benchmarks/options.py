"""What Megatron-LM's options do to MoBA's losses: logs of its `pretrain_gpt.py`, a run a file, against a plain run."""
from __future__ import annotations

import argparse
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from moba_megatron import environment

from . import report

STEP = re.compile(r"iteration +\d+/.*?elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: ([-\d.E+]+)")
GRAPHS = re.compile(r"built \d+ cuda graph[^\n]*|\d+ graphable layers|\d+ graphs deleted")
SETTLED = 10  # steps before those whose median time counts


@dataclass(frozen=True)
class Run:
    """One run: its flags, how many GPUs, the run whose losses it must have, and in how many first steps (None: all)."""

    flags: str
    gpus: int = 1
    like: str | None = None
    steps: int | None = None
    alone: bool = False


RUNS = {
    "ddp": Run("data parallel 2", 2),
    "megatron-fsdp": Run("`--use-megatron-fsdp`", 2, "ddp"),
    "torch-fsdp2": Run("`--use-torch-fsdp2`", 2, "ddp"),
    "mla-tp2": Run("`--multi-latent-attention --tensor-model-parallel-size 2 --sequence-parallel`", 2),
    "one": Run("none"),
    "offload-modules": Run("`--offload-modules core_attn attn_proj`", like="one"),
    "cpu-offloading": Run("`--cpu-offloading-num-layers 6`", like="one"),
    "key-conv": Run("`--moba-key-conv 3`", like="one", steps=1),
    "graphs-te": Run("`--cuda-graph-impl transformer_engine --cuda-graph-modules attn`", like="one"),
    "eager": Run("none", alone=True),
    "graphs": Run("`--cuda-graph-impl local --cuda-graph-modules attn`", like="eager", alone=True),
}


def read(path: Path) -> dict:
    """Losses and step times of one log; its name says which of ``RUNS`` it is.

    Raises:
        ValueError: no run has that name.
    """
    if path.stem not in RUNS:
        raise ValueError(f"the log must have the name of a run ({', '.join(RUNS)}), got {path.name!r}")
    text = path.read_text(errors="replace")
    ms, losses = ([float(step[i]) for step in STEP.findall(text)] for i in (0, 1))
    row = {"name": path.stem, "status": "ok", "losses": losses, "ms": ms,
           "moba": re.findall(r"^> MoBA attention.*", text, re.M), "graphs": GRAPHS.findall(text)}
    if len(losses) <= SETTLED:
        return row | {"status": "failed", "reason": f"{len(losses)} steps, more than {SETTLED} are needed"}
    return row | {"ms_median": statistics.median(ms[SETTLED:]),
                  "max_allocated_mib": max(map(float, re.findall(r"max allocated: ([\d.]+)", text)), default=None)}


def _runs(result: dict) -> list[dict]:
    """The rows in the order of ``RUNS``, each with its run and the row that it is compared with."""
    rows = {row["name"]: row for row in result["rows"] if row["status"] == "ok"}
    return [row | {"run": run, "like": rows.get(run.like)} for name, run in RUNS.items() if (row := rows.get(name))]


def difference(run: Run, row: dict, like: dict | None) -> str:
    """How far the losses are from those that they must be, as text; nothing where there are none."""
    if like is None:
        return ""
    pairs = list(zip(row["losses"], like["losses"]))[:run.steps]
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    return f"{largest:.4f} from {run.like}" + (f", {len(pairs)} step" if run.steps else "") if largest else (
        f"none from {run.like}" + (f" in step {run.steps}" if run.steps else ""))


def _columns(result: dict) -> report.Columns:
    steps = dict.fromkeys(len(row["losses"]) for row in _runs(result))
    return {"run": report.same("name"), "GPUs": lambda row: str(row["run"].gpus),
            "flags added": lambda row: row["run"].flags, "loss, step 1": lambda row: f"{row['losses'][0]:.5f}",
            **{f"step {n}": lambda row: f"{row['losses'][-1]:.5f}" for n in steps},
            "largest difference": lambda row: difference(row["run"], row, row["like"]),
            "peak MiB": lambda row: f"{row['max_allocated_mib']:.0f}" if row["max_allocated_mib"] else "",
            "ms/step": lambda row: f"{row['ms_median']:.1f}" if row["run"].alone else "",
            "commit": report.same("commit")}


TABLE = report.Table(_columns, _runs, below=report.measured_at)


def _worst(errors: dict[str, float]) -> str:
    worst = max((what for what in errors if what != "output"), key=errors.get, default=None)
    return f"{errors[worst]:.1e} ({worst})" if worst else ""


MLA = report.Table({"latent attention": lambda item: item[0], "output": lambda item: f"{item[1]['output']:.1e}",
                    "worst gradient": lambda item: _worst(item[1])},
                   lambda result: result["errors"].items(), below=report.measured_at)
"""Of `benchmarks/check_mla.py`: the worst relative error of output and gradients."""


def add_options(subcommands) -> None:
    """Adds the subcommand."""
    p = subcommands.add_parser("options", help="losses under Megatron-LM's options, from logs of its pretrain_gpt.py")
    p.add_argument("logs", nargs="+", type=Path, metavar="LOG", help=f"NAME.log, where NAME is {', '.join(RUNS)}")
    p.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the result goes")
    p.set_defaults(run=run_options)


def run_options(arguments: argparse.Namespace) -> int:
    """Prints and writes the result; 1 if a log is none or has too few steps."""
    about = environment.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        result = {"environment": about, "rows": [read(path) for path in arguments.logs]}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report.finish(arguments.json, result, TABLE)
