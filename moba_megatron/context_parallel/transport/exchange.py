"""Exchanges of rows: how tensors go from every rank's own order to the global order, and back.

Where a rank's rows are a few runs whose places the host knows (one long sequence), messages are received and sent in
place: nothing is permuted. Otherwise messages are whole ranks' rows, permuted by an index before or after.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Pending, all_gather, crowds_the_network, exchange, reduce_scatter
from .peers import peers_for
from .rows import Rows, copy_rows, place_own, whole_rows


class Arrived(NamedTuple):
    """What reached this rank: its rows as every rank computed them."""

    others: Tensor  # [P - 1, T, h, D], from the other ranks in order
    own: list[tuple[slice, Tensor]]  # (rows of T, this rank's own [rows, h, D]), one or several


def to_global(rows: Rows, own: Sequence[Tensor], messages: Sequence[Tensor | None] | None, group: dist.ProcessGroup,
              stage: str) -> Pending:
    """Starts to collect what every rank has for this one; pending, for each of ``own`` a ``[S, h, D]`` in global order.

    Args:
        own: each ``[T, h, D]``, this rank's message to itself, any strides; D is the same for all: they travel as one.
        messages: for each rank ``[T, heads of all, D]``, contiguous; None as a whole: ``own`` goes to every rank.
    """
    peers = peers_for(rows, group, own[0].device) if messages is None else None
    if peers is not None:
        return peers.fetch(rows, [whole_rows(x[None]) for x in own], stage)
    heads = [x.shape[1] for x in own]

    def permuted(x: Tensor) -> tuple[Tensor, ...]:
        return x.index_select(0, rows.global_rows).split(heads, 1)

    in_place = rows.runs is not None and not (messages is None and crowds_the_network(group))
    if not in_place and messages is None:
        return all_gather(torch.cat(own, 1) if len(own) > 1 else own[0], group, stage, permuted)
    output, rounds = own[0].new_empty(rows.total, sum(heads), own[0].shape[2]), []
    if not in_place:
        ranked = output.unflatten(0, (rows.size, rows.local))
        for part, x in zip(ranked[rows.rank].split(heads, 1), own):
            copy_rows(part, x)
        rounds = [(_without(ranked, rows.rank), _without(messages, rows.rank))]
        return Pending(exchange(rounds, output.device, group, stage), output, messages, stage, permuted)
    for part, x in zip(output.split(heads, 1), own):
        place_own(rows, part, x)
    for run in range(len(rows.runs)):
        mine, local = output[rows.global_run(run, rows.rank)], rows.local_run(run)
        sent = [mine] * rows.size if messages is None else [None if x is None else x[local] for x in messages]
        received = [output[rows.global_run(run, rank)] for rank in range(rows.size)]
        rounds.append((_without(received, rows.rank), _without(sent, rows.rank)))
    return Pending(exchange(rounds, output.device, group, stage), output, messages, stage, lambda x: x.split(heads, 1))


def to_local(rows: Rows, tensors: Sequence[Tensor], group: dist.ProcessGroup, stage: str) -> Pending:
    """Starts to send every rank its rows of each contiguous ``[S, h, D]``; pending list of :class:`Arrived`."""
    peers = peers_for(rows, group, tensors[0].device)
    if peers is not None:
        mine = [[(rows.local_run(run), x[rows.global_run(run, rows.rank)]) for run in range(len(rows.runs))]
                for x in tensors]
        return peers.collect(rows, tensors, stage).then(lambda others: list(map(Arrived, others, mine)))
    arriving, keep, rounds = [], [], []
    for x in tensors:
        others = x.new_empty(rows.size - 1, rows.local, *x.shape[1:])
        if rows.runs is None:
            keep.append(x.index_select(0, rows.rank_rows))
            ranked = keep[-1].unflatten(0, (rows.size, rows.local))
            rounds.append((_around(others, rows.rank), _without(ranked, rows.rank)))
            arriving.append(Arrived(others, [(slice(None), ranked[rows.rank])]))
            continue
        own = []
        for run in range(len(rows.runs)):
            local = rows.local_run(run)
            sent = [x[rows.global_run(run, rank)] for rank in range(rows.size)]
            rounds.append((_around(others[:, local], rows.rank), _without(sent, rows.rank)))
            own.append((local, sent[rows.rank]))
        keep.append(x)
        arriving.append(Arrived(others, own))
    return Pending(exchange(rounds, tensors[0].device, group, stage), tensors[0], keep, stage, lambda _: arriving)


def reduce_to_local(rows: Rows, tensors: Sequence[Tensor], outs: Sequence[Tensor], group: dist.ProcessGroup,
                    stage: str, deterministic: bool) -> list[Pending]:
    """Starts to add each ``[S, h, D]`` over the ranks; the wait writes this rank's rows to its out ``[T, h, D]``.

    The others' rows are added in a fixed order and the rank's own last, in their own dtype, and rounded once to out's;
    where it saves traffic between nodes, and not if ``deterministic``, the library adds, in whatever order it likes.
    """
    if crowds_the_network(group) and not deterministic:
        return [reduce_scatter(x.index_select(0, rows.rank_rows), group, stage, out.copy_)
                for x, out in zip(tensors, outs)]

    def add(arriving: list[Arrived]) -> None:
        for arrived, out in zip(arriving, outs):
            for local, own in arrived.own:
                others = arrived.others[:, local]
                torch.add(others[0] if rows.size == 2 else others.sum(0), own, out=out[local])

    return [to_local(rows, tensors, group, stage).then(add)]


def _without(tensors: Sequence[Tensor | None], rank: int) -> list[Tensor | None]:
    """One entry a rank, None for this one's."""
    return [None if r == rank else x for r, x in enumerate(tensors)]


def _around(others: Tensor, rank: int) -> list[Tensor | None]:
    """The other ranks' entries with None in between for this one."""
    return [*others[:rank], None, *others[rank:]]
