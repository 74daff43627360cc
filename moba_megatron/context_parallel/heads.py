"""The all-to-all schedule: heads for rows, so that each rank attends with a part of the heads over more of the rows.

What a rank then holds is whole sequences (``a2a``), or, in the inner group of a hierarchy, the zigzag rows of a smaller
context parallel group (``a2a+all_gather``): an inner schedule attends. Heads go in groups: while one is computed, the
next one's q, k, v and the previous one's o (in backward: do; dq, dk, dv) travel.

With fewer kv heads than ranks a kv head goes to several ranks. Their fp32 gradients of it are added where it came from,
and k and v are kept as they came and exchanged again in backward: that saves their copies' memory.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Pending
from .gather import Gathered, sum_dtype
from .head_groups import HeadGroups, Prefetch, number_of_groups, split_heads
from .rows import Rows, copy_rows, to_global, to_local
from .whole import Grads, Saved, Whole


def check_heads(heads: int, kv_heads: int, size: int, comm_type: str) -> None:
    """Raises ValueError unless heads can be dealt out to ``size`` ranks."""
    if kv_heads % size and (size % kv_heads or heads % size):
        raise ValueError(
            f"cp_comm_type {comm_type!r} exchanges heads among {size} ranks: key's heads must be a multiple of {size}, "
            f"or divide it with query's heads a multiple of {size}; got {heads} query and {kv_heads} key heads (after "
            "tensor parallelism). Use cp_comm_type all_gather, or fewer ranks for the exchange")


@dataclass(frozen=True)
class Exchanged:
    """Attention with a part of the heads over the rows of all ranks of ``group``, by an inner schedule."""

    inner: Whole | Gathered
    rows: Rows
    group: dist.ProcessGroup
    head_groups: int | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """q ``[T, H, D]``, k ``[T, HK, D]``, v ``[T, HK, DV]``, the rank's rows: o and what backward needs."""
        groups, size = self._groups(q, k, v), self.rows.size
        copied = k.shape[1] < size
        arriving = self._fetch(groups, [(q, size, 0), *self._keys_and_values(k, v)], "fwd exchange in")
        o, leaving, saved = q.new_empty(*q.shape[:2], v.shape[2]), [], []
        for group in groups:
            part, rest = self.inner.forward(*(x.wait() for x in arriving.take()))
            if copied:
                rest[1] = rest[2] = None
            saved.append(rest)
            started = [_Leaving(to_local(self.rows, part, self.group, "fwd exchange out"), o, size, group[0])]
            del part
            self._place(leaving)
            leaving = started
        self._place(leaving)
        return o, [q.shape, (k.shape, v.shape), [k, v] if copied else None, groups, saved]

    def backward(self, do: Tensor, saved: Saved, kv_grad_dtype: torch.dtype) -> Grads:
        """dq, dk, dv of the rank's rows; dk and dv in ``kv_grad_dtype``, rounded once."""
        q_shape, kv_shapes, copied, groups, saved = saved
        size, kv_parts = self.rows.size, min(self.rows.size, kv_shapes[0][1])
        grad_dtype = sum_dtype(do.dtype) if copied else kv_grad_dtype
        dq = torch.empty(q_shape, dtype=do.dtype, device=do.device)
        dk, dv = (torch.empty(shape, dtype=kv_grad_dtype, device=do.device) for shape in kv_shapes)
        arriving = self._fetch(groups, [(do, size, 0), *(self._keys_and_values(*copied) if copied else [])],
                               "bwd exchange in")
        leaving = []
        for (heads, kv_heads), rest in zip(groups, saved):
            do_part, *keys_and_values = (x.wait() for x in arriving.take())
            if copied:
                rest = [rest[0], *keys_and_values, *rest[3:]]
            del keys_and_values
            grads = self.inner.backward(do_part, rest, grad_dtype)
            del do_part, rest
            started = [_Leaving(to_local(self.rows, x, self.group, "bwd exchange out"), out, parts, part)
                       for x, out, parts, part in zip(grads, (dq, dk, dv), (size, kv_parts, kv_parts),
                                                      (heads, kv_heads, kv_heads))]
            del grads
            self._place(leaving)
            leaving = started
        self._place(leaving)
        return dq, dk, dv

    def _groups(self, q: Tensor, k: Tensor, v: Tensor) -> HeadGroups:
        """Groups of the heads that one rank gets."""
        kv_heads = max(1, k.shape[1] // self.rows.size)
        number = number_of_groups(self.head_groups, kv_heads, q.nbytes, q.nbytes + k.nbytes + v.nbytes)
        return split_heads(q.shape[1] // self.rows.size, kv_heads, number)

    def _keys_and_values(self, *tensors: Tensor) -> list[tuple[Tensor, int, int]]:
        return [(x, min(self.rows.size, x.shape[1]), 1) for x in tensors]

    def _fetch(self, groups: HeadGroups, sources: list[tuple[Tensor, int, int]], stage: str) -> Prefetch:
        """Exchanges the sources' heads: (tensor, parts that its heads are dealt out in, which slice of a group)."""
        def start(i: int) -> tuple[Pending, ...]:
            return tuple(self._send(x, parts, groups[i][which], stage) for x, parts, which in sources)

        return Prefetch(start, [kv_heads.stop - kv_heads.start for _, kv_heads in groups])

    def _send(self, x: Tensor, parts: int, heads: slice, stage: str) -> Pending:
        """Starts to send each rank the ``heads`` of its part of x ``[T, heads, D]``; ranks share parts in turn."""
        size, me = self.rows.size, self.rows.rank
        view = x.unflatten(1, (parts, -1))[:, :, heads].transpose(0, 1)  # [parts, T, heads, D]
        if parts < size:
            packed = view.contiguous()
            messages = [packed[rank * parts // size] for rank in range(size)]
        else:
            packed = x.new_empty(parts - 1, *view.shape[1:])
            copy_rows(packed[:me], view[:me])
            copy_rows(packed[me:], view[me + 1:])
            messages = [*packed[:me], None, *packed[me:]]
        return to_global(self.rows, view[me * parts // size], messages, self.group, stage)

    def _place(self, leaving: list["_Leaving"]) -> None:
        """Awaits results and puts them where they belong; what several ranks computed is added."""
        me, size = self.rows.rank, self.rows.size
        for x in leaving:
            arrived = x.pending.wait()
            out = x.out.unflatten(1, (x.parts, -1))[:, :, x.heads].transpose(0, 1)  # [parts, T, heads, D]
            if x.parts == size:
                copy_rows(out[:me], arrived.others[:me])
                copy_rows(out[me + 1:], arrived.others[me:])
                for local, own in arrived.own:
                    copy_rows(out[me, local], own)
                continue
            copies = size // x.parts
            for local, own in arrived.own:
                by_rank = [*arrived.others[:me, local], own, *arrived.others[me:, local]]
                for part in range(x.parts):
                    *first, last = by_rank[part * copies:(part + 1) * copies]
                    torch.add(functools.reduce(torch.add, first), last, out=out[part, local])


@dataclass(frozen=True)
class _Leaving:
    """Results under way to the ranks whose rows they are: where to put what arrives here."""

    pending: Pending
    out: Tensor
    parts: int
    heads: slice
