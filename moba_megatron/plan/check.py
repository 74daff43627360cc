"""Predictions beside measurements: the stored JSON of this repository and what was measured before it."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..bench.cases import Case
from ..bench.report import GIB, RESULTS, load
from ..config import MoBAConfig
from . import measured
from .calibration import Calibration, calibrate, leave_one_out, median_error, shape_of
from .cards import Card, find_card
from .layout import Layout
from .memory import attention_working
from .models import MODELS, Model, Run
from .step import predict

GOAL = 0.15
"""Largest median of the absolute relative errors that a section may have."""


@dataclass(frozen=True)
class Section:
    """One table of the check.

    Args:
        title: what is compared, and how the predictions were kept from seeing the measurements.
        rows: name, measured, predicted (in ``unit``), error (relative), fitted.
        unit: of the values.
    """

    title: str
    rows: list[dict]
    unit: str = "ms"

    @property
    def median(self) -> float:
        """Over the rows that no constant was taken from."""
        return median_error(row for row in self.rows if not row["fitted"])

    def table(self) -> list[dict[str, str]]:
        return [{"row": row["row"], f"measured {self.unit}": f"{row['measured']:.2f}",
                 f"predicted {self.unit}": f"{row['predicted']:.2f}", "error": f"{row['error']:+.1%}",
                 "": "fitted to this" if row["fitted"] else ""} for row in self.rows]


def _row(name: str, was: float, predicted: float, fitted: bool = False) -> dict:
    return {"row": name, "measured": was, "predicted": predicted, "error": predicted / was - 1, "fitted": fitted}


def sections(folder: Path = RESULTS / "h200") -> list[Section]:
    """Every comparison for which the folder has measurements."""
    card = find_card("h200")
    kernels = load(folder / "kernels.json")["rows"]
    calibration = calibrate(kernels, card, "kernels.json")
    found = [_kernels(kernels, card), _memory(kernels), _end_to_end(card, calibration)]
    for name, read in (("cp.json", _context_parallel), ("gpt.json", _gpt)):
        if (folder / name).exists():
            section = read(load(folder / name), card, calibration)
            found += [section] if section.rows else []
    return found


def _kernels(rows: list[dict], card: Card) -> Section:
    found = [_row(f"{r['row']} {r['part']}", 1e3 * r["measured"], 1e3 * r["predicted"])
             for r in leave_one_out(rows, card, "kernels.json")]
    return Section("MoBA operator (kernels.json): each shape predicted by a fit that left it out", found)


def _memory(rows: Iterable[dict]) -> Section:
    found = []
    for row in rows:
        if row["status"] == "ok" and row["extra_peak_bytes"]:
            case = Case(**row["case"])
            run = Run(_model_of(case), case.tokens, 1, 1, MoBAConfig(case.chunk_size, case.topk))
            predicted = attention_working(run, Layout(1, 1, 1, 1))
            found.append(_row(case.name, row["extra_peak_bytes"] / GIB, predicted / GIB))
    return Section("Memory of the operator beyond its inputs (kernels.json): counted, nothing fitted", found, "GiB")


def _model_of(case: Case) -> Model:
    """One layer with the attention of a benchmark's row."""
    return Model(1, case.heads * case.head_dim, case.heads, case.kv_heads, case.head_dim, 1, 1)


def _end_to_end(card: Card, calibration: Calibration) -> Section:
    found = []
    for gpus, seqlen, comm_type, seconds, fitted in measured.END_TO_END:
        run = Run(MODELS["350m"], seqlen, gpus, 1, MoBAConfig(), attention="full")
        layout = Layout(1, gpus, 1, 1, comm_type or "-")
        predicted = predict(run, layout, card, calibration, optimizer=False).seconds
        found.append(_row(f"{gpus} GPUs {seqlen // 1024}K {comm_type or ''}", 1e3 * seconds, 1e3 * predicted, fitted))
    return Section("Full attention in Transformer Engine, 350M GPT, forward and backward (plan/measured.py)", found)


def _context_parallel(result: dict, card: Card, calibration: Calibration) -> Section:
    """One attention layer over several ranks (`bench cp`)."""
    found = []
    for row in result["rows"]:
        if row["status"] != "ok":
            continue
        case, size = Case(**row["case"]), row["ranks"]
        run = Run(_model_of(case), case.tokens, size, 1, MoBAConfig(case.chunk_size, case.topk))
        layout = Layout(1, size, 1, 1, row["comm"] if size > 1 else "-", row.get("inner", 1))
        parts = predict(run, layout, card, calibration, optimizer=False).parts
        predicted = 1e3 * (parts["attention"].seconds + parts["context"].seconds)
        found.append(_row(f"{case.name} {row['comm']} on {size}", row["ms"]["median"], predicted))
    return Section("Context parallel MoBA layer (cp.json)", found)


def _gpt(result: dict, card: Card, calibration: Calibration) -> Section:
    """Steps of the 350M GPT (`bench gpt`)."""
    found = []
    for row in result["rows"]:
        if row["status"] != "ok":
            continue
        run = Run(MODELS["350m"], row["seqlen"], row["ranks"], 1, MoBAConfig(row["chunk_size"], row["topk"]),
                  attention=row["attention"])
        layout = Layout(1, row["ranks"], 1, 1, row["comm"] if row["ranks"] > 1 else "-", row.get("inner", 1),
                        row.get("recompute", "none"))
        predicted = 1e3 * predict(run, layout, card, calibration, optimizer=False).seconds
        found.append(_row(f"{row['attention']} {row['seqlen'] // 1024}K {row['comm']} on {row['ranks']}",
                          row["ms"]["median"], predicted))
    return Section("350M GPT in Megatron-Core with Transformer Engine, forward and backward (gpt.json)", found)
