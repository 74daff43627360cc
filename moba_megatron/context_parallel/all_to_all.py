"""The all-to-all schedule: heads for rows, so that each rank attends with a part of the heads over more of the rows.

What a rank then holds is whole sequences (``a2a``), or, in the inner group of a hierarchy, the zigzag rows of a smaller
context parallel group (``a2a+all_gather``): an inner schedule attends. Heads go in groups: while one is computed, the
next one's q, k, v and the previous one's o (in backward: do; dq, dk, dv) travel.

With fewer kv heads than ranks a kv head goes to several ranks. Their fp32 gradients of it are added where it came from,
and k and v are kept as they came and exchanged again in backward: that saves their copies' memory.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.pipeline import Pipeline
from ..segments import Segments
from .all_gather import AllGatherAttention, Grads, HeadGroups, State, head_groups, most_heads, prefetch, transport_for
from .transport.comm import Library, Pending, Rows, arrived, copy_rows

QUERIES, KEYS, OUT, MEANS = LANES = range(4)  # of the transport


@dataclass(frozen=True)
class LocalAttention:
    """Attention over whole sequences, whose rows are all here: the inner schedule of ``a2a``."""

    pipeline: Pipeline
    segments: Segments

    def forward(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None = None) -> tuple[Tensor, State]:
        """As :meth:`.Pipeline.forward`, of rows in global order: o and what backward needs."""
        o, saved = self.pipeline.forward(q, k, v, self.segments, selected)
        return o, [q, k, v, saved]

    def backward(self, do: Tensor, saved: State, kv_grad_dtype: torch.dtype, event: torch.cuda.Event | None = None,
                 out: Sequence[Tensor] | None = None) -> Grads:
        """As :meth:`.Pipeline.backward`."""
        q, k, v, saved = saved
        return self.pipeline.backward(do, None, q, k, v, saved, self.segments, kv_grad_dtype, event, out)


@dataclass(frozen=True)
class AllToAllAttention:
    """Attention with a part of the heads over the rows of all ranks of ``group``, by an inner schedule."""

    inner: LocalAttention | AllGatherAttention
    rows: Rows  # the rank's among all
    group: dist.ProcessGroup
    head_groups: int | None
    # the rank's rows as segments of whole chunks, and these among all; None where they cut chunks, or none is chosen
    chunks: tuple[Segments, Rows] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None = None) -> tuple[Tensor, State]:
        """As :meth:`.AllGatherAttention.forward`; given chunks travel first."""
        size, replicated = self.rows.size, k.shape[1] < self.rows.size
        kv_heads = max(1, k.shape[1] // size)  # that one rank gets
        groups = head_groups(self.head_groups, q.shape[1] // size, kv_heads, q.nbytes, q.nbytes + k.nbytes + v.nbytes)
        # one group is little work, for which more exchanges would keep the host longer than they save
        by_means = not (replicated or self.chunks is None or len(groups) == 1 or selected is not None)
        given = [None] * len(groups)
        if selected is not None:
            views = [self._parts(selected, group[selected.shape[1] != q.shape[1]]) for group in groups]
            given = Library(self.rows, self.group).fetch(views, "fwd exchange choices", (MEANS, 0)).wait()
        o = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        lanes = {QUERIES: [(q, 0)], KEYS: [(k, 1), (v, 1)], OUT: [(o, 0)], MEANS: [(k, 1)] * by_means}
        transport = self._transport(groups, lanes, q.dtype)
        if by_means:
            parts = self._attend_by_means(transport, q, k, v, groups)
        else:
            starts = prefetch(lambda i: self._start(transport, groups[i], i, "fwd exchange in", q, k, v), len(groups))
            parts = (self.inner.forward(*arrived(arriving), chunks) for arriving, chunks in zip(starts, given))
        leaving, saved = [], []
        for i, ((heads, _), (part, rest)) in enumerate(zip(groups, parts)):
            if replicated:
                rest[1] = rest[2] = None
            saved.append(rest)
            leaving.append(transport.deliver([part], [self._parts(o, heads)], "fwd exchange out", (OUT, i)))
            del part
            if i:
                leaving.pop(0).wait()
        leaving.pop().wait()
        return o, [q.shape, (k.shape, v.shape), [k, v] if replicated else None, groups, saved]

    def _attend_by_means(self, transport: Library, q: Tensor, k: Tensor, v: Tensor, groups: HeadGroups
                         ) -> Iterator[tuple[Tensor, State]]:
        """o and what is saved of each group; ranks send their rows' means, so chunks are chosen before k and v arrive.
        Copy engines bring k and v of the inner groups while these choose: beside products, not beside sums of the group
        before, which leave no bandwidth of memory unused."""
        stage, ends, means = "fwd exchange in", (0, len(groups) - 1), []

        def start(i: int) -> list[Pending]:
            queries = self._start(transport, groups[i], i, stage, q)
            if not i:
                segments, rows = self.chunks
                local = self.inner.pipeline.stages.chunk_means(k, segments)[:rows.local]
                views = [self._parts(local, kv_heads) for _, kv_heads in groups]
                means.append(transport.fetch(views, stage, (MEANS, 0), rows=rows))
            return queries + (keys(i) if i in ends or not transport.early else [])

        def keys(i: int) -> list[Pending]:
            return self._start(transport, groups[i], i, stage, None, k, v)

        pipeline, segments, of_groups = self.inner.pipeline, self.inner.segments, None
        for i, (queries, *late) in enumerate(prefetch(start, len(groups))):
            late = late or keys(i)
            part, = queries.wait()
            of_groups = of_groups or means.pop().wait()
            choice = pipeline.choose(part, of_groups[i], segments, part.shape[0])
            k_part, v_part = arrived(late)
            o, saved = pipeline.attend(part, k_part, v_part, choice, segments)
            yield o, [part, k_part, v_part, saved]
            del part, k_part, v_part, o, saved, choice

    def backward(self, do: Tensor, saved: State, kv_grad_dtype: torch.dtype) -> Grads:
        """dq, dk, dv of the rank's rows; dk and dv in ``kv_grad_dtype``, rounded once."""
        q_shape, kv_shapes, replicated, groups, saved = saved
        stage = "bwd exchange out"
        grad_dtype = torch.promote_types(do.dtype, torch.float32) if replicated else kv_grad_dtype
        dq = torch.empty(q_shape, dtype=do.dtype, device=do.device)
        dk, dv = (torch.empty(shape, dtype=kv_grad_dtype, device=do.device) for shape in kv_shapes)
        lanes = {QUERIES: [(do, 0)], KEYS: [(dk, 1), (dv, 1)] if replicated else [],
                 OUT: [(dq, 0), (dk, 1), (dv, 1)], MEANS: []}
        transport = self._transport(groups, lanes, grad_dtype)
        arriving = prefetch(lambda i: self._start(transport, groups[i], i, "bwd exchange in", do, *replicated or ()),
                            len(groups))
        # over whole sequences dk and dv are complete before dq. The last group's leave meanwhile; others beside the
        # products of the next, since the sums of dq leave no bandwidth of memory unused
        early = transport.early and isinstance(self.inner, LocalAttention) and not replicated
        leaving = []
        for i, ((heads, kv_heads), rest, here) in enumerate(zip(groups, saved, arriving)):
            do_part, *keys_and_values = arrived(here)
            if replicated:
                rest = [rest[0], *keys_and_values, *rest[3:]]
            del keys_and_values
            kinds = (rest[0].shape, do.dtype), *((x.shape, grad_dtype) for x in rest[1:3])
            memory = transport.tensors((OUT, i), *kinds) if early else None
            event = transport.event() if early and i + 1 == len(groups) else None
            grads = self.inner.backward(do_part, rest, grad_dtype, **(dict(event=event, out=memory) if early else {}))
            del do_part, rest
            outs = [self._parts(dq, heads), *(self._parts(x, kv_heads) for x in (dk, dv))]
            after = event if grads is memory else None
            if memory and grads is not memory:  # other ranks, which may have other kernels, look for them there
                grads = [copy_rows(x, grad) for x, grad in zip(memory, grads)]
            if memory and event is not None:
                # dk and dv at the event already: where they go to was allocated before the first group
                started = [transport.deliver(grads[1:], outs[1:], stage, (OUT, i), after),
                           transport.deliver(grads[:1], outs[:1], stage, (OUT, i))]
            else:
                started = [transport.deliver(grads, outs, stage, (OUT, i))]
            del grads
            arrived(leaving)
            leaving = started
        arrived(leaving)
        return dq, dk, dv

    def _transport(self, groups: HeadGroups, lanes: dict[int, list[tuple[Tensor, int]]], dtype: torch.dtype) -> Library:
        """How heads of such tensors travel: query heads (0) or kv heads (1), at most as wide as ``dtype``."""
        most = most_heads(groups)
        sizes = [[self.rows.total * most[which] * x.shape[2] * dtype.itemsize for x, which in lanes[lane]]
                 for lane in LANES]
        return transport_for(self.rows, self.group, lanes[QUERIES][0][0], sizes)

    def _start(self, transport: Library, group: tuple[slice, slice], i: int, stage: str, queries: Tensor | None,
               *keys: Tensor) -> list[Pending]:
        """Starts to send each rank its heads of a group: of queries, and of keys and values."""
        lanes = (QUERIES, () if queries is None else (queries,)), (KEYS, keys)
        return [transport.fetch([self._parts(x, heads) for x in tensors], stage, (lane, i))
                for (lane, tensors), heads in zip(lanes, group) if tensors]

    def _parts(self, x: Tensor, heads: slice) -> Tensor:
        """The ``heads`` of each part that x's heads are dealt out in: a view ``[parts, T, heads, D]``."""
        return x.unflatten(1, (min(self.rows.size, x.shape[1]), -1))[:, :, heads].transpose(0, 1)
