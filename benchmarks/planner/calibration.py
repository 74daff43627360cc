"""Fits the coefficients of the attention's terms to this repository's measured rows, and says how well they fit."""
from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy

from moba_megatron.config import MoBAConfig
from moba_megatron.plan.attention_cost import (
    COEFFICIENTS,
    FORWARD,
    STAGES,
    TERMS,
    AttentionShape,
    Calibration,
    dense_seconds,
    term_seconds,
)
from moba_megatron.plan.hardware import Card, find_card
from moba_megatron.plan.layout import Layout
from moba_megatron.plan.models import MODELS, Run
from moba_megatron.plan.step import elementwise_bytes, matrix_share

from ..report import RESULTS, load, save
from . import measured

MEASURED = RESULTS / "h200" / "kernels.json"
HOST_BOUND = 1.25
"""A row is bound by launching where the call takes this many times what its CUDA graph takes."""
SHORT_MS = 2.0
"""Forward passes below this are taken for bound by launching where no graph says otherwise."""
PARTS = {"forward": FORWARD, "total": (*FORWARD, "bwd"), "chunk_means": ("means",), "gate": ("gate",),
         "attention_fwd": ("route", "sparse", "own"), "attention_bwd": ("route", "bwd"),
         **{name: (name,) for name in STAGES}}
"""What was timed -> the stages inside; the first six are names of the benchmark's JSON."""
RIDGE = 0.02
"""Pull of each coefficient towards PRIOR, in relative errors: decides only what the rows cannot tell apart."""
PRIOR = 1.5


@dataclass(frozen=True)
class Observation:
    """One measured time of the device.

    Args:
        row: the row's name.
        part: a key of PARTS.
        shape: of the call.
        seconds: measured.
        source: file.
    """

    row: str
    part: str
    shape: AttentionShape
    seconds: float
    source: str


def predicted(fitted: Calibration, observation: Observation, card: Card) -> float:
    """What a calibration says of an observation, seconds."""
    stages = fitted.stages(observation.shape, card)
    return sum(stages[name] for name in PARTS[observation.part])


def shape_of(case: dict) -> AttentionShape:
    """The shape of a row of the benchmark's JSON."""
    return AttentionShape(case["tokens"], case["chunk_size"], case["topk"], case["heads"], case["kv_heads"],
                          case["head_dim"])


def observations_of(rows: Iterable[dict], source: str) -> list[Observation]:
    """The device times in stored rows: forward, forward and backward, stages where they were timed.

    A row that was bound by launching gives the time of its CUDA graph, and no forward.
    """
    found = []
    for row in rows:
        if row["status"] != "ok":
            continue
        shape, name = shape_of(row["case"]), row["case"]["name"]
        total, graph = row["ms"]["median"], row.get("graph_ms", {}).get("median")
        host_bound = graph is not None and total > HOST_BOUND * graph
        times = {"total": graph if graph is not None else total}
        if not host_bound and (graph is not None or row["forward_ms"]["median"] > SHORT_MS):
            times["forward"] = row["forward_ms"]["median"]
        times |= row.get("stages_ms", {}) if not host_bound else {}
        found += [Observation(name, part, shape, ms / 1e3, source) for part, ms in times.items() if part in PARTS]
    return found


def stage_observations() -> list[Observation]:
    """Stages that were timed alone (``measured.STAGES``), for what whole rows cannot tell apart."""
    return [Observation(f"{s}-{c}-{k}", stage, AttentionShape(s, c, k, heads, kv_heads, 128), ms / 1e3, "kernel notes")
            for s, c, k, heads, kv_heads, stage, ms in measured.STAGES]


def fit(observations: Sequence[Observation], card: Card) -> dict[str, float]:
    """Coefficients, none negative, that make the relative errors small (least squares)."""
    matrix, goal = [], []
    for o in observations:
        terms = term_seconds(o.shape, card)
        inside = Counter(term for stage in PARTS[o.part] for term in STAGES[stage])
        matrix.append([inside[t] * terms[t] / o.seconds for t in TERMS])
        goal.append(1.0)
    for i, _ in enumerate(TERMS):
        matrix.append([RIDGE * (i == j) for j in range(len(TERMS))])
        goal.append(RIDGE * PRIOR)
    return dict(zip(TERMS, non_negative(numpy.array(matrix), numpy.array(goal)).tolist()))


def non_negative(matrix: numpy.ndarray, goal: numpy.ndarray, sweeps: int = 3000) -> numpy.ndarray:
    """The vector >= 0 for which ``|matrix @ x - goal|`` is smallest, one coordinate after the other."""
    square, right = matrix.T @ matrix, matrix.T @ goal
    x = numpy.zeros(matrix.shape[1])
    for _ in range(sweeps):
        before = x.copy()
        for i in range(x.size):
            x[i] = max(0.0, x[i] + (right[i] - square[i] @ x) / square[i, i])
        if numpy.abs(x - before).max() < 1e-10:
            break
    return x


def _host(rows: list[dict]) -> tuple[float, float]:
    """Seconds of launching forward and backward: the rows that are bound by it."""
    bound = [r for r in rows if r["status"] == "ok" and "graph_ms" in r
             and r["ms"]["median"] > HOST_BOUND * r["graph_ms"]["median"]]
    if not bound:
        return 0.0, 0.0
    forward = min(r["forward_ms"]["median"] for r in bound)
    return forward / 1e3, min(r["ms"]["median"] - r["forward_ms"]["median"] for r in bound) / 1e3


def _dense(rows: list[dict], card: Card) -> float:
    """Times longer than the best rate that cuDNN's full attention takes, by the longest sequence."""
    dense = [(r["case"]["tokens"], r["cudnn_ms"]["median"] / 1e3 / sum(dense_seconds(shape_of(r["case"]), card)))
             for r in rows if "cudnn_ms" in r]
    return max(dense)[1]


def _elementwise(dense: float) -> float:
    """Times longer than their bytes that everything beside products and attention takes, by the 1-GPU figures."""
    card, model, found = find_card("h200"), MODELS["350m"], []
    for seqlen, seconds in measured.GPT_FULL:
        run, layout = Run(model, seqlen, 1, 1, MoBAConfig(), attention="full"), Layout(1, 1, 1, 1)
        shape = AttentionShape(seqlen, run.moba.chunk_size, run.moba.topk, model.heads, model.kv_heads, model.head_dim)
        forward, backward = (dense * pass_seconds for pass_seconds in dense_seconds(shape, card))
        matrices = 6 * seqlen * model.matrix_parameters / (card.flops * matrix_share(run, layout))
        rest = seconds / model.layers - forward - backward - matrices
        found.append(rest / (3 * elementwise_bytes(run) * seqlen / card.bytes_per_second))
    return max(1.0, min(found))


def link_share() -> float:
    """Part of the link's data-sheet rate that NCCL reached on 2 and 4 H200s: the median of ``measured.COLLECTIVES``."""
    return statistics.median(size / seconds for size, seconds in _received()) / find_card("h200").link.value


def _received():
    for kind, ranks, contributed, seconds in measured.COLLECTIVES:
        others = ranks - 1
        yield contributed * others / (ranks if kind == "all_to_all" else 1), seconds



def calibrate(rows: list[dict], card: Card, source: str, without: AttentionShape | None = None) -> Calibration:
    """Fits to stored rows and, unless those have stages of their own, to the stages of ``measured``.

    Args:
        rows: of the benchmark's JSON.
        card: that they were measured on.
        source: their file.
        without: leave out every observation of this shape.
    """
    observations = observations_of(rows, source)
    if not any(o.part not in ("total", "forward") for o in observations):
        observations += stage_observations()
    kept = [o for o in observations if without is None or o.shape != without]
    dense = _dense(rows, card)
    return Calibration(fit(kept, card), dense, *_host(rows), _elementwise(dense), source)


def write_coefficients(path: Path = MEASURED) -> Calibration:
    """Fits to the stored rows and writes what the planner reads."""
    fitted = calibrate(load(path)["rows"], find_card("h200"), str(Path(*path.parts[-2:])))
    save(COEFFICIENTS, asdict(fitted) | {"link_share": link_share()})
    return fitted


def leave_one_out(rows: list[dict], card: Card, source: str) -> list[dict]:
    """Every shape predicted by a fit that never saw it.

    Returns:
        one dict for each observation of the rows: row, part, measured and predicted seconds, error (relative).
    """
    found = []
    for shape in dict.fromkeys(o.shape for o in observations_of(rows, source)):
        fitted = calibrate(rows, card, source, without=shape)
        for o in observations_of(rows, source):
            if o.shape == shape:
                seconds = predicted(fitted, o, card)
                found.append({"row": o.row, "part": o.part, "measured": o.seconds, "predicted": seconds,
                              "error": seconds / o.seconds - 1})
    return found


def median_error(rows: Iterable[dict]) -> float:
    """Median of the absolute relative errors, 0 of none."""
    return statistics.median([abs(row["error"]) for row in rows] or [0.0])
