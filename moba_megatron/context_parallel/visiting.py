"""The schedule in which queries travel: to the ranks that hold their chosen chunks, as tokens travel to experts.

Keys and values stay. A choice (a query, a head, a chunk of another rank) is a row that visits the chunk's home, attends
to that chunk alone and brings back its part of o and the log-sum-exp; at home the query attends to its own chunk and to
the chosen ones there, and all parts are merged. In backward q, do, o and lse visit, dq comes back, and dK and dV are
complete where they are: nothing is reduced over ranks. So a rank moves O(its queries), not O(the sequence).

How many rows go where is known once the choices are: the host reads 2 P numbers a group of heads, its only wait. There
is no capacity, so nothing is dropped. Sequences are of one length, and their pieces whole chunks.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..segments import Routing, Segments
from .comm import Pending, all_gather, exchange
from .gather import Gathered, sum_dtype
from .head_groups import HeadGroups
from .layout import ZigzagLayout
from .visitors import visitors_bwd, visitors_fwd
from .whole import Grads, Saved

def pieces_are_chunks(layout: ZigzagLayout) -> bool:
    """Whether every rank holds whole chunks, as far as the host knows."""
    rows, segments = layout.rows, layout.segments
    uniform = layout.blocks is not None and rows.total % segments.max_seqlen_k == 0
    return uniform and segments.max_seqlen_k % (2 * rows.size * segments.chunk_size) == 0


def chunk_homes(layout: ZigzagLayout) -> Tensor:
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
class Visit:
    """Rows of one group of kv heads that leave this rank, and rows that come.

    Args:
        choices: int64 ``[n]``, numbers of choices ``(token * h + head) * KS + j`` that leave: rank after rank, then
            by kv head and chunk.
        leaving, coming: how many go to each rank, and come from each.
        order: int64 ``[m]``, the rows that come (rank after rank) sorted by kv head and chunk.
        cu_visitors: int32, where each (kv head, chunk of this rank) begins in that order.
        most: visitors of one of them, upper bound.
    """

    choices: Tensor
    leaving: tuple[int, ...]
    coming: tuple[int, ...]
    order: Tensor
    cu_visitors: Tensor
    most: int


class Visiting(Gathered):
    """Attention of a rank's queries over chosen chunks of all ranks of ``group``, which they visit.

    The layout's pieces must be whole chunks: :func:`pieces_are_chunks`.
    """

    def attend_chosen(self, q: Tensor, k: Tensor, v: Tensor, groups: HeadGroups, choices: list,
                      table: Tensor) -> tuple[Tensor, Saved]:
        """o and what backward needs, once chunks are chosen.

        Args:
            q, k, v: the rank's rows.
            groups: of heads, one after the other.
            choices: (selected, routing) of each group.
            table: :func:`table_of_choices`.
        """
        visits = self._visits([routing for _, routing in choices], groups, table)
        o = q.new_empty(*q.shape[:2], v.shape[2])
        saved = []
        for (heads, kv_heads), (selected, _), visit in zip(groups, choices, visits):
            saved.append(self._attend(q[:, heads], k[:, kv_heads], v[:, kv_heads], selected, visit, o[:, heads]))
        return o, [q, k, v, o, groups, saved]

    def backward(self, do: Tensor, saved: Saved, kv_grad_dtype: torch.dtype) -> Grads:
        """As :meth:`Gathered.backward`."""
        q, k, v, o, groups, saved = saved
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.empty(x.shape, dtype=kv_grad_dtype, device=x.device) for x in (k, v))
        for (heads, kv_heads), rest in zip(groups, saved):
            tensors = do[:, heads], q[:, heads], k[:, kv_heads], v[:, kv_heads], o[:, heads]
            for out, x in zip((dq[:, heads], dk[:, kv_heads], dv[:, kv_heads]), self._attend_bwd(*tensors, rest)):
                out.copy_(x)
        return dq, dk, dv

    def _home(self, kv_heads: int, selected: Tensor) -> tuple[Segments, Tensor, Routing]:
        """This rank's rows as one sequence, the choices among its chunks, and their lists."""
        segments, rows = self.layout.segments, self.layout.rows
        cu_seqlens = torch.tensor([0, rows.local], dtype=torch.int32, device=selected.device)
        home = Segments.from_cu_seqlens(cu_seqlens, rows.local, segments.chunk_size)
        local = torch.full((segments.num_chunks(rows.total) + 1,), -1, dtype=torch.int32, device=selected.device)
        mine = chunk_homes(self.layout)[rows.rank]
        local[mine] = torch.arange(mine.numel(), dtype=torch.int32, device=selected.device)
        here = local[selected.long()]  # -1 reads the last entry, which is -1
        return home, here, self.method.stages.route(here, kv_heads, home.num_chunks(rows.local))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, visit: Visit, out: Tensor) -> list:
        """Writes o of one group of heads; returns what its backward needs."""
        choices_per_row, size = selected.shape[2], self.layout.segments.chunk_size
        rows = visit.choices // choices_per_row
        arriving = self._send(q.flatten(0, 1)[rows], visit.leaving, visit.coming, "fwd visit")
        home, here, routing = self._home(k.shape[1], selected)
        o, lse = self.method.stages.attention_fwd(q, k, v, here, home, self.method.softmax_scale, routing)
        visitors = arriving.wait().index_select(0, visit.order)
        parts = visitors_fwd(visitors, by_chunk(k, size), by_chunk(v, size), visit.cu_visitors, visit.most,
                             self.method.softmax_scale)
        back = [self._send(_unsorted(x, visit.order), visit.coming, visit.leaving, "fwd return") for x in parts]
        o_parts, lse_parts = (x.wait() for x in back)
        lse = _merge(o, lse, o_parts, lse_parts, visit.choices, choices_per_row, out)
        return [lse, here, routing.entries, routing.starts, choices_per_row, visit.choices, visit.leaving, visit.coming,
                visit.order, visit.cu_visitors, visit.most]

    def _attend_bwd(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: list) -> tuple[Tensor, ...]:
        lse, here, entries, starts, choices_per_row, *visit = saved
        visit, size, wide = Visit(*visit), self.layout.segments.chunk_size, sum_dtype(k.dtype)
        rows = visit.choices // choices_per_row
        arriving = [self._send(x.flatten(0, 1)[rows], visit.leaving, visit.coming, "bwd visit")
                    for x in (do, q, o, lse)]
        cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
        home = Segments.from_cu_seqlens(cu_seqlens, q.shape[0], size)
        dq, dk, dv = self.method.stages.attention_bwd(
            do, None, q, k, v, o, lse, here, home, self.method.softmax_scale, deterministic=self.method.deterministic,
            kv_grad_dtype=wide, routing=Routing(entries, starts))
        do_v, q_v, o_v, lse_v = (x.wait().index_select(0, visit.order) for x in arriving)
        dq_v, dk_v, dv_v = visitors_bwd(do_v, q_v, by_chunk(k, size), by_chunk(v, size), o_v, lse_v, visit.cu_visitors,
                                        visit.most, self.method.softmax_scale, self.method.deterministic)
        back = self._send(_unsorted(dq_v, visit.order), visit.coming, visit.leaving, "bwd return")
        dk, dv = (x.add_(_by_token(x_v, x.shape)) for x, x_v in ((dk, dk_v), (dv, dv_v)))
        slots = _slots(back.wait(), visit.choices, dq.shape, choices_per_row)
        total = dq.to(wide)
        for j in range(choices_per_row):
            total += slots[:, :, j]
        return total, dk, dv

    def _visits(self, routings: list[Routing], groups: HeadGroups, table: Tensor) -> list[Visit]:
        """What leaves and what comes, for each group of heads."""
        rank, homes = self.layout.rows.rank, chunk_homes(self.layout)
        leaving = table[rank][:, homes].transpose(0, 1).contiguous()  # [to, HK, chunk there]
        leaving[rank] = 0
        coming = table[:, :, homes[rank]].clone()  # [from, HK, chunk here]
        coming[rank] = 0
        per_rank = torch.stack([torch.stack([x[:, kv].sum((1, 2)) for x in (leaving, coming)]) for _, kv in groups])
        most = torch.stack([coming[:, kv].sum(0).amax() for _, kv in groups])
        numbers = torch.cat((per_rank.flatten(1), most[:, None]), 1).tolist()  # the host waits here
        return [self._visit(r, leaving[:, kv], coming[:, kv], line, homes)
                for r, (_, kv), line in zip(routings, groups, numbers)]

    def _visit(self, routing: Routing, leaving: Tensor, coming: Tensor, numbers: list[int], homes: Tensor) -> Visit:
        size, heads = self.layout.rows.size, leaving.shape[1]
        sent, received, most = tuple(numbers[:size]), tuple(numbers[size:2 * size]), numbers[-1]
        chunks = routing.num_buckets // heads
        buckets = (torch.arange(heads, device=homes.device)[None, :, None] * chunks + homes[:, None]).flatten()
        choices = routing.entries[ranges(routing.starts.long()[buckets], leaving.flatten().long(), sum(sent))].long()
        lengths = coming.long()
        begins = (lengths.flatten().cumsum(0) - lengths.flatten()).view(lengths.shape)
        sorted_by = (1, 2, 0)  # kv head, chunk, rank
        order = ranges(begins.permute(sorted_by).flatten(), lengths.permute(sorted_by).flatten(), sum(received))
        ends = lengths.sum(0).flatten().cumsum(0)
        return Visit(choices, sent, received, order, torch.cat((ends.new_zeros(1), ends)).int(), most)

    def _send(self, x: Tensor, leaving: tuple[int, ...], coming: tuple[int, ...], stage: str) -> Pending:
        """Starts to send the rows of ``x``, rank after rank; pending: what comes."""
        x = x.contiguous()
        arrived = x.new_empty(sum(coming), *x.shape[1:])
        works = exchange(_parts(arrived, coming), _parts(x, leaving), x.device, self.group, stage)
        return Pending(works, arrived, x, stage)


def by_chunk(x: Tensor, chunk_size: int) -> Tensor:
    """``[T, h, D]`` as ``[h * T / chunk_size, chunk_size, D]``, kv head after kv head; a copy."""
    return x.unflatten(0, (-1, chunk_size)).permute(2, 0, 1, 3).flatten(0, 1).contiguous()


def ranges(begins: Tensor, lengths: Tensor, total: int) -> Tensor:
    """``begin, begin + 1, ...`` of each range in turn; ``total`` is the sum of the lengths, known on the host."""
    ends = lengths.cumsum(0)
    which = torch.repeat_interleave(lengths, output_size=total)
    return begins[which] + torch.arange(total, device=begins.device) - (ends - lengths)[which]


def _by_token(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`by_chunk`, to ``[T, h, D]``."""
    return x.unflatten(0, (shape[1], -1)).permute(1, 2, 0, 3).reshape(shape)


def _unsorted(x: Tensor, order: Tensor) -> Tensor:
    """The rows of ``x`` back where ``index_select`` by ``order`` took them from."""
    return torch.empty_like(x).index_copy_(0, order, x)


def _slots(x: Tensor, choices: Tensor, shape: torch.Size, choices_per_row: int) -> Tensor:
    """Rows that came back ``[n, D]`` at their choices: ``[T, h, KS, D]``, 0 where no row belongs."""
    slots = x.new_zeros(shape[0] * shape[1] * choices_per_row, x.shape[1])
    return slots.index_copy_(0, choices, x).view(*shape[:2], choices_per_row, x.shape[1])


def _merge(o: Tensor, lse: Tensor, o_parts: Tensor, lse_parts: Tensor, choices: Tensor, choices_per_row: int,
           out: Tensor) -> Tensor:
    """Writes the merged o ``[T, h, DV]`` to ``out`` and returns the merged lse; parts are added in the order of j."""
    part_lse = lse.new_full((*lse.shape, choices_per_row), -torch.inf)
    part_lse.view(-1).index_copy_(0, choices, lse_parts)
    merged = torch.logsumexp(torch.cat((lse[:, :, None], part_lse), 2), 2)
    slots = _slots(o_parts, choices, lse.shape, choices_per_row)
    total = torch.exp(lse - merged)[:, :, None] * o
    for j in range(choices_per_row):
        total += torch.exp(part_lse[:, :, j] - merged)[:, :, None] * slots[:, :, j]
    out.copy_(total)
    return merged


def _parts(x: Tensor, counts: tuple[int, ...]) -> list[Tensor | None]:
    """``x`` cut up by counts; None for parts without rows."""
    return [part if part.shape[0] else None for part in x.split(counts)]
