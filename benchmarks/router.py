"""What a training step costs in which the router is watched: from the logs of examples/pretrain_gpt.py."""
from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from moba_megatron import environment

from . import report

WARM = 4
"""First steps that are not counted: kernels are compiled in them. In the first watched one others are."""
EVERY = 50
"""Steps from one watched step to the next, at which the share of a run is given."""
SETTINGS = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "seq_length", "global_batch_size",
            "moba_chunk_size", "moba_topk", "bf16", "router_log_interval", "train_iters")


def read(path: Path) -> tuple[dict, list[dict]]:
    """The flags of a run and its records."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    starts = [record["args"] for record in records if record["kind"] == "start"]
    if not starts:
        raise ValueError(f"{path} must be a log of examples/pretrain_gpt.py --log-jsonl, it has no start")
    return starts[-1], records


def cost(path: Path) -> dict:
    """A row: a step's time, and how much longer a watched one takes; medians, ms.

    Raises:
        ValueError: the log is not one of examples/pretrain_gpt.py with --log-interval 1.
    """
    args, records = read(path)
    if args["log_interval"] != 1:
        raise ValueError(f"{path} must be of a run with --log-interval 1, got {args['log_interval']}")
    watched = {record["iteration"] for record in records if record["kind"] == "router"}
    tokens = args["global_batch_size"] * args["seq_length"]
    ms = {record["iteration"]: 1000 * tokens / record["tokens_per_second"] for record in records
          if record["kind"] == "step"}
    plain = [t for i, t in ms.items() if i > WARM and i not in watched]
    seen = [t for i, t in sorted(ms.items()) if i in watched][1:]
    row = {"name": f"{args['num_layers']} layers, {args['global_batch_size']} x {args['seq_length'] // 1024}K",
           "log": path.name, "settings": {name: args[name] for name in SETTINGS}}
    if len(plain) < 2 or not seen:
        return row | {"status": "not run", "reason": f"{len(plain)} plain and {len(seen)} watched steps are too few"}
    step, extra = statistics.median(plain), statistics.median(seen) - statistics.median(plain)
    quantiles = statistics.quantiles(plain, n=5)
    return row | {"status": "ok", "ms": {"median": step, "p20": quantiles[0], "p80": quantiles[-1],
                                         "runs": len(plain)},
                  "watched_ms": seen, "extra_ms": extra, "share": extra / (EVERY * step)}


def by_step(path: Path) -> list[dict]:
    """The router's statistics of a run: means over layers and heads, a watched step a row."""
    rows = []
    for record in read(path)[1]:
        if record["kind"] == "router" and record["layers"]:
            layers = record["layers"].values()
            rows.append({"iteration": record["iteration"],
                         **{name: round(statistics.mean(layer[name] for layer in layers), 4)
                            for name in next(iter(layers)) if name != "heads"}})
    return rows


def below(result: dict) -> str:
    """What the router of the first run has learned, and where that was measured."""
    text = ""
    if len(result.get("trained", [])) > 1:
        first, last = result["trained"][0], result["trained"][-1]
        changes = ", ".join(f"{name.replace('_', ' ')} {first[name]:.3f} to {last[name]:.3f}"
                            for name in first if name != "iteration")
        text = (f"From step {first['iteration']} to {last['iteration']} of the first run's model at commit "
                f"{result['environment']['commit']}: {changes}.\n\n")
    return text + report.measured_at(result)


def _of(text: str) -> report.Cell:
    """The column that fills a row's settings into a text."""
    return lambda row: text.format(**row["settings"])


TABLE = report.Table({
    "tokens a step": _of("{global_batch_size} x {seq_length:,}"), "layers": _of("{num_layers}"),
    "chunk, topk": _of("{moba_chunk_size}, {moba_topk}"), "ms/step": report.median("ms"),
    "a watched step, ms more": lambda row: f"{row['extra_ms']:.1f}",
    f"of a run, watched every {EVERY} steps": lambda row: f"{100 * row['share']:.2f} %",
    "commit": report.same("commit")},
    lambda result: [row for row in result["rows"] if row["status"] == "ok"], below=below)
"""A run a line; with the commit of those that a later measurement replaced, where there are such."""


def add_router(subcommands) -> None:
    """Adds the subcommand."""
    p = subcommands.add_parser("router", help="what watching the router costs, from logs of examples/pretrain_gpt.py")
    p.add_argument("logs", nargs="+", type=Path, metavar="LOG.jsonl",
                   help="of runs on this machine with --router-log-interval N --log-interval 1")
    p.add_argument("--trained", type=Path, metavar="LOG.jsonl", help="also the statistics by step of this run")
    p.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the result goes")
    p.set_defaults(run=run_router)


def run_router(arguments: argparse.Namespace) -> int:
    """Prints and writes the result; 1 if a log has too few steps or is none."""
    about = environment.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        result = {"environment": about, "rows": [cost(path) for path in arguments.logs]}
        if arguments.trained:
            result["trained"] = by_step(arguments.trained)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report.finish(arguments.json, result, TABLE)
