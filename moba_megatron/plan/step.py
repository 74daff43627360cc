"""Time of one training step of a layout: matrix products, attention, collectives, what hides what, the pipeline; and
every sensible layout of a run, predicted, sorted by cost."""
from collections import Counter
from dataclasses import dataclass, replace

from ..context_parallel import COMM_TYPES
from . import collectives
from .attention_cost import BF16, FP32, AttentionShape, Calibration
from .collectives import NOTHING, Amounts, Exchange, Group, Traffic, exchange
from .hardware import Card
from .layout import RECOMPUTE, Layout, candidates, refusals
from .memory import Memory, estimate, rank_parameters
from .models import Run

HALF_SPEED_DIM = 256  # narrowest side of a product that reaches half of what large ones do (assumed: 0.8 at 1024)
HOST_LAYER = 1e-3  # seconds of launching one layer without its attention, one pass (assumed)
OPTIMIZER_BYTES = 30  # read and written by Adam for a parameter
LOSS_BYTES = 16  # read and written for an entry of the logits, forward and backward
HIDDEN_COST, HIDDEN_COST_NCCL = 0.4, 0.9
"""What communication beside attention costs it, over its own time on the machine's links: they share memory, and with
NCCL, which is what goes between machines, multiprocessors. Of all_gather rows of `benchmarks cp` on two H200s: eight by
copy engines (2026-11-23), four by NCCL (2026-11-22: 0.8 to 1.3)."""
RING_SECONDS = 1.6e-3
"""What p2p adds to a layer's forward, and to its backward, in Transformer Engine on two H200s beside half of one GPU's
time (benchmarks/planner/measured.py)."""
GATHERED_DENSE = 1.16
"""Full attention on gathered keys over a fourth of one GPU's time, in Transformer Engine on four H200s (same)."""
PARTS = ("matrices", "elementwise", "attention", "output", "context", "tensor", "pipeline", "data", "optimizer", "host")
"""What the time of a step goes to."""


@dataclass(frozen=True)
class Part(Amounts):
    """Seconds and traffic of one thing in a step, on the busiest GPU."""

    seconds: float = 0.0  # that nothing else hides
    hidden: float = 0.0  # seconds of communication that computation hides
    traffic: Traffic = NOTHING  # of a step; its seconds are those of the links, hidden or not


@dataclass(frozen=True)
class Prediction:
    """What a layout is expected to cost."""

    run: Run  # what was asked, like
    layout: Layout
    memory: Memory  # of the fullest GPU
    parts: dict[str, Part]  # PARTS, which add up to the step
    mfu: float  # operations as if every layer attended fully, over the card's peak. Above 1 where MoBA saves that much
    mfu_moba: float  # the same with the operations that are done

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.run.tokens / self.seconds

    @property
    def cost(self) -> float:
        """GPU seconds a million tokens."""
        return 1e6 * self.seconds * self.layout.gpus / self.run.tokens

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing hides."""
        return sum(self.parts[name].seconds for name in ("context", "tensor", "pipeline", "data"))

    @property
    def hidden(self) -> float:
        return sum(part.hidden for part in self.parts.values())


def predict(run: Run, layout: Layout, card: Card, calibration: Calibration, optimizer: bool = True) -> Prediction:
    """Memory and time of one step; ``optimizer``: its step and its communication count."""
    micro_batches = run.batch // layout.dp
    costs = {moba: _layer(run if moba is None else replace(run, moba=moba), layout, card, calibration, moba is None)
             for moba in dict.fromkeys(run.layers)}
    stages = []
    per_stage = run.model.layers // layout.pp
    for first in range(0, run.model.layers, per_stage):
        stage: dict[str, Part] = {}
        for moba, number in Counter(run.layers[first:first + per_stage]).items():
            stage = {name: stage.get(name, Part()) + part * number for name, part in costs[moba].items()}
        stages.append(stage)
    logits = run.seqlen / layout.cp * run.model.padded_vocabulary(layout.tp) / layout.tp
    stages[-1]["output"] = Part(
        6 * logits * run.model.hidden / card.flops + logits * LOSS_BYTES / card.bytes_per_second)
    seconds = [sum(part.seconds for part in parts.values()) for parts in stages]
    slowest = max(range(layout.pp), key=seconds.__getitem__)
    parts = {name: part * micro_batches for name, part in stages[slowest].items()}
    parts["pipeline"] = Part(sum(seconds) - seconds[slowest])  # the first micro batch passes every other stage too
    if layout.pp > 1:  # activations to the next stage and gradients back, none hidden
        sent = run.seqlen / layout.cp * run.model.hidden * BF16 / layout.tp
        both = collectives.point_to_point(layout.gpus // layout.pp, sent, card) * (2 * (micro_batches + layout.pp - 1))
        parts["pipeline"] += Part(both.seconds, 0.0, both)
    if optimizer:
        parts |= _update(run, layout, card, seconds[slowest])
    parts = {name: parts.get(name, Part()) for name in PARTS}
    rate = layout.gpus * card.peak.value * sum(part.seconds for part in parts.values())
    return Prediction(run, layout, estimate(run, layout), parts, run.step_flops(dense=True) / rate,
                      run.step_flops(dense=False) / rate)


def plan(run: Run, card: Card, calibration: Calibration, fixed: dict[str, int | str] | None = None
         ) -> tuple[list[Prediction], list[tuple[Layout, list[str]]]]:
    """All layouts that agree with ``fixed``, fields of Layout that the user has decided: those that fit, cheapest first
    (with the least recompute that fits), and the others with reasons."""
    fit, out, fixed = [], [], dict(fixed or {})
    modes = RECOMPUTE if (only := fixed.pop("recompute", None)) is None else (only,)
    for layout in candidates(run, int(card.node.value)):
        if any(getattr(layout, name) != value for name, value in fixed.items()):
            continue
        if why := refusals(run, layout):
            out.append((layout, why))
            continue
        predictions = [predict(run, replace(layout, recompute=m), card, calibration) for m in modes]
        if enough := [p for p in predictions if p.memory.total <= card.memory.value]:
            fit.append(min(enough, key=lambda p: p.cost))
        else:
            least = min(p.memory.total for p in predictions)
            out.append((layout, [f"needs {least / 2**30:.0f} GiB a GPU, has {card.memory.value / 2**30:.0f}"]))
    return sorted(fit, key=lambda p: p.cost), out


def _layer(run: Run, layout: Layout, card: Card, calibration: Calibration, dense: bool) -> dict[str, Part]:
    """One layer, one micro batch, forward and backward."""
    model, again, attention_again = run.model, layout.recompute == "full", layout.recompute != "none"
    tokens = run.seqlen / layout.cp
    matrices = 2 * tokens * model.matrix_parameters / layout.tp / (card.flops * matrix_share(run, layout))
    elementwise = elementwise_bytes(run) * calibration.elementwise * tokens / layout.tp / card.bytes_per_second
    forward, backward = _attention(run, layout, card, calibration, dense)
    moved = Exchange()
    if layout.comm_type in COMM_TYPES:  # the ring of p2p is part of the time of attention
        brought = AttentionShape(run.seqlen, run.moba.chunk_size, run.moba.topk, model.heads // layout.tp,
                                 model.kv_heads // layout.tp, model.head_dim, 1 / layout.cp)
        moved = exchange(layout.comm_type, brought, layout.cp, layout.tp, layout.inner, card,
                         1 if dense else None)  # dense layers are Transformer Engine's own
    passes = 4 if again else 3
    attention = forward * (2 if attention_again else 1) + backward
    waiting = HOST_LAYER * (3 if again else 2)
    if not dense:
        waiting += calibration.host_forward * (2 if attention_again else 1) + calibration.host_backward
    tensor = collectives.all_gather(Group(layout.tp), tokens * model.hidden * BF16 / layout.tp, card)
    return {"matrices": Part(matrices * passes), "elementwise": Part(elementwise * passes),
            "attention": Part(attention), "context": _hide(moved, forward, backward, attention_again, card),
            # two gathers and two scatters a pass; backward's further two gathers run beside products
            "tensor": Part(tensor.seconds * (12 if again else 8), tensor.seconds * 2, tensor * (14 if again else 10)),
            "host": Part(max(0.0, waiting - passes * (matrices + elementwise) - attention))}


def _attention(run: Run, layout: Layout, card: Card, calibration: Calibration, dense: bool) -> tuple[float, float]:
    """Seconds forward and backward, on the device."""
    m, split = run.model, layout.tp * layout.heads_split
    shape = AttentionShape(run.seqlen, run.moba.chunk_size, run.moba.topk, m.heads / split, max(1, m.kv_heads / split),
                           m.head_dim, 1 / layout.sequence_split, 1 / layout.sequence_split)
    if not dense:
        return calibration.moba(shape, card)
    forward, backward = calibration.full(shape, card)
    if layout.comm_type == "p2p":
        return forward + RING_SECONDS, backward + RING_SECONDS
    slower = GATHERED_DENSE if layout.sequence_split > 1 else 1.0
    return forward * slower, backward * slower


def _hide(moved: Exchange, forward: float, backward: float, again: bool, card: Card) -> Part:
    """Exposed and hidden communication of a layer: what comes while attention runs is exposed where it takes longer,
    and slows attention down (HIDDEN_COST)."""
    times, part = 2 if again else 1, Part()
    for (first, rest, after), compute in [(moved.forward, forward)] * times + [(moved.backward, backward)]:
        late = max(0.0, rest.seconds - compute)
        cost = HIDDEN_COST_NCCL if moved.nccl or rest.network else HIDDEN_COST
        slower = min(rest.seconds - late, cost * collectives.link_seconds(rest.link + rest.network, card))
        part += Part(first.seconds + late + after.seconds + slower, rest.seconds - late - slower, first + rest + after)
    return part


def matrix_share(run: Run, layout: Layout) -> float:
    """Part of the card's reachable rate that the layer's products get: their narrowest side decides."""
    narrow = min(run.model.hidden, run.model.ffn / layout.tp)
    return narrow / (narrow + HALF_SPEED_DIM)


def elementwise_bytes(run: Run) -> float:
    """Bytes a token that one layer's forward reads and writes outside of products and attention, each once: two norms
    (read, write), two residual additions (read two, write one), rotation of q and k, SwiGLU (read two halves, write
    one), the layout changes of q, k, v and o."""
    m = run.model
    return BF16 * (4 * m.hidden + 6 * m.hidden + 2 * (m.heads + m.kv_heads) * m.head_dim + 3 * m.ffn)


def _update(run: Run, layout: Layout, card: Card, micro_batch_seconds: float) -> dict[str, Part]:
    """The optimizer, and gradients and weights over data and context parallel ranks, which Megatron's --overlap-* hide
    behind the last backward (two thirds of a micro batch) and the first forward."""
    ranks = Group(layout.dp * layout.cp, layout.tp)
    parameters = rank_parameters(run, layout)
    gradients = collectives.all_gather(ranks, FP32 * parameters / ranks.size, card)
    weights = collectives.all_gather(ranks, BF16 * parameters / ranks.size, card)
    if not run.distributed_optimizer:  # an all-reduce: scatter and gather of gradients
        weights = gradients
    late = (max(0.0, gradients.seconds - micro_batch_seconds * 2 / 3)
            + max(0.0, weights.seconds - micro_batch_seconds / 3))
    both = gradients + weights
    shards = ranks.size if run.distributed_optimizer else 1
    return {"data": Part(late, both.seconds - late, both),
            "optimizer": Part(OPTIMIZER_BYTES * parameters / shards / card.bytes_per_second)}
