"""Which choices visit which rank, and which chunks are copied: lists for one layer and step, made from all choices.

Every rank knows the choices of all ranks and who serves them (``cost_model``), so both ends of a message know its
length. The host reads 6 P + 2 numbers a group of heads, of all groups at once: its only wait beside that of
``cheapest_mode``.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..context_parallel.head_groups import HeadGroups
from ..context_parallel.layout import ZigzagLayout
from ..context_parallel.transport.comm import all_gather
from ..segments import Routing
from .cost_model import is_relayed, owner_of_chunks, replicas_of
from .replicas import Replicas, make_replicas, replica_counts


def chunks_of_ranks(layout: ZigzagLayout) -> Tensor:
    """Ids of every rank's chunks in the order of its rows: int64 ``[P, T / chunk_size]``."""
    rows, segments = layout.rows, layout.segments
    first = rows.rank_rows.unflatten(0, (rows.size, -1, segments.chunk_size))[:, :, 0]
    return first // segments.chunk_size + first // segments.max_seqlen_k  # a sequence leaves one id unused


def table_of_choices(layout: ZigzagLayout, routings: list[Routing], group: dist.ProcessGroup) -> Tensor:
    """How often each rank's queries chose each chunk: int32 ``[P, HK, chunk ids]``, the same on every rank."""
    chunks = layout.segments.num_chunks(layout.rows.total)
    counts = torch.cat([r.starts.diff().unflatten(0, (-1, chunks)) for r in routings]).int()
    return all_gather(counts, group, "fwd choices").wait().unflatten(0, (layout.rows.size, -1))


@dataclass(frozen=True)
class Round:
    """Rows of one group of kv heads that leave this rank in one round, and rows that come.

    Args:
        choices: int64 ``[n]``, numbers of choices ``(token * h + head) * KS + j`` that leave: rank after rank, then
            by kv head and chunk.
        leaving, coming: how many go to each rank, and come from each.
        order: int64 ``[m]``, the rows that come (rank after rank) sorted by kv head and chunk.
        cu_queries: int32, where each (kv head, chunk here) begins in that order.
    """

    choices: Tensor
    leaving: tuple[int, ...]
    coming: tuple[int, ...]
    order: Tensor
    cu_queries: Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """What this rank serves of one group of kv heads, and what of its queries others serve.

    Args:
        copies: of others' chunks, before the rank's own.
        chunk_here: int32 ``[h, chunk ids + 1]``, which chunk here it is if its own queries attend to it here, else -1.
        most: visitors of one (kv head, chunk), upper bound.
        rounds: of visits.
    """

    copies: Replicas
    chunk_here: Tensor
    most: int
    rounds: list[Round]

    def saved(self) -> list:
        """What backward needs, for autograd."""
        return [self.copies.saved(), self.most,
                [[x.choices, x.leaving, x.coming, x.order, x.cu_queries] for x in self.rounds]]


@dataclass(frozen=True)
class Demand:
    """What ranks want of each other, over kv heads: choices and copies by chunk.

    Args:
        leaving: int64 ``[HK, chunk ids]``, choices of this rank that others serve.
        servers: int64 of that shape, who serves this rank's.
        relayed: bool of that shape, which chunks are copied through relays.
        coming: int32 ``[P, HK, chunk ids]``, choices of each other rank that this one serves.
        copies: bool of that shape, which rank has copies of what.
    """

    leaving: Tensor
    servers: Tensor
    relayed: Tensor
    coming: Tensor
    copies: Tensor

    def of(self, kv_heads: slice) -> "Demand":
        return Demand(*(x[kv_heads] if x.dim() == 2 else x[:, kv_heads] for x in vars(self).values()))

    def numbers(self, homes: Tensor, rank: int) -> Tensor:
        """What the host must know: choices to and from each rank, :func:`replica_counts`, places for copies, most
        visitors."""
        sent = self.leaving.new_zeros(len(homes)).scatter_add_(0, self.servers.flatten(), self.leaving.flatten())
        counts = replica_counts(self.copies, self.relayed, homes, rank).flatten()
        return torch.cat((sent, self.coming.sum((1, 2)), counts, self.copies[rank].sum(1).amax()[None],
                          self.coming.sum(0).amax()[None]))


def dispatch_plans(layout: ZigzagLayout, routings: list[Routing], groups: HeadGroups, table: Tensor, servers: Tensor,
                capacity: int) -> Callable[[int], DispatchPlan]:
    """What this rank serves and what others serve for it, of each group of heads by its number, made when asked for.

    So the host makes those of later groups while the GPU computes the first.

    Args:
        routings: of each group's choices.
        table: :func:`table_of_choices`.
        servers: int64 of its shape, the rank that serves these choices.
        capacity: visitors that a rank takes at once, about: each other rank sends an even share of it, at least one.
    """
    rank, homes = layout.rows.rank, chunks_of_ranks(layout)
    home = owner_of_chunks(homes, table.shape[2])
    copies = replicas_of(table, servers, home)
    coming = torch.where(servers == rank, table, 0)
    coming[rank] = 0
    demand = Demand(torch.where(servers[rank] == rank, 0, table[rank]).long(), servers[rank], is_relayed(copies),
                    coming, copies)
    demands = [demand.of(kv_heads) for _, kv_heads in groups]
    numbers = torch.stack([x.numbers(homes, rank) for x in demands]).tolist()  # the host waits here

    @functools.cache
    def service(group: int) -> DispatchPlan:
        return _service(routings[group], demands[group], numbers[group], homes, home, rank, layout.segments.chunk_size,
                        capacity)

    return service


def _service(routing: Routing, demand: Demand, numbers: list[int], homes: Tensor, home: Tensor, rank: int,
             chunk_size: int, capacity: int) -> DispatchPlan:
    size, mine = homes.shape
    heads, ids = demand.leaving.shape
    sent, received, *counts = (numbers[i * size:(i + 1) * size] for i in range(6))
    places, most = numbers[6 * size:]
    held = demand.copies[rank]
    chunk_here = pad(torch.where(held, held.cumsum(1) - 1, -1), (0, 1), value=-1)
    chunk_here[:, homes[rank]] = places + torch.arange(mine, device=home.device)
    copies = make_replicas(places, demand.copies, demand.relayed, chunk_here, homes, rank, chunk_size, counts)
    served_here = torch.where(pad(demand.servers == rank, (0, 1)), chunk_here, -1).int()
    if not sum(sent + received):
        return DispatchPlan(copies, served_here, 0, [_nobody(homes)])
    unit = torch.arange(heads * ids, device=home.device).view(heads, ids)
    # rank after rank, of each by kv head, copies before its own chunks
    order = ((demand.servers * heads + unit // ids) * 2 + (demand.servers == home)).flatten().argsort(stable=True)
    choices = routing.entries[ranges(routing.starts.long()[:-1][order], demand.leaving.flatten()[order],
                                     sum(sent))].long()
    # copies of each kv head by id, then what is left of their places, then the rank's own chunks
    copied = torch.where(held, unit % ids, ids).sort(1)[0][:, :places]
    here = torch.cat((copied, homes[rank].expand(heads, mine)), 1)
    visitors = pad(demand.coming, (0, 1)).gather(2, here.expand(size, *here.shape)).long()
    limit = max(1, -(-capacity // max(1, size - 1)))
    rounds = [_round(choices, visitors, sent, received, i * limit, limit)
              for i in range(max(1, -(-max(sent + received) // limit)))]
    return DispatchPlan(copies, served_here, most, rounds)


def _nobody(homes: Tensor) -> Round:
    """A round without visits."""
    nothing, none = homes.new_empty(0), (0,) * len(homes)
    return Round(nothing, none, none, nothing, nothing.int())


def _round(choices: Tensor, visitors: Tensor, sent: list[int], received: list[int], begin: int, limit: int) -> Round:
    """The rows from ``begin`` on, at most ``limit``, of every rank's to every other."""
    leaving, coming = (tuple(min(max(0, n - begin), limit) for n in counts) for counts in (sent, received))
    choices = torch.cat([x[begin:begin + limit] for x in choices.split(sent)])
    ends = visitors.flatten(1).cumsum(1)
    inside = (ends - begin).clamp(0, limit) - (ends - visitors.flatten(1) - begin).clamp(0, limit)
    begins = (inside.flatten().cumsum(0) - inside.flatten()).view(inside.shape)
    order = ranges(begins.T.flatten(), inside.T.flatten(), sum(coming))
    total = inside.sum(0).cumsum(0)
    return Round(choices, leaving, coming, order, torch.cat((total.new_zeros(1), total)).int())


def ranges(begins: Tensor, lengths: Tensor, total: int) -> Tensor:
    """``begin, begin + 1, ...`` of each range in turn; ``total`` is the sum of the lengths, known on the host."""
    ends = lengths.cumsum(0)
    which = torch.repeat_interleave(lengths, output_size=total)
    return begins[which] + torch.arange(total, device=begins.device) - (ends - lengths)[which]
