"""Which choices are dispatched where, and which chunks are copied: lists for one layer and step, made from all choices.

Every rank knows the choices of all ranks and who computes them (``cost_model``), so both ends of a message know its
length. The host reads 6 P + 2 numbers a group of heads, of all groups at once: its only wait beside that of
``cheapest_mode``.

An owner sends a copy of a chunk to each rank that wants it. Where many do (a sink), its link would be the narrowest
place: then every rank gets a slice of the chunk and passes it on, and adds up the slices of dK and dV on their way
back, in fp32 in the order of ranks. So nobody sends a chunk more than about once, and sums are reproducible.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..context_parallel.all_gather import HeadGroups
from ..context_parallel.layout import ZigzagLayout
from ..context_parallel.selective import RowExchange, true_numbers
from ..context_parallel.transport.comm import Pending, all_gather
from ..segments import Routing
from .cost_model import is_relayed, owner_of_chunks, replicas_of


def chunks_of_ranks(layout: ZigzagLayout) -> Tensor:
    """Ids of every rank's chunks in the order of its rows: int64 ``[P, T / chunk_size]``."""
    rows, segments = layout.rows, layout.segments
    first = rows.rank_rows.unflatten(0, (rows.size, -1, segments.chunk_size))[:, :, 0]
    return first // segments.chunk_size + first // segments.max_seqlen_k  # a sequence leaves one id unused


def table_of_choices(layout: ZigzagLayout, routings: list[Routing], group: dist.ProcessGroup) -> Tensor:
    """How often each rank's queries chose each chunk: int32 ``[P, HK, chunk ids]``, the same on every rank."""
    chunks = layout.segments.num_chunks(layout.rows.total)
    counts = torch.cat([r.indptr.diff().unflatten(0, (-1, chunks)) for r in routings]).int()
    return all_gather(counts, group, "fwd choices").wait().unflatten(0, (layout.rows.size, -1))


class Round(NamedTuple):
    """Rows of one group of kv heads that leave this rank in one round, and rows that come."""

    choices: Tensor  # int64, those that leave: (token * h + head) * KS + j, rank after rank, then by kv head and chunk
    leaving: tuple[int, ...]  # how many go to each rank
    coming: tuple[int, ...]  # and come from each
    order: Tensor  # int64, the rows that come (rank after rank) sorted by kv head and chunk
    cu_queries: Tensor  # int32, where each (kv head, chunk here) begins in that order


class Replicas(NamedTuple):
    """Copies of one group of kv heads."""

    places: int  # chunks before the rank's own, of each kv head: the most that one has copies of
    direct: RowExchange  # from owners to those who want them, who read [places * chunk_size + T, h, D]
    to_relays: RowExchange | None = None  # which keep them as [rows, 1, D]
    from_relays: RowExchange | None = None

    def start(self, x: Tensor, chunk_size: int, group: dist.ProcessGroup, stage: str) -> Pending:
        """Starts to send rows of ``x`` ``[T, h, D]``; pending: the copies, and x behind them."""
        def place(x: Tensor) -> Tensor:
            out = x.new_zeros(self.places * chunk_size + x.shape[0], *x.shape[1:])  # as in ``selective``
            out[-x.shape[0]:] = x
            return out

        direct = self.direct.start(x, group, stage, place)
        if self.to_relays is None:
            return direct
        number = self.to_relays.take.numel()
        slices = self.to_relays.start(x, group, stage, lambda x: x.new_empty(number, 1, x.shape[2])).wait()
        return self.from_relays.start(slices, group, stage, lambda _: direct.wait())

    def send_back(self, x: Tensor, own: Tensor, out: Tensor, group: dist.ProcessGroup, stage: str) -> Pending:
        """Starts to send the sums of copies in ``x`` back; the wait writes those of this rank's rows to ``out``.

        ``own``: the last T rows of ``x`` ``[places * chunk_size + T, h, D]``; changed.
        """
        direct = self.direct.send_back(x, own, out, group, stage)
        if self.to_relays is not None:
            slices = x.new_zeros(self.to_relays.take.numel(), 1, x.shape[2])
            self.from_relays.send_back(x, slices, slices, group, stage).wait()
            self.to_relays.send_back(slices, own, own, group, stage).wait()
        return direct


class DispatchPlan(NamedTuple):
    """What this rank computes of one group of kv heads, and what others compute for its queries."""

    replicas: Replicas  # of others' chunks, before the rank's own
    chunk_here: Tensor  # int32 [h, chunk ids + 1], which chunk here it is if its own queries attend to it here, else -1
    most: int  # queries that come for one (kv head, chunk), upper bound
    rounds: list[Round]


class Demand(NamedTuple):
    """What ranks want of each other, over kv heads: choices and copies by chunk."""

    leaving: Tensor  # int64 [HK, chunk ids], choices of this rank that others compute
    computed_by: Tensor  # int64, who computes this rank's
    relayed: Tensor  # bool, which chunks are copied through relays
    coming: Tensor  # int32 [P, HK, chunk ids], choices of each other rank that this one computes
    copies: Tensor  # bool, which rank has copies of what

    def numbers(self, rank_chunks: Tensor, rank: int) -> Tensor:
        """For the host: choices to and from each rank, :func:`replica_counts`, places for copies, most of a chunk."""
        sent = self.leaving.new_zeros(len(rank_chunks))
        sent.scatter_add_(0, self.computed_by.flatten(), self.leaving.flatten())
        return torch.cat((sent, self.coming.sum((1, 2)),
                          replica_counts(self.copies, self.relayed, rank_chunks, rank).flatten(),
                          self.copies[rank].sum(1).amax()[None], self.coming.sum(0).amax()[None]))


def dispatch_plans(layout: ZigzagLayout, routings: list[Routing], groups: HeadGroups, table: Tensor,
                   computed_by: Tensor, capacity: int) -> Callable[[int], DispatchPlan]:
    """The plan of each group of heads by its number, made when asked for, while the GPU computes earlier groups.

    ``routings``: of each group's choices. ``table``, ``computed_by``: as in ``cost_model``. ``capacity``: rows that a
    rank takes at once, about: each other rank sends an even share of it, at least one.
    """
    rank, rank_chunks = layout.rows.rank, chunks_of_ranks(layout)
    owner = owner_of_chunks(rank_chunks, table.shape[2])
    copies = replicas_of(table, computed_by, owner)
    coming = torch.where(computed_by == rank, table, 0)
    coming[rank] = 0
    demand = Demand(torch.where(computed_by[rank] == rank, 0, table[rank]).long(), computed_by[rank],
                    is_relayed(copies), coming, copies)
    demands = [Demand(*(x[..., kv_heads, :] for x in demand)) for _, kv_heads in groups]
    numbers = torch.stack([x.numbers(rank_chunks, rank) for x in demands]).tolist()  # the host waits here

    return functools.cache(lambda group: _plan(routings[group], demands[group], numbers[group], rank_chunks, owner,
                                               rank, layout.segments.chunk_size, capacity))


def _plan(routing: Routing, demand: Demand, numbers: list[int], rank_chunks: Tensor, owner: Tensor, rank: int,
          chunk_size: int, capacity: int) -> DispatchPlan:
    size, mine = rank_chunks.shape
    heads, ids = demand.leaving.shape
    sent, received, *counts = (numbers[i * size:(i + 1) * size] for i in range(6))
    places, most = numbers[6 * size:]
    held = demand.copies[rank]
    chunk_here = pad(torch.where(held, held.cumsum(1) - 1, -1), (0, 1), value=-1)
    chunk_here[:, rank_chunks[rank]] = places + torch.arange(mine, device=owner.device)
    replicas = make_replicas(places, demand.copies, demand.relayed, chunk_here, rank_chunks, rank, chunk_size, counts)
    unit = torch.arange(heads * ids, device=owner.device).view(heads, ids)
    # rank after rank, of each by kv head, copies before its own chunks
    order = ((demand.computed_by * heads + unit // ids) * 2 + (demand.computed_by == owner)).flatten()
    order = order.argsort(stable=True)
    choices = routing.indices[ranges(routing.indptr.long()[:-1][order], demand.leaving.flatten()[order],
                                     sum(sent))].long()
    # copies of each kv head by id, then what is left of their places, then the rank's own chunks
    copied = torch.where(held, unit % ids, ids).sort(1)[0][:, :places]
    here = torch.cat((copied, rank_chunks[rank].expand(heads, mine)), 1)
    queries = pad(demand.coming, (0, 1)).gather(2, here.expand(size, *here.shape)).long()
    limit = max(1, -(-capacity // max(1, size - 1)))
    rounds = [_round(choices, queries, sent, received, begin, limit)
              for begin in range(0, max(1, *sent, *received), limit)]
    computed_here = torch.where(pad(demand.computed_by == rank, (0, 1)), chunk_here, -1).int()
    return DispatchPlan(replicas, computed_here, most, rounds)


def _round(choices: Tensor, queries: Tensor, sent: list[int], received: list[int], begin: int, limit: int) -> Round:
    """The rows from ``begin`` on, at most ``limit``, of every rank's to every other."""
    leaving, coming = (tuple(min(max(0, n - begin), limit) for n in counts) for counts in (sent, received))
    choices = torch.cat([x[begin:begin + limit] for x in choices.split(sent)])
    ends = queries.flatten(1).cumsum(1)
    inside = (ends - begin).clamp(0, limit) - (ends - queries.flatten(1) - begin).clamp(0, limit)
    begins = (inside.flatten().cumsum(0) - inside.flatten()).view(inside.shape)
    order = ranges(begins.T.flatten(), inside.T.flatten(), sum(coming))
    return Round(choices, leaving, coming, order, pad(inside.sum(0).cumsum(0), (1, 0)).int())


def ranges(begins: Tensor, lengths: Tensor, total: int) -> Tensor:
    """``begin, begin + 1, ...`` of each range in turn; ``total`` is the sum of the lengths, known on the host."""
    ends = lengths.cumsum(0)
    which = torch.repeat_interleave(lengths, output_size=total)
    return begins[which] + torch.arange(total, device=begins.device) - (ends - lengths)[which]


def make_replicas(places: int, copies: Tensor, relayed: Tensor, chunk_here: Tensor, rank_chunks: Tensor, rank: int,
                  chunk_size: int, counts: list[list[int]]) -> Replicas:
    """The copies of one group of kv heads.

    Args:
        copies, relayed: as :class:`Demand` has them.
        chunk_here: ``[h, chunk ids + 1]``, the place of each chunk on this rank.
        rank_chunks: int64 ``[P, M]``, ids of every rank's chunks.
        counts: :func:`replica_counts` on the host.
    """
    size, mine = rank_chunks.shape
    heads = copies.shape[1]
    within = torch.arange(chunk_size, device=copies.device)
    given, taken, owned, wanted = counts

    def rows(chunk: Tensor, head: Tensor) -> Tensor:
        return (chunk[:, None] * chunk_size + within) * heads + head[:, None]

    def places_of(units: Tensor) -> Tensor:
        """Rows where copies lie here; units are numbers of (owner, kv head, chunk of the owner)."""
        head = units // mine % heads
        return rows(chunk_here[head, rank_chunks[units // (heads * mine), units % mine]], head)

    direct = copies & ~relayed
    number = true_numbers(direct[:, :, rank_chunks[rank]], sum(given))
    send = rows(number % mine, number // mine % heads).flatten()
    take = places_of(true_numbers(direct[rank][:, rank_chunks].transpose(0, 1), sum(taken))).flatten()
    direct = RowExchange(send, tuple(n * chunk_size for n in given), take, tuple(n * chunk_size for n in taken))
    if not sum(owned):
        return Replicas(places, direct)
    relay = within * size // chunk_size  # of each row of a chunk
    lengths = [-(-(i + 1) * chunk_size // size) - -(-i * chunk_size // size) for i in range(size)]
    slice_rows = lengths[rank]

    def by_relay(rows: Tensor) -> Tensor:
        """Rows ``[units, chunk_size]`` relay after relay."""
        unit = torch.arange(len(rows), device=rows.device)[:, None]
        return rows.flatten()[(relay * len(rows) + unit).flatten().argsort(stable=True)]

    number = true_numbers(relayed[:, rank_chunks[rank]], owned[rank])
    to_relays = RowExchange(by_relay(rows(number % mine, number // mine)), tuple(owned[rank] * n for n in lengths),
                            torch.arange(sum(owned) * slice_rows, device=copies.device),
                            tuple(n * slice_rows for n in owned))
    every = relayed[:, rank_chunks].transpose(0, 1).flatten()  # (owner, kv head, chunk of the owner)
    wants = (copies & relayed)[:, :, rank_chunks].transpose(1, 2).flatten(1)
    unit = (every.cumsum(0) - 1)[true_numbers(wants, sum(wanted)) % every.numel()]
    send = (unit[:, None] * slice_rows + torch.arange(slice_rows, device=unit.device)).flatten()
    take = by_relay(places_of(true_numbers(wants[rank], wanted[rank])))
    from_relays = RowExchange(send, tuple(n * slice_rows for n in wanted), take,
                              tuple(wanted[rank] * n for n in lengths))
    return Replicas(places, direct, to_relays, from_relays)


def replica_counts(copies: Tensor, relayed: Tensor, rank_chunks: Tensor, rank: int) -> Tensor:
    """``[4, P]`` (kv head, chunk): given to each rank, taken from each rank; relayed of each owner, wanted by each."""
    direct = copies & ~relayed
    return torch.stack((direct[:, :, rank_chunks[rank]].sum((1, 2)), direct[rank][:, rank_chunks].sum((0, 2)),
                        relayed[:, rank_chunks].sum((0, 2)), (copies & relayed).sum((1, 2))))
