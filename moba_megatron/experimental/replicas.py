"""Chunks that are copied to ranks which serve them: what travels where, through relays if many ranks want a chunk.

An owner sends a chunk to each rank that wants it. Where many do (a sink), its link would be the narrowest place: then
every rank gets a slice of the chunk and passes it on, and adds up the slices of dK and dV on their way back, in fp32 in
the order of ranks. So nobody sends a chunk more than about once, and sums are reproducible.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel.selective import RowExchange, true_numbers
from ..context_parallel.transport.comm import Pending


@dataclass(frozen=True)
class Replicas:
    """Replicas of one group of kv heads.

    Args:
        places: chunks before the rank's own, of each kv head: the most that one has copies of.
        direct: rows that go from owners to those who want them; these read ``[places * chunk_size + T, h, D]``.
        relayed: rows that go from owners to relays, which keep them as ``[rows, 1, D]``, and from there; or None.
    """

    places: int
    direct: RowExchange
    relayed: tuple[RowExchange, RowExchange] | None

    def saved(self) -> list:
        """What makes it again, for autograd."""
        return [self.places, self.direct.saved(), [x.saved() for x in self.relayed or ()]]

    @classmethod
    def restored(cls, saved: list) -> "Replicas":
        places, direct, relayed = saved
        return cls(places, RowExchange(*direct), tuple(RowExchange(*x) for x in relayed) or None)

    def start(self, x: Tensor, chunk_size: int, group: dist.ProcessGroup, stage: str) -> Pending:
        """Starts to send rows of ``x`` ``[T, h, D]``; pending: the copies, and x behind them."""
        def place(x: Tensor) -> Tensor:
            out = x.new_empty(self.places * chunk_size + x.shape[0], *x.shape[1:])
            out[-x.shape[0]:] = x
            return out

        direct = self.direct.start(x, group, stage, place)
        if self.relayed is None:
            return direct
        there, onward = self.relayed
        slices = there.start(x, group, stage, lambda x: x.new_empty(there.take.numel(), 1, x.shape[2])).wait()
        return onward.start(slices, group, stage, lambda _: direct.wait())

    def send_back(self, x: Tensor, own: Tensor, out: Tensor, group: dist.ProcessGroup, stage: str) -> Pending:
        """Starts to send the sums of copies in ``x`` back; the wait writes those of this rank's rows to ``out``.

        Args:
            x: ``[places * chunk_size + T, h, D]``.
            own: the last T rows of it, contiguous; changed.
        """
        direct = self.direct.send_back(x, own, out, group, stage)
        if self.relayed is not None:
            there, onward = self.relayed
            slices = x.new_zeros(there.take.numel(), 1, x.shape[2])
            onward.send_back(x, slices, slices, group, stage).wait()
            there.send_back(slices, own, own, group, stage).wait()
        return direct


def make_replicas(places: int, copies: Tensor, relayed: Tensor, slot: Tensor, homes: Tensor, rank: int, chunk_size: int,
                counts: list[list[int]]) -> Replicas:
    """The copies of one group of kv heads.

    Args:
        places: as in :class:`Replicas`.
        copies: bool ``[P, h, chunk ids]``, which rank has copies of what.
        relayed: bool ``[h, chunk ids]``, what goes through relays.
        slot: ``[h, chunk ids + 1]``, the place of each chunk on this rank.
        homes: int64 ``[P, M]``, ids of every rank's chunks.
        rank: this one.
        chunk_size: rows of a chunk.
        counts: :func:`replica_counts` on the host.
    """
    size, mine = homes.shape
    heads = copies.shape[1]
    within = torch.arange(chunk_size, device=homes.device)
    given, taken, owned, wanted = counts

    def rows(chunk: Tensor, head: Tensor) -> Tensor:
        return (chunk[:, None] * chunk_size + within) * heads + head[:, None]

    def places_of(units: Tensor) -> Tensor:
        """Rows where copies lie here; units are numbers of (owner, kv head, chunk of the owner)."""
        head = units // mine % heads
        return rows(slot[head, homes[units // (heads * mine), units % mine]], head)

    direct = copies & ~relayed
    number = true_numbers(direct[:, :, homes[rank]], sum(given))
    send = rows(number % mine, number // mine % heads).flatten()
    take = places_of(true_numbers(direct[rank][:, homes].transpose(0, 1), sum(taken))).flatten()
    travel = RowExchange(send, tuple(n * chunk_size for n in given), take, tuple(n * chunk_size for n in taken))
    if not sum(owned):
        return Replicas(places, travel, None)
    relay = within * size // chunk_size  # of each row of a chunk
    lengths = [-(-(i + 1) * chunk_size // size) - -(-i * chunk_size // size) for i in range(size)]

    def by_relay(rows: Tensor) -> Tensor:
        """Rows ``[units, chunk_size]`` relay after relay."""
        unit = torch.arange(len(rows), device=rows.device)[:, None]
        return rows.flatten()[(relay * len(rows) + unit).flatten().argsort(stable=True)]

    number = true_numbers(relayed[:, homes[rank]], owned[rank])
    here = torch.arange(sum(owned) * lengths[rank], device=homes.device)
    there = RowExchange(by_relay(rows(number % mine, number // mine)), tuple(owned[rank] * n for n in lengths), here,
                   tuple(n * lengths[rank] for n in owned))
    every = relayed[:, homes].transpose(0, 1).flatten()  # (owner, kv head, chunk of the owner)
    wants = (copies & relayed)[:, :, homes].transpose(1, 2).flatten(1)
    unit = (every.cumsum(0) - 1)[true_numbers(wants, sum(wanted)) % every.numel()]
    send = (unit[:, None] * lengths[rank] + torch.arange(lengths[rank], device=unit.device)).flatten()
    take = by_relay(places_of(true_numbers(wants[rank], wanted[rank])))
    onward = RowExchange(send, tuple(n * lengths[rank] for n in wanted), take, tuple(wanted[rank] * n for n in lengths))
    return Replicas(places, travel, (there, onward))


def replica_counts(copies: Tensor, relayed: Tensor, homes: Tensor, rank: int) -> Tensor:
    """How many (kv head, chunk): given to each rank, taken from each rank; relayed of each owner, wanted by each rank.

    Returns:
        int64 ``[4, P]``.
    """
    direct = copies & ~relayed
    return torch.stack((direct[:, :, homes[rank]].sum((1, 2)), direct[rank][:, homes].sum((0, 2)),
                        relayed[:, homes].sum((0, 2)), (copies & relayed).sum((1, 2))))
