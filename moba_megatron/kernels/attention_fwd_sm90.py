"""Sparse attention forward on Hopper (Gluon): gathered rows against a selected chunk.

A program takes pieces of (chunk, kv head)s' lists, one after the other, 128 rows at a time: 64 for each of two groups
of warps. The loader gathers the next rows, also those of the next piece, and streams the chunk's keys and values past.
While one group is in its softmax, the other's products run; within a group the next scores are computed beside the last
tile's product with the values.
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


def attention_fwd_sparse(call: AttentionCall, routing: Routing, tiles: Tiles, o_partial: Buffer, lse_partial: Buffer,
                         group: tuple[int, int], options: dict[str, int]) -> None:
    """Fills the partial o and lse of one group of kv heads."""
    grid, lists = call.over_lists(routing, tiles, group)
    grid = (min(*grid, sm90.processors(call.q.device)),)
    keys = sm90.key_tiles(call.k, call.v, call.segments.chunk_size, options)
    launch(_attention_fwd_sm90_kernel, grid, **call.arguments(
        _attention_fwd_sm90_kernel, **lists, tile_taken=tiles.taken, o_partial=o_partial, lse_partial=lse_partial,
        **keys, ONE_TILE=call.segments.chunk_size <= keys["BLOCK_N"],
        **sm90.strides_of_eight(q=call.q, k=call.k, v=call.v)))


@gluon.jit
def _arrived(smem, full, step, USE_TMA: gl.constexpr):
    """The tile of keys or values of a step, as soon as it is there."""
    STAGES: gl.constexpr = smem[0].shape[0]
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    if not USE_TMA:
        fence_async_shared()
    return _tile(smem, stage)


@gluon.jit
def _keep_chunk(s, key, chunk_size, RAGGED: gl.constexpr):
    """Scores of keys from ``key`` on, -inf where they are not to be counted."""
    if RAGGED:
        kept = _kept(key, chunk_size, s.shape[1], gl.SliceLayout(0, s.type.layout))
        s = gl.where(kept[None, :], s, -float("inf"))
    return s


@gluon.jit
def _attend(s, indices, outs, smem, bars, ints, qk_scale, part: gl.constexpr, step, tile, first, H: gl.constexpr,
            G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, DV: gl.constexpr, BUFFERS: gl.constexpr,
            USE_TMA: gl.constexpr, RAGGED: gl.constexpr, ONE_TILE: gl.constexpr, GOES_ON: gl.constexpr):
    """Writes the results of 64 rows from ``first`` on, whose scores against their first keys are ``s``.

    A chunk that is one tile stays in its stage, a piece is one step: that ends where it does not go on. Where it does,
    the next 64 rows begin beside the end; returns their scores.
    """
    q_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, k_empty, v_empty = bars
    o_partial, lse_partial, first_head, group_heads = outs
    count, kv_head, chunk_size = ints
    STAGES: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    dtype: gl.constexpr = q_smem[0].dtype
    S: gl.constexpr = s.type.layout
    OUT: gl.constexpr = _row_layout(DV)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S)
    buffer = tile % BUFFERS
    q = _tile(q_smem, buffer * 2 + part)
    o_index = first + part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    o_choice = _listed(indices, gl.minimum(o_index, count - 1), None, KS, SHARED)
    lse_index = first + part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    lse_choice = _listed(indices, gl.minimum(lse_index, count - 1), None, KS, SHARED)
    acc = [_zeros(64, it) for it in v_smem]
    s = _keep_chunk(s, 0, chunk_size, RAGGED)
    m = gl.max(s, 1) * qk_scale
    p = gl.exp2(s * qk_scale - m[:, None])
    l = gl.sum(p, 1)
    weights = p.to(dtype)
    for key in range(BLOCK_N, chunk_size, BLOCK_N):
        s = _start_scores(q, _arrived(k_smem, k_full, step + 1, USE_TMA), zero)
        acc = _start_sums(weights, _arrived(v_smem, v_full, step, USE_TMA), acc)
        s = warpgroup_mma_wait(len(v_smem), deps=(s,))
        mbarrier.arrive(k_empty.index((step + 1) % STAGES), count=1)
        s = _keep_chunk(s, key, chunk_size, RAGGED)
        m_new = gl.maximum(m, gl.max(s, 1) * qk_scale)
        p = gl.exp2(s * qk_scale - m_new[:, None])
        alpha = gl.exp2(m - m_new)
        l = l * alpha + gl.sum(p, 1)
        m = m_new
        waited = _wait(0, acc + (p,))  # p: the weights are computed before the wait
        acc = waited[:len(v_smem)]
        p = waited[len(v_smem)]
        mbarrier.arrive(v_empty.index(step % STAGES), count=1)
        weights = p.to(dtype)
        acc = [x * gl.convert_layout(alpha, gl.SliceLayout(1, x.type.layout))[:, None] for x in acc]
        step += 1
    acc = _start_sums(weights, _arrived(v_smem, v_full, step, USE_TMA), acc)
    if GOES_ON:
        s = _begin(part, smem, bars, step, tile + 1, BUFFERS, USE_TMA)
        acc = _wait(len(q), acc)
    else:
        acc = _wait(0, acc)
        if ONE_TILE:
            mbarrier.arrive(k_empty.index(step % STAGES), count=1)
        mbarrier.arrive(v_empty.index(step % STAGES), count=1)
    acc = [x * gl.convert_layout(1.0 / l, gl.SliceLayout(1, x.type.layout))[:, None] for x in acc]
    o_row = _partial_row(o_choice, kv_head, first_head, group_heads, H, G, KS)
    lse_row = _partial_row(lse_choice, kv_head, first_head, group_heads, H, G, KS)
    o = _through_tile(q, acc, OUT)
    mbarrier.arrive(row_empty.index(buffer), count=1)
    _store_rows(o_partial, o_row, o, o_index < count, DV, OUT)
    gl.store(lse_partial + lse_row, m + gl.log2(l), mask=lse_index < count)
    if GOES_ON:
        s = warpgroup_mma_wait(0, deps=(s,))
    return s, step + 1


@gluon.jit
def _begin(part: gl.constexpr, smem, bars, step, tile, BUFFERS: gl.constexpr, USE_TMA: gl.constexpr):
    """Starts the scores of 64 rows of a tile against their first keys."""
    q_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, k_empty, v_empty = bars
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    buffer = tile % BUFFERS
    mbarrier.wait(row_full.index(buffer), (tile // BUFFERS) & 1)
    fence_async_shared()
    return _start_scores(_tile(q_smem, buffer * 2 + part), _arrived(k_smem, k_full, step, USE_TMA),
                         gl.zeros([64, BLOCK_N], gl.float32, layout=S))


@gluon.jit
def _consumer(part: gl.constexpr, listed, outs, smem, bars, work, chunk_size, qk_scale, H: gl.constexpr,
              G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, DV: gl.constexpr, BUFFERS: gl.constexpr,
              USE_TMA: gl.constexpr, RAGGED: gl.constexpr, ONE_TILE: gl.constexpr):
    """64 rows of every 128, by one group of four warps."""
    k_empty = bars[4]
    STAGES: gl.constexpr = smem[1][0].shape[0]
    piece = 0
    step = 0
    tile = 0
    length, head, begin = _take(work, piece)
    while length > 0:
        count = length.to(gl.int32)
        kv_head = head.to(gl.int32)
        indices = listed + begin // SHARED
        ints = (count, kv_head, chunk_size)
        if ONE_TILE:
            s = warpgroup_mma_wait(0, deps=(_begin(part, smem, bars, step, tile, BUFFERS, USE_TMA),))
            for first in range(0, count - 128, 128):
                s, _ = _attend(s, indices, outs, smem, bars, ints, qk_scale, part, step, tile, first, H, G, KS, SHARED,
                               DV, BUFFERS, USE_TMA, RAGGED, True, True)
                tile += 1
            _, step = _attend(s, indices, outs, smem, bars, ints, qk_scale, part, step, tile, (count - 1) // 128 * 128,
                              H, G, KS, SHARED, DV, BUFFERS, USE_TMA, RAGGED, True, False)
            tile += 1
        else:
            for first in range(0, count, 128):
                s = warpgroup_mma_wait(0, deps=(_begin(part, smem, bars, step, tile, BUFFERS, USE_TMA),))
                mbarrier.arrive(k_empty.index(step % STAGES), count=1)
                _, step = _attend(s, indices, outs, smem, bars, ints, qk_scale, part, step, tile, first, H, G, KS,
                                  SHARED, DV, BUFFERS, USE_TMA, RAGGED, False, False)
                tile += 1
        piece += 1
        length, head, begin = _take(work, piece)


# Shared memory   written by               read by                                   full       empty (arrivals)
# q, own half     loader, cp.async         the half's group, all its products        row_full   row_empty (2)
#                 its group: o, in place   its group, in other lines (own barrier)              the same
# k               loader, TMA or cp.async  both groups: scores                       k_full     k_empty (2)
# v               loader, TMA or cp.async  both groups: values                       v_full     v_empty (2)
# work            loader                   both groups                               full       empty (2)
@gluon.jit(do_not_specialize=["chunk_size", "num_chunks", "num_sequences", "kv_head_begin", "kv_head_end"])
def _attention_fwd_sm90_kernel(
    q, k, k_rest, v, v_rest, indices, tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken, cu_seqlens_k,
    o_partial, lse_partial, qk_scale, chunk_size, num_chunks, num_sequences, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    EVEN: gl.constexpr, USE_TMA: gl.constexpr, RAGGED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr, ONE_TILE: gl.constexpr, LOADER_REGS: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Pieces of the lists of some kv heads, one after the other."""
    dtype: gl.constexpr = q.dtype.element_ty
    KEY_ARRIVALS: gl.constexpr = 1 if USE_TMA else 32 * LOADER_WARPS
    q_smem = _allocate(dtype, BUFFERS * 2, 64, D)
    k_smem = _allocate(dtype, STAGES, BLOCK_N, D)
    v_smem = _allocate(dtype, STAGES, BLOCK_N, DV)
    row_full = _barriers(BUFFERS, 32 * LOADER_WARPS)
    row_empty = _barriers(BUFFERS, 2)
    k_full = _barriers(STAGES, KEY_ARRIVALS)
    v_full = _barriers(STAGES, KEY_ARRIVALS)
    k_empty = _barriers(STAGES, 2)
    v_empty = _barriers(STAGES, 2)
    fence_async_shared()
    smem = (q_smem, k_smem, v_smem)
    bars = (row_full, row_empty, k_full, v_full, k_empty, v_empty)
    work = _work(3, 2)
    first_number = gl.load(tile_indptr + kv_head_begin * num_chunks)
    end_number = gl.load(tile_indptr + kv_head_end * num_chunks)
    tiles = (tile_csr_row, tile_begin, tile_end, tile_taken, first_number, end_number)
    chunks = (cu_seqlens_k, num_sequences, num_chunks, chunk_size)
    outs = (o_partial, lse_partial, kv_head_begin * G, (kv_head_end - kv_head_begin) * G)
    strides = ((stride_qt, stride_qh), (stride_kt, stride_kh, stride_vt, stride_vh))
    gl.warp_specialize([
        (_consumer, (0, indices, outs, smem, bars, work, chunk_size, qk_scale, H, G, KS, SHARED, DV, BUFFERS, USE_TMA,
                     RAGGED, ONE_TILE)),
        (_consumer, (1, indices, outs, smem, bars, work, chunk_size, qk_scale, H, G, KS, SHARED, DV, BUFFERS, USE_TMA,
                     RAGGED, ONE_TILE)),
        (_load_lists, ((q,), ((k, k_rest), (v, v_rest)), indices, ((q_smem,), k_smem, v_smem), bars, work, tiles,
                       chunks, strides, H, G, KS, SHARED, (D, DV), EVEN, BUFFERS, USE_TMA, False)),
    ], [4, LOADER_WARPS], [CONSUMER_REGS, LOADER_REGS])
