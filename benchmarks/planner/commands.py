"""The subcommands plan-check, plan-fit and plan-simulate."""
from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from moba_megatron import MoBAConfig, environment
from moba_megatron.plan.attention_cost import COEFFICIENTS
from moba_megatron.plan.hardware import CARDS, find_card
from moba_megatron.plan.models import parse_size

from .. import report
from . import calibration, check, scenarios
from .simulate import Layer

CPU = torch.device("cpu")


def add_check(subcommands) -> None:
    p = subcommands.add_parser("plan-check", help="the planner's predictions beside every stored measurement")
    p.add_argument("--results", type=Path, metavar="DIR", default=report.RESULTS / "h200",
                   help="a folder of JSON by `kernels`, `cp`, `gpt` and `plan-measure` on H200s")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the tables")
    p.set_defaults(run=run_check)


def run_check(arguments: argparse.Namespace) -> int:
    """Prints the comparison; 1 where a median error is above the limit, 2 where there are no measurements."""
    folder = arguments.results
    if not (folder / "kernels.json").exists():
        print(f"error: --results must be a folder with kernels.json, got {folder}", file=sys.stderr)
        return 2
    missed, found = 0, check.sections(folder)
    if arguments.json:
        report.save(arguments.json, {"environment": environment.describe(CPU),
                                     "sections": [{**asdict(s), "median_error": s.median} for s in found]})
    for section in found:
        verdict = "" if section.median <= check.GOAL else f", above {check.GOAL:.0%}"
        missed += bool(verdict)
        print(f"{section.title}\n\n{report.as_text(section.table())}\nmedian error {section.median:.1%}{verdict}\n")
    return int(missed > 0)


def add_fit(subcommands) -> None:
    p = subcommands.add_parser("plan-fit", help="fit the planner's coefficients to the stored rows, and write them")
    p.set_defaults(run=run_fit)


def run_fit(arguments: argparse.Namespace) -> int:
    """Writes what the planner reads."""
    print(f"wrote {COEFFICIENTS}, fitted to {calibration.write_coefficients().source}")
    return 0


def add_simulate(subcommands) -> None:
    p = subcommands.add_parser("plan-simulate", help="what context parallelism moves up to 1024 ranks and 10M tokens")
    p.add_argument("output", type=Path, metavar="DIR", help="where JSON and pictures go")
    p.add_argument("--seq", metavar="N", help="tokens of a sequence, such as 128K (default: 1M and 10M)")
    p.add_argument("--card", default="h100", help=", ".join(CARDS))
    p.add_argument("--chunk-size", type=int, default=MoBAConfig.chunk_size)
    p.add_argument("--topk", type=int, default=MoBAConfig.topk, help="chunks a query attends to, its own included")
    p.add_argument("--trace", type=Path, metavar="FILE.npz", help="a routing trace to simulate as well")
    p.set_defaults(run=run_simulate)


def run_simulate(arguments: argparse.Namespace) -> int:
    """Simulates, writes, prints up to how many ranks each comm type scales."""
    lengths = [parse_size(arguments.seq)] if arguments.seq else list(scenarios.LENGTHS)
    found = scenarios.write(arguments.output, Layer(arguments.chunk_size, arguments.topk), lengths,
                            find_card(arguments.card), arguments.trace)
    print(report.as_text(found))
    return 0
