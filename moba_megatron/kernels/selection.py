"""What stands beside the gate: the sum of a group's queries, and given choices made harmless."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Segments
from .bounds import clear_rows
from .host import cdiv, head_block, next_power_of_2
from .jit_helpers import _offset, _query_tile
from .launcher import Buffer, call, empty, launch, rows


def group_queries(q: Tensor, num_kv_heads: int) -> Tensor:
    """As :func:`moba_megatron.reference.group_queries`: the same bits."""
    return call(_group_queries, rows(q), num_kv_heads)


def _group_queries(q: Buffer, num_kv_heads: int) -> Buffer:
    total, num_heads, head_dim = q.shape
    sums, group = empty((total, num_kv_heads, head_dim), q.dtype, q.device), num_heads // num_kv_heads
    if total:
        launch(_group_queries_kernel, (cdiv(total * num_kv_heads, 16),), q, sums, total * num_kv_heads, *q.stride()[:2],
               HK=num_kv_heads, G=group, D=head_dim, BLOCK_D=head_block(head_dim), SCALE=1 / next_power_of_2(group),
               BLOCK_M=16, num_warps=4)
    return sums


def keep_earlier(selected: Tensor, segments: Segments) -> Tensor:
    """As :func:`moba_megatron.reference.keep_earlier`; nothing waits for the device."""
    return call(_keep_earlier, selected.contiguous(), segments)


def _keep_earlier(selected: Buffer, segments: Segments) -> Buffer:
    total, lists, choices = selected.shape
    kept = empty(selected.shape, torch.int32, selected.device)
    if selected.numel():
        if not segments.exact:
            clear_rows(segments.cu_seqlens_q, (kept, -1))
        block_m = max(16, 1024 // next_power_of_2(choices))
        num_tiles = total // block_m + segments.num_segments
        launch(_keep_earlier_kernel, (num_tiles * lists,), selected, kept, segments.cu_seqlens_q, segments.cu_seqlens_k,
               segments.seq_ids, segments.offsets, segments.num_segments, segments.chunk_size, LISTS=lists, KS=choices,
               BLOCK_KS=next_power_of_2(choices), BLOCK_M=block_m, num_warps=4)
    return kept


@triton.jit(do_not_specialize=["num_rows"])
def _group_queries_kernel(q, sums, num_rows, stride_qt, stride_qh, HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                          BLOCK_D: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M sums of G heads each, which are added in order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    keep = (row < num_rows)[:, None] & (cols < D)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.static_range(G):
        at = _offset(row // HK, stride_qt) + _offset(row % HK * G + i, stride_qh)
        total += tl.load(q + at[:, None] + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(sums + row[:, None] * D + cols[None, :], (total * SCALE).to(sums.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_segments", "chunk_size"])
def _keep_earlier_kernel(selected, kept, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments, chunk_size,
                         LISTS: tl.constexpr, KS: tl.constexpr, BLOCK_KS: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M queries of one segment and head, or group of heads."""
    row, row_end, position, _, first_chunk = _query_tile(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments,
                                                         chunk_size, tl.program_id(0) // LISTS, BLOCK_M)
    if row >= row_end:
        return
    lane = tl.arange(0, BLOCK_M)
    valid = row + lane < row_end
    own = first_chunk + (position + lane) // chunk_size
    at = ((row + lane).to(tl.int64) * LISTS + tl.program_id(0) % LISTS) * KS
    place = tl.arange(0, BLOCK_KS)[None, :]
    given = tl.load(selected + at[:, None] + place, mask=valid[:, None] & (place < KS), other=-1)
    for j in range(KS):
        chunk = tl.load(selected + at + j, mask=valid, other=-1)
        named = tl.sum(((given == chunk[:, None]) & (place < j)).to(tl.int32), 1)  # so often before
        keep = (chunk >= first_chunk) & (chunk < own) & (named == 0)
        tl.store(kept + at + j, tl.where(keep, chunk, -1), mask=valid)
