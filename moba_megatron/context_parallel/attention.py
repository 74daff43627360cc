"""The all-gather schedule: partial sums, gate beside the key/value gather, attention on local queries, gradient.

1. Sums of whole blocks of local keys, and the rows of blocks that a piece boundary cuts, are gathered (small). Every
   rank then has the same chunk means, bit for bit those of a single rank, so it selects the same chunks.
2. The gathers of K and V are issued right behind and awaited only after the gate: they overlap.
3. Local queries attend to the gathered keys. Backward gathers K and V again rather than keeping them, and
   reduce-scatters dK and dV in fp32.
"""
from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import get_stages
from ..ops.validation import check_scale
from ..segments import Routing, Segments
from .comm import Pending, all_gather, reduce_scatter
from .layout import BlockExchange, ZigzagLayout


def context_parallel_attention(q: Tensor, k: Tensor, v: Tensor, layout: ZigzagLayout, topk: int,
                               group: dist.ProcessGroup, *, softmax_scale: float | None = None,
                               deterministic: bool = False, backend: str = "auto") -> Tensor:
    """MoBA over sequences whose rows are spread over the ranks of a group; dense with topk 1 and one chunk a sequence.

    The inputs must fit together on all ranks: check them under :class:`~moba_megatron.context_parallel.Agreement`.

    Args:
        q: ``[T, H, D]``, this rank's rows of every sequence in zigzag order.
        k: ``[T, HK, D]``.
        v: ``[T, HK, DV]``.
        layout: this rank's place, for the layout's own chunk size.
        topk: chunks a query attends to, its own included.
        group: the context parallel group, any backend.
        softmax_scale: None for ``1/sqrt(D)``.
        deterministic: bitwise reproducible gradients, as far as the backend's reduce-scatter is.
        backend: ``auto``, ``triton`` or ``reference``.

    Returns:
        o ``[T, H, DV]``, what a single rank would compute for these rows.
    """
    scale = check_scale(softmax_scale, q.shape[2])
    return _ContextParallelAttention.apply(q, k, v, layout, topk, group, scale, deterministic, backend)


class _ContextParallelAttention(torch.autograd.Function):
    """Saves the local q, k, v, o, lse, the selection and its routing.

    The gathered K and V live in forward and in backward only.
    """

    @staticmethod
    def forward(ctx, q, k, v, layout, topk, group, softmax_scale, deterministic, backend):
        stages = get_stages(backend, q.device)
        o, lse, selected, routing = _forward(stages, q, k, v, layout, topk, group, softmax_scale)
        s = layout.segments
        entries, starts = (routing.entries, routing.starts) if routing else (None, None)
        ctx.save_for_backward(q, k, v, o, lse, selected, entries, starts, layout.global_rows, layout.rank_rows,
                              s.cu_seqlens_q, s.cu_seqlens_k, s.seq_ids, s.offsets)
        ctx.bounds = (s.max_seqlen_q, s.max_seqlen_k, s.chunk_size)
        ctx.stages, ctx.group, ctx.softmax_scale, ctx.deterministic = stages, group, softmax_scale, deterministic
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, selected, entries, starts, global_rows, rank_rows, *segment_tensors = ctx.saved_tensors
        routing = Routing(entries, starts) if entries is not None else None
        segments = Segments(*segment_tensors, *ctx.bounds)
        k_all, v_all = all_gather(k, ctx.group), all_gather(v, ctx.group)
        dq, dk, dv = ctx.stages.attention_bwd(
            do.contiguous(), None, q, k_all.wait()[global_rows], v_all.wait()[global_rows], o, lse, selected, segments,
            ctx.softmax_scale, deterministic=ctx.deterministic, kv_grad_dtype=_sum_dtype(k.dtype),
            routing=routing)
        dk, dv = reduce_scatter(dk[rank_rows], ctx.group), reduce_scatter(dv[rank_rows], ctx.group)
        return dq, dk.wait().to(k.dtype), dv.wait().to(v.dtype), *(None,) * 6


def _forward(stages: ModuleType, q: Tensor, k: Tensor, v: Tensor, layout: ZigzagLayout, topk: int,
             group: dist.ProcessGroup, softmax_scale: float) -> tuple[Tensor, Tensor, Tensor, Routing | None]:
    segments = layout.segments
    earlier = min(topk - 1, max(0, (segments.max_seqlen_k - 1) // segments.chunk_size))
    sums = _send_sums(stages, k, layout.blocks, group) if earlier and layout.blocks else None
    k_all, v_all = all_gather(k, group), all_gather(v, group)
    if not earlier:
        selected = torch.empty(*q.shape[:2], 0, dtype=torch.int32, device=q.device)
        k_global = k_all.wait()[layout.global_rows]
    elif sums is not None:
        means = _receive_means(stages, sums.wait(), layout.blocks, segments.chunk_size, k.dtype)
        selected = stages.gate(q, means, segments, earlier + 1)
        k_global = k_all.wait()[layout.global_rows]
    else:  # the boundaries of pieces are on the device only: the same sums from the gathered keys, while V travels
        k_global = k_all.wait()[layout.global_rows]
        selected = stages.gate(q, stages.chunk_means(k_global, segments), segments, earlier + 1)
    del k_all
    routing = stages.route(selected, k.shape[1], segments.num_chunks(k_global.shape[0])) if earlier else None
    o, lse = stages.attention_fwd(q, k_global, v_all.wait()[layout.global_rows], selected, segments, softmax_scale,
                                  routing)
    return o, lse, selected, routing


def _send_sums(stages: ModuleType, k: Tensor, blocks: BlockExchange, group: dist.ProcessGroup) -> Pending:
    """Starts the gather of this rank's block sums and of its rows in cut blocks."""
    message = torch.zeros(blocks.send_rows, *k.shape[1:], dtype=_sum_dtype(k.dtype), device=k.device)
    whole = blocks.starts.numel()
    message[:whole] = stages.block_sums(k, blocks.starts, blocks.counts)
    message[whole:whole + blocks.cut_rows.numel()] = k[blocks.cut_rows]
    return all_gather(message, group)


def _receive_means(stages: ModuleType, messages: Tensor, blocks: BlockExchange, chunk_size: int,
                   dtype: torch.dtype) -> Tensor:
    """Chunk means ``[num_chunks, HK, D]`` from the gathered messages."""
    num_chunks, per_chunk = blocks.table_shape
    table = torch.zeros(num_chunks * per_chunk, *messages.shape[1:], dtype=messages.dtype, device=messages.device)
    table[blocks.sum_target] = messages[blocks.sum_source]
    if blocks.cut_target.numel():
        cut = messages[blocks.cut_source].to(dtype)  # exact: they were keys of this dtype
        table[blocks.cut_target] = stages.block_sums(cut, blocks.cut_starts, blocks.cut_counts)
    return stages.means_from_block_sums(table.unflatten(0, (num_chunks, per_chunk)), chunk_size, dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
