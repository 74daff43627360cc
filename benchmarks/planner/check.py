"""Predictions beside measurements: the stored JSON of this repository and what was measured before it."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moba_megatron.config import MoBAConfig
from moba_megatron.plan.attention_cost import Calibration
from moba_megatron.plan.hardware import Card, find_card
from moba_megatron.plan.layout import Layout
from moba_megatron.plan.memory import attention_working
from moba_megatron.plan.models import MODELS, Model, Run
from moba_megatron.plan.step import Prediction, predict

from ..cases import Case
from ..report import GIB, RESULTS, case_of, load
from . import measured
from .calibration import calibrate, leave_one_out, median_error

GOAL = 0.15
"""Largest median of the absolute relative errors that a section may have."""


INNER = 2
"""Ranks that exchange heads in the benchmarks' a2a+all_gather."""


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
        """Over the rows that no constant was taken from; 0 where there are no others."""
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
    for pattern, readers in (("cp*.json", (_context_parallel, _sent)), ("gpt*.json", (_gpt, _gpt_memory)),
                             ("selective*.json", (_selective_bytes,))):
        results = [load(path) for path in sorted(folder.glob(pattern))]
        sections_of = [read(results, card, calibration) for read in readers] if results else []
        found += [section for section in sections_of if section.rows]
    return found


def _kernels(rows: list[dict], card: Card) -> Section:
    found = [_row(f"{r['row']} {r['part']}", 1e3 * r["measured"], 1e3 * r["predicted"])
             for r in leave_one_out(rows, card, "kernels.json")]
    return Section("MoBA operator (kernels.json): each shape predicted by a fit that left it out", found)


def _memory(rows: Iterable[dict]) -> Section:
    found = []
    for row in rows:
        if row["status"] == "ok" and row["extra_peak_bytes"]:
            case = case_of(row)
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
    return Section("Full attention in Transformer Engine, 350M GPT, forward and backward (planner/measured.py)", found)


def _rows(results: list[dict]) -> list[dict]:
    """Those that were measured."""
    return [row for result in results for row in result["rows"] if row["status"] == "ok"]


def _layer(row: dict, card: Card, calibration: Calibration) -> tuple[str, Prediction]:
    """A row of `benchmarks cp` and its prediction: a model of one layer, of which attention and exchange count."""
    case, size = case_of(row), row["ranks"]
    run = Run(_model_of(case), case.tokens, size, 1, MoBAConfig(case.chunk_size, case.topk))
    layout = Layout(1, size, 1, 1, row["comm"], INNER if "+" in row["comm"] else 1)
    return f"{row['name']} on {size}", predict(run, layout, card, calibration, optimizer=False)


def _context_parallel(results: list[dict], card: Card, calibration: Calibration) -> Section:
    found = []
    for row in _rows(results):
        name, p = _layer(row, card, calibration)
        predicted = 1e3 * (p.parts["attention"].seconds + p.parts["context"].seconds)
        fitted = row["comm"] == "all_gather" and row["ranks"] == 2  # step.HIDDEN_COST
        found.append(_row(name, row["ms"]["median"], predicted, fitted))
    return Section("Context parallel attention (cp*.json)", found)


def _sent(results: list[dict], card: Card, calibration: Calibration) -> Section:
    found = []
    for row in _rows(results):
        sent = sum(stage["sent_bytes"] for stage in row.get("exposed", {}).values())
        if sent:
            name, p = _layer(row, card, calibration)
            traffic = p.parts["context"].traffic
            found.append(_row(name, sent / GIB, (traffic.link + traffic.network) / GIB))
    return Section("Bytes that a rank sends in context parallel attention (cp*.json): counted", found, "GiB")


def _selective_bytes(results: list[dict], card: Card, calibration: Calibration) -> Section:
    """Of `plan-measure`: what all ranks sent beside what the selection of one rank tells."""
    found = [_row(f"{row['routing']}, {row['way']} on {row['ranks']}", sum(row["sent_bytes"]) / GIB,
                  sum(row["counted_bytes"]) / GIB) for row in _rows(results) if row["counted_bytes"]]
    return Section("Bytes of the selective exchange (selective*.json): counted on the selection", found, "GiB")


def _step(row: dict, card: Card, calibration: Calibration) -> tuple[str, Prediction] | None:
    """A row of `benchmarks gpt` and its prediction; None where the planner does not know the setting."""
    about, size = row["row"], row["ranks"]
    if about["fp8"]:
        return None
    cp = size // about["tp"]
    run = Run(MODELS["350m"], about["tokens"], size, 1,
              MoBAConfig(about["chunk_size"], about["topk"], about["full_layers"]), attention=about["attention"])
    comm = (about["comm"] or "p2p") if cp > 1 else "-"
    layout = Layout(about["tp"], cp, 1, 1, comm, INNER if "+" in comm else 1, "full" if about["recompute"] else "none")
    return f"{row['name']} on {size}", predict(run, layout, card, calibration, optimizer=False)


def _gpt(results: list[dict], card: Card, calibration: Calibration) -> Section:
    found = []
    for row in _rows(results):
        step = _step(row, card, calibration)
        if step:
            fitted = row["row"]["attention"] == "full" and row["ranks"] == 1  # measured.GPT_FULL
            found.append(_row(step[0], row["ms"]["median"], 1e3 * step[1].seconds, fitted))
    return Section("350M GPT in Megatron-Core, forward and backward (gpt*.json); no step with MoBA is fitted", found)


def _gpt_memory(results: list[dict], card: Card, calibration: Calibration) -> Section:
    found = []
    for row in _rows(results):
        step = _step(row, card, calibration) if row.get("peak_bytes") else None
        if step:
            m = step[1].memory  # bf16 gradients beside the weights, no optimizer, nothing reserved
            predicted = 2 * m.weights + m.activations + m.working + m.gathered
            found.append(_row(step[0], row["peak_bytes"] / GIB, predicted / GIB))
    return Section("Peak memory of the same (gpt*.json)", found, "GiB")
