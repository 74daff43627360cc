"""What is cheapest, by the choices of all ranks: to dispatch queries, to copy chunks, or to gather everything.

A choice (a query, a head, a chunk) is computed by the chunk's owner, to which the query is dispatched; by the rank that
made it, which fetches a copy of the chunk; or by a third rank with a copy, where the owner has too much to do. So a
tensor of compute ranks tells a mode: DISPATCH and FETCH are its extremes, MIXED takes for each rank, kv head and chunk
the cheaper one and relieves busy owners.

Seconds are reckoned from constants: the busiest rank's bytes over a link, products over a rate, rows handled, and what
it takes to plan. ``python -m benchmarks plan-check`` sets them beside measurements.

Arguments, where nothing else is said:
    table: ``[P, HK, chunk ids]``, how often each rank's queries chose each chunk; or expected values, fp64.
    computed_by: int64 ``[..., P, HK, chunk ids]``, the rank that computes these choices.
    owner: int64 ``[chunk ids]``, the rank of each chunk.
    rank_chunks: int64 ``[P, M]``, ids of every rank's chunks.
    link: bytes a second.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel.selective import HANDLING, PLANNING
from ..context_parallel.transport.comm import crowds_the_network, members_a_node

LINK, NETWORK = 280e9, 30e9
"""Bytes a second between GPUs of a node (measured on H200s: 255 to 320), and between nodes (assumed)."""
RATE = 300e12  # operations a second of sparse attention
PASSES = 3.5  # forward and backward over forward
AT_ONCE = 1 << 21
"""Entries of a table up to which several modes are reckoned in one go: fewer kernels for the host to launch."""
OVERLOAD = 1.1  # work of a rank over the mean, above which queries for its chunks are sent to copies elsewhere
RELAYED_FROM = 4  # copies of a chunk from which on slices of it are passed on by all ranks: its owner sends it once
DISPATCH, GATHER, FETCH, MIXED = MODES = "visit", "gather", "fetch", "mixed"  # as stored measurements call them


@dataclass(frozen=True)
class RowSizes:
    """Bytes and sizes of the layer: bytes of an element of q, k, v, o; head dims; keys in a chunk."""

    item: int
    dim: int
    v_dim: int
    chunk_size: int

    @property
    def query(self) -> tuple[int, int]:
        """Bytes of a dispatched choice: what goes (q, then q, do, o, lse) and what comes back (o, lse, then dq)."""
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


def cheapest_mode(table: Tensor, rank_chunks: Tensor, sizes: RowSizes,
                  group: dist.ProcessGroup) -> tuple[str, Tensor | None]:
    """One of MODES, the same on every rank, and who computes what (None for GATHER); the host reads four numbers."""
    members = members_a_node(group)
    seconds, computed_by = seconds_of_modes(table, rank_chunks, sizes, NETWORK if members < group.size() else LINK,
                                            members if crowds_the_network(group) else 1)
    listed = seconds.tolist()
    mode = MODES[listed.index(min(listed))]
    return mode, computed_by.get(mode)


def seconds_of_modes(table: Tensor, rank_chunks: Tensor, sizes: RowSizes, link: float,
                     members_a_node: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Seconds of each of MODES, forward and backward, fp64 ``[4]``; and who computes what in all of them but GATHER.

    ``members_a_node`` ranks share what a gather brings into their node.
    """
    whole = (rank_chunks.numel() - rank_chunks.shape[1]) * table.shape[1] * sum(sizes.copy) / members_a_node
    gather = table.sum((1, 2)).max().double() * sizes.work + whole / link
    (dispatch, fetch, mixed), computed_by = reckon(table, owner_of_chunks(rank_chunks, table.shape[2]), sizes, link)
    return torch.stack((PLANNING + dispatch, gather, PLANNING + fetch, PLANNING + mixed)), computed_by


def reckon(table: Tensor, owner: Tensor, sizes: RowSizes, link: float) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Seconds of DISPATCH, FETCH and MIXED without PLANNING, and who computes what: int64 ``[P, HK, chunk ids]``.

    MIXED is the faster of two: a rank fetches a chunk where its choices of it, dispatched, would cost more than the
    copy; and the same :func:`_relieved`, where that leaves an owner with too much work.
    """
    ranks = _ranks(table)
    alone = table.double() * (sum(sizes.query) + HANDLING * link) > sum(sizes.copy)
    by_bytes = torch.where(alone, ranks, owner)
    relieved = _relieved(_wide(table), by_bytes, owner, sum(sizes.copy) / link / sizes.work)
    candidates = owner.expand(table.shape), ranks.expand(table.shape), by_bytes, relieved
    if table.numel() > AT_ONCE:
        seconds = [seconds_of(table, computed_by, owner, sizes, link) for computed_by in candidates]
    else:
        seconds = seconds_of(table, torch.stack(candidates), owner, sizes, link).unbind()
    mixed = torch.where(seconds[3] < seconds[2], relieved, by_bytes)
    return ([*seconds[:2], torch.minimum(*seconds[2:])], {DISPATCH: candidates[0], FETCH: candidates[1], MIXED: mixed})


def seconds_of(table: Tensor, computed_by: Tensor, owner: Tensor, sizes: RowSizes, link: float) -> Tensor:
    """Seconds without PLANNING: fp64 ``[...]``."""
    away, size = _away(_wide(table), computed_by), len(table)
    leaving, coming = away.sum((-1, -2)), _sum_by_rank(computed_by, away, size)
    copies = replicas_of(table, computed_by, owner)
    number, relayed = copies.sum(-3), is_relayed(copies)
    fetched = copies.sum((-1, -2))
    given = _sum_by_rank(owner.expand(number.shape), torch.where(relayed, 1, number), size, 2)
    (out, back), (copy, sums) = sizes.query, sizes.copy
    passed, slices = (torch.where(relayed, x, 0).sum((-1, -2)).double()[..., None] / size
                      for x in (number, 1))  # by every relay
    sent = leaving * out + coming * back + given * copy + fetched * sums + passed * copy + slices * sums
    received = leaving * back + coming * out + given * sums + fetched * copy + passed * sums + slices * copy
    work = _wide(table).sum((1, 2)) - leaving + coming
    return (torch.maximum(sent, received).amax(-1).double() / link + (leaving + coming).amax(-1).double() * HANDLING
            + work.amax(-1).double() * sizes.work)




def _relieved(table: Tensor, computed_by: Tensor, owner: Tensor, least: float) -> Tensor:
    """``computed_by`` with choices of the busiest owners' chunks moved to copies on ranks that do less than the mean.

    A chunk's choices from elsewhere are a crowd. The largest crowds of a busy owner are moved until it does as much as
    the mean. All that is moved, in a line, is poured into the ranks that have room, one after the other: a crowd goes
    to few ranks, and a rank takes few crowds. One smaller than ``least`` stays: the copy would take as long.
    """
    away = _away(table, computed_by)
    busy = table.sum((1, 2)) - away.sum((1, 2)) + _sum_by_rank(computed_by, away, len(table))
    mean = busy.sum() // len(table)
    surplus = torch.where(busy > OVERLOAD * mean, busy - mean, 0)
    crowd, at = away.sum(0).flatten(), owner.expand(table.shape[1:]).flatten()
    order = crowd.argsort(descending=True, stable=True)
    order = order[at[order].argsort(stable=True)]  # owner after owner, large crowds first
    sizes, at = crowd[order], at[order]
    before = sizes.cumsum(0) - sizes
    first = torch.searchsorted(at, torch.arange(len(table), device=at.device)).clamp(max=len(at) - 1)
    moved = torch.minimum((surplus[at] - (before - before[first][at])).clamp(min=0), sizes)
    moved = torch.where(moved < least, 0, moved)
    begin, amount = torch.empty_like(crowd), torch.empty_like(crowd)
    begin[order], amount[order] = moved.cumsum(0) - moved, moved
    place = away.cumsum(0) - (away + 1) // 2 - (crowd - amount).view(table.shape[1:])
    room = (mean - busy).clamp(min=0).cumsum(0)
    helper = torch.searchsorted(room, place + begin.view(place.shape[1:]), right=True).clamp(max=len(table) - 1)
    moved_to = torch.where((place >= 0) & (away > 0), helper, computed_by)
    return torch.where(replicas_of(table, moved_to, owner), _ranks(table), moved_to)  # who has a copy uses it


def owner_of_chunks(rank_chunks: Tensor, chunk_ids: int) -> Tensor:
    """The rank of each chunk, int64 ``[chunk ids]``; of ids without a chunk 0."""
    ranks = torch.arange(len(rank_chunks), device=rank_chunks.device).repeat_interleave(rank_chunks.shape[1])
    return rank_chunks.new_zeros(chunk_ids).index_copy_(0, rank_chunks.flatten(), ranks)


def replicas_of(table: Tensor, computed_by: Tensor, owner: Tensor) -> Tensor:
    """Which rank computes choices of chunks that it does not own, and so needs copies: bool, as ``computed_by``."""
    computes = torch.zeros(computed_by.shape, dtype=torch.int32, device=table.device)
    computes.scatter_add_(-3, computed_by, (table > 0).int().expand(computed_by.shape))
    return (computes > 0) & (owner != _ranks(table))


def is_relayed(copies: Tensor) -> Tensor:
    """Chunks that so many ranks want that they go through relays (``dispatch_plan``): bool ``[..., HK, chunk ids]``."""
    return copies.sum(-3) >= RELAYED_FROM


def _away(table: Tensor, computed_by: Tensor) -> Tensor:
    """The choices that other ranks compute."""
    return torch.where(computed_by != _ranks(table), table, 0)


def _sum_by_rank(ranks: Tensor, x: Tensor, size: int, dims: int = 3) -> Tensor:
    """``x`` added up over the entries of each rank in its last ``dims`` dimensions: ``[..., P]``."""
    ranks, x = ranks.flatten(-dims), x.flatten(-dims)
    return x.new_zeros(*x.shape[:-1], size).scatter_add_(-1, ranks, x)


def _ranks(table: Tensor) -> Tensor:
    return torch.arange(len(table), device=table.device)[:, None, None]


def _wide(table: Tensor) -> Tensor:
    """Whole numbers are added up exactly, in any order: every rank finds the same."""
    return table if table.is_floating_point() else table.long()
