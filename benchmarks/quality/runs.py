"""Training runs of several attentions and seeds: from scratch, and going on with a pretrained model."""
from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import compare_50m, report, train_50m
from ..gpt_50m import pretrained, text
from .pages import STORED
from .variants import Variant

TOY_LENGTH, TOY_STEP, TOY_SEQUENCES = 256, 1024, 4
POINTS = 150
"""Of a stored training curve, at most."""
VALIDATIONS = 12
"""Of a run, about."""
LOG_INTERVAL = 10


@dataclass(frozen=True)
class Part:
    """Defaults of a kind of run."""

    help: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    tokens: float
    flags: tuple[str, ...]


PARTS = {
    "scratch": Part(
        "train the 50M GPT from scratch", ("full", "moba-512-3", "moba-128-12", "moba-128-12-conv3"), (1, 2, 3), 100e6,
        ("--task-share", "0.125", "--task-sequences", "64", "--save-seconds", "60")),
    "continued": Part(
        "go on with a pretrained model, dense before", ("full", "moba-512-3", "moba-128-8", "moba-64-8"), (1,), 20e6,
        ("--task-share", "0.125", "--task-sequences", "32", "--save-seconds", "60", "--lr", "1e-4", "--generate", "32",
         "--micro-batch-tokens", "16384", "--corpus-bytes", "120000000", "--eval-tokens", "524288"))}


def add_part(subcommands, name: str) -> None:
    part = PARTS[name]
    p = subcommands.add_parser(name, help=part.help)
    add = p.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="a folder a run; the same command goes on from them")
    add("--json", type=Path, default=STORED[name], metavar="PATH", help="everything measured, curves thinned")
    add("--variants", nargs="+", default=list(part.variants), metavar="NAME", help=" ".join(part.variants))
    add("--seeds", nargs="+", type=int, default=list(part.seeds), help="runs of a seed see the same batches, and are "
        "done before those of the next (%(default)s)")
    add("--tokens", type=float, default=part.tokens, help="of every run (%(default)g)")
    add("--seq-length", type=int, default=8192, help="(8192)")
    add("--tokens-per-step", type=int, default=65_536, help="(65,536)")
    add("--seconds", type=float, default=float("inf"), help="stop after so many, and save")
    add("--gpus", type=int, help="use so many GPUs, a run on each (all)")
    add("--corpus", type=Path, help="prefix of the text's files, made once (default: in --output)")
    if name == "continued":
        add("--pretrained", type=Path, required=True, metavar="GGUF", help="the model, or a folder of Transformers'")
    add("train", nargs="*", metavar="-- FLAG", help="more flags of train_50m.py for every run")
    p.set_defaults(run=run_part, part=name)


def run_part(arguments: argparse.Namespace) -> int:
    """Runs what is not finished, and stores all; 1 where a run failed, 0 otherwise."""
    args = settings(arguments)
    encode = pretrained.load_tokenizer(args.pretrained).encode if "pretrained" in args else None
    most = train_50m.parse_args([*args.train, "--output", str(args.output)]).corpus_bytes
    text.prepare(args.corpus, None, most, encode)
    result = compare_50m.Comparison(args, jobs(args), compare_50m.devices(args.gpus), go_on=True).run_all()
    result["rows"] = [thinned(row) for row in result["rows"]]
    report.save(arguments.json, result)
    unfinished = [row["variant"] for row in result["rows"] if row["status"] in ("stopped", "not run")]
    print(f"{len(result['rows']) - len(unfinished)} runs ended, {len(unfinished)} to go on with")
    return int(any(row["status"] in ("failed", "absent") for row in result["rows"]))


def settings(arguments: argparse.Namespace) -> argparse.Namespace:
    """What :class:`compare_50m.Comparison` wants to know."""
    part, toy = PARTS[arguments.part], not torch.cuda.is_available()
    length, step = (TOY_LENGTH, TOY_STEP) if toy else (arguments.seq_length, arguments.tokens_per_step)
    steps = max(1, round(arguments.tokens / step))
    interval = max(1, round(steps / VALIDATIONS / LOG_INTERVAL)) * LOG_INTERVAL
    train = [*part.flags, "--seq-length", str(length), "--tokens-per-step", str(step), "--steps", str(steps),
             "--eval-interval", str(interval), "--log-interval", str(LOG_INTERVAL)]
    if toy:
        train += ["--task-sequences", str(TOY_SEQUENCES)]
    if "pretrained" in arguments:
        train += ["--pretrained", str(arguments.pretrained)]
    return argparse.Namespace(**vars(arguments) | {
        "json": arguments.output / "result.json", "corpus": arguments.corpus or arguments.output / "text",
        "minutes": arguments.seconds / 60, "limit_to_a6000": False, "train": [*train, *arguments.train]})


def jobs(args: argparse.Namespace) -> list[compare_50m.Job]:
    """All variants of the first seed, then those of the next: differences are within a seed."""
    found = []
    for seed in args.seeds:
        for name in args.variants:
            variant = Variant.of(name)
            found.append(compare_50m.Job(
                f"{name.replace(':', '_')}-{seed}", {"variant": name, "attention": variant.attention, "seed": seed},
                (*variant.flags(), "--seed", str(seed))))
    return found


def thinned(row: dict) -> dict:
    """A row with its training losses as means of as many steps as leave POINTS of them, rounded."""
    if "losses" not in row:
        return row
    every = -(-len(row["losses"]) // POINTS)
    curve = [round(statistics.mean(row["losses"][i:i + every]), 4) for i in range(0, len(row["losses"]), every)]
    validations = [each | {"loss": round(each["loss"], 5),
                           "by_position": [round(loss, 5) for _, _, loss in each["by_position"]]}
                   for each in row["validations"]]
    kept = {name: value for name, value in row.items() if name not in ("losses", "environment")}
    return kept | {"curve": {"steps": every, "losses": curve}, "validations": validations}
