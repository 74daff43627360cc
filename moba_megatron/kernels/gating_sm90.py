"""The gate on Hopper (Gluon): two groups of warps, 64 queries each, against tiles of chunk means.

Both read the same tile, so that the means come from L2 half as often as in ``gating.py``, whose 64 rows wait for them;
and each goes on at its own pace, AHEAD tiles at most apart. The first group also starts the copies.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from ..segments import Segments
from . import gating, jit_helpers, sm90
from .jit_helpers_sm90 import (
    _allocate,
    _barriers,
    _copy_keys,
    _copy_rows,
    _row_layout,
    _start_scores,
    _tile,
    _wait,
)
from .launcher import Buffer, launch

_query_tile = gluon.jit(jit_helpers._query_tile.fn)
_deal = gluon.jit(gating._deal.fn)
_columns = gluon.jit(gating._columns.fn)
_below_best = gluon.jit(gating._below_best.fn)
_insert = gluon.jit(gating._insert.fn)
_take_best = gluon.jit(gating._take_best.fn)
_kinds = gluon.constexpr_function(gating._kinds.fn)


def gate(q: Buffer, means: Buffer, segments: Segments, selected: Buffer, options: dict[str, int]) -> None:
    """Fills ``selected``, of which one pass chooses all."""
    ptx = gating.insertion(options["BLOCK_N"] // options["LANES"], selected.shape[2], options["LANES"], False)
    num_tiles = q.shape[0] // sm90.ROWS + segments.num_segments
    parts = [sm90.described(means, options["BLOCK_N"], width) for width in sm90.widths(q.shape[2])]
    strides = sm90.strides_of_eight(q=q)
    launch(_gate_sm90_kernel, (num_tiles * q.shape[1],), q, parts[0], parts[1] if len(parts) > 1 else None, selected,
           segments.cu_seqlens_q, segments.cu_seqlens_k, segments.seq_ids, segments.offsets, segments.num_segments,
           num_tiles, segments.chunk_size, strides["stride_qt"], strides["stride_qh"], H=q.shape[1],
           HK=means.shape[1], D=q.shape[2], KS=selected.shape[2], PTX=ptx[0], CONSTRAINTS=ptx[1], **options)


@gluon.jit
def _start_copy(means, ring, bars, step, walk, D: gl.constexpr, ROWS: gl.constexpr):
    """Starts the copy of a step's tile, as soon as its place is free: ``warm`` tiles from the latest back, then all."""
    full, empty, _ = bars
    _, warm, end, first_chunk, kv_head = walk
    STAGES: gl.constexpr = ring[0].shape[0]
    BLOCK_N: gl.constexpr = ring[0].shape[1]
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    tile = end - 1 - step
    if step >= warm:
        tile += warm
    _copy_keys(means, _tile(ring, stage), full.index(stage), first_chunk + tile * BLOCK_N, 0, kv_head, 0, D // 8, D,
               True, ROWS)


@gluon.jit
def _scores(part: gl.constexpr, q, means, ring, bars, step, walk, zero, AHEAD: gl.constexpr, D: gl.constexpr,
            ROWS: gl.constexpr):
    """Scores of 64 rows against the tile of a step; the first group starts the copy of a later one before."""
    full, empty, _ = bars
    STAGES: gl.constexpr = ring[0].shape[0]
    if part == 0:
        if step + AHEAD < walk[0]:
            _start_copy(means, ring, bars, step + AHEAD, walk, D, ROWS)
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    s = _wait(0, (_start_scores(q, _tile(ring, stage), zero),))[0]
    mbarrier.arrive(empty.index(stage), count=1)
    return s


@gluon.jit
def _earlier(s, tile, earlier):
    """Scores of a tile, -inf from chunk ``earlier`` on."""
    chunk = tile * s.shape[1] + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    before = gl.convert_layout(earlier, gl.SliceLayout(1, s.type.layout))
    return gl.where(chunk[None, :] < before[:, None], s, -float("inf"))


@gluon.jit
def _consumer(part: gl.constexpr, q, means, selected, smem, bars, ints, strides, H: gl.constexpr, D: gl.constexpr,
              KS: gl.constexpr, WARM: gl.constexpr, LANES: gl.constexpr, AHEAD: gl.constexpr, REFRESH: gl.constexpr,
              PTX: gl.constexpr, CONSTRAINTS: gl.constexpr):
    """64 rows of every 128, by one group of four warps."""
    q_smem, ring = smem
    full, empty, q_full = bars
    row, row_end, position, first_chunk, chunk_size, head, kv_head = ints
    BLOCK_N: gl.constexpr = ring[0].shape[1]
    WIDTH: gl.constexpr = BLOCK_N // LANES
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    ROWS: gl.constexpr = _row_layout(D)
    limit = (position + gl.minimum(128, row_end - row) - 1) // chunk_size  # the most that a row has
    end = gl.cdiv(limit, BLOCK_N)
    whole = position // chunk_size // BLOCK_N  # up to here every row may choose every chunk
    warm = gl.minimum(end, WARM)
    if limit <= BLOCK_N // 4:  # as in gating.py
        warm = end * 0
    walk = (warm + end, warm, end, first_chunk, kv_head)
    if part == 0:
        for step in range(0, gl.minimum(AHEAD, warm + end)):
            _start_copy(means, ring, bars, step, walk, D, ROWS)
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS)) + part * 64
    q_rows = _tile(q_smem, part)
    _copy_rows(q_rows, q, (row + lane).to(gl.int64), head.to(gl.int64), strides[0], strides[1], ROWS,
               row + lane < row_end)
    async_copy.mbarrier_arrive(q_full.index(part), increment_count=False)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S)
    L: gl.constexpr = _columns(_deal(zero, LANES), WIDTH)[0].type.layout
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, L)) + part * 64
    valid = row + lane < row_end
    earlier = gl.where(valid, (position + lane) // chunk_size, 0)
    mbarrier.wait(q_full.index(part), 0)
    fence_async_shared()

    threshold = gl.full([64], -float("inf"), gl.float32, layout=gl.SliceLayout(1, L))
    if warm > 0:
        best = gl.full([64, BLOCK_N], -float("inf"), gl.float32, layout=S)
        for step in range(0, warm):
            s = _scores(part, q_rows, means, ring, bars, step, walk, zero, AHEAD, D, ROWS)
            if end - 1 - step >= whole:
                s = _earlier(s, end - 1 - step, earlier)
            best = gl.maximum(best, s)
        threshold = gl.convert_layout(_below_best(best, KS), gl.SliceLayout(1, L))
    state = (gl.full([64, LANES], -float("inf"), gl.float32, layout=L),) * (KS + 1) + (
        gl.full([64, LANES], -1, gl.int32, layout=L),) * (KS + 1)
    lanes = 2 * gl.arange(0, LANES, layout=gl.SliceLayout(0, L))[None, :]
    for whole_tiles in gl.static_range(2):
        for step in range(end - whole if whole_tiles else 0, end if whole_tiles else end - whole):
            tile = end - 1 - step
            s = _scores(part, q_rows, means, ring, bars, warm + step, walk, zero, AHEAD, D, ROWS)
            if not whole_tiles:
                s = _earlier(s, tile, earlier)
            x = _columns(_deal(s, LANES), WIDTH)
            chunk = first_chunk + tile * BLOCK_N + lanes
            if PTX != "":
                operands = state + x + (threshold[:, None], chunk, threshold[:, None], chunk)
                state = gl.inline_asm_elementwise(PTX, CONSTRAINTS, operands, _kinds(KS + 1), is_pure=False, pack=1)
            else:
                for i in gl.static_range(WIDTH - 1, -1, -1):
                    hit = gl.where(x[i] > threshold[:, None], x[i], -float("inf"))
                    state = _insert(state, hit, chunk + (i // 2 * 2 * LANES + i % 2), KS)
            if tile % REFRESH == 0 or not whole_tiles:
                threshold = gl.maximum(threshold, gl.max(state[KS - 1], 1))
                threshold = gl.maximum(threshold, gl.min(state[(KS - 1) // LANES], 1))
    state = _insert(state, state[KS], state[2 * KS + 1], KS)
    to = selected + ((row + lane).to(gl.int64) * H + head) * KS
    for j in range(KS):
        chosen, state = _take_best(state, KS)
        gl.store(to + j, chosen, mask=valid)


# Shared memory   written by                read by               full            empty (arrivals)
# q, own half     its group, cp.async       its group             q_full, once    -
# means           the first group, TMA      both groups           full            empty (2)
@gluon.jit(do_not_specialize=["num_segments", "num_tiles"])
def _gate_sm90_kernel(
    q, means, means_rest, selected, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments, num_tiles, chunk_size,
    stride_qt, stride_qh, H: gl.constexpr, HK: gl.constexpr, D: gl.constexpr, KS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, AHEAD: gl.constexpr, WARM: gl.constexpr, LANES: gl.constexpr, REFRESH: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PTX: gl.constexpr, CONSTRAINTS: gl.constexpr, num_warps: gl.constexpr,
):
    """128 queries of one segment and head against the earlier chunks of their sequence."""
    tile = num_tiles - 1 - gl.program_id(0) // H  # later queries have more chunks: they start first
    head = gl.program_id(0) % H
    row, row_end, position, _, first_chunk = _query_tile(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments,
                                                         chunk_size, tile, 128)
    if row >= row_end:
        return
    dtype: gl.constexpr = q.dtype.element_ty
    smem = (_allocate(dtype, 2, 64, D), _allocate(dtype, STAGES, BLOCK_N, D))
    bars = (_barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(2, 128))
    fence_async_shared()
    ints = (row, row_end, position, first_chunk, chunk_size, head, head // (H // HK))
    strides = (stride_qt, stride_qh)
    gl.warp_specialize([
        (_consumer, (0, q, (means, means_rest), selected, smem, bars, ints, strides, H, D, KS, WARM, LANES, AHEAD,
                     REFRESH, PTX, CONSTRAINTS)),
        (_consumer, (1, q, (means, means_rest), selected, smem, bars, ints, strides, H, D, KS, WARM, LANES, AHEAD,
                     REFRESH, PTX, CONSTRAINTS)),
    ], [4], [CONSUMER_REGS])
