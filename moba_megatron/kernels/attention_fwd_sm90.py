"""Sparse attention forward on Hopper (Gluon): gathered rows against a selected chunk.

A program takes a piece of one (chunk, kv head)'s list, 128 rows at a time: 64 for each of two groups of warps. The
loader gathers the next rows and streams the chunk's keys and values past. While one group is in its softmax, the
other's products run; within a group the next scores are computed beside the last tile's product with the values.
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
    _chunk_keys,
    _kept,
    _listed,
    _load_list,
    _partial_row,
    _row_layout,
    _start_scores,
    _start_sums,
    _store_rows,
    _through_tile,
    _tile,
    _wait,
    _zeros,
)
from .launcher import Buffer, launch
from .routing import Tiles


def attention_fwd_sparse(call: AttentionCall, routing: Routing, tiles: Tiles, o_partial: Buffer, lse_partial: Buffer,
                         group: tuple[int, int], options: dict[str, int]) -> None:
    """Fills the partial o and lse of one group of kv heads."""
    grid, lists = call.over_lists(routing, tiles, group)
    keys = sm90.key_tiles(call.k, call.v, call.segments.chunk_size, options)
    launch(_attention_fwd_sm90_kernel, grid, **call.arguments(
        _attention_fwd_sm90_kernel, **lists, o_partial=o_partial, lse_partial=lse_partial, **keys,
        ONE_TILE=call.segments.chunk_size <= keys["BLOCK_N"], **sm90.strides_of_eight(q=call.q, k=call.k, v=call.v)))


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
def _attend(s, indices, outs, smem, bars, ints, qk_scale, part: gl.constexpr, step, tile, H: gl.constexpr,
            G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, DV: gl.constexpr, BUFFERS: gl.constexpr,
            USE_TMA: gl.constexpr, RAGGED: gl.constexpr, ONE_TILE: gl.constexpr, GOES_ON: gl.constexpr):
    """Writes the results of 64 rows, whose scores against their first keys are ``s``; returns those of the next 64.

    A chunk that is one tile stays in the first stage, all its steps are step 0, and the next 64 begin beside the end.
    """
    q_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, k_empty, v_empty = bars
    o_partial, lse_partial, first_head, group_heads = outs
    count, kv_head, first_key, chunk_size = ints
    STAGES: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    dtype: gl.constexpr = q_smem[0].dtype
    S: gl.constexpr = s.type.layout
    OUT: gl.constexpr = _row_layout(DV)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S)
    buffer = tile % BUFFERS
    q = _tile(q_smem, buffer * 2 + part)
    o_index = tile * 128 + part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    o_choice = _listed(indices, gl.minimum(o_index, count - 1), None, KS, SHARED)
    lse_index = tile * 128 + part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
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
    next_step = step if ONE_TILE else step + 1
    if GOES_ON and ONE_TILE:
        s = _begin(part, smem, bars, next_step, tile + 1, BUFFERS, USE_TMA)
        acc = _wait(len(q), acc)
    else:
        acc = _wait(0, acc)
    mbarrier.arrive(v_empty.index(step % STAGES), count=1)
    acc = [x * gl.convert_layout(1.0 / l, gl.SliceLayout(1, x.type.layout))[:, None] for x in acc]
    o_row = _partial_row(o_choice, kv_head, first_head, group_heads, H, G, KS)
    lse_row = _partial_row(lse_choice, kv_head, first_head, group_heads, H, G, KS)
    o = _through_tile(q, acc, OUT)
    mbarrier.arrive(row_empty.index(buffer), count=1)
    _store_rows(o_partial, o_row, o, o_index < count, DV, OUT)
    gl.store(lse_partial + lse_row, m + gl.log2(l), mask=lse_index < count)
    if GOES_ON:
        if not ONE_TILE:
            s = _begin(part, smem, bars, next_step, tile + 1, BUFFERS, USE_TMA)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(next_step % STAGES), count=1)
    return s, next_step


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
def _consumer(part: gl.constexpr, indices, outs, smem, bars, ints, qk_scale, H: gl.constexpr, G: gl.constexpr,
              KS: gl.constexpr, SHARED: gl.constexpr, DV: gl.constexpr, BUFFERS: gl.constexpr, USE_TMA: gl.constexpr,
              RAGGED: gl.constexpr, ONE_TILE: gl.constexpr):
    """64 rows of every 128, by one group of four warps."""
    k_empty = bars[4]
    step = 0
    tile = 0
    s = warpgroup_mma_wait(0, deps=(_begin(part, smem, bars, step, tile, BUFFERS, USE_TMA),))
    mbarrier.arrive(k_empty.index(0), count=1)
    for _ in range(128, ints[0], 128):
        s, step = _attend(s, indices, outs, smem, bars, ints, qk_scale, part, step, tile, H, G, KS, SHARED, DV, BUFFERS,
                          USE_TMA, RAGGED, ONE_TILE, True)
        tile += 1
    _attend(s, indices, outs, smem, bars, ints, qk_scale, part, step, tile, H, G, KS, SHARED, DV, BUFFERS, USE_TMA,
            RAGGED, ONE_TILE, False)


# Shared memory   written by               read by                                   full       empty (arrivals)
# q, own half     loader, cp.async         the half's group, all its products        row_full   row_empty (2)
#                 its group: o, in place   its group, in other lines (own barrier)              the same
# k               loader, TMA or cp.async  both groups: scores                       k_full     k_empty (2)
# v               loader, TMA or cp.async  both groups: values                       v_full     v_empty (2)
@gluon.jit(do_not_specialize=["chunk_size", "num_chunks", "num_sequences", "kv_head_begin", "kv_head_end"])
def _attention_fwd_sm90_kernel(
    q, k, k_rest, v, v_rest, indices, tile_csr_row, tile_begin, tile_end, tile_indptr, cu_seqlens_k, o_partial,
    lse_partial, qk_scale, chunk_size, num_chunks, num_sequences, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    EVEN: gl.constexpr, USE_TMA: gl.constexpr, RAGGED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr, ONE_TILE: gl.constexpr, LOADER_REGS: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    num_warps: gl.constexpr,
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
    indices += begin // SHARED  # pieces begin with whole groups of heads
    smem = (q_smem, k_smem, v_smem)
    bars = (row_full, row_empty, k_full, v_full, k_empty, v_empty)
    ints = ((end - begin).to(gl.int32), kv_head, first_key, chunk_size)
    outs = (o_partial, lse_partial, kv_head_begin * G, (kv_head_end - kv_head_begin) * G)
    strides = ((stride_qt, stride_qh), (stride_kt, stride_kh, stride_vt, stride_vh))
    gl.warp_specialize([
        (_consumer, (0, indices, outs, smem, bars, ints, qk_scale, H, G, KS, SHARED, DV, BUFFERS, USE_TMA, RAGGED,
                     ONE_TILE)),
        (_consumer, (1, indices, outs, smem, bars, ints, qk_scale, H, G, KS, SHARED, DV, BUFFERS, USE_TMA, RAGGED,
                     ONE_TILE)),
        (_load_list, ((q,), ((k, k_rest), (v, v_rest)), indices, ((q_smem,), k_smem, v_smem), bars, ints, strides, H, G,
                      KS, SHARED, (D, DV), EVEN, BUFFERS, USE_TMA, False)),
    ], [4, LOADER_WARPS], [CONSUMER_REGS, LOADER_REGS])
