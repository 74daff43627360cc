"""Bytes that each rank must receive in one attention layer up to thousands of ranks, for any routing: simulated.

Expected values under independent choices, exact in the layout of ranks (zigzag pieces may cut chunks): nothing is drawn
at random, and nothing runs on a device. ``traffic_of_selection`` counts the same on a selection that was really made.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy

from .attention_cost import BF16, FP32, AttentionShape
from .calibration import Calibration
from .cards import Card
from .exchange import query_bytes
from .links import LATENCY, Group, all_gather, link_share
from .routing import Routing

OVERLOAD = 1.1
"""Visitors of the busiest rank over the mean, above which copies are made."""
FETCHED = 2 + FP32 / BF16
"""Times that a fetched chunk's bytes travel: forward, again for backward, and its dk, dv in fp32."""
HOT = 0.25
"""Part of the ranks that fetch a chunk, above which it goes by collectives."""
MOST_COPIES = 16
"""Steps of that for each rank, at most."""
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
        about: what else is worth telling, such as how many chunks a rank fetches.
    """

    forward: numpy.ndarray
    backward: numpy.ndarray
    work: numpy.ndarray
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
    return RankTraffic(received, received + returned, numpy.ones(ranks), {"union": float(need.mean())})


def queries_travel(layer: Layer, routing: Routing, ranks: int) -> RankTraffic:
    """A (query, head) visits every home of a chunk it chose; (o, lse) come back; dk and dv stay at home."""
    tokens = zigzag_tokens(routing.chunks, layer.chunk_size, ranks)
    home = homes(tokens)
    visit = _visits(routing, home)
    sent = layer.heads * (tokens * (visit.sum(1)[None] - visit.T)).sum(1)
    taken = layer.heads * ((layer.chunk_size - tokens) * visit.T).sum(1)
    forward, backward = _moved(layer, tokens, home, sent, taken)
    work = layer.chunk_size * layer.heads * home @ routing.inclusion.sum(0)
    return RankTraffic(forward, backward, work / work.mean())


def _visits(routing: Routing, home: numpy.ndarray) -> numpy.ndarray:
    """``[N, P]``: the chance that a query of chunk i goes to rank o.

    A query makes a fixed number of choices, so it misses a home less often than independent choices would. With ``c``
    choices of which a share ``s`` falls on the home, ``(1 - s)^c`` is exact for one choice; where a chunk is certain
    the product of misses is. Both are at least the true chance, so the smaller one is taken.
    """
    choices = numpy.maximum(routing.inclusion.sum(1), 1e-9)[:, None]
    share = numpy.minimum(routing.inclusion @ home.T / choices, 1.0)
    return 1 - numpy.minimum((1 - share) ** choices, numpy.exp(routing.log_miss() @ home.T))


def mixed(layer: Layer, routing: Routing, ranks: int) -> RankTraffic:
    """For each rank, chunk and kv head the cheaper of the two: fetch the chunk, or send the queries that chose it.

    A rank decides alone: it knows how many of its queries chose a chunk. Visitors of a chunk that would overload its
    home are served by copies on the least busy ranks (:func:`spread`). Rows are counted a choice, although a query that
    chose two chunks of one home could travel once. A chunk that more than HOT of the ranks fetch is broadcast, and its
    dk and dv are summed on the way (a reduction), so that no home takes part in more than one transfer of it.
    """
    tokens = zigzag_tokens(routing.chunks, layer.chunk_size, ranks)
    home = homes(tokens)
    visitors = layer.heads / layer.kv_heads * tokens @ routing.inclusion  # [P, N], of one kv head
    away = visitors * (1 - home)
    chunk_bytes = layer.chunk_size * layer.key_bytes / layer.kv_heads
    fetched = away * sum(query_bytes(layer.head_dim)) > chunk_bytes * FETCHED
    travelling = numpy.where(fetched, 0.0, away)
    base = (visitors - travelling).sum(1)
    load = travelling.sum(0)
    served, copies = spread(load, home, base)
    sent, taken = travelling.sum(1) * layer.kv_heads, served @ load * layer.kv_heads
    forward, backward = _moved(layer, tokens, home, sent, taken)
    got = fetched.sum(1) * chunk_bytes * layer.kv_heads
    fetchers = fetched.sum(0)
    hot = fetchers > ranks * HOT
    returned = (home @ numpy.where(hot, 0, fetchers) + hot.sum()) * chunk_bytes * layer.kv_heads
    copied = copies * chunk_bytes * layer.kv_heads
    copied_back = home @ numpy.maximum(0, ((served > 0) & (home == 0)).sum(0)) * chunk_bytes * layer.kv_heads
    work = base + served @ load
    return RankTraffic(forward + got + copied, backward + got + (returned + copied_back) * FP32 / BF16,
                       work / work.mean(), {"fetched": float(fetched.sum(1).mean()), "copies": float(copies.mean()),
                                             "hot": int(hot.sum())})


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


def spread(load: numpy.ndarray, home: numpy.ndarray, base: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Moves visitors of the busiest ranks' chunks to copies on the least busy ranks.

    Args:
        load: ``[N]`` visitors of each chunk.
        home: ``[P, N]`` of :func:`homes`.
        base: ``[P]`` what a rank has to do besides.

    Returns:
        ``[P, N]`` part of a chunk's visitors that a rank serves; ``[P]`` copies that it was given.
    """
    served, copies = home.copy(), numpy.zeros(len(home))
    busy = base + served @ load
    mean = busy.mean()
    for _ in range(MOST_COPIES * len(home)):
        top, low = int(busy.argmax()), int(busy.argmin())
        chunk = int((served[top] * load).argmax())
        if busy[top] <= OVERLOAD * mean or not load[chunk]:
            break
        moved = min(served[top, chunk] * load[chunk], busy[top] - mean, mean - busy[low])
        copies[low] += served[low, chunk] == 0
        served[top, chunk] -= moved / load[chunk]
        served[low, chunk] += moved / load[chunk]
        busy[top] -= moved
        busy[low] += moved
    return served, copies


def seconds_of(traffic: RankTraffic, ranks: int, card: Card) -> float:
    """Time of the busiest rank's bytes if partners are spread evenly over machines: each rank uses its own port."""
    inside = Group(ranks).inside(card)
    outside = (ranks - inside) / max(1, ranks - 1)
    share = link_share()
    return max(traffic.worst * (1 - outside) / (card.link.value * share),
               traffic.worst * outside / (card.network.value * share)) + 4 * LATENCY


def gathered_seconds(layer: Layer, chunks: int, ranks: int, card: Card) -> float:
    """Time of all_gather's collectives, which enter a machine once."""
    part = layer.key_bytes * chunks * layer.chunk_size / ranks
    return all_gather(Group(ranks), part * (2 + FP32 / BF16), card).seconds


def attention_seconds(layer: Layer, chunks: int, ranks: int, card: Card, calibration: Calibration) -> float:
    """What the attention of one rank takes, forward and backward, if the work is even."""
    time = calibration.moba(AttentionShape(chunks * layer.chunk_size, layer.chunk_size, layer.topk, layer.heads,
                                           layer.kv_heads, layer.head_dim, 1 / ranks, 1 / ranks), card)
    return time.forward + time.backward


def sweep(layer: Layer, routings: list[Routing], ranks: list[int], card: Card, calibration: Calibration) -> list[dict]:
    """Every comm type at every number of ranks, for routings of one length.

    ``selective`` is the fastest of a gather, chunks and queries for the whole layer; ``mixed`` chooses by rank and
    chunk, or gathers where that is faster.

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
                                  ("queries travel", queries_travel(layer, routing, p))):
                ways.append((traffic, seconds_of(traffic, p, card)))
                found.append((routing.name, comm, *ways[-1]))
            best = mixed(layer, routing, p)
            for comm, options in (("selective", ways), ("mixed", [found[0][2:], (best, seconds_of(best, p, card))])):
                found.append((routing.name, comm, *min(options, key=lambda o: _layer_seconds(*o, attention))))
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
    return max(seconds, attention * float(traffic.work.max()))


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
