"""The all-gather schedule: queries stay where they are, keys and values travel, one group of kv heads at a time.

Forward: sums of whole blocks of local keys, and the rows of blocks that a piece boundary cuts, are gathered first
(small). Every rank then has the same chunk means, bit for bit those of a single rank, and selects the same chunks; the
first groups' K and V travel meanwhile, later ones' while their predecessors are computed. Backward gathers again
rather than keeping K and V, and adds dK and dV over the ranks in fp32 while the next group is computed, those of the
last group while its dQ is.

Here too is what schedules share: groups of heads, one of which travels while another is computed, and their transport.
"""
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.pipeline import Choice, Pipeline, Saved
from .layout import ZigzagLayout
from .transport.comm import Library, Pending, Rows, all_gather, arrived, copy_rows
from .transport.symmetric_memory import through_arenas

T = TypeVar("T")
HeadGroups = tuple[tuple[slice, slice], ...]  # query heads and kv heads of each group
State = list  # what a schedule keeps for backward: tensors, what the host knows, and such lists
Grads = tuple[Tensor, Tensor, Tensor]
Arriving = Iterator[tuple[Pending, ...]]  # keys and values of one group of heads after the other, on their way
GATHERED, REDUCED = 0, 1  # lanes of the transport
LEAST_BYTES = 64 << 20
"""Bytes of a rank's queries in a group, at least: a group costs the host a millisecond or two, there and back, and
below this the GPU (H200: 128K tokens on 2 ranks, 16 heads, chunks of 128) would wait for it. Reckoned from one run."""
MUCH_BYTES = 1 << 30
"""Bytes of a rank's queries from which on 4 groups beat 3: 96.2 ms, 96.8 (2 H200s, a2a, 512K, 128, 8, 32:8 heads)."""
MOST_BYTES = 1 << 30  # that a rank holds of a group, at most, while groups have several kv heads


def number_of_groups(asked: int | None, kv_heads: int, queries: int, held: int) -> int:
    """How many groups to make of ``kv_heads``: as ``asked``, or for None 4 where there is enough work or heads for it,
    else 3, or fewer. More cost the kernels more than they hide: on 2 H200s at 128K, 512, 8, 16 heads, 19.6 ms in 3
    groups, 20.6 in 5. ``queries``: bytes of the rank's queries, a measure of its work; ``held``: of what has travelled,
    all heads together."""
    if asked is None:
        usual = 4 if kv_heads >= 8 or queries >= MUCH_BYTES else 3
        asked = max(min(queries // LEAST_BYTES, usual), -(-held // MOST_BYTES))
    return max(1, min(asked, kv_heads))


def split_heads(heads: int, kv_heads: int, number: int) -> HeadGroups:
    """The query heads and kv heads of each group; the first and the last have an eighth of the heads at most: what the
    first one waits for and what the last one leaves behind is all that nothing hides."""
    end = max(1, kv_heads // max(8, 2 * number - 2)) if number > 2 else -(-kv_heads // number)
    inner, rest = max(0, number - 2), kv_heads - 2 * end
    sizes = [end, *(rest // inner + (i < rest % inner) for i in range(inner)), end] if inner else [end, kv_heads - end]
    per_kv, groups, begin = heads // kv_heads, [], 0
    for size in sizes[:number]:
        groups.append((slice(begin * per_kv, (begin + size) * per_kv), slice(begin, begin + size)))
        begin += size
    return tuple(groups)


@functools.lru_cache(maxsize=256)
def head_groups(asked: int | None, heads: int, kv_heads: int, queries: int, held: int) -> HeadGroups:
    """:func:`split_heads` into :func:`number_of_groups`."""
    return split_heads(heads, kv_heads, number_of_groups(asked, kv_heads, queries, held))


def most_heads(groups: HeadGroups) -> tuple[int, int]:
    """Query heads and kv heads of the largest group."""
    most = 0, 0
    for heads, kv_heads in groups:
        most = max(most, (heads.stop - heads.start, kv_heads.stop - kv_heads.start))
    return most


def prefetch(start: Callable[[int], T], number: int) -> Iterator[T]:
    """``start(i)`` for each i: of the first two when the first is asked for, of another when the one before it is. What
    was got from the one before that must have been let go of: memory for two is enough."""
    ahead = []
    for i in range(number):
        while len(ahead) < 2 and i + len(ahead) < number:
            ahead.append(start(i + len(ahead)))
        yield ahead.pop(0)


def transport_for(rows: Rows, group: dist.ProcessGroup, x: Tensor, lanes: Sequence[Sequence[int]]) -> Library:
    """How these rows travel: through arenas with room for such lanes, or by the group's library; on all ranks alike.
    The latter for rows at places that the host does not know, in a CUDA graph under capture; among several hosts,
    without access to each other's memory, and as MOBA_CP_COPY_ENGINES says: 0 never, 1 wherever it can be, unset groups
    of two ranks. Where arenas must be made or grow the call is collective. ``x``: on their device; ``lanes``: for each
    kind of exchange the bytes of its tensors ``[S, h, D]``, at most; two of a kind may be under way or in use."""
    if not x.is_cuda or rows.runs is None or rows.size == 1 or not rows.local or (
            torch.cuda.is_current_stream_capturing()):
        return Library(rows, group)
    return through_arenas(rows, group, x.device, lanes) or Library(rows, group)


@dataclass(frozen=True)
class AllGatherAttention:
    """Attention of a rank's queries over the keys of all ranks of ``group``."""

    pipeline: Pipeline
    layout: ZigzagLayout
    group: dist.ProcessGroup
    head_groups: int | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None = None) -> tuple[Tensor, State]:
        """q ``[T, H, D]``, k ``[T, HK, D]``, v ``[T, HK, DV]``, the rank's rows: o and what backward needs.
        ``selected``: given chunks, int32 ``[T, H or HK, n]``."""
        held = (k.nbytes + v.nbytes) * self.layout.rows.size
        groups = head_groups(self.head_groups, q.shape[1], k.shape[1], q.nbytes, held)
        sums = None
        if selected is None and self.pipeline.earlier(self.layout.segments) and self.layout.blocks is not None:
            sums = self.send_sums(k)
        gathered = self.gather(self.transport(k, v, groups), k, v, groups, "fwd gather")
        if selected is not None:
            choices = self.given(selected, q.shape[1], groups)
        else:
            choices = [None] * len(groups) if sums is None else self.choose_by_sums(q, k.dtype, sums, groups)
        o, saved = self.attend(q, v.shape[2], groups, gathered, choices)
        return o, [q, k, v, o, groups, saved]

    def attend(self, q: Tensor, v_dim: int, groups: HeadGroups, gathered: Arriving,
               choices: Sequence[Choice | None]) -> tuple[Tensor, list[Saved]]:
        """o, and what is saved of each group but its o, from keys and values that are on their way."""
        segments = self.layout.segments
        o, saved = q.new_empty(*q.shape[:2], v_dim) if len(groups) > 1 else None, []
        for (heads, _), choice, arriving in zip(groups, choices, gathered):
            k_all, v_all = arrived(arriving)
            if choice is None and self.pipeline.earlier(segments):
                # the boundaries of pieces are on the device only: the same means from all keys
                choice = self.pipeline.choose(q[:, heads], k_all, segments)
            part, rest = self.pipeline.attend(q[:, heads], k_all, v_all, choice, segments)
            del k_all, v_all  # their memory is that of the next group but one
            if o is None:
                o = part
            else:
                copy_rows(o[:, heads], part)
            saved.append(replace(rest, o=None))
        return o, saved

    def backward(self, do: Tensor, saved: State, kv_grad_dtype: torch.dtype) -> Grads:
        """dq, dk, dv of the rank's rows; dk and dv in ``kv_grad_dtype``, rounded once."""
        q, k, v, o, groups, saved = saved
        transport = self.transport(k, v, groups)
        gathered = self.gather(transport, k, v, groups, "bwd gather")

        def reduce(i: int, grads: list[Tensor], outs: list[Tensor], after: torch.cuda.Event | None) -> list[Pending]:
            return transport.reduce(grads, outs, "bwd reduce", (REDUCED, i), self.pipeline.deterministic, after)

        return self.attend_bwd(do, (q, k, v, o), groups, saved, gathered, reduce, kv_grad_dtype, transport)

    def attend_bwd(self, do: Tensor, tensors: tuple[Tensor, ...], groups: HeadGroups, saved: list[Saved],
                   gathered: Arriving, reduce: Callable[..., list[Pending]],
                   kv_grad_dtype: torch.dtype, transport: Library | None = None) -> Grads:
        """dq, dk, dv. ``reduce(i, grads, outs, after)`` starts to add group i's ``[S, h, D]``, complete at the event
        ``after`` or, with None, now, over the ranks into ``outs``. ``transport``: what it sends by."""
        q, k, v, o = tensors
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if len(groups) > 1 else None
        dk, dv = (torch.empty(x.shape, dtype=kv_grad_dtype, device=x.device) for x in (k, v))
        reducing = []
        early = transport is not None and transport.early
        for i, ((heads, kv_heads), rest, arriving) in enumerate(zip(groups, saved, gathered)):
            keys, sums = arrived(arriving), torch.promote_types(k.dtype, torch.float32)
            q_part, do_part = (_gathered_fast(x[:, heads], k.shape[1] < q.shape[1]) for x in (q, do))
            memory = transport and transport.tensors((REDUCED, i), *((x.shape, sums) for x in keys))
            out = memory and [torch.empty(q_part.shape, dtype=q.dtype, device=q.device), *memory]
            # dk and dv are complete before dq, and the last group's leave meanwhile
            event = transport.event() if early and i + 1 == len(groups) else None
            grads = self.pipeline.backward(do_part, None, q_part, *keys, replace(rest, o=o[:, heads]),
                                           self.layout.segments, sums, event, out)
            del keys, q_part, do_part
            part, after = grads[0], event if grads is out else None
            started = reduce(i, grads[1:], [x[:, kv_heads] for x in (dk, dv)], after)
            del grads, out
            if dq is None:
                dq = part
            else:
                copy_rows(dq[:, heads], part)
            arrived(reducing)
            reducing = started
        arrived(reducing)
        return dq, dk, dv

    def transport(self, k: Tensor, v: Tensor, groups: HeadGroups) -> Library:
        """How keys and values travel, and their gradients."""
        rows, (_, most) = self.layout.rows, most_heads(groups)
        narrow, wide = k.element_size(), torch.promote_types(k.dtype, torch.float32).itemsize
        others = rows.total - rows.local
        of_k, of_v = most * k.shape[2], most * v.shape[2]
        lanes = ((rows.total * of_k * narrow, rows.total * of_v * narrow),
                 # theirs, and what comes of the others'
                 (rows.total * of_k * wide, rows.total * of_v * wide, others * of_k * wide, others * of_v * wide))
        return transport_for(rows, self.group, k, lanes)

    def gather(self, transport: Library, k: Tensor, v: Tensor, groups: HeadGroups, stage: str) -> Arriving:
        """Starts to gather the first groups; the memory of a group is used again for the next but one."""
        def start(i: int) -> tuple[Pending]:
            _, heads = groups[i]
            return transport.fetch((k[None, :, heads], v[None, :, heads]), stage, (GATHERED, i), lasting=False),

        arriving = prefetch(start, len(groups))
        return itertools.chain((next(arriving),), arriving)  # they are on their way from here on

    def given(self, selected: Tensor, heads: int, groups: HeadGroups) -> list[Choice]:
        """The choice of each group, from given chunks of all heads."""
        by_group = selected.shape[1] != heads
        return [self.pipeline.given(selected[:, group[by_group]], *(part.stop - part.start for part in group),
                                    self.layout.segments, self.layout.rows.total) for group in groups]

    def choose_by_sums(self, q: Tensor, dtype: torch.dtype, sums: Pending, groups: HeadGroups) -> list[Choice]:
        """The choice of each group, from the sums of all ranks' keys: what every rank sent."""
        segments, blocks, stages, messages = self.layout.segments, self.layout.blocks, self.pipeline.stages, sums.wait()
        num_chunks, per_chunk = blocks.table_shape
        table = torch.zeros(num_chunks * per_chunk, *messages.shape[1:], dtype=messages.dtype, device=messages.device)
        table[blocks.sum_target] = messages[blocks.sum_source]
        if blocks.cut_target.numel():
            cut = messages[blocks.cut_source].to(dtype)  # exact: they were keys of this dtype
            table[blocks.cut_target] = stages.block_sums(cut, blocks.cut_starts, blocks.cut_counts)
        means = stages.means_from_block_sums(table.unflatten(0, (num_chunks, per_chunk)), segments.chunk_size, dtype)
        choices = []
        for heads, kv_heads in groups:
            choices.append(self.pipeline.choose(q[:, heads], means[:, kv_heads], segments, self.layout.rows.total))
        return choices

    def send_sums(self, k: Tensor) -> Pending:
        """Starts the gather of this rank's block sums and of its rows in cut blocks."""
        blocks = self.layout.blocks
        dtype, whole = torch.promote_types(k.dtype, torch.float32), blocks.starts.numel()
        message = torch.zeros(blocks.send_rows, *k.shape[1:], dtype=dtype, device=k.device)
        message[:whole] = self.pipeline.stages.block_sums(k, blocks.starts, blocks.counts)
        message[whole:whole + blocks.cut_rows.numel()] = k[blocks.cut_rows]
        return all_gather(message, self.group, "fwd sums")


def _gathered_fast(x: Tensor, grouped: bool) -> Tensor:
    """Of several heads a kv head kernels gather rows in half of the instructions where one lies behind the other."""
    if not grouped or x.is_contiguous():
        return x
    return copy_rows(torch.empty(x.shape, dtype=x.dtype, device=x.device), x)
