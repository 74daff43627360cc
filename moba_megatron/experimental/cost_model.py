"""What the selective schedule chooses from, by the choices of all ranks: queries travel, or chunks, or everything.

A choice is served where its chunk lies (the query visits), by the rank that made it (which fetches a copy of the
chunk), or by a third rank with a copy, where the home has too much to do. So a tensor of serving ranks tells a way:
DISPATCH and FETCH are its extremes, MIXED takes for each rank, kv head and chunk the cheaper one, and relieves busy
homes.

The seconds are reckoned from constants: the busiest rank's bytes over a link, products over a rate, rows handled, and
what it takes to plan. ``python -m benchmarks plan-check`` sets them beside measurements.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel.selective import HANDLING, PLANNING
from ..context_parallel.transport.comm import crowds_the_network, members_a_node

LINK, NETWORK = 280e9, 30e9
"""Bytes a second between GPUs of a node (measured on H200s: 255 to 320), and between nodes (assumed)."""
RATE = 300e12
"""Operations a second of sparse attention."""
PASSES = 3.5
"""Forward and backward over forward."""
AT_ONCE = 1 << 21
"""Entries of a table up to which several ways are reckoned in one go: fewer kernels for the host to launch."""
OVERLOAD = 1.1
"""Work of a rank over the mean, above which visitors of its chunks are sent to copies elsewhere."""
RELAYED_FROM = 4
"""Replicas of a chunk from which on slices of it are passed on by all ranks: its owner sends it once."""
DISPATCH, GATHER, FETCH, MIXED = MODES = "visit", "gather", "fetch", "mixed"


@dataclass(frozen=True)
class RowSizes:
    """Bytes and sizes of the layer: bytes of an element of q, k, v, o; head dims; keys in a chunk."""

    item: int
    dim: int
    v_dim: int
    chunk_size: int

    @property
    def visit(self) -> tuple[int, int]:
        """Bytes of one visiting choice: what goes (q, then q, do, o, lse) and what comes back (o, lse, then dq)."""
        row = (self.dim + self.v_dim) * self.item
        return 2 * row + 4, row + 4

    @property
    def copy(self) -> tuple[int, int]:
        """Bytes of one copy of a kv head's chunk: what comes (K, V, and again) and what goes back (fp32 dK, dV)."""
        keys = self.chunk_size * (self.dim + self.v_dim)
        return 2 * keys * self.item, 4 * keys

    @property
    def work(self) -> float:
        """Seconds of attention of one choice, forward and backward."""
        return 2 * (self.dim + self.v_dim) * self.chunk_size * PASSES / RATE


def cheapest_mode(table: Tensor, homes: Tensor, sizes: RowSizes, group: dist.ProcessGroup) -> tuple[str, Tensor | None]:
    """One of MODES, the same on every rank, and who serves what (None for GATHER); the host waits for four numbers.

    Args:
        table: int32 ``[P, HK, chunk ids]``, how often each rank's queries chose each chunk.
        homes: int64 ``[P, M]``, ids of every rank's chunks.
        sizes: of the layer.
        group: the ranks.
    """
    members = members_a_node(group)
    seconds, servers = seconds_of_modes(table, homes, sizes, NETWORK if members < group.size() else LINK,
                                       members if crowds_the_network(group) else 1)
    listed = seconds.tolist()
    way = MODES[listed.index(min(listed))]
    return way, servers.get(way)


def seconds_of_modes(table: Tensor, homes: Tensor, sizes: RowSizes, link: float,
                    members_a_node: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Seconds of each of MODES, forward and backward, fp64 ``[4]``; and who serves what in all of them but GATHER.

    Args:
        table, homes, sizes: as :func:`cheapest_mode`.
        link: bytes a second.
        members_a_node: ranks of a node that share what a gather brings into it.
    """
    home = owner_of_chunks(homes, table.shape[2])
    visits, fetches = home.expand(table.shape), _ranks(table).expand(table.shape)
    mixes = _mixed(table, home, sizes, link)
    seconds = PLANNING + _seconds_of_each(table, (visits, fetches, *mixes), home, sizes, link)
    visit, fetch, by_bytes, relieved = seconds.unbind()
    whole = (homes.numel() - homes.shape[1]) * table.shape[1] * sum(sizes.copy) / members_a_node
    gather = table.sum((1, 2)).max().double() * sizes.work + whole / link
    mixed = torch.where(relieved < by_bytes, mixes[1], mixes[0])
    seconds = {DISPATCH: visit, GATHER: gather, FETCH: fetch, MIXED: torch.minimum(by_bytes, relieved)}
    return torch.stack([seconds[way] for way in MODES]), {DISPATCH: visits, FETCH: fetches, MIXED: mixed}


def _seconds_of_each(table: Tensor, candidates: Sequence[Tensor], home: Tensor, sizes: RowSizes, link: float) -> Tensor:
    """:func:`seconds_of` of each of several servers: fp64 ``[n]``."""
    if table.numel() > AT_ONCE:
        return torch.stack([seconds_of(table, servers, home, sizes, link) for servers in candidates])
    return seconds_of(table, torch.stack(tuple(candidates)), home, sizes, link)


def seconds_of(table: Tensor, servers: Tensor, home: Tensor, sizes: RowSizes, link: float) -> Tensor:
    """Seconds where ``servers`` serve what each rank's queries chose, without PLANNING.

    Args:
        table: ``[P, HK, chunk ids]``.
        servers: int64 ``[..., P, HK, chunk ids]``.
        home: int64 ``[chunk ids]``.
        sizes, link: as :func:`seconds_of_modes`.

    Returns:
        fp64 ``[...]``.
    """
    away, size = _away(_wide(table), servers), len(table)
    leaving, coming = away.sum((-1, -2)), _added_up(servers, away, size)
    copies = replicas_of(table, servers, home)
    number, relayed = copies.sum(-3), is_relayed(copies)
    fetched = copies.sum((-1, -2))
    given = _added_up(home.expand(number.shape), torch.where(relayed, 1, number), size, 2)
    (out, back), (copy, sums) = sizes.visit, sizes.copy
    passed, slices = (torch.where(relayed, x, 0).sum((-1, -2)).double()[..., None] / size
                      for x in (number, 1))  # by every relay
    sent = leaving * out + coming * back + given * copy + fetched * sums + passed * copy + slices * sums
    received = leaving * back + coming * out + given * sums + fetched * copy + passed * sums + slices * copy
    work = _wide(table).sum((1, 2)) - leaving + coming
    return (torch.maximum(sent, received).amax(-1).double() / link + (leaving + coming).amax(-1).double() * HANDLING
            + work.amax(-1).double() * sizes.work)


def mixed_ranks(table: Tensor, home: Tensor, sizes: RowSizes, link: float) -> Tensor:
    """Who serves what if the cheaper is taken for each rank, kv head and chunk: int64 ``[P, HK, chunk ids]``.

    Args:
        table: as :func:`cheapest_mode`; expected values, fp64, are also understood.
        home: int64 ``[chunk ids]``, the rank of each chunk.
        sizes, link: as :func:`seconds_of_modes`.
    """
    mixes = _mixed(table, home, sizes, link)
    by_bytes, relieved = _seconds_of_each(table, mixes, home, sizes, link).unbind()
    return torch.where(relieved < by_bytes, mixes[1], mixes[0])


def _mixed(table: Tensor, home: Tensor, sizes: RowSizes, link: float) -> tuple[Tensor, Tensor]:
    """Two ways to mix, of which the faster is taken.

    In the first a rank fetches a chunk where its choices of it, as visitors, would cost more than the copy. Where that
    leaves a home with too much work the second is :func:`_relieved`.
    """
    alone = table.double() * (sum(sizes.visit) + HANDLING * link) > sum(sizes.copy)
    by_bytes = torch.where(alone, _ranks(table), home)
    return by_bytes, _relieved(_wide(table), by_bytes, home, sum(sizes.copy) / link / sizes.work)


def _relieved(table: Tensor, servers: Tensor, home: Tensor, least: float) -> Tensor:
    """Servers with visitors of the busiest homes moved to copies on ranks that do less than the mean.

    The largest crowds of a busy home are moved until it does as much as the mean. All that is moved, in a line, is
    poured into the ranks that have room, one after the other: a crowd goes to few ranks, and a rank takes few crowds.

    Args:
        table, servers, home: as :func:`mixed_ranks`.
        least: a smaller crowd stays: the copy would take as long as its work.
    """
    away = _away(table, servers)
    busy = table.sum((1, 2)) - away.sum((1, 2)) + _added_up(servers, away, len(table))
    mean = busy.sum() // len(table)
    surplus = torch.where(busy > OVERLOAD * mean, busy - mean, 0)
    crowd, at = away.sum(0).flatten(), home.expand(table.shape[1:]).flatten()
    order = crowd.argsort(descending=True, stable=True)
    order = order[at[order].argsort(stable=True)]  # home after home, large crowds first
    sizes, owner = crowd[order], at[order]
    before = sizes.cumsum(0) - sizes
    first = torch.searchsorted(owner, torch.arange(len(table), device=owner.device)).clamp(max=len(owner) - 1)
    moved = torch.minimum((surplus[owner] - (before - before[first][owner])).clamp(min=0), sizes)
    moved = torch.where(moved < least, 0, moved)
    begin, amount = torch.empty_like(crowd), torch.empty_like(crowd)
    begin[order], amount[order] = moved.cumsum(0) - moved, moved
    place = away.cumsum(0) - (away + 1) // 2 - (crowd - amount).view(home.expand(table.shape[1:]).shape)
    room = (mean - busy).clamp(min=0).cumsum(0)
    helper = torch.searchsorted(room, place + begin.view(place.shape[1:]), right=True).clamp(max=len(table) - 1)
    served = torch.where((place >= 0) & (away > 0), helper, servers)
    return torch.where(replicas_of(table, served, home), _ranks(table), served)  # who has a copy uses it


def owner_of_chunks(homes: Tensor, chunk_ids: int) -> Tensor:
    """The rank of each chunk, int64 ``[chunk ids]``; of ids without a chunk 0."""
    home = homes.new_zeros(chunk_ids)
    home[homes.flatten()] = torch.arange(len(homes), device=homes.device).repeat_interleave(homes.shape[1])
    return home


def replicas_of(table: Tensor, servers: Tensor, home: Tensor) -> Tensor:
    """Which rank serves chunks that it does not own, and so needs copies of them: bool, of ``servers``' shape."""
    served = torch.zeros(servers.shape, dtype=torch.int32, device=table.device)
    served.scatter_add_(-3, servers, (table > 0).int().expand(servers.shape))
    return (served > 0) & (home != _ranks(table))


def is_relayed(copies: Tensor) -> Tensor:
    """Chunks that so many ranks want that they go through relays (``replicas``): bool ``[..., HK, chunk ids]``."""
    return copies.sum(-3) >= RELAYED_FROM


def _away(table: Tensor, servers: Tensor) -> Tensor:
    """The choices that other ranks serve."""
    return torch.where(servers != _ranks(table), table, 0)


def _added_up(ranks: Tensor, x: Tensor, size: int, dims: int = 3) -> Tensor:
    """``x`` added up over the entries of each rank in its last ``dims`` dimensions: ``[..., P]``."""
    ranks, x = ranks.flatten(-dims), x.flatten(-dims)
    return x.new_zeros(*x.shape[:-1], size).scatter_add_(-1, ranks, x)


def _ranks(table: Tensor) -> Tensor:
    return torch.arange(len(table), device=table.device)[:, None, None]


def _wide(table: Tensor) -> Tensor:
    """Whole numbers are added up exactly, in any order: every rank finds the same."""
    return table if table.is_floating_point() else table.long()
