"""The schedule in which queries travel: to the ranks that compute their chosen chunks, as tokens travel to experts.

A choice (a query, a head, a chunk of another rank) is a row that is dispatched to the rank which computes it, attends
there to that chunk alone and brings back its part of o and the log-sum-exp, which are merged with what the query found
at home. In backward q, do, o and lse are dispatched, and dq comes back. ``cost_model`` decides who computes what.
Mostly it is the chunk's owner: keys and values stay, dK and dV are complete where they are, and a rank moves O(its
queries), not O(the sequence). Chunks that many choose (sinks) are copied: ranks keep K and V before their own rows
while the group of heads is computed, and send back dK and dV, which the owner adds in fp32 in the order of ranks.

Rows that a rank takes at once are limited (DISPATCHED_BYTES). What exceeds that comes in later rounds, recorded apart
("fwd dispatch later", "bwd dispatch later"): nothing is dropped. Sequences are of one length, and their pieces whole
chunks (``context_parallel.selective.pieces_are_chunks``).
"""
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel.all_gather import AllGatherAttention, Arriving, Grads, HeadGroups, State, prefetch
from ..context_parallel.selective import parts
from ..context_parallel.transport.comm import Pending, exchange, sum_dtype
from ..ops.pipeline import Choice
from ..segments import Routing, Segments
from .chunk_attention import add_partials, chunk_attention_bwd, chunk_attention_fwd, merge_partials
from .cost_model import GATHER, RowSizes, cheapest_mode
from .dispatch_plan import DispatchPlan, Replicas, Round, chunks_of_ranks, dispatch_plans, table_of_choices

DISPATCHED_BYTES = 2 << 30  # of q, do, o and dq of the queries that a rank takes at once


class DispatchAttention(AllGatherAttention):
    """Attention of a rank's queries over chosen chunks of all ranks of ``group``, to which they are dispatched."""

    def attend_chosen(self, q: Tensor, k: Tensor, v: Tensor, groups: HeadGroups,
                      choices: list[Choice]) -> tuple[Tensor, State] | None:
        """o and what backward needs, from each group's choice; None where gathering all is cheapest."""
        routings = [choice.routing for choice in choices]
        table = table_of_choices(self.layout, routings, self.group)
        sizes = RowSizes(q.element_size(), q.shape[2], v.shape[2], self.layout.segments.chunk_size)
        mode, computed_by = cheapest_mode(table, chunks_of_ranks(self.layout), sizes, self.group)
        if mode == GATHER:
            return None
        capacity = DISPATCHED_BYTES // (2 * (q.shape[2] + v.shape[2]) * q.element_size())
        plan = dispatch_plans(self.layout, routings, groups, table, computed_by, capacity)
        fetched = self._fetch_copies(k, v, groups, lambda group: plan(group).replicas, "fwd gather")
        o = q.new_empty(*q.shape[:2], v.shape[2])
        saved, finish_last = [], lambda: None
        for group, ((heads, _), choice) in enumerate(zip(groups, choices)):
            rest, finish = self._attend_here(q[:, heads], fetched, choice.selected, plan(group), o[:, heads])
            finish_last()
            saved, finish_last = [*saved, rest], finish
        finish_last()
        return o, [q, k, v, o, groups, saved]

    def backward(self, do: Tensor, saved: State, kv_grad_dtype: torch.dtype) -> Grads:
        """As :meth:`AllGatherAttention.backward`."""
        q, k, v, o, groups, saved = saved
        dq, finish_last = torch.empty(q.shape, dtype=q.dtype, device=q.device), lambda: None
        dk, dv = (torch.empty(x.shape, dtype=kv_grad_dtype, device=x.device) for x in (k, v))
        fetched = self._fetch_copies(k, v, groups, lambda group: saved[group][0], "bwd gather")
        for (heads, kv_heads), rest in zip(groups, saved):
            finish = self._attend_here_bwd(do[:, heads], q[:, heads], fetched, o[:, heads], rest,
                                           (dq[:, heads], dk[:, kv_heads], dv[:, kv_heads]))
            finish_last()
            finish_last = finish
        finish_last()
        return dq, dk, dv

    def _fetch_copies(self, k: Tensor, v: Tensor, groups: HeadGroups, replicas: Callable[[int], Replicas],
                      stage: str) -> Arriving:
        """Of each group K and V, the copies before the rank's own rows."""
        fetched = prefetch(lambda i: tuple(replicas(i).start(x[:, groups[i][1]], self.layout.segments.chunk_size,
                                                             self.group, stage) for x in (k, v)), len(groups))
        return itertools.chain((next(fetched),), fetched)  # they are on their way from here on

    def _segments_here(self, places: int, device: torch.device) -> Segments:
        """This rank's rows as one sequence, after the copies."""
        size, rows = self.layout.segments.chunk_size, self.layout.rows.local
        before, total = places * size, places * size + rows
        bounds = torch.tensor([[0, rows, 0, 0], [0, total, 0, 0], [0, 0, 0, 0], [before, 0, 0, 0]],  # 16 bytes each
                              dtype=torch.int32, device=device)
        return Segments(bounds[0, :2], bounds[1, :2], bounds[2, :1], bounds[3, :1], rows, total, size, exact=True)

    def _attend_here(self, q: Tensor, fetched: Arriving, selected: Tensor, plan: DispatchPlan,
                     out: Tensor) -> tuple[list, Callable[[], None]]:
        """Computes one group of heads; what its backward needs, and what is left to do: to write o when parts come."""
        stages, scale, size = self.pipeline.stages, self.pipeline.softmax_scale, self.layout.segments.chunk_size
        queries, choices_per_row = q.flatten(0, 1), selected.shape[2]
        arriving = self._send_queries((queries,), plan.rounds[0], choices_per_row, "fwd dispatch")
        k, v = (x.wait() for x in next(fetched))
        segments = self._segments_here(plan.replicas.places, q.device)
        kv_head = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
        here = plan.chunk_here[kv_head[:, None], selected.long()]  # -1 reads the last entry, which is -1
        routing = stages.route(here, k.shape[1], segments.num_chunks(k.shape[0]))
        o, lse = stages.attention_fwd(q, k, v, here, segments, scale, routing)
        if any(sum(x.coming) for x in plan.rounds):
            k, v = by_chunk(k, size), by_chunk(v, size)
        returned = Returned(plan.rounds, self.group, "fwd return", (o.flatten(0, 1), lse.flatten()))
        for i, turn in enumerate(plan.rounds):
            if i:
                arriving = self._send_queries((queries,), turn, choices_per_row, "fwd dispatch later")
            q_here, = (pending.wait().index_select(0, turn.order) for pending in arriving)
            returned.send(turn, chunk_attention_fwd(q_here, k, v, turn.cu_queries, plan.most, scale))
        saved = [plan.replicas, plan.most, plan.rounds, lse, here, routing.indices, routing.indptr, choices_per_row]

        def finish() -> None:
            o_parts, lse_parts = returned.wait()
            if returned.number:
                saved[3] = merge_partials(o, lse, o_parts, lse_parts, returned.places(here.shape), out,
                                          hasattr(stages, "INTERPRETED"))
            else:
                out.copy_(o)

        return saved, finish

    def _attend_here_bwd(self, do: Tensor, q: Tensor, fetched: Arriving, o: Tensor, saved: list,
                         outs: tuple[Tensor, ...]) -> Callable[[], None]:
        """Computes one group of heads; what is left to do: to write dq, dk, dv to ``outs`` when parts come."""
        replicas, most, rounds, lse, here, indices, indptr, choices_per_row = saved
        pipeline, size = self.pipeline, self.layout.segments.chunk_size
        tensors = [x.flatten(0, 1) for x in (do, q, o, lse)]
        arriving = self._send_queries(tensors, rounds[0], choices_per_row, "bwd dispatch")
        k, v = (x.wait() for x in next(fetched))
        dq, *sums = pipeline.stages.attention_bwd(
            do, None, q, k, v, o, lse, here, self._segments_here(replicas.places, q.device), pipeline.softmax_scale,
            deterministic=pipeline.deterministic, kv_grad_dtype=sum_dtype(k.dtype), routing=Routing(indices, indptr))
        if any(sum(x.coming) for x in rounds):
            k, v = by_chunk(k, size), by_chunk(v, size)
        returned = Returned(rounds, self.group, "bwd return", (dq.flatten(0, 1),))
        for i, turn in enumerate(rounds):
            if i:
                arriving = self._send_queries(tensors, turn, choices_per_row, "bwd dispatch later")
            do_here, q_here, o_here, lse_here = (pending.wait().index_select(0, turn.order) for pending in arriving)
            dq_here, *grads = chunk_attention_bwd(do_here, q_here, k, v, o_here, lse_here, turn.cu_queries, most,
                                                  pipeline.softmax_scale, pipeline.deterministic)
            returned.send(turn, (dq_here,))
            for total, grad in zip(sums, grads) if sum(turn.coming) else ():
                heads = total.shape[1]  # by_chunk the other way round
                total += grad.unflatten(0, (heads, -1)).permute(1, 2, 0, 3).reshape(total.shape)
        reducing = [replicas.send_back(x, x[replicas.places * size:], out, self.group, "bwd reduce")
                    for x, out in zip(sums, outs[1:])]

        def finish() -> None:
            dq_parts, = returned.wait()
            if returned.number:
                add_partials(dq, dq_parts, returned.places(here.shape), outs[0],
                             hasattr(pipeline.stages, "INTERPRETED"))
            else:
                outs[0].copy_(dq)
            for x in reducing:
                x.wait()

        return finish

    def _send_queries(self, tensors: Sequence[Tensor], turn: Round, choices_per_row: int, stage: str) -> list[Pending]:
        """Starts to send the rows of each ``[T * h, ...]`` that leave; pending: those that come."""
        rows = turn.choices // choices_per_row
        return [send_rows(x[rows], x.new_empty(sum(turn.coming), *x.shape[1:]), turn.leaving, turn.coming, self.group,
                          stage) for x in tensors]


class Returned:
    """What comes back for the choices of one group of heads: rows ``like`` others, in the order in which they leave."""

    def __init__(self, rounds: list[Round], group: dist.ProcessGroup, stage: str, like: Sequence[Tensor]):
        self._rounds, self._group, self._stage = rounds, group, stage
        self.number = sum(sum(x.leaving) for x in rounds)
        self._parts = [x.new_empty(self.number, *x.shape[1:]) for x in like]
        self._pending, self._filled = [], 0

    def send(self, turn: Round, computed: Sequence[Tensor]) -> None:
        """Starts to send back what this rank computed for others, and to receive what others did for it."""
        self.wait()  # the memory of the round before
        end = self._filled + sum(turn.leaving)
        unsorted = (torch.empty_like(rows).index_copy_(0, turn.order, rows) for rows in computed)
        self._pending = [send_rows(rows, out[self._filled:end], turn.coming, turn.leaving, self._group, self._stage)
                         for rows, out in zip(unsorted, self._parts)]
        self._filled = end

    def wait(self) -> list[Tensor]:
        """All that has come back, once it is here and all that was sent has left."""
        for pending in self._pending:
            pending.wait()
        self._pending = []
        return self._parts

    def places(self, shape: torch.Size) -> Tensor:
        """The row of each choice's part, int32 ``[T, h, KS]``, or -1."""
        choices = torch.cat([x.choices for x in self._rounds])
        places = torch.full(shape, -1, dtype=torch.int32, device=choices.device)
        places.view(-1)[choices] = torch.arange(self.number, dtype=torch.int32, device=choices.device)
        return places


def send_rows(x: Tensor, out: Tensor, leaving: tuple[int, ...], coming: tuple[int, ...], group: dist.ProcessGroup,
              stage: str) -> Pending:
    """Starts to send the rows of ``x``, rank after rank; pending: ``out``, filled with what comes."""
    x = x.contiguous()
    return exchange([(parts(out, coming), parts(x, leaving))], out, x, group, stage)


def by_chunk(x: Tensor, chunk_size: int) -> Tensor:
    """``[T, h, D]`` as ``[h * T / chunk_size, chunk_size, D]``, kv head after kv head; a copy."""
    return x.unflatten(0, (-1, chunk_size)).permute(2, 0, 1, 3).flatten(0, 1).contiguous()
