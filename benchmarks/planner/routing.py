"""Which chunks queries choose: synthetic routings, and the one of a recorded trace at any length."""
from __future__ import annotations

from dataclasses import dataclass

import numpy

from moba_megatron.inspect.trace import RoutingTrace

CERTAIN = 1 - 1e-7
"""Largest probability that is told apart from 1: its logarithm must be finite."""
HOT_SHARE = 0.01
HOT_WEIGHT = 20.0
DISTANCE_BINS = 24


@dataclass(frozen=True)
class Routing:
    """Chances of being chosen.

    Args:
        name: for tables.
        inclusion: ``[N, N]``, for each query chunk ``i`` and earlier chunk ``j`` the probability that a (query, head)
            of ``i`` chooses ``j``. Rows add up to ``min(i, topk - 1)``.
        coherence: how many (query, head) of a kv head and chunk choose as one. 1: each for itself, which makes the
            union of what a rank needs as large as it can be.
    """

    name: str
    inclusion: numpy.ndarray
    coherence: float = 1.0

    @property
    def chunks(self) -> int:
        return len(self.inclusion)

    def log_miss(self) -> numpy.ndarray:
        """``log(1 - inclusion)``: the chance of not being chosen, so that chances of independent queries add up."""
        return numpy.log1p(-numpy.minimum(self.inclusion, CERTAIN))


def inclusion_of(weights: numpy.ndarray, topk: int) -> numpy.ndarray:
    """Probabilities ``1 - exp(-s_i w_ij)`` for ``j < i`` with ``s_i`` such that a row adds up to ``min(i, topk - 1)``.

    Args:
        weights: ``[N, N]``, positive below the diagonal.
        topk: chunks a query attends to, its own included.
    """
    n = len(weights)
    earlier = numpy.tril(numpy.ones((n, n), dtype=bool), -1)
    weights = numpy.where(earlier, weights, 0.0)
    goal = numpy.minimum(numpy.arange(n), topk - 1).astype(float)
    free = goal < numpy.arange(n)  # the others choose every earlier chunk
    log_scale = numpy.log(numpy.maximum(goal, 1e-9) / numpy.maximum(weights.sum(1), 1e-300))
    for _ in range(60):  # Newton's steps in the logarithm, kept short; the sum grows with the scale
        raised = numpy.exp(log_scale)[:, None] * weights
        rest = numpy.exp(-raised)
        total, slope = (1 - rest).sum(1), (raised * rest).sum(1)
        step = numpy.where(free, (goal - total) / numpy.maximum(slope, 1e-12), 0.0)
        log_scale += numpy.clip(step, -2, 2)
        if numpy.abs(step).max(initial=0.0) < 1e-9:
            break
    return numpy.where(free[:, None], 1 - numpy.exp(-numpy.exp(log_scale)[:, None] * weights), earlier)


def uniform(chunks: int, topk: int) -> Routing:
    """Every earlier chunk alike: the most that can travel."""
    return Routing("uniform", inclusion_of(numpy.ones((chunks, chunks)), topk))


def local(chunks: int, topk: int) -> Routing:
    """The chance falls with the distance in chunks to the power 1.5."""
    return Routing("local", inclusion_of(_distance(chunks) ** -1.5, topk))


def sink(chunks: int, topk: int) -> Routing:
    """Everybody chooses the first chunk, a hundredth of the chunks is chosen 20 times as often as the others."""
    weights = numpy.ones((chunks, chunks))
    weights[:, ::max(1, round(1 / HOT_SHARE))] = HOT_WEIGHT
    weights[:, 0] = 1e4
    return Routing("sink", inclusion_of(weights, topk))


SYNTHETIC = (uniform, local, sink)


def of_trace(trace: RoutingTrace, layer: int, chunks: int, topk: int) -> Routing:
    """The routing of a recorded layer stretched to ``chunks`` chunks.

    Kept are the share of the first chunk, how the others' chance falls with distance (as a fraction of the query's
    position, in bins of its logarithm), and the coherence that explains how many (query chunk, chunk) pairs of a kv
    head are chosen by nobody. All heads together.
    """
    counts = trace.counts(layer)
    n = trace.num_chunks
    chances = counts.sum(0) / numpy.maximum(trace.queries()[:, None] * trace.num_heads, 1)
    first = chances[1:, 0].mean() if n > 1 else 0.0
    row, column = numpy.tril_indices(n, -1)
    keep = (column > 0) & (row >= trace.topk)  # earlier rows choose everything
    distance = (row - column)[keep] / row[keep]
    edges = numpy.logspace(-numpy.log10(max(n, 2)), 0, DISTANCE_BINS + 1)
    edges[-1] += 1e-9
    bins = numpy.clip(numpy.digitize(distance, edges) - 1, 0, DISTANCE_BINS - 1)
    relative = chances[row, column][keep] * row[keep]  # 1 a chunk would be one choice spread evenly
    total = numpy.bincount(bins, weights=relative, minlength=DISTANCE_BINS)
    number = numpy.bincount(bins, minlength=DISTANCE_BINS)
    density = numpy.interp(numpy.arange(DISTANCE_BINS), numpy.flatnonzero(number), (total / numpy.maximum(number, 1))
                           [number > 0]) if number.any() else numpy.ones(DISTANCE_BINS)
    position = numpy.maximum(numpy.arange(chunks)[:, None], 1)
    at = numpy.clip(numpy.digitize(_distance(chunks) / position, edges) - 1, 0, DISTANCE_BINS - 1)
    weights = numpy.maximum(density, density.max() * 1e-6)[at] / position
    # the first chunk's weight is such that it keeps its share: -log(1 - share) in units where the rest is topk - 1
    rest = numpy.maximum(numpy.tril(weights, -1)[:, 1:].sum(1), 1e-300)
    share = min(first, 0.999)
    weights[:, 0] = -numpy.log1p(-share) * rest / max(topk - 1 - share, 1e-3)
    return Routing(f"layer {layer}", inclusion_of(weights, topk), _coherence(trace, counts))


def _coherence(trace: RoutingTrace, counts: numpy.ndarray) -> float:
    """How many (query, head) choose as one, from the share of (query chunk, chunk) pairs that a kv head never uses."""
    group = trace.num_heads // trace.num_kv_heads
    per_kv_head = counts.reshape(trace.num_kv_heads, group, trace.num_chunks, trace.num_chunks).sum(1)
    row, column = numpy.tril_indices(trace.num_chunks, -1)
    keep = row >= trace.topk
    used = (per_kv_head[:, row[keep], column[keep]] > 0).mean() if keep.any() else 1.0
    draws = trace.queries()[row[keep]] * group
    chance = numpy.minimum(per_kv_head[:, row[keep], column[keep]] / numpy.maximum(draws, 1), CERTAIN)
    # the expected share by the pooled chances of each pair's distance would need bins; the mean over kv heads serves
    pooled = chance.mean(0)
    low, high = 1.0, float(max(draws.max(initial=1), 1))
    for _ in range(50):
        middle = (low * high) ** 0.5
        expected = (1 - numpy.exp(draws / middle * numpy.log1p(-pooled))).mean() if keep.any() else 1.0
        low, high = (middle, high) if expected > used else (low, middle)
    return low


def _distance(chunks: int) -> numpy.ndarray:
    """Query chunk minus chunk, at least 1."""
    i = numpy.arange(chunks)
    return numpy.maximum(i[:, None] - i[None, :], 1).astype(float)
