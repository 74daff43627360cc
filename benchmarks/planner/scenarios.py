"""The simulation's scenarios: lengths, ranks and routings, written as JSON and pictures."""
from __future__ import annotations

from pathlib import Path

import torch

from moba_megatron import environment
from moba_megatron.inspect.trace import load_trace
from moba_megatron.plan.attention_cost import stored
from moba_megatron.plan.hardware import Card

from ..report import save
from . import pictures
from .routing import SYNTHETIC, Routing, of_trace
from .simulate import Layer, limits, sweep

LENGTHS = (1 << 20, 10 << 20)
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
TRACE_LAYERS = 3
"""Of a trace the first, a middle and the last sparse layer."""


def routings_for(layer: Layer, tokens: int, trace: Path | None) -> list[Routing]:
    """The synthetic routings at a length, and those of a trace's layers stretched to it."""
    chunks = tokens // layer.chunk_size
    found = [make(chunks, layer.topk) for make in SYNTHETIC]
    if trace is not None:
        recorded = load_trace(trace)
        last = len(recorded.layers) - 1
        picked = sorted({recorded.layers[round(i * last / (TRACE_LAYERS - 1))] for i in range(TRACE_LAYERS)})
        found += [of_trace(recorded, number, chunks, layer.topk) for number in picked]
    return found


def write(folder: Path, layer: Layer, lengths: list[int], card: Card, trace: Path | None) -> list[dict[str, str]]:
    """Simulates, writes ``exchange.json`` and a picture a length.

    Args:
        folder: made where it is missing.
        layer: heads and chunks.
        lengths: of sequences, tokens.
        card: links and speed.
        trace: a routing trace, or None.

    Returns:
        up to how many ranks each comm type scales, as lines of a table.

    Raises:
        ValueError: a length is no multiple of the chunk size.
    """
    calibration, rows = stored(), []
    for tokens in lengths:
        if tokens % layer.chunk_size:
            raise ValueError(f"--seq must be a multiple of --chunk-size {layer.chunk_size}, got {tokens}")
        ranks = [p for p in RANKS if tokens % (2 * p) == 0 and tokens // (2 * p) >= 64]
        rows += sweep(layer, routings_for(layer, tokens, trace), ranks, card, calibration)
    result = {"environment": environment.describe(torch.device("cpu")), "simulated": True, "card": card.name,
              "calibration": calibration.source, "layer": vars(layer), "limits": limits(rows), "rows": rows}
    save(folder / "exchange.json", result)
    pictures.simulated(result, folder)
    return table(result["limits"])


def table(found: list[dict]) -> list[dict[str, str]]:
    """A comm type and routing a line, a length a column: up to how many ranks it scales."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in found:
        line = lines.setdefault((row["comm"], row["routing"]), {"comm": row["comm"], "routing": row["routing"]})
        line[f"{row['tokens'] / 2**20:g}M tokens"] = str(row["ranks"] or "-")
    return list(lines.values())
