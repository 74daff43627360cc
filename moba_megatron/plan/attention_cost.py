"""Time of one attention call as a sum of terms: operations, bytes and choices, each over a rate of the card. A term's
physics gives the seconds that the card would need at its best; the fitted coefficient of :class:`Calibration` says how
many times longer the kernels take."""
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..flops import attended_pairs, scored_pairs
from .hardware import Card

COEFFICIENTS = Path(__file__).with_name("coefficients.json")  # fitted to stored rows by `python -m benchmarks plan-fit`
_STORED = json.loads(COEFFICIENTS.read_text())
LINK_SHARE = _STORED.pop("link_share")  # part of the link's data-sheet rate that NCCL reached on 2 and 4 H200s
BACKWARD_PRODUCTS = 2.5  # backward over forward: five matrix products against two
BF16, FP32 = 2, 4  # bytes

STAGES = {  # stage -> its terms; `own` includes merging partial o and lse
    "means": ("means bytes", "launch"),
    "gate": ("gate scores", "gate choices", "launch"),
    "route": ("route choices", "launch"),
    "sparse": ("sparse products", "sparse bytes", "launch"),
    "own": ("own products", "own bytes", "launch"),
    "bwd": ("bwd products", "bwd own products", "bwd bytes", "bwd launches")}
FORWARD = ("means", "gate", "route", "sparse", "own")
TERMS = tuple(dict.fromkeys(term for terms in STAGES.values() for term in terms))
LAUNCH_SECONDS = 10e-6  # what one kernel takes before and after its work, at best; the backward pass has about ten


@dataclass(frozen=True)
class AttentionShape:
    """One call over one sequence; under context parallelism the queries of one rank."""

    seqlen: int  # keys of the sequence, tokens
    chunk_size: int  # as in MoBAConfig, like
    topk: int
    heads: float  # on this GPU, like
    kv_heads: float
    head_dim: int
    share: float = 1.0  # of the queries that this GPU has, 1 over the ranks that split them. Zigzag makes the work even
    key_share: float = 1.0  # of the keys whose sums this GPU makes; it reads all keys that it attends to

    @property
    def choices(self) -> float:
        """(query, head, earlier chunk) triples that are selected, counted by their bound."""
        return self.seqlen * self.share * self.heads * min(self.topk - 1, max(0, (self.seqlen - 1) // self.chunk_size))

    @property
    def own_pairs(self) -> float:
        return attended_pairs(self.seqlen, self.chunk_size, 1) * self.share * self.heads

    @property
    def earlier_pairs(self) -> float:
        return attended_pairs(self.seqlen, self.chunk_size, self.topk) * self.share * self.heads - self.own_pairs

    @property
    def scores(self) -> float:
        """(query, head, chunk) triples that the gate scores."""
        return scored_pairs(self.seqlen, self.chunk_size, self.topk) * self.share * self.heads

    @property
    def row_bytes(self) -> int:
        """Of one head of one token."""
        return self.head_dim * BF16

    @property
    def tokens(self) -> int:
        """Queries of this GPU."""
        return round(self.seqlen * self.share)

    @property
    def q_bytes(self) -> float:
        """One tensor of q's shape."""
        return self.tokens * self.heads * self.row_bytes

    @property
    def kv_bytes(self) -> float:
        """K and V of as many tokens."""
        return 2 * self.tokens * self.kv_heads * self.row_bytes


def term_seconds(shape: AttentionShape, card: Card) -> dict[str, float]:
    """What every term would take at the card's best rate."""
    q_rows = shape.seqlen * shape.share * shape.heads
    kv_bytes = 2 * shape.seqlen * shape.kv_heads * shape.row_bytes
    partial = shape.row_bytes + FP32
    per_product = 2 * shape.head_dim
    operations = {"gate scores": per_product * shape.scores, "sparse products": 2 * per_product * shape.earlier_pairs,
                  "own products": 2 * per_product * shape.own_pairs,
                  "bwd products": 2 * per_product * shape.earlier_pairs * BACKWARD_PRODUCTS,
                  "bwd own products": 2 * per_product * shape.own_pairs * BACKWARD_PRODUCTS}
    moved = {"means bytes": shape.seqlen * shape.key_share * shape.kv_heads * shape.row_bytes,
             "sparse bytes": shape.choices * (shape.row_bytes + partial) + kv_bytes,
             "own bytes": 2 * q_rows * shape.row_bytes + shape.choices * partial + kv_bytes,
             # gathers of q and do, one partial dq written and read, for a choice; q, o, do, dq and k, v, dk, dv once
             "bwd bytes": 4 * (shape.choices + q_rows) * shape.row_bytes + 2 * kv_bytes}
    return {**{name: x / card.flops for name, x in operations.items()}, "launch": LAUNCH_SECONDS,
            **{name: x / card.bytes_per_second for name, x in moved.items()}, "bwd launches": 10 * LAUNCH_SECONDS,
            **{f"{stage} choices": shape.choices / card.issue.value for stage in ("gate", "route")}}


def dense_seconds(shape: AttentionShape, card: Card) -> tuple[float, float]:
    """Full causal attention at the card's best rate: forward, backward."""
    forward = 4 * shape.head_dim * shape.heads * shape.share * shape.seqlen**2 / 2 / card.flops
    return forward, BACKWARD_PRODUCTS * forward


@dataclass(frozen=True, eq=False)
class Calibration:
    """How many times longer things take than at the card's best rate, and what launching costs."""

    coefficients: dict[str, float]  # term of attention -> times
    dense: float  # the same for full attention, forward and backward together
    host_forward: float  # seconds of one call's launches, like
    host_backward: float
    elementwise: float  # the same for everything beside products and attention, over the bytes that it must move
    source: str  # what it was fitted to

    def stages(self, shape: AttentionShape, card: Card) -> dict[str, float]:
        """Predicted seconds of MoBA attention on the device, by stage."""
        terms = term_seconds(shape, card)
        return {stage: sum(self.coefficients[t] * terms[t] for t in names) for stage, names in STAGES.items()}

    def moba(self, shape: AttentionShape, card: Card) -> tuple[float, float]:
        """Predicted seconds of MoBA attention on the device: forward, backward."""
        stages = self.stages(shape, card)
        return sum(stages[name] for name in FORWARD), stages["bwd"]

    def full(self, shape: AttentionShape, card: Card) -> tuple[float, float]:
        """The same of full attention."""
        return tuple(self.dense * seconds for seconds in dense_seconds(shape, card))


@lru_cache(maxsize=None)
def stored() -> Calibration:
    """The calibration by the rows that are stored for the H200."""
    return Calibration(**_STORED)
