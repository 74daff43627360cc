"""The picture of predictions: cost against sequence length."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .. import plotting
from ..plotting import LIGHT
from .coefficients import Calibration
from .hardware import Card
from .models import Run, default_batch
from .search import plan

SHORTEST = 1 << 15


def lengths_around(seqlen: int) -> list[int]:
    """Powers of two from 32K to four times the run's length, and the length itself."""
    found = {seqlen}
    length = SHORTEST
    while length <= 4 * seqlen:
        found.add(length)
        length *= 2
    return sorted(found)


def costs_by_length(run: Run, card: Card, calibration: Calibration) -> dict[str, list[tuple[int, float]]]:
    """For MoBA and for full attention: (sequence length, GPU seconds a million tokens) of the cheapest layout.

    The batch is about four million tokens at each length.
    """
    found: dict[str, list[tuple[int, float]]] = {"moba": [], "full": []}
    for seqlen in lengths_around(run.seqlen):
        for attention, points in found.items():
            batch = run.batch if seqlen == run.seqlen else default_batch(seqlen)
            fit, _ = plan(replace(run, seqlen=seqlen, batch=batch, attention=attention), card, calibration)
            if fit:
                points.append((seqlen, fit[0].cost))
    return found


def time_against_length(run: Run, card: Card, calibration: Calibration, path: Path) -> None:
    """Draws :func:`costs_by_length` into ``path`` (.png or .svg)."""
    names = {"moba": f"MoBA ({run.moba.chunk_size}, {run.moba.topk})", "full": "full attention"}
    lines = {name: points for name, points in costs_by_length(run, card, calibration).items() if points}
    with plotting.figure(path) as (_, axes):
        labels = []
        for attention, points in lines.items():
            colour = LIGHT.accent if attention == "moba" else LIGHT.others[0]
            axes.plot(*zip(*points), color=colour, linewidth=2, marker="o", markersize=4)
            labels.append((points[-1][1], f"{names[attention]}: {points[-1][1]:.0f}", colour))
        plotting.log_axis(axes)
        plotting.length_axis(axes, sorted({tokens for points in lines.values() for tokens, _ in points})[::2])
        axes.set_title(f"Predicted GPU seconds per million tokens,\n{run.model.parameters / 1e9:.2g}B parameters, "
                       f"{run.gpus} x {card.name}")
        axes.figure.draw_without_rendering()
        plotting.label_ends(axes, labels)
