"""Copies of chunks on ranks that compute with them: what goes where, through relays if many ranks want a chunk.

An owner sends a chunk to each rank that wants it. Where many do (a sink), its link would be the narrowest place: then
every rank gets a slice of the chunk and passes it on, and adds up the slices of dK and dV on their way back, in fp32 in
the order of ranks. So nobody sends a chunk more than about once, and sums are reproducible.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel.selective import RowExchange, true_numbers
from ..context_parallel.transport.comm import Pending


class Replicas(NamedTuple):
    """Copies of one group of kv heads."""

    places: int  # chunks before the rank's own, of each kv head: the most that one has copies of
    direct: RowExchange  # from owners to those who want them, who read [places * chunk_size + T, h, D]
    to_relays: RowExchange | None = None  # which keep them as [rows, 1, D]
    from_relays: RowExchange | None = None

    def start(self, x: Tensor, chunk_size: int, group: dist.ProcessGroup, stage: str) -> Pending:
        """Starts to send rows of ``x`` ``[T, h, D]``; pending: the copies, and x behind them."""
        def place(x: Tensor) -> Tensor:
            out = x.new_empty(self.places * chunk_size + x.shape[0], *x.shape[1:])
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


def make_replicas(places: int, copies: Tensor, relayed: Tensor, chunk_here: Tensor, rank_chunks: Tensor, rank: int,
                  chunk_size: int, counts: list[list[int]]) -> Replicas:
    """The copies of one group of kv heads.

    Args:
        copies, relayed: as ``dispatch_plan.Demand`` has them.
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
