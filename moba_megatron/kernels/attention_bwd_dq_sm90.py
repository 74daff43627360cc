"""Attention backward, partial dq, on Hopper (Gluon): gathered rows against a selected chunk.

A program takes a piece of one (chunk, kv head)'s list, 128 rows at a time: 64 for each of two groups of warps. The
loader gathers the next rows of q and do, and streams the chunk's keys and values past. While one group computes
weights, the other's products run.
"""
from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..segments import Routing
from . import sm90
from .attention_call import AttentionCall
from .jit_helpers_sm90 import LOADER_WARPS, _choice_row, _chunk_keys, _copy_keys, _copy_rows, _partial_row
from .launcher import launch
from .routing import Tiles


def attention_bwd_dq(call: AttentionCall, routing: Routing, tiles: Tiles, dq_partial: Tensor, group: tuple[int, int],
                     options: dict[str, int]) -> None:
    """Fills the partial dq of one group of kv heads."""
    grid, lists = call.over_lists(routing, tiles, group)
    launch(_attention_bwd_dq_sm90_kernel, grid, **call.arguments(
        _attention_bwd_dq_sm90_kernel,
        **lists,
        dq_partial=dq_partial,
        **sm90.strides_of_eight(q=call.q, k=call.k, v=call.v, do=call.do),
        **sm90.key_tiles(call.k, call.v, call.segments.chunk_size, options),
    ))


@gluon.jit
def _gather(rows, smem, row_full, buffer, choice0, choice1, kv_head, strides, H: gl.constexpr, G: gl.constexpr,
            KS: gl.constexpr, ROWS: gl.constexpr):
    """Starts copies of 128 rows of q and do, 64 for each group of warps."""
    q, do = rows
    q_smem, do_smem, k_smem, v_smem = smem
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh = strides
    _, token, head = _choice_row(choice0, kv_head, H, G, KS)
    _copy_rows(q_smem.index(buffer * 2), q, token, head, stride_qt, stride_qh, ROWS)
    _copy_rows(do_smem.index(buffer * 2), do, token, head, stride_dot, stride_doh, ROWS)
    _, token, head = _choice_row(choice1, kv_head, H, G, KS)
    _copy_rows(q_smem.index(buffer * 2 + 1), q, token, head, stride_qt, stride_qh, ROWS)
    _copy_rows(do_smem.index(buffer * 2 + 1), do, token, head, stride_dot, stride_doh, ROWS)
    async_copy.mbarrier_arrive(row_full.index(buffer), increment_count=False)


@gluon.jit
def _load_tile(keys, smem, bars, step, row, end, kv_head, strides, USE_TMA: gl.constexpr, ROWS: gl.constexpr):
    """Starts the copies of one tile of keys and values as soon as its buffers are free."""
    k, v = keys
    q_smem, do_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, kv_empty = bars
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh = strides
    STAGES: gl.constexpr = k_smem.shape[0]
    stage = step % STAGES
    mbarrier.wait(kv_empty.index(stage), ((step // STAGES) & 1) ^ 1)
    _copy_keys(k, k_smem.index(stage), k_full.index(stage), row, end, kv_head, stride_kt, stride_kh, USE_TMA, ROWS)
    _copy_keys(v, v_smem.index(stage), v_full.index(stage), row, end, kv_head, stride_vt, stride_vh, USE_TMA, ROWS)
    return step + 1


@gluon.jit
def _loader(rows, keys, indices, smem, bars, ints, strides, H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr,
            BUFFERS: gl.constexpr, USE_TMA: gl.constexpr):
    q_smem, do_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, kv_empty = bars
    count, kv_head, first_key, chunk_size = ints
    D: gl.constexpr = q_smem.shape[2]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [LOADER_WARPS, 1], [1, 0])
    gl.static_assert(BUFFERS > 1, "rows are gathered ahead, before the last keys of those that are in use")
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    end = first_key + chunk_size
    choice0 = gl.load(indices + gl.minimum(lane, count - 1))  # the last choice fills up
    choice1 = gl.load(indices + gl.minimum(64 + lane, count - 1))
    _gather(rows, smem, row_full, 0, choice0, choice1, kv_head, strides, H, G, KS, ROWS)
    step = 0
    tile = 1
    for first in range(0, count, 128):
        choice0 = gl.load(indices + gl.minimum(first + 128 + lane, count - 1))
        choice1 = gl.load(indices + gl.minimum(first + 192 + lane, count - 1))
        step = _load_tile(keys, smem, bars, step, first_key, end, kv_head, strides, USE_TMA, ROWS)
        if first + 128 < count:
            buffer = tile % BUFFERS
            mbarrier.wait(row_empty.index(buffer), ((tile // BUFFERS) & 1) ^ 1)
            _gather(rows, smem, row_full, buffer, choice0, choice1, kv_head, strides, H, G, KS, ROWS)
            tile += 1
        for key in range(BLOCK_N, chunk_size, BLOCK_N):
            step = _load_tile(keys, smem, bars, step, first_key + key, end, kv_head, strides, USE_TMA, ROWS)


@gluon.jit
def _load_terms(terms, choice, kv_head, H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr):
    """lse, in powers of two, and delta of indices' rows."""
    row, _, _ = _choice_row(choice, kv_head, H, G, KS)
    at = terms + row.to(gl.int64) * 4
    return gl.load(at), gl.load(at + 1)


@gluon.jit
def _add_tile(dq, q, do, lse, delta, smem, bars, step, key, chunk_size, qk_scale, USE_TMA: gl.constexpr,
              RAGGED: gl.constexpr):
    """Adds one tile of keys to dq ``[64, D]``, and frees the tile's buffers."""
    q_smem, do_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, kv_empty = bars
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S)
    stage = step % STAGES
    phase = (step // STAGES) & 1
    k = k_smem.index(stage)
    mbarrier.wait(k_full.index(stage), phase)
    if not USE_TMA:
        fence_async_shared()
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    if not USE_TMA:
        fence_async_shared()
    dp = warpgroup_mma(do, v_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * qk_scale - lse[:, None])
    if RAGGED:
        index = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S))
        p = gl.where((index < chunk_size)[None, :], p, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(k.dtype), gl.DotOperandLayout(0, dq.type.layout, 2))
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(kv_empty.index(stage), count=1)
    return dq


@gluon.jit
def _consumer(part: gl.constexpr, terms, indices, outs, smem, bars, ints, scales, H: gl.constexpr, G: gl.constexpr,
              KS: gl.constexpr, BUFFERS: gl.constexpr, USE_TMA: gl.constexpr, RAGGED: gl.constexpr):
    """64 rows of every 128, by one group of four warps."""
    q_smem, do_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, kv_empty = bars
    dq_partial, first_head, group_heads = outs
    count, kv_head, first_key, chunk_size = ints
    qk_scale, softmax_scale = scales
    D: gl.constexpr = q_smem.shape[2]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    lane = part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    at = part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    choice = gl.load(indices + gl.minimum(lane, count - 1))
    next_lse, next_delta = _load_terms(terms, choice, kv_head, H, G, KS)
    choice = gl.load(indices + gl.minimum(lane + 128, count - 1))
    step = 0
    tile = 0
    for first in range(0, count, 128):
        lse = next_lse
        delta = next_delta
        next_lse, next_delta = _load_terms(terms, choice, kv_head, H, G, KS)
        choice = gl.load(indices + gl.minimum(first + 256 + lane, count - 1))
        buffer = tile % BUFFERS
        mbarrier.wait(row_full.index(buffer), (tile // BUFFERS) & 1)
        fence_async_shared()
        q = q_smem.index(buffer * 2 + part)
        do = do_smem.index(buffer * 2 + part)
        dq = gl.zeros([64, D], gl.float32, layout=ACC)
        for key in range(0, chunk_size, BLOCK_N):
            dq = _add_tile(dq, q, do, lse, delta, smem, bars, step, key, chunk_size, qk_scale, USE_TMA, RAGGED)
            step += 1
        q.store((dq * softmax_scale).to(q_smem.dtype))  # the rows have been used: whole lines are stored from here
        index = first + at
        this = gl.load(indices + gl.minimum(index, count - 1))
        partial_row = _partial_row(this, kv_head, first_head, group_heads, H, G, KS)
        x = q.load(OUT)
        mbarrier.arrive(row_empty.index(buffer), count=1)
        gl.store(dq_partial + partial_row[:, None] * D + cols[None, :], x, mask=(index < count)[:, None])
        tile += 1


# Shared memory      written by                read by                                   full       empty (arrivals)
# q and do, halves   loader, cp.async          the half's group, all its products        row_full   row_empty (2)
# q, own half        its group: dq, in place   its group, in other lines (own barrier)              the same
# k                  loader, TMA or cp.async   both groups: scores, dq                   k_full     kv_empty (2)
# v                  loader, TMA or cp.async   both groups: dp                           v_full     kv_empty (2)
@gluon.jit(do_not_specialize=["chunk_size", "num_chunks", "num_sequences", "kv_head_begin", "kv_head_end"])
def _attention_bwd_dq_sm90_kernel(
    q, k, v, do, terms, indices, tile_csr_row, tile_begin, tile_end, tile_indptr, cu_seqlens_k, dq_partial,
    qk_scale, softmax_scale, chunk_size, num_chunks, num_sequences, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, D: gl.constexpr, USE_TMA: gl.constexpr, RAGGED: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, LOADER_REGS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, num_warps: gl.constexpr,
):
    """A piece of the list of one (chunk, kv head)."""
    tile = gl.program_id(0) + gl.load(tile_indptr + kv_head_begin * num_chunks)
    if tile >= gl.load(tile_indptr + kv_head_end * num_chunks):
        return
    csr_row = gl.load(tile_csr_row + tile)
    begin = gl.load(tile_begin + tile)
    end = gl.load(tile_end + tile)
    if begin >= end:  # nothing of the list is here; its chunk may even reach beyond the keys
        return
    kv_head = csr_row // num_chunks
    first_key, _ = _chunk_keys(cu_seqlens_k, num_sequences, chunk_size, csr_row % num_chunks)
    dtype: gl.constexpr = q.dtype.element_ty
    ROWS_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    KEYS_SMEM: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    KEY_ARRIVALS: gl.constexpr = 1 if USE_TMA else 32 * LOADER_WARPS
    q_smem = gl.allocate_shared_memory(dtype, [BUFFERS * 2, 64, D], ROWS_SMEM)
    do_smem = gl.allocate_shared_memory(dtype, [BUFFERS * 2, 64, D], ROWS_SMEM)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], KEYS_SMEM)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], KEYS_SMEM)
    row_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    row_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=KEY_ARRIVALS)
        mbarrier.init(v_full.index(i), count=KEY_ARRIVALS)
        mbarrier.init(kv_empty.index(i), count=2)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(row_full.index(i), count=32 * LOADER_WARPS)
        mbarrier.init(row_empty.index(i), count=2)
    fence_async_shared()
    indices += begin
    rows = (q, do)
    keys = (k, v)
    smem = (q_smem, do_smem, k_smem, v_smem)
    bars = (row_full, row_empty, k_full, v_full, kv_empty)
    ints = ((end - begin).to(gl.int32), kv_head, first_key, chunk_size)
    outs = (dq_partial, kv_head_begin * G, (kv_head_end - kv_head_begin) * G)
    scales = (qk_scale, softmax_scale)
    strides = (stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh)
    gl.warp_specialize([
        (_consumer, (0, terms, indices, outs, smem, bars, ints, scales, H, G, KS, BUFFERS, USE_TMA, RAGGED)),
        (_consumer, (1, terms, indices, outs, smem, bars, ints, scales, H, G, KS, BUFFERS, USE_TMA, RAGGED)),
        (_loader, (rows, keys, indices, smem, bars, ints, strides, H, G, KS, BUFFERS, USE_TMA)),
    ], [4, LOADER_WARPS], [CONSUMER_REGS, LOADER_REGS])
