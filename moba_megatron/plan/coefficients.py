"""What the predictions rest on: coefficients.json, fitted to stored rows by ``python -m benchmarks plan-fit``."""
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .attention_cost import STAGES, AttentionShape, AttentionTime, dense_seconds, term_seconds
from .hardware import Card

COEFFICIENTS = Path(__file__).with_name("coefficients.json")
_STORED = json.loads(COEFFICIENTS.read_text())
LINK_SHARE = _STORED.pop("link_share")
"""Part of the link's data-sheet rate that NCCL reached on 2 and 4 H200s."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """How many times longer things take than at the card's best rate, and what launching costs.

    Args:
        coefficients: term of attention -> times.
        dense: the same for full attention, forward and backward together.
        host_forward, host_backward: seconds of one call's launches.
        elementwise: the same for everything beside products and attention, over the bytes that it must move.
        source: what it was fitted to.
    """

    coefficients: dict[str, float]
    dense: float
    host_forward: float
    host_backward: float
    elementwise: float
    source: str

    def moba(self, shape: AttentionShape, card: Card) -> AttentionTime:
        """Predicted time of MoBA attention."""
        terms = term_seconds(shape, card)
        stages = {stage: sum(self.coefficients[t] * terms[t] for t in names) for stage, names in STAGES.items()}
        return AttentionTime(stages, self.host_forward, self.host_backward)

    def full(self, shape: AttentionShape, card: Card) -> tuple[float, float]:
        """Predicted seconds of full attention: forward, backward."""
        forward, backward = dense_seconds(shape, card)
        return self.dense * forward, self.dense * backward


@lru_cache(maxsize=None)
def stored() -> Calibration:
    """The calibration by the rows that are stored for the H200."""
    return Calibration(**_STORED)
