"""The selective schedule: as the all-gather one, but of keys and values only chunks that were chosen travel.

After the gate every rank tells the others, one bit a (kv head, chunk), which chunks its queries chose; owners send the
rows of those chunks, to each rank its own choice, and rows of dK and dV come back the same way and are added in fp32.
Nothing has a capacity: nothing is dropped. The host reads a table of P x P numbers a group of heads, its only wait. A
layer whose choices cover nearly everything is gathered whole instead. K and V still have a row for every token where
they are read, one group of heads at a time; rows that did not travel are never touched.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..segments import Routing
from .all_gather import AllGatherAttention, Arriving, Grads, HeadGroups, State, head_groups, prefetch
from .transport.comm import Pending, all_gather, copy_rows, exchange

GATHER_SHARE = 0.5
"""From this share of the rows on, the whole is gathered: picking rows out and putting them in costs extra copies. The
zigzag's causal order alone leaves 3/4: at that, two H200s took 51 ms where they gathered in 45 (128K tokens, 32:8
heads, chunks of 512, topk 8), for a gather's rows go to their place by copy engines."""


class SelectiveAttention(AllGatherAttention):
    """Attention of a rank's queries over chosen chunks of all ranks of ``group``; sequences of one length."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None = None) -> tuple[Tensor, State]:
        """As :meth:`AllGatherAttention.forward`."""
        if not self.pipeline.earlier(self.layout.segments):  # every row is attended to
            o, saved = super().forward(q, k, v)
            return o, [None, *saved]
        held = (k.nbytes + v.nbytes) * self.layout.rows.size
        groups = head_groups(self.head_groups, q.shape[1], k.shape[1], q.nbytes, held)
        choices = (self.choose_by_sums(q, k.dtype, self.send_sums(k), groups) if selected is None else
                   self.given(selected, q.shape[1], groups))
        exchanges = self._exchanges([choice.routing for choice in choices], groups)
        fetched = self._fetch(k, v, groups, exchanges, "fwd gather")
        o, saved = self.attend(q, v.shape[2], groups, fetched, choices)
        return o, [exchanges, q, k, v, o, groups, saved]

    def backward(self, do: Tensor, saved: State, kv_grad_dtype: torch.dtype) -> Grads:
        """As :meth:`AllGatherAttention.backward`."""
        exchanges, *saved = saved
        if exchanges is None:
            return super().backward(do, saved, kv_grad_dtype)
        (q, k, v, o, groups, saved), rows = saved, self.layout.rows
        fetched = self._fetch(k, v, groups, exchanges, "bwd gather")

        def reduce(i: int, grads: list[Tensor], outs: list[Tensor], _) -> list[Pending]:
            started = []
            for x, out in zip(grads, outs):
                own = x.index_select(0, rows.own_rows) if rows.runs is None else (
                    torch.cat([x[among_all] for _, among_all in rows.own_runs()]))
                started.append(exchanges[i].send_back(x, own, out, self.group, "bwd reduce"))
            return started

        return self.attend_bwd(do, (q, k, v, o), groups, saved, fetched, reduce, kv_grad_dtype)

    def _fetch(self, k: Tensor, v: Tensor, groups: HeadGroups, exchanges: list["RowExchange"] | None,
               stage: str) -> Arriving:
        if exchanges is None:
            return self.gather(self.transport(k, v, groups), k, v, groups, stage)
        rows = self.layout.rows

        def place(x: Tensor) -> Tensor:
            out = x.new_zeros(rows.total, *x.shape[1:])  # backend torch looks whether all is finite
            if rows.runs is None:
                return out.index_copy_(0, rows.own_rows, x)
            for here, among_all in rows.own_runs():
                copy_rows(out[among_all], x[here])
            return out

        return prefetch(lambda i: tuple(exchanges[i].start(x[:, groups[i][1]], self.group, stage, place)
                                        for x in (k, v)), len(groups))

    def _exchanges(self, routings: Sequence[Routing], groups: HeadGroups) -> list["RowExchange"] | None:
        """What travels for each group of heads; None where the whole might as well. The same answer on every rank."""
        segments, rows = self.layout.segments, self.layout.rows
        size, me, chunks = rows.size, rows.rank, segments.num_chunks(rows.total)
        chosen = torch.cat([(r.indptr[1:] > r.indptr[:-1]).unflatten(0, (-1, chunks)) for r in routings])
        sequence, position = segments.key_positions(rows.total)
        chunk_of = (segments.first_chunk()[sequence] + position // segments.chunk_size)[rows.rank_rows]
        chunk_of = chunk_of.unflatten(0, (size, -1))  # of each rank's rows
        own = torch.zeros(chunks, dtype=torch.bool, device=chosen.device)
        own[chunk_of[me]] = True  # cut chunks: their other rows
        needed = all_gather((chosen | own).to(torch.uint8), self.group, "fwd choices").wait()
        needed = needed.unflatten(0, (size, -1)).bool()  # [rank, kv head, chunk]
        owned = torch.zeros(size, chunks, dtype=torch.float64, device=chosen.device)
        owned.scatter_add_(1, chunk_of, owned.new_ones(()).expand(size, rows.local))
        tables = torch.stack([needed[:, kv_heads].sum(1).double() @ owned.T for _, kv_heads in groups])
        counts = tables.long().tolist()  # [group][to rank][from rank], rows; the host waits here
        moved = sum(n for table in counts for to, line in enumerate(table) for by, n in enumerate(line) if to != by)
        if moved > GATHER_SHARE * (size - 1) * rows.total * chosen.shape[0]:
            return None
        return [self._exchange_of(needed[:, kv_heads], chunk_of, table) for (_, kv_heads), table in zip(groups, counts)]

    def _exchange_of(self, needed: Tensor, chunk_of: Tensor, counts: list[list[int]]) -> "RowExchange":
        """Lists of rows from ``needed`` ``[rank, h, chunk]``; both sides list a rank's rows head after head."""
        rows, heads = self.layout.rows, needed.shape[1]
        me, size, local = rows.rank, rows.size, rows.local
        send_counts = tuple(counts[to][me] * (to != me) for to in range(size))
        take_counts = tuple(counts[me][by] * (by != me) for by in range(size))
        sent = needed[:, :, chunk_of[me]]  # [to, h, T]
        sent[me] = False
        number = true_numbers(sent, sum(send_counts)) % (heads * local)
        send = number % local * heads + number // local
        taken = needed[me][:, chunk_of].transpose(0, 1).contiguous()  # [from, h, T]
        taken[me] = False
        number = true_numbers(taken, sum(take_counts))
        by, within = number // (heads * local), number % (heads * local)
        take = rows.rank_rows[by * local + within % local] * heads + within // local
        return RowExchange(send, send_counts, take, take_counts)


class RowExchange(NamedTuple):
    """Which rows of one group of kv heads travel; a row here is one (token, kv head)."""

    send: Tensor  # int64, rows of this rank's [T, h, D], flattened to [T * h, D]: for rank 0, rank 1, ...
    send_counts: tuple[int, ...]  # how many go to each rank; what a rank has for itself is copied
    take: Tensor  # int64, rows of the [R, h, D] where they are read, flattened: what comes from rank 0, rank 1, ...
    take_counts: tuple[int, ...]  # how many come from each rank

    def start(self, x: Tensor, group: dist.ProcessGroup, stage: str, place: Callable[[Tensor], Tensor]) -> Pending:
        """Starts to send rows of ``x`` ``[T, h, D]``; pending, what ``place`` makes of it, with the others' rows: a
        ``[R, h, D]`` that has this rank's own rows, and room for those."""
        heads = x.shape[1]
        message = x[self.send // heads, self.send % heads]
        arrived = message.new_empty(self.take.numel(), x.shape[2])

        def finish(arrived: Tensor) -> Tensor:
            out = place(x)
            if arrived.shape[0]:
                out.flatten(0, 1).index_copy_(0, self.take, arrived)
            return out

        messages = parts(arrived, self.take_counts), parts(message, self.send_counts)
        return exchange([messages], arrived, message, group, stage, finish)

    def send_back(self, x: Tensor, own: Tensor, out: Tensor, group: dist.ProcessGroup, stage: str) -> Pending:
        """Starts to send the rows of ``x`` ``[R, h, D]`` that came back to their owners. The wait adds what came to
        ``own`` ``[T, h, D]``, contiguous, this rank's part of the sums of its rows, and writes the sums to ``out``,
        which may be ``own``."""
        message = x.flatten(0, 1).index_select(0, self.take)
        arrived = message.new_empty(self.send.numel(), x.shape[2])

        def finish(arrived: Tensor) -> Tensor:
            for to, part in zip(self.send.split(self.send_counts), arrived.split(self.send_counts)):
                own.flatten(0, 1).index_add_(0, to, part)  # a row occurs once: the order of sums is the ranks'
            return out if out is own else out.copy_(own)

        messages = parts(arrived, self.send_counts), parts(message, self.take_counts)
        return exchange([messages], arrived, message, group, stage, finish)


def true_numbers(mask: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` elements that are True, in order, int64; the host knows the count and need not wait."""
    return torch.nonzero_static(mask.flatten(), size=count).flatten()


def parts(x: Tensor, counts: tuple[int, ...]) -> list[Tensor | None]:
    """``x`` cut up by counts; None for parts without rows."""
    return [part if part.shape[0] else None for part in x.split(counts)]
