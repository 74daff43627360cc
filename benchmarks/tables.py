"""Which stored result makes which table of which page, and the writing of it between the table's markers."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import (
    cliffs,
    comparison,
    cp,
    cpu,
    decode,
    first_call,
    gate,
    gpt,
    layouts,
    options,
    packed,
    report,
    router,
    selection,
    training,
    zero,
)


@dataclass(frozen=True)
class Stored:
    """A result below ``results/``, what makes markdown of it, and the page that it stands on."""

    name: str
    markdown: Callable[[dict], str]
    page: str = "docs/benchmarks.md"

    @property
    def path(self) -> Path:
        return report.RESULTS / self.name


TABLES = {
    "speedup": Stored("h200/gpt-p1.json", gpt.SPEEDUP.markdown, "README.md"),
    "kernels": Stored("h200/kernels.json", report.KERNELS.markdown),
    "gate": Stored("h200/gate_graphs.json", gate.TABLE.markdown),
    "host": Stored("h200/host.json", gate.TABLE.markdown),
    "cliffs": Stored("h200/cliffs.json", cliffs.TABLE.markdown),
    "first-call": Stored("h200/first_call.json", first_call.TABLE.markdown),
    "selection": Stored("h200/selection.json", selection.TABLE.markdown, "docs/own_router.md"),
    "learned-router": Stored("h200/learned_router.json", selection.LEARNED.markdown, "docs/own_router.md"),
    "triton": Stored("h200/gate_triton.json", gate.TABLE.markdown),
    "comparison": Stored("h200/comparison.json", comparison.PAGE.markdown),
    "flash-moba": Stored("h200/flash_moba.json", comparison.FLASH_MOBA.markdown),
    "training-speed": Stored("h200/training_speed.json", training.SPEED.markdown),
    "smoke": Stored("h200/smoke.json", training.smoke_text),
    "deepspeed": Stored("h200/deepspeed.json", zero.TABLE.markdown),
    "continued": Stored("h200/continued.json", training.SWITCH.markdown),
    "decode": Stored("h200/decode.json", decode.TABLE.markdown),
    "cpu": Stored("cpu/attention.json", cpu.TABLE.markdown),
    "learning": Stored("h200/learning.json", training.LEARNING.markdown),
    "cp-p2": Stored("h200/cp-p2.json", cp.TABLE.markdown),
    "symmetric-memory": Stored("h200/gate_symmetric_memory.json", gate.TABLE.markdown, "docs/context_parallel.md"),
    "gpt-p1": Stored("h200/gpt-p1.json", gpt.TABLE.markdown),
    "gpt-p2": Stored("h200/gpt-p2.json", gpt.TABLE.markdown),
    "router": Stored("h200/router.json", router.TABLE.markdown),
    "megatron-options": Stored("h200/megatron_options.json", options.TABLE.markdown),
    "layouts": Stored("cpu/layouts.json", layouts.TABLE.markdown, "docs/megatron.md"),
    "layouts-newest": Stored("cpu/layouts_0.19.json", layouts.summary, "docs/megatron.md"),
    "layouts-main": Stored("cpu/layouts_main.json", layouts.summary, "docs/megatron.md"),
    "packed": Stored("cpu/packed.json", packed.TABLE.markdown, "docs/megatron.md"),
    "packed-hybrid": Stored("cpu/packed_hybrid.json", packed.TABLE.markdown, "docs/megatron.md"),
    "packed-gpu": Stored("h200/packed.json", packed.TABLE.markdown, "docs/megatron.md"),
    "groups": Stored("h200/layouts_float32.json", layouts.GROUPS.markdown, "docs/megatron.md"),
    "layouts-fp32": Stored("h200/layouts_float32.json", layouts.TABLE.markdown, "docs/megatron.md"),
    "layouts-bf16": Stored("h200/layouts_bfloat16.json", layouts.summary, "docs/megatron.md"),
    "mla": Stored("h200/mla.json", options.MLA.markdown),
}


def written(name: str, text: str, path: Path | None = None) -> str:
    """The text with the table between its markers replaced by what is stored (or by the result in ``path``)."""
    begin, end = report.between_markers(text, name)
    table = TABLES[name]
    return text[:begin] + table.markdown(report.load(path or table.path)) + "\n" + text[end:]


def add_table(subcommands) -> None:
    p = subcommands.add_parser("table", help="stored results as a markdown table; --write puts it into a file")
    p.add_argument("path", nargs="?", type=Path, help="JSON of a measurement (default: the stored one)")
    p.add_argument("--name", default="kernels", choices=TABLES, help="which table (kernels)")
    p.add_argument("--add", type=Path, metavar="JSON", help="first take a later run's rows into the stored result")
    p.add_argument("--write", type=Path, metavar="PAGE.md", help="replace what is between the file's markers")
    p.set_defaults(run=run_table)


def run_table(arguments: argparse.Namespace) -> int:
    """Prints or writes the markdown table."""
    table = TABLES[arguments.name]
    if not table.path.exists() and (arguments.add or arguments.path is None):
        print(f"no {table.path}: name a JSON file", file=sys.stderr)
        return 2
    if arguments.add:
        report.save(table.path, report.added(report.load(table.path), report.load(arguments.add)))
    if arguments.write is None:
        print(table.markdown(report.load(arguments.path or table.path)))
    else:
        arguments.write.write_text(written(arguments.name, arguments.write.read_text(), arguments.path))
    return 0
