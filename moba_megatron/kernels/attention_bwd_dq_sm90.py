"""Attention backward, partial dq, on Hopper (Gluon): gathered rows against a selected chunk.

A program takes pieces of (chunk, kv head)s' lists, one after the other, 128 rows at a time: 64 for each of two groups
of warps. The loader gathers the next rows of q and do, also those of the next piece, and streams the chunk's keys and
values past. While one group computes weights, the other's products run.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from ..segments import Routing
from . import sm90
from .attention_call import AttentionCall
from .jit_helpers_sm90 import (
    LOADER_WARPS,
    _allocate,
    _barriers,
    _choice_row,
    _kept,
    _listed,
    _load_lists,
    _partial_row,
    _row_layout,
    _start_scores,
    _start_sums,
    _store_rows,
    _take,
    _through_tile,
    _tile,
    _wait,
    _work,
    _zeros,
)
from .launcher import Buffer, launch
from .routing import Tiles


def attention_bwd_dq(call: AttentionCall, routing: Routing, tiles: Tiles, dq_partial: Buffer, group: tuple[int, int],
                     options: dict[str, int]) -> None:
    """Fills the partial dq of one group of kv heads."""
    grid, lists = call.over_lists(routing, tiles, group)
    grid = (min(*grid, sm90.processors(call.q.device)),)
    launch(_attention_bwd_dq_sm90_kernel, grid, **call.arguments(
        _attention_bwd_dq_sm90_kernel, **lists, tile_taken=tiles.taken, dq_partial=dq_partial,
        **sm90.strides_of_eight(q=call.q, k=call.k, v=call.v, do=call.do),
        **sm90.key_tiles(call.k, call.v, call.segments.chunk_size, options)))


@gluon.jit
def _load_terms(terms, choice, kv_head, H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr):
    """lse, in powers of two, and delta of indices' rows."""
    row, _, _ = _choice_row(choice, kv_head, H, G, KS)
    at = terms + row.to(gl.int64) * 4
    return gl.load(at), gl.load(at + 1)


@gluon.jit
def _start_tile(rows, smem, bars, step, USE_TMA: gl.constexpr):
    """Starts the scores of 64 rows, by number, and do's products with values, against the tile of keys of a step."""
    q_smem, do_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, kv_empty = bars
    STAGES: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S)
    here = rows + (step >> 30)  # is rows: descriptors are made here, and not kept in registers
    stage = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    if not USE_TMA:
        fence_async_shared()
    s = _start_scores(_tile(q_smem, here), _tile(k_smem, stage), zero)
    mbarrier.wait(v_full.index(stage), phase)
    if not USE_TMA:
        fence_async_shared()
    return s, _start_scores(_tile(do_smem, here), _tile(v_smem, stage), zero)


@gluon.jit
def _add_tile(dq, s, dp, lse, delta, smem, bars, step, key, chunk_size, qk_scale, RAGGED: gl.constexpr):
    """Adds one tile of keys, whose first two products are started, to dq, and frees the tile's buffers."""
    q_smem, do_smem, k_smem, v_smem = smem
    kv_empty = bars[4]
    STAGES: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    s = warpgroup_mma_wait(len(v_smem), deps=(s,))
    p = gl.exp2(s * qk_scale - lse[:, None])
    if RAGGED:
        p = gl.where(_kept(key, chunk_size, BLOCK_N, gl.SliceLayout(0, s.type.layout))[None, :], p, 0.0)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = (p * (dp - delta[:, None])).to(k_smem[0].dtype)
    dq = _wait(0, _start_sums(ds, _tile(k_smem, step % STAGES), dq))
    mbarrier.arrive(kv_empty.index(step % STAGES), count=1)
    return dq


@gluon.jit
def _rows(row_full, tile, part: gl.constexpr, BUFFERS: gl.constexpr):
    """The number of this group's 64 rows of a tile, as soon as they are there."""
    buffer = tile % BUFFERS
    mbarrier.wait(row_full.index(buffer), (tile // BUFFERS) & 1)
    fence_async_shared()
    return buffer * 2 + part


@gluon.jit
def _write_rows(s, dp, lse, delta, indices, outs, smem, bars, ints, scales, part: gl.constexpr, step, tile,
                first, H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr,
                BUFFERS: gl.constexpr, USE_TMA: gl.constexpr, RAGGED: gl.constexpr, GOES_ON: gl.constexpr):
    """Writes partial dq of 64 rows, whose first products are ``s`` and ``dp``; returns those of the next 64."""
    q_smem, do_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, kv_empty = bars
    dq_partial, first_head, group_heads = outs
    count, kv_head, chunk_size = ints
    qk_scale, softmax_scale = scales
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    OUT: gl.constexpr = _row_layout(D)
    buffer = tile % BUFFERS
    rows = buffer * 2 + part
    dq = [_zeros(64, it) for it in q_smem]
    dq = _add_tile(dq, s, dp, lse, delta, smem, bars, step, 0, chunk_size, qk_scale, RAGGED)
    step += 1
    for key in range(BLOCK_N, chunk_size, BLOCK_N):
        started = _start_tile(rows, smem, bars, step, USE_TMA)
        dq = _add_tile(dq, started[0], started[1], lse, delta, smem, bars, step, key, chunk_size, qk_scale, RAGGED)
        step += 1
    if GOES_ON:
        next_s, next_dp = _start_tile(_rows(row_full, tile + 1, part, BUFFERS), smem, bars, step, USE_TMA)
    index = first + part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    this = _listed(indices, gl.minimum(index, count - 1), None, KS, SHARED)
    partial_row = _partial_row(this, kv_head, first_head, group_heads, H, G, KS)
    x = _through_tile(_tile(q_smem, rows), [x * softmax_scale for x in dq], OUT)
    mbarrier.arrive(row_empty.index(buffer), count=1)
    _store_rows(dq_partial, partial_row, x, index < count, D, OUT)
    if GOES_ON:
        s, dp = warpgroup_mma_wait(0, deps=(next_s, next_dp))
    return s, dp, step


@gluon.jit
def _consumer(part: gl.constexpr, terms, listed, outs, smem, bars, work, chunk_size, scales, H: gl.constexpr,
              G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr, BUFFERS: gl.constexpr,
              USE_TMA: gl.constexpr, RAGGED: gl.constexpr):
    """64 rows of every 128, by one group of four warps."""
    row_full = bars[0]
    BLOCK_N: gl.constexpr = smem[2][0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    lane = part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    piece = 0
    step = 0
    tile = 0
    length, head, begin = _take(work, piece)
    while length > 0:
        count = length.to(gl.int32)
        kv_head = head.to(gl.int32)
        indices = listed + begin // SHARED
        ints = (count, kv_head, chunk_size)
        choice = _listed(indices, gl.minimum(lane, count - 1), None, KS, SHARED)
        next_lse, next_delta = _load_terms(terms, choice, kv_head, H, G, KS)
        choice = _listed(indices, gl.minimum(lane + 128, count - 1), None, KS, SHARED)
        s, dp = warpgroup_mma_wait(0, deps=_start_tile(_rows(row_full, tile, part, BUFFERS), smem, bars, step, USE_TMA))
        for first in range(0, count - 128, 128):
            lse = next_lse
            delta = next_delta
            next_lse, next_delta = _load_terms(terms, choice, kv_head, H, G, KS)
            choice = _listed(indices, gl.minimum(first + 256 + lane, count - 1), None, KS, SHARED)
            s, dp, step = _write_rows(s, dp, lse, delta, indices, outs, smem, bars, ints, scales, part, step, tile,
                                      first, H, G, KS, SHARED, D, BUFFERS, USE_TMA, RAGGED, True)
            tile += 1
        _, _, step = _write_rows(s, dp, next_lse, next_delta, indices, outs, smem, bars, ints, scales, part, step, tile,
                                 (count - 1) // 128 * 128, H, G, KS, SHARED, D, BUFFERS, USE_TMA, RAGGED, False)
        tile += 1
        piece += 1
        length, head, begin = _take(work, piece)


# Shared memory      written by                read by                                   full       empty (arrivals)
# q and do, halves   loader, cp.async          the half's group, all its products        row_full   row_empty (2)
# q, own half        its group: dq, in place   its group, in other lines (own barrier)              the same
# k                  loader, TMA or cp.async   both groups: scores, dq                   k_full     kv_empty (2)
# v                  loader, TMA or cp.async   both groups: dp                           v_full     kv_empty (2)
# work               loader                    both groups                               full       empty (2)
@gluon.jit(do_not_specialize=["chunk_size", "num_chunks", "num_sequences", "kv_head_begin", "kv_head_end"])
def _attention_bwd_dq_sm90_kernel(
    q, k, k_rest, v, v_rest, do, terms, indices, tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken,
    cu_seqlens_k, dq_partial, qk_scale, softmax_scale, chunk_size, num_chunks, num_sequences, kv_head_begin,
    kv_head_end, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    EVEN: gl.constexpr, USE_TMA: gl.constexpr, RAGGED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr, LOADER_REGS: gl.constexpr, CONSUMER_REGS: gl.constexpr, num_warps: gl.constexpr,
):
    """Pieces of the lists of some kv heads, one after the other."""
    dtype: gl.constexpr = q.dtype.element_ty
    KEY_ARRIVALS: gl.constexpr = 1 if USE_TMA else 32 * LOADER_WARPS
    q_smem = _allocate(dtype, BUFFERS * 2, 64, D)
    do_smem = _allocate(dtype, BUFFERS * 2, 64, DV)
    k_smem = _allocate(dtype, STAGES, BLOCK_N, D)
    v_smem = _allocate(dtype, STAGES, BLOCK_N, DV)
    row_full = _barriers(BUFFERS, 32 * LOADER_WARPS)
    row_empty = _barriers(BUFFERS, 2)
    k_full = _barriers(STAGES, KEY_ARRIVALS)
    v_full = _barriers(STAGES, KEY_ARRIVALS)
    kv_empty = _barriers(STAGES, 2)
    fence_async_shared()
    smem = (q_smem, do_smem, k_smem, v_smem)
    bars = (row_full, row_empty, k_full, v_full, kv_empty)
    work = _work(3, 2)
    first_number = gl.load(tile_indptr + kv_head_begin * num_chunks)
    end_number = gl.load(tile_indptr + kv_head_end * num_chunks)
    tiles = (tile_csr_row, tile_begin, tile_end, tile_taken, first_number, end_number)
    chunks = (cu_seqlens_k, num_sequences, num_chunks, chunk_size)
    outs = (dq_partial, kv_head_begin * G, (kv_head_end - kv_head_begin) * G)
    scales = (qk_scale, softmax_scale)
    strides = ((stride_qt, stride_qh, stride_dot, stride_doh), (stride_kt, stride_kh, stride_vt, stride_vh))
    gl.warp_specialize([
        (_consumer, (0, terms, indices, outs, smem, bars, work, chunk_size, scales, H, G, KS, SHARED, D, BUFFERS,
                     USE_TMA, RAGGED)),
        (_consumer, (1, terms, indices, outs, smem, bars, work, chunk_size, scales, H, G, KS, SHARED, D, BUFFERS,
                     USE_TMA, RAGGED)),
        (_load_lists, ((q, do), ((k, k_rest), (v, v_rest)), indices, ((q_smem, do_smem), k_smem, v_smem),
                       (row_full, row_empty, k_full, v_full, kv_empty, kv_empty), work, tiles, chunks, strides, H, G,
                       KS, SHARED, (D, DV), EVEN, BUFFERS, USE_TMA, True)),
    ], [4, LOADER_WARPS], [CONSUMER_REGS, LOADER_REGS])
