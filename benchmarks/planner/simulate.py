"""Bytes that each rank must receive in one attention layer up to thousands of ranks, for any routing: simulated.

Expected values under independent choices, exact in the layout of ranks (zigzag pieces may cut chunks): nothing is drawn
at random, and nothing runs on a device. ``traffic_of_selection`` counts the same on a selection that was really made.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from moba_megatron.context_parallel.selective import DISPATCH_FROM, HANDLING, PLANNING
from moba_megatron.experimental.cost_model import MIXED, RowSizes, is_relayed, reckon, replicas_of
from moba_megatron.plan.attention_cost import BF16, FP32, LINK_SHARE, AttentionShape, Calibration
from moba_megatron.plan.collectives import LATENCY, Group, all_gather, query_bytes
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
        work: (query, head, key) products of the rank in forward, relative to an even share.
        handling: seconds that the busiest rank spends on visiting rows, beside their bytes and products.
        planning: seconds for deciding what travels, before anything else.
        about: what else is worth telling, such as how many chunks a rank has copies of.
    """

    forward: numpy.ndarray
    backward: numpy.ndarray
    work: numpy.ndarray
    handling: float = 0.0
    planning: float = 0.0
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
    return RankTraffic(each, each * (1 + FP32 / BF16), numpy.ones(ranks))


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
    return RankTraffic(each, each, numpy.ones(ranks))


def chunks_travel(layer: Layer, routing: Routing, ranks: int) -> RankTraffic:
    """Owners send what a rank's queries chose, once for each kv head; backward again, and fp32 dk and dv return."""
    tokens = zigzag_tokens(routing.chunks, layer.chunk_size, ranks)
    group = layer.heads / layer.kv_heads / routing.coherence
    need = 1 - numpy.exp(group * tokens @ routing.log_miss())  # [P, N], for each kv head
    remote = need * (layer.chunk_size - tokens)
    received = remote.sum(1) * layer.key_bytes
    returned = ((need.sum(0)[None] - need) * tokens).sum(1) * layer.key_bytes * FP32 / BF16  # to the owners
    return RankTraffic(received, received + returned, numpy.ones(ranks), planning=_planning(ranks),
                       about={"union": float(need.mean())})


def _planning(ranks: int) -> float:
    return PLANNING if ranks >= DISPATCH_FROM else 0.0


def queries_travel(layer: Layer, routing: Routing, ranks: int) -> RankTraffic:
    """A choice visits the home of its chunk; (o, lse) come back; dk and dv stay at home."""
    return _served(layer, routing, ranks, lambda table, home: home.expand(table.shape))


def mixed(layer: Layer, routing: Routing, ranks: int, link: float) -> RankTraffic:
    """For each rank, chunk and kv head visits, or a copy; busy homes relieved: as ``ways`` decides in the real thing.

    Args:
        link: bytes a second of a rank.
    """
    sizes = RowSizes(BF16, layer.head_dim, layer.head_dim, layer.chunk_size)
    return _served(layer, routing, ranks, lambda table, home: reckon(table, home, sizes, link)[1][MIXED])


def _served(layer: Layer, routing: Routing, ranks: int,
            decide: Callable[[Tensor, Tensor], Tensor]) -> RankTraffic:
    """What travels where ``decide(choices of ranks, homes)`` tells who serves them; kv heads are alike.

    A home is given the rest of a chunk that pieces cut; the real schedule needs whole chunks.
    """
    tokens = zigzag_tokens(routing.chunks, layer.chunk_size, ranks)
    home = homes(tokens)
    choices = layer.heads / layer.kv_heads * tokens @ routing.inclusion  # [P, N], of one kv head
    table, at = torch.from_numpy(choices)[:, None], torch.from_numpy(tokens.argmax(0))
    servers = decide(table, at)
    copied = replicas_of(table, servers, at)
    relayed, copies = is_relayed(copied)[0].numpy(), copied[:, 0].numpy()
    servers = servers[:, 0].numpy()
    away = numpy.where(servers != numpy.arange(ranks)[:, None], choices, 0.0)
    taken = numpy.bincount(servers.ravel(), away.ravel(), ranks)
    forward, backward = _moved(layer, tokens, home, away.sum(1) * layer.kv_heads, taken * layer.kv_heads)
    chunk, wanted = layer.chunk_size * layer.key_bytes, copies.sum(0)
    slices, passed = relayed.sum() / ranks, wanted[relayed].sum() / ranks  # what each relay gets, and passes on
    got = (copies.sum(1) + slices) * chunk
    returned = (home @ numpy.where(relayed, 1, wanted) + passed) * chunk
    work = choices.sum(1) - away.sum(1) + taken
    handling = (away.sum(1) + taken).max() * layer.kv_heads * HANDLING
    return RankTraffic(forward + got, backward + got + returned * FP32 / BF16, work / work.mean(), float(handling),
                       _planning(ranks), {"copies": float(copies.sum(1).mean()), "relayed": int(relayed.sum())})


def homes(tokens: numpy.ndarray) -> numpy.ndarray:
    """``[P, N]`` 1 where the rank holds most of a chunk (the first of equals): it is given the rest of its keys."""
    found = numpy.zeros_like(tokens)
    found[tokens.argmax(0), numpy.arange(tokens.shape[1])] = 1.0
    return found


def _moved(layer: Layer, tokens: numpy.ndarray, home: numpy.ndarray, sent: numpy.ndarray,
           taken: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Bytes that ranks receive, forward and backward, for rows that travel and for keys that complete a home's chunks.

    Args:
        sent, taken: ``[P]`` (query, head) rows that a rank sends, and serves for others.
    """
    q = layer.head_dim * BF16
    row, back = query_bytes(layer.head_dim)
    completed = (home * (layer.chunk_size - tokens)).sum(1) * layer.key_bytes
    given = ((1 - home) * tokens).sum(1) * layer.key_bytes
    forward = taken * q + sent * (row - q) + completed
    return forward, taken * (back - q) + sent * q + given * FP32 / BF16


def rate(ranks: int, card: Card) -> float:
    """Bytes a second of a rank where its partners are; the network's as soon as some are in other machines."""
    between = Group(ranks).inside(card) < ranks
    return (card.network if between else card.link).value * LINK_SHARE


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

    ``selective`` is the fastest of a gather, chunks, queries and both mixed.

    Returns:
        rows: ``tokens``, ``ranks``, ``routing``, ``comm``, bytes received (mean of the ranks forward and backward, both
        passes of the busiest), ``work`` of the busiest rank over the mean, ``seconds`` of communication, seconds of
        ``attention`` if its work were even, and ``efficiency``: that over what the layer takes if communication hides
        behind attention as far as it can, the busiest rank deciding.
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
            ways = [found[0][2:]]
            for comm, traffic in (("chunks travel", chunks_travel(layer, routing, p)),
                                  ("queries travel", queries_travel(layer, routing, p)),
                                  ("mixed", mixed(layer, routing, p, rate(p, card)))):
                ways.append((traffic, seconds_of(traffic, p, card)))
                found.append((routing.name, comm, *ways[-1]))
            found.append((routing.name, "selective", *min(ways, key=lambda way: _layer_seconds(*way, attention))))
        for name, comm, traffic, seconds in found:
            rows.append({
                "tokens": chunks * layer.chunk_size, "ranks": p, "routing": name, "comm": comm,
                "forward_bytes": float(traffic.forward.mean()), "backward_bytes": float(traffic.backward.mean()),
                "worst_bytes": traffic.worst, "work": float(traffic.work.max()), "seconds": seconds,
                "attention": attention,
                "efficiency": attention / _layer_seconds(traffic, seconds, attention), **traffic.about})
    return rows


def _layer_seconds(traffic: RankTraffic, seconds: float, attention: float) -> float:
    """What the busiest rank takes where communication hides behind attention as far as it can."""
    return traffic.planning + max(seconds, attention * float(traffic.work.max()) + traffic.handling)


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
                         chunk_size: int, kv_heads: int, ranks: int) -> dict[str, numpy.ndarray]:
    """What a real selection of one sequence makes travel: counted, not expected.

    Args:
        selected: ``[T, H, topk - 1]``, chunk numbers, -1 for none.
        rank_of_query, rank_of_key: ``[T]`` the rank that holds the row.
        chunk_size: keys in a chunk.
        kv_heads: of the layer.
        ranks: of the group.

    Returns:
        ``keys [P]``: (key, kv head) rows that a rank receives where chunks travel; ``visits [P, P]``: (query, head)
        rows from a rank to another where queries travel.
    """
    heads = selected.shape[1]
    chunks = -(-len(rank_of_key) // chunk_size)
    held = numpy.zeros((ranks, chunks), dtype=numpy.int64)
    numpy.add.at(held, (rank_of_key, numpy.arange(len(rank_of_key)) // chunk_size), 1)
    keys, visits = numpy.zeros(ranks, dtype=numpy.int64), numpy.zeros((ranks, ranks), dtype=numpy.int64)
    for rank in range(ranks):
        mine = selected[rank_of_query == rank]
        for head in range(heads):
            chosen = _one_hot(mine[:, head], chunks)
            visits[rank] += ((chosen @ (held.T > 0)) > 0).sum(0)
        for group in numpy.array_split(numpy.arange(heads), kv_heads):
            wanted = numpy.unique(mine[:, group])
            wanted = wanted[wanted >= 0]
            keys[rank] += held[:, wanted].sum() - held[rank, wanted].sum()
    numpy.fill_diagonal(visits, 0)
    return {"keys": keys, "visits": visits}


def _one_hot(chosen: numpy.ndarray, chunks: int) -> numpy.ndarray:
    """``[T, topk - 1]`` numbers as ``[T, N]`` zeros and ones."""
    out = numpy.zeros((len(chosen), chunks), dtype=numpy.int64)
    row, column = numpy.nonzero(chosen >= 0)
    out[row, chosen[row, column]] = 1
    return out
