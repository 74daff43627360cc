"""The all-to-all schedule: heads for rows, so that each rank attends with a part of the heads over more of the rows.

What a rank then holds is whole sequences (``a2a``), or, in the inner group of a hierarchy, the zigzag rows of a smaller
context parallel group (``a2a+all_gather``): an inner schedule attends. Heads go in groups: while one is computed, the
next one's q, k, v and the previous one's o (in backward: do; dq, dk, dv) travel.

With fewer kv heads than ranks a kv head goes to several ranks. Their fp32 gradients of it are added where it came from,
and k and v are kept as they came and exchanged again in backward: that saves their copies' memory.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.pipeline import Pipeline
from ..segments import Segments
from .all_gather import AllGatherAttention, Grads, State, arrived, of_one_dim, sum_dtype
from .head_groups import HeadGroups, Prefetch, number_of_groups, split_heads
from .layout import Sequences
from .transport.comm import Pending, wait_for
from .transport.exchange import Arrived, to_global, to_local
from .transport.peers import peers_for
from .transport.rows import Rows, copy_rows, whole_rows


def check_heads(heads: int, kv_heads: int, size: int, comm_type: str) -> None:
    """Raises ValueError unless heads can be dealt out to ``size`` ranks."""
    if kv_heads % size and (size % kv_heads or heads % size):
        raise ValueError(
            f"cp_comm_type {comm_type!r} exchanges heads among {size} ranks: key's heads must be a multiple of {size}, "
            f"or divide it with query's heads a multiple of {size}; got {heads} query and {kv_heads} key heads (after "
            "tensor parallelism). Use cp_comm_type all_gather, or fewer ranks for the exchange")


def local_chunks(sequences: Sequences, size: int, rank: int, chunk_size: int) -> tuple[Segments, Rows] | None:
    """One of ``size`` ranks' rows as segments of whole chunks, and these among all chunks; None where they are not."""
    length = sequences.max_seqlen
    if sequences.batch != 1 or length % (2 * size * chunk_size):
        return None
    device = sequences.cu_seqlens.device
    return (Sequences.uniform(length // size, 1, device).whole(chunk_size),
            Sequences.uniform(length // chunk_size, 1, device).rows(size, rank))


@dataclass(frozen=True)
class LocalAttention:
    """Attention over whole sequences, whose rows are all here: the inner schedule of ``a2a``."""

    pipeline: Pipeline
    segments: Segments

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        """q ``[S, H, D]``, k ``[S, HK, D]``, v ``[S, HK, DV]`` in global order: o and what backward needs."""
        o, saved = self.pipeline.forward(q, k, v, self.segments)
        return o, [q, k, v, saved]

    def forward_by_means(self, q: Tensor, means: Tensor, arrive: Callable[[], Sequence[Tensor]]
                         ) -> tuple[Tensor, State]:
        """As :meth:`forward`, with chunk means ``[num_chunks, HK, D]``; k and v are what ``arrive`` then waits for."""
        choice = self.pipeline.choose(q, means, self.segments, q.shape[0])
        k, v = arrive()
        o, saved = self.pipeline.attend(q, k, v, choice, self.segments)
        return o, [q, k, v, saved]

    def backward(self, do: Tensor, saved: State, kv_grad_dtype: torch.dtype,
                 event: torch.cuda.Event | None = None) -> Grads:
        """dq, dk, dv; dk and dv in ``kv_grad_dtype``. As soon as these two are complete, ``event`` is recorded."""
        q, k, v, saved = saved
        return self.pipeline.backward(do, None, q, k, v, saved, self.segments, kv_grad_dtype, event)


@dataclass(frozen=True)
class AllToAllAttention:
    """Attention with a part of the heads over the rows of all ranks of ``group``, by an inner schedule."""

    inner: LocalAttention | AllGatherAttention
    rows: Rows  # the rank's among all
    group: dist.ProcessGroup
    head_groups: int | None
    chunks: tuple[Segments, Rows] | None = None  # None where ranks' rows cut chunks, or nothing is chosen here

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        """q ``[T, H, D]``, k ``[T, HK, D]``, v ``[T, HK, DV]``, the rank's rows: o and what backward needs."""
        size = self.rows.size
        kv_heads, copied = max(1, k.shape[1] // size), k.shape[1] < size  # heads that one rank gets
        number = number_of_groups(self.head_groups, kv_heads, q.nbytes, q.nbytes + k.nbytes + v.nbytes)
        groups = split_heads(q.shape[1] // size, kv_heads, number)
        # one group is little work, for which more exchanges would keep the host longer than they save
        parts = self._attend if copied or self.chunks is None or len(groups) == 1 else self._attend_by_means
        o, leaving, saved = self._empty((*q.shape[:2], v.shape[2]), q.dtype, q.device), [], []
        for group, (part, rest) in zip(groups, parts(q, k, v, groups)):
            if copied:
                rest[1] = rest[2] = None
            saved.append(rest)
            started = self._deliver([part], [(o, size, group[0])], "fwd exchange out")
            del part
            wait_for(leaving)
            leaving = [started]
        wait_for(leaving)
        return o, [q.shape, (k.shape, v.shape), [k, v] if copied else None, groups, saved]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, groups: HeadGroups) -> Iterator[tuple[Tensor, State]]:
        """o and what is saved of each group of heads."""
        # k and v, where they are not kept, share no memory with q, which is
        apart = [[(q, 0)], [(k, 1), (v, 1)]] if k.shape[1] < self.rows.size else [[(q, 0), (k, 1), (v, 1)]]
        arriving = self._fetch(groups, apart, "fwd exchange in")
        for _ in groups:
            yield self.inner.forward(*arrived(arriving.take()))

    def _attend_by_means(self, q: Tensor, k: Tensor, v: Tensor, groups: HeadGroups) -> Iterator[tuple[Tensor, State]]:
        """As :meth:`_attend`, but each rank sends its rows' means, so that chunks are chosen before k and v arrive.

        Copy engines bring k and v of the inner groups while these choose: beside products, not beside sums of the group
        before, which leave no bandwidth of memory unused.
        """
        stage, ends = "fwd exchange in", (0, len(groups) - 1)
        ahead = ends if peers_for(self.rows, self.group, q.device) is not None else range(len(groups))
        means = []

        def keys(i: int) -> list[Pending]:
            views = [self._parts(x, groups[i][1]) for x in (k, v)]
            return [self._send(together, stage) for together in of_one_dim(views)]

        def start(i: int) -> tuple[Pending, ...]:
            queries = self._send([self._parts(q, groups[i][0])], stage)
            if not i:
                segments, rows = self.chunks
                local = self.inner.pipeline.stages.chunk_means(k, segments)[:rows.local]
                means.append(self._send([self._parts(local, kv_heads) for _, kv_heads in groups], stage, rows))
            return queries, *(keys(i) if i in ahead else ())

        arriving = Prefetch(start, groups)
        of_groups = None
        for i in range(len(groups)):
            queries, *late = arriving.take()
            late = late or keys(i)
            here = arrived([queries])
            of_groups = of_groups or arrived([means.pop()])
            yield self.inner.forward_by_means(*here, of_groups[i], functools.partial(arrived, late))
            del here

    def backward(self, do: Tensor, saved: State, kv_grad_dtype: torch.dtype) -> Grads:
        """dq, dk, dv of the rank's rows; dk and dv in ``kv_grad_dtype``, rounded once."""
        q_shape, kv_shapes, copied, groups, saved = saved
        size, kv_parts = self.rows.size, min(self.rows.size, kv_shapes[0][1])
        grad_dtype = sum_dtype(do.dtype) if copied else kv_grad_dtype
        dq = self._empty(q_shape, do.dtype, do.device)
        dk, dv = (self._empty(shape, kv_grad_dtype, do.device) for shape in kv_shapes)
        again = [[(x, 1) for x in copied]] if copied else []
        arriving = self._fetch(groups, [[(do, 0)], *again], "bwd exchange in")
        # over whole sequences dk and dv are complete before dq. The last group's leave meanwhile; others beside the
        # products of the next, since the sums of dq leave no bandwidth of memory unused
        complete = isinstance(self.inner, LocalAttention) and not copied
        peers = peers_for(self.rows, self.group, do.device) if complete else None
        leaving, stage = [], "bwd exchange out"
        for i, ((heads, kv_heads), rest) in enumerate(zip(groups, saved)):
            do_part, *keys_and_values = arrived(arriving.take())
            if copied:
                rest = [rest[0], *keys_and_values, *rest[3:]]
            del keys_and_values
            ahead = {} if peers is None or i + 1 < len(groups) else {"event": peers.event()}
            grads = self.inner.backward(do_part, rest, grad_dtype, **ahead)
            del do_part, rest
            places = [(dq, size, heads), (dk, kv_parts, kv_heads), (dv, kv_parts, kv_heads)]
            if ahead:
                # dk and dv at the event already. No memory that then travels is what dq's kernels let go of: they were
                # allocated before it, as are all results of a call, and where they go to before the first group
                started = [self._deliver(grads[1:], places[1:], stage, ahead["event"]),
                           self._deliver(grads[:1], places[:1], stage)]
            else:
                started = [self._deliver(grads, places, stage)]
            del grads
            wait_for(leaving)
            leaving = started
        wait_for(leaving)
        return dq, dk, dv

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor for :meth:`_deliver` to fill."""
        peers = peers_for(self.rows, self.group, device)
        return torch.empty(shape, dtype=dtype, device=device) if peers is None else peers.empty(shape, dtype)

    def _fetch(self, groups: HeadGroups, batches: list[list[tuple[Tensor, int]]], stage: str) -> Prefetch:
        """Exchanges the heads of (tensor, 0 for query heads or 1 for kv heads); those of a batch may travel as one."""
        def start(i: int) -> tuple[Pending, ...]:
            views = [[self._parts(x, groups[i][which]) for x, which in batch] for batch in batches]
            return tuple(self._send(together, stage) for batch in views for together in of_one_dim(batch))

        return Prefetch(start, groups)

    def _parts(self, x: Tensor, heads: slice) -> Tensor:
        """The ``heads`` of each part that x's heads are dealt out in: a view ``[parts, T, heads, D]``."""
        return x.unflatten(1, (min(self.rows.size, x.shape[1]), -1))[:, :, heads].transpose(0, 1)

    def _send(self, views: list[Tensor], stage: str, rows: Rows | None = None) -> Pending:
        """Starts to send each rank its part of every view ``[parts, T, heads, D]``; neighbours may share a part.

        ``rows``: of the views; None for the rows of q, k and v.
        """
        rows = rows or self.rows
        peers = peers_for(rows, self.group, views[0].device)
        if peers is not None:
            return peers.fetch(rows, list(map(whole_rows, views)), stage)
        size, me = rows.size, rows.rank
        _, local, _, dim = views[0].shape
        heads = [view.shape[2] for view in views]
        packed = views[0].new_empty(size - 1, local, sum(heads), dim)
        for view, out in zip(views, packed.split(heads, 2)):
            if view.shape[0] == size:
                copy_rows(out[:me], view[:me])
                copy_rows(out[me:], view[me + 1:])
            else:
                for message, rank in zip(out, [rank for rank in range(size) if rank != me]):
                    copy_rows(message, view[rank * view.shape[0] // size])
        own = [view[me * view.shape[0] // size] for view in views]
        return to_global(rows, own, [*packed[:me], None, *packed[me:]], self.group, stage)

    def _deliver(self, tensors: Sequence[Tensor], places: list[tuple[Tensor, int, slice]], stage: str,
                 after: torch.cuda.Event | None = None) -> Pending:
        """Starts to send every rank its rows of each ``[S, h, D]``; the wait puts them into ``places``: for each tensor
        another, the number of parts in which its heads were dealt out, and heads of each of these."""
        outs = [whole.unflatten(1, (number, -1))[:, :, heads].transpose(0, 1) for whole, number, heads in places]
        peers = peers_for(self.rows, self.group, outs[0].device)
        same = all(x.dtype == out.dtype for x, out in zip(tensors, outs))
        if peers is not None and same and all(out.shape[0] == self.rows.size for out in outs):
            return peers.deliver(self.rows, tensors, outs, stage, after)
        return to_local(self.rows, tensors, self.group, stage).then(lambda arrived: self._put(arrived, outs))

    def _put(self, arriving: list[Arrived], outs: list[Tensor]) -> None:
        """Puts what arrived into each ``[parts, T, heads, D]``; what several ranks computed for a part is added."""
        me, size = self.rows.rank, self.rows.size
        for piece, out in zip(arriving, outs):
            parts = out.shape[0]
            if parts == size:
                copy_rows(out[:me], piece.others[:me])
                copy_rows(out[me + 1:], piece.others[me:])
                for local, own in piece.own:
                    copy_rows(out[me, local], own)
                continue
            copies = size // parts
            for local, own in piece.own:
                by_rank = [*piece.others[:me, local], own, *piece.others[me:, local]]
                for part in range(parts):
                    *first, last = by_rank[part * copies:(part + 1) * copies]
                    torch.add(functools.reduce(torch.add, first), last, out=out[part, local])
