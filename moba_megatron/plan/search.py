"""Every sensible layout of a run, predicted, sorted by cost; those that cannot be with the reason."""
from __future__ import annotations

from .coefficients import Calibration
from .hardware import Card
from .layout import RECOMPUTE, Layout, candidates, refusals
from .models import Run
from .step import Prediction, predict


def plan(run: Run, card: Card, calibration: Calibration, fixed: dict[str, int | str] | None = None
         ) -> tuple[list[Prediction], list[tuple[Layout, list[str]]]]:
    """All layouts.

    Args:
        run: what is trained.
        card: on what.
        calibration: of attention.
        fixed: fields of Layout that the user has decided.

    Returns:
        Those that fit, cheapest first (with the least recompute that fits), and the others with reasons.
    """
    fit, out = [], []
    for layout in candidates(run, int(card.node.value)):
        if any(getattr(layout, name) != value for name, value in (fixed or {}).items() if name != "recompute"):
            continue
        why = refusals(run, layout)
        if why:
            out.append((layout, why))
            continue
        modes = [m for m in RECOMPUTE if (fixed or {}).get("recompute", m) == m]
        predictions = [predict(run, layout.with_recompute(m), card, calibration) for m in modes]
        enough = [p for p in predictions if p.memory.total <= card.memory.value]
        if enough:
            fit.append(min(enough, key=lambda p: p.cost))
        else:
            least = min(p.memory.total for p in predictions)
            out.append((layout, [f"needs {least / 2**30:.0f} GiB a GPU, has {card.memory.value / 2**30:.0f}"]))
    return sorted(fit, key=lambda p: p.cost), out
