"""Bytes that each rank must receive in one attention layer up to thousands of ranks, for any routing: simulated.

Expected values under independent choices, exact in the layout of ranks (zigzag pieces may cut chunks): nothing is drawn
at random, and nothing runs on a device. ``traffic_of_selection`` counts the same on a selection that was really made.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy

from moba_megatron.plan.attention_cost import BF16, FP32, LINK_SHARE, AttentionShape, Calibration
from moba_megatron.plan.collectives import LATENCY, Group, all_gather
from moba_megatron.plan.hardware import Card

from .routing import Routing

EFFICIENT = 0.5
"""A comm type scales to the most ranks at which a layer still reaches this efficiency."""


@dataclass(frozen=True)
class Layer:
    """One attention layer over all ranks.

    Args:
        chunk_size, topk: as in MoBAConfig.
        heads, kv_heads, head_dim: of the layer.
    """

    chunk_size: int = 4096
    topk: int = 12
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def key_bytes(self) -> int:
        """K and V of one token in bf16, all kv heads."""
        return 2 * self.kv_heads * self.head_dim * BF16


@dataclass(frozen=True)
class RankTraffic:
    """Bytes a rank receives in one layer, ``[P]`` each.

    Args:
        forward, backward: from other ranks.
        about: what else is worth telling, such as the share of chunks that some query of a rank chooses.
    """

    forward: numpy.ndarray
    backward: numpy.ndarray
    about: dict = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return float((self.forward + self.backward).max())


def zigzag_tokens(chunks: int, chunk_size: int, ranks: int) -> numpy.ndarray:
    """``[P, N]``: tokens of chunk ``i`` that rank ``r`` holds."""
    tokens = chunks * chunk_size
    if tokens % (2 * ranks):
        raise ValueError(f"the sequence must be a multiple of 2 * ranks = {2 * ranks}, got {tokens}")
    piece = tokens // (2 * ranks)
    begins = numpy.arange(2 * ranks)[:, None] * piece
    starts = numpy.arange(chunks)[None, :] * chunk_size
    overlap = numpy.minimum(begins + piece, starts + chunk_size) - numpy.maximum(begins, starts)
    overlap = numpy.maximum(overlap, 0)
    return (overlap[:ranks] + overlap[ranks:][::-1]).astype(float)


def gathered(layer: Layer, chunks: int, ranks: int) -> RankTraffic:
    """all_gather: K and V of everybody; backward again, and fp32 sums of dk and dv come back by reduce-scatter."""
    others = layer.key_bytes * chunks * layer.chunk_size * (ranks - 1) / ranks
    each = numpy.full(ranks, others)
    return RankTraffic(each, each * (1 + FP32 / BF16))


def exchanged(layer: Layer, chunks: int, ranks: int) -> RankTraffic:
    """a2a: q, k, v out and o back; kv heads are repeated beyond their number, and it ends where query heads do.

    Raises:
        ValueError: there are more ranks than query heads.
    """
    if layer.heads % ranks:
        raise ValueError(f"a2a needs query heads that divide by the ranks, got {layer.heads} heads and {ranks} ranks")
    local = chunks * layer.chunk_size / ranks
    q = local * layer.heads * layer.head_dim * BF16
    kv = local * layer.key_bytes * max(1, ranks / layer.kv_heads)
    each = numpy.full(ranks, (2 * q + kv) * (ranks - 1) / ranks)
    return RankTraffic(each, each)


def chunks_travel(layer: Layer, routing: Routing, ranks: int) -> RankTraffic:
    """Owners send what a rank's queries chose, once for each kv head; backward again, and fp32 dk and dv return."""
    tokens = zigzag_tokens(routing.chunks, layer.chunk_size, ranks)
    group = layer.heads / layer.kv_heads / routing.coherence
    need = 1 - numpy.exp(group * tokens @ routing.log_miss())  # [P, N], for each kv head
    remote = need * (layer.chunk_size - tokens)
    received = remote.sum(1) * layer.key_bytes
    returned = ((need.sum(0)[None] - need) * tokens).sum(1) * layer.key_bytes * FP32 / BF16  # to the owners
    return RankTraffic(received, received + returned, {"union": float(need.mean())})


def seconds_of(traffic: RankTraffic, ranks: int, card: Card) -> float:
    """Time of the busiest rank's bytes if partners are spread evenly over machines: each rank uses its own port."""
    inside = Group(ranks).inside(card)
    outside = (ranks - inside) / max(1, ranks - 1)
    return max(traffic.worst * (1 - outside) / (card.link.value * LINK_SHARE),
               traffic.worst * outside / (card.network.value * LINK_SHARE)) + 4 * LATENCY


def gathered_seconds(layer: Layer, chunks: int, ranks: int, card: Card) -> float:
    """Time of all_gather's collectives, which enter a machine once."""
    part = layer.key_bytes * chunks * layer.chunk_size / ranks
    return all_gather(Group(ranks), part * (2 + FP32 / BF16), card).seconds


def attention_seconds(layer: Layer, chunks: int, ranks: int, card: Card, calibration: Calibration) -> float:
    """What the attention of one rank takes, forward and backward, if the work is even."""
    return sum(calibration.moba(AttentionShape(chunks * layer.chunk_size, layer.chunk_size, layer.topk, layer.heads,
                                               layer.kv_heads, layer.head_dim, 1 / ranks, 1 / ranks), card))


def sweep(layer: Layer, routings: list[Routing], ranks: list[int], card: Card, calibration: Calibration) -> list[dict]:
    """Every comm type at every number of ranks, for routings of one length.

    ``chunks travel`` is ``selective`` where it does not gather.

    Returns:
        rows: ``tokens``, ``ranks``, ``routing``, ``comm``, bytes received (mean of the ranks forward and backward, both
        passes of the busiest), ``seconds`` of communication, seconds of ``attention``, and ``efficiency``: that over
        what the layer takes if communication hides behind attention as far as it can.
    """
    rows = []
    for p in ranks:
        chunks = routings[0].chunks
        attention = attention_seconds(layer, chunks, p, card, calibration)
        found = [("any", "all_gather", gathered(layer, chunks, p), gathered_seconds(layer, chunks, p, card))]
        if layer.heads % p == 0:
            traffic = exchanged(layer, chunks, p)
            found.append(("any", "a2a", traffic, seconds_of(traffic, p, card)))
        for routing in routings:
            traffic = chunks_travel(layer, routing, p)
            found.append((routing.name, "chunks travel", traffic, seconds_of(traffic, p, card)))
        for name, comm, traffic, seconds in found:
            rows.append({
                "tokens": chunks * layer.chunk_size, "ranks": p, "routing": name, "comm": comm,
                "forward_bytes": float(traffic.forward.mean()), "backward_bytes": float(traffic.backward.mean()),
                "worst_bytes": traffic.worst, "seconds": seconds, "attention": attention,
                "efficiency": attention / max(seconds, attention), **traffic.about})
    return rows


def limits(rows: list[dict]) -> list[dict]:
    """For each length, routing and comm type: the most ranks at which the layer's efficiency is at least EFFICIENT."""
    found: dict[tuple, int] = {}
    for row in rows:
        key = row["tokens"], row["comm"], row["routing"]
        found.setdefault(key, 0)
        if row["efficiency"] >= EFFICIENT:
            found[key] = max(found[key], row["ranks"])
    return [{"tokens": tokens, "comm": comm, "routing": routing, "ranks": ranks}
            for (tokens, comm, routing), ranks in found.items()]


def traffic_of_selection(selected: numpy.ndarray, rank_of_query: numpy.ndarray, rank_of_key: numpy.ndarray,
                         chunk_size: int, kv_heads: int, ranks: int) -> numpy.ndarray:
    """(Key, kv head) rows that each rank receives for a real selection of one sequence: counted, not expected.

    Args:
        selected: ``[T, H, topk - 1]``, chunk numbers, -1 for none.
        rank_of_query, rank_of_key: ``[T]`` the rank that holds the row.
        chunk_size: keys in a chunk.
        kv_heads: of the layer.
        ranks: of the group.

    Returns:
        ``[P]``.
    """
    chunks = -(-len(rank_of_key) // chunk_size)
    held = numpy.zeros((ranks, chunks), dtype=numpy.int64)
    numpy.add.at(held, (rank_of_key, numpy.arange(len(rank_of_key)) // chunk_size), 1)
    keys = numpy.zeros(ranks, dtype=numpy.int64)
    for rank in range(ranks):
        mine = selected[rank_of_query == rank]
        for group in numpy.array_split(numpy.arange(selected.shape[1]), kv_heads):
            wanted = numpy.unique(mine[:, group])
            wanted = wanted[wanted >= 0]
            keys[rank] += held[:, wanted].sum() - held[rank, wanted].sum()
    return keys
