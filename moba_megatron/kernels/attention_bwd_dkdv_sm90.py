"""Attention backward, dk and dv, on Hopper (Gluon): a tile of keys stays, the rows that attend to it stream past.

A program owns 128 keys of one (chunk, kv head), 64 for each of two groups of warps. The loader gathers the rows of the
chunk's list, then those whose diagonal chunk it is; long lists are cut as in ``attention_bwd_dkdv.py``. While one group
computes weights, the other's products run. Where the keys are the whole chunk, the groups hand each other their halves
of ds through shared memory and write the partial dq of every other block of rows, a block late: no one waits for it.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import sm90
from .attention_call import AttentionCall
from .jit_helpers_sm90 import (
    LOADER_WARPS,
    _allocate,
    _barriers,
    _choice_row,
    _copy_listed,
    _copy_rows,
    _extra_piece,
    _find_piece,
    _listed,
    _lower_bound,
    _partial_row,
    _piece_items,
    _piece_of_list,
    _row_layout,
    _start_scores,
    _start_sums,
    _store_rows,
    _through_tile,
    _tile,
    _wait,
    _zeros,
    async_load,
)
from .launcher import Buffer, launch


def attention_bwd_dkdv(call: AttentionCall, grid: tuple[int], dkdv_partial: Buffer | None, dq_partial: Buffer | None,
                       arguments: dict[str, object]) -> None:
    """Writes dk and dv of one group of kv heads, or partial sums of cut lists, and ``dq_partial`` where there is one.

    Args:
        grid, arguments: as of the Triton kernel.
    """
    if arguments["indptr"] is None:  # not read where there are no choices
        arguments = {**arguments, "indices": call.selected, "indptr": call.selected}
    launch(_attention_bwd_dkdv_sm90_kernel, grid, **call.arguments(
        _attention_bwd_dkdv_sm90_kernel, **arguments, dkdv_partial=call.terms if dkdv_partial is None else dkdv_partial,
        dq_partial=call.q if dq_partial is None else dq_partial,
        **sm90.strides_of_eight(q=call.q, k=call.k, v=call.v, do=call.do)))


@gluon.jit
def _diagonal_rows(spans, segment, first_position, chunk_end_position, BLOCK_M: gl.constexpr):
    """A segment's rows in this chunk, at or after these keys: row minus position, positions, blocks of rows."""
    segment_begin, segment_end, offsets, first_segment, end_segment = spans
    row_begin = gl.load(segment_begin + segment)
    origin = gl.load(offsets + segment)
    low = gl.maximum(origin, first_position)
    high = gl.minimum(origin + gl.load(segment_end + segment) - row_begin, chunk_end_position)
    return row_begin - origin, low, high, gl.maximum((high - low + BLOCK_M - 1) // BLOCK_M, 0)


@gluon.jit
def _copy_terms(smem, full, stage, terms, row):
    """Starts copies of lse and delta of rows, and lets ``full`` hear of the end of all copies so far."""
    q_smem, do_smem, lse_smem, delta_smem = smem
    at = terms + row.to(gl.int64) * 4
    async_load(lse_smem.index(stage), at)
    async_load(delta_smem.index(stage), at + 1)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _loader(pointers, spans, smem, kv_smem, bars, ints, strides, H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr,
            SHARED: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, EVEN: gl.constexpr, STAGES: gl.constexpr):
    q, k, v, do, terms, indices = pointers
    segment_begin, segment_end, offsets, first_segment, end_segment = spans
    q_smem, do_smem, lse_smem, delta_smem = smem
    k_smem, v_smem = kv_smem
    full, empty, kv_full = bars
    count, kv_head, first_row, chunk_end, first_position, chunk_end_position, num_rows = ints
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh = strides
    BLOCK_M: gl.constexpr = q_smem[0].shape[1]
    ROWS: gl.constexpr = _row_layout(D)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [LOADER_WARPS], [0])
    half = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    wide_head = kv_head.to(gl.int64)
    PARTS: gl.constexpr = k_smem[0].shape[0]
    for part in gl.static_range(PARTS):
        key = first_row + part * 64 + half
        exists = key < chunk_end
        _copy_rows(_tile(k_smem, part), k, key.to(gl.int64), wide_head, stride_kt, stride_kh, ROWS, exists)
        _copy_rows(_tile(v_smem, part), v, key.to(gl.int64), wide_head, stride_vt, stride_vh, ROWS, exists)
    async_copy.mbarrier_arrive(kv_full, increment_count=False)

    lane = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ROWS))
    line = gl.arange(0, BLOCK_M, layout=LINE)
    step = 0
    if KS > 0:
        choice = _listed(indices, gl.minimum(lane, count - 1), count > 0, KS, SHARED)  # the last choice fills up
        line_choice = _listed(indices, gl.minimum(line, count - 1), count > 0, KS, SHARED)
        for first in range(0, count, BLOCK_M):
            row, _, _ = _choice_row(line_choice, kv_head, H, G, KS)
            row = gl.where(first + line < count, row, num_rows)
            this_choice = choice
            choice = _listed(indices, gl.minimum(first + BLOCK_M + lane, count - 1), None, KS, SHARED)
            line_choice = _listed(indices, gl.minimum(first + BLOCK_M + line, count - 1), None, KS, SHARED)
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            _copy_listed(_tile(q_smem, stage), q, this_choice, kv_head, stride_qt, stride_qh, H, G, KS, D, EVEN, ROWS)
            _copy_listed(_tile(do_smem, stage), do, this_choice, kv_head, stride_dot, stride_doh, H, G, KS, DV, EVEN,
                         ROWS)
            _copy_terms(smem, full, stage, terms, row)
            step += 1
    for segment in range(first_segment, end_segment):
        shift, low, high, blocks = _diagonal_rows(spans, segment, first_position, chunk_end_position, BLOCK_M)
        for i in range(0, blocks * G):
            head = (kv_head * G + i // blocks).to(gl.int64)
            position = low + i % blocks * BLOCK_M + lane
            line_position = low + i % blocks * BLOCK_M + line
            token = (shift + position).to(gl.int64)
            row = gl.where(line_position < high, ((shift + line_position).to(gl.int64) * H + head).to(gl.int32),
                           num_rows)
            keep = position < high
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            _copy_rows(_tile(q_smem, stage), q, token, head, stride_qt, stride_qh, ROWS, keep)
            _copy_rows(_tile(do_smem, stage), do, token, head, stride_dot, stride_doh, ROWS, keep)
            _copy_terms(smem, full, stage, terms, row)
            step += 1


@gluon.jit
def _hand_over(ds, ds_to, step):
    """Stores ds for partial dq, beside the products, as soon as what was there has been read."""
    mbarrier.wait(ds_to[2], ((step >> 1) & 1) ^ 1)
    ds_to[0].store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_to[1], count=1)


@gluon.jit
def _weights(s, lse, qk_scale, key_position, query_position, key_end, CAUSAL: gl.constexpr):
    """Of scores ``[keys, rows]``; 0 for later keys if CAUSAL, and from ``key_end`` on, if given."""
    p = gl.exp2(s * qk_scale - lse[None, :])
    if CAUSAL:
        p = gl.where(key_position[:, None] <= query_position[None, :], p, 0.0)
    if key_end is not None:
        p = gl.where((key_position < key_end)[:, None], p, 0.0)
    return p


@gluon.jit
def _add_rows(part: gl.constexpr, kv_smem, smem, full, empty, step, dk, dv, qk_scale, key_position, query_position,
              key_end, ds_to, CAUSAL: gl.constexpr, STAGES: gl.constexpr):
    """Adds one block of rows to dk and dv of 64 keys, and frees its buffers; ``ds_to``, if given: a place for ds, and
    its barriers.

    Keys from ``key_end`` on, if given, get no weight: zeros add nothing, unless their weight overflows.
    """
    q_smem, do_smem, lse_smem, delta_smem = smem
    k_smem, v_smem = kv_smem
    BLOCK_M: gl.constexpr = q_smem[0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    fence_async_shared()
    q = _tile(q_smem, stage)
    do = _tile(do_smem, stage)
    zero = gl.zeros([64, BLOCK_M], gl.float32, layout=S)
    here = part + (step >> 30)  # is part: descriptors that no loop could keep are not spilled either
    s = _start_scores(_tile(k_smem, here), q, zero)
    dp = _start_scores(_tile(v_smem, here), do, zero)
    lse = lse_smem.index(stage).load(gl.SliceLayout(0, S))
    s = warpgroup_mma_wait(len(do), deps=(s,))
    p = _weights(s, lse, qk_scale, key_position, query_position, key_end, CAUSAL)
    dv = _start_sums(p.to(do[0].dtype), do, dv)
    dp = warpgroup_mma_wait(len(do), deps=(dp,))
    delta = delta_smem.index(stage).load(gl.SliceLayout(0, S))
    ds = (p * (dp - delta[None, :])).to(q[0].dtype)
    dk = _start_sums(ds, q, dk)
    if ds_to is not None:
        _hand_over(ds, ds_to, step)
    both = warpgroup_mma_wait(0, deps=dk + dv)
    mbarrier.arrive(empty.index(stage), count=1)
    return both[:len(q)], both[len(q):]


@gluon.jit
def _write_columns(ds_smem, k_smem, out_smem, part: gl.constexpr, turn, step, to, keep, softmax_scale):
    """Those columns of a block's dq that k's tiles have, 64 at a time: registers hold no more beside dk and dv."""
    COLUMNS: gl.constexpr = k_smem.shape[2]
    TILES: gl.constexpr = k_smem.shape[0]
    out = out_smem.index(part)
    for first in gl.static_range(0, COLUMNS, 64):
        dq = _zeros(ds_smem.shape[2], out_smem)
        for half in gl.static_range(TILES):
            keys = k_smem.index(half + (step >> 30)).slice(first, out.shape[1], dim=1)
            weights = ds_smem.index(turn * TILES + half + (step >> 30)).permute((1, 0))
            dq = warpgroup_mma(weights, keys, dq, use_acc=half > 0, is_async=True)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        out.store((dq * softmax_scale).to(out.dtype))  # whole lines are stored from here
        cols = first + gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, to.type.layout.parent))
        gl.store(to[:, None] + cols[None, :], out.load(to.type.layout.parent), mask=keep[:, None])


@gluon.jit
def _write_dq_partial(k_smem, dq_smem, part: gl.constexpr, turn, step, indices, first, count, places, softmax_scale,
                      kv_head, H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr,
                      D: gl.constexpr):
    """dq of a step's block of rows against all keys, into their partial dq."""
    ds_smem, out_smem, ds_full, ds_empty = dq_smem
    dq_partial, first_head, group_heads = places
    BLOCK_M: gl.constexpr = ds_smem.shape[2]
    OUT: gl.constexpr = _row_layout(D if D % 64 else 64)
    index = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, OUT))
    choice = _listed(indices, gl.minimum(index, count - 1), None, KS, SHARED)
    to = dq_partial + _partial_row(choice, kv_head, first_head, group_heads, H, G, KS) * D
    mbarrier.wait(ds_full.index(turn), (step >> 1) & 1)
    for i in gl.static_range(len(k_smem)):
        _write_columns(ds_smem, k_smem[i], out_smem[i], part, turn, step, to + i * k_smem[0].shape[2], index < count,
                       softmax_scale)
    mbarrier.arrive(ds_empty.index(turn), count=1)


@gluon.jit
def _write_partial_sums(pointer, sums, keys, apart: gl.constexpr):
    """Writes dk or dv of the first ``keys`` of 64 keys to rows so many elements apart."""
    for i in gl.static_range(len(sums)):
        x = sums[i]
        cols = i * sums[0].shape[1] + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
        rows = gl.arange(0, 64, layout=gl.SliceLayout(1, x.type.layout))
        gl.store(pointer + rows[:, None] * apart + cols[None, :], x.to(pointer.dtype.element_ty),
                 mask=(rows < keys)[:, None])


@gluon.jit
def _write_sums(pointer, tile, sums, keys, D: gl.constexpr, HK: gl.constexpr):
    """Writes dk or dv of the first ``keys`` of 64 keys, one head of HK: by whole lines, through a tile that nobody
    reads any more, where the dtypes allow it."""
    if pointer.dtype.element_ty == tile[0].dtype:
        OUT: gl.constexpr = _row_layout(D)
        rows = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
        _store_rows(pointer, rows.to(gl.int64) * HK, _through_tile(tile, sums, OUT), rows < keys, D, OUT)
    else:
        _write_partial_sums(pointer, sums, keys, HK * D)


@gluon.jit
def _consumer(part: gl.constexpr, spans, smem, kv_smem, dq_smem, bars, ints, outs, dq_outs, scales, H: gl.constexpr,
              HK: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr,
              DV: gl.constexpr, CUT: gl.constexpr, HAS_DQ: gl.constexpr, RAGGED: gl.constexpr, STAGES: gl.constexpr):
    """64 of the 128 keys, by one group of four warps."""
    segment_begin, segment_end, offsets, first_segment, end_segment = spans
    q_smem, do_smem, lse_smem, delta_smem = smem
    k_smem, v_smem = kv_smem
    full, empty, kv_full = bars
    count, kv_head, first_row, chunk_end, first_position, chunk_end_position, num_rows = ints
    dk_out, dv_out, dkdv_partial, partial_index, chunk_row, chunk_size = outs
    qk_scale, softmax_scale = scales
    BLOCK_M: gl.constexpr = q_smem[0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    key_position = first_position + part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    lane = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S))
    dk = [_zeros(64, it) for it in k_smem]
    dv = [_zeros(64, it) for it in v_smem]
    mbarrier.wait(kv_full, 0)
    fence_async_shared()
    step = 0
    if HAS_DQ:
        indices, places = dq_outs
        ds_smem, out_smem, ds_full, ds_empty = dq_smem
        for first in range(0, count, BLOCK_M):
            turn = step & 1
            dk, dv = _add_rows(part, kv_smem, smem, full, empty, step, dk, dv, qk_scale, key_position, lane,
                               chunk_end_position if RAGGED else None, (ds_smem.index(turn * 2 + part),
                               ds_full.index(turn), ds_empty.index(turn)), False, STAGES)
            if (turn != part) & (step > 0):
                _write_dq_partial(k_smem, dq_smem, part, part, step - 1, indices, first - BLOCK_M, count, places,
                                  softmax_scale, kv_head, H, G, KS, SHARED, D)
            step += 1
        if (step & 1 != part) & (step > 0):
            _write_dq_partial(k_smem, dq_smem, part, part, step - 1, indices, (step - 1) * BLOCK_M, count, places,
                              softmax_scale, kv_head, H, G, KS, SHARED, D)
    elif KS > 0:
        for first in range(0, count, BLOCK_M):
            dk, dv = _add_rows(part, kv_smem, smem, full, empty, step, dk, dv, qk_scale, key_position, lane, None, None,
                               False, STAGES)
            step += 1
    for segment in range(first_segment, end_segment):
        _, low, _, blocks = _diagonal_rows(spans, segment, first_position, chunk_end_position, BLOCK_M)
        for i in range(0, blocks * G):
            position = low + i % blocks * BLOCK_M
            if position + BLOCK_M > first_position + part * 64:  # else all rows are before these keys
                dk, dv = _add_rows(part, kv_smem, smem, full, empty, step, dk, dv, qk_scale, key_position,
                                   position + lane, None, None, True, STAGES)
            else:
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
    dk = [x * softmax_scale for x in dk]
    first_row += part * 64
    keys = chunk_end - first_row
    if CUT:
        if partial_index >= 0:
            to = dkdv_partial + (partial_index * chunk_size + first_row - chunk_row) * (D + DV)
            _write_partial_sums(to, dk, keys, D + DV)
            _write_partial_sums(to + D, dv, keys, D + DV)
            keys = 0
    at = first_row.to(gl.int64) * HK + kv_head
    gl.static_assert(D == DV or not HAS_DQ, "the other group may still read k")
    _write_sums(dv_out + at * DV, _tile(v_smem, part), dv, keys, DV, HK)
    _write_sums(dk_out + at * D, _tile(v_smem if D == DV else k_smem, part), dk, keys, D, HK)


@gluon.jit
def _start_step(of_keys, of_rows, full, step, S: gl.constexpr, STAGES: gl.constexpr):
    """Starts the product ``[64, BLOCK_M]`` of all keys' tile with a block of rows, as soon as that is there."""
    BLOCK_M: gl.constexpr = of_rows[0].shape[1]
    zero = gl.zeros([64, BLOCK_M], gl.float32, layout=S)
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    fence_async_shared()
    return _start_scores(_tile(of_keys, step >> 30), _tile(of_rows, step % STAGES), zero)


@gluon.jit
def _values_step(smem, kv_smem, bars, step, dv, qk_scale, key_position, query_position, key_end, CAUSAL: gl.constexpr,
                 STAGES: gl.constexpr):
    """Adds one block of rows to dv of all keys, and hands its weights to the other group; none from ``key_end`` on."""
    q_smem, do_smem, lse_smem, delta_smem = smem
    k_smem, v_smem = kv_smem
    full, empty, kv_full, p_smem, p_full, p_empty = bars
    BLOCK_M: gl.constexpr = q_smem[0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    stage = step % STAGES
    turn = step & 1
    s = _start_step(k_smem, q_smem, full, step, S, STAGES)
    do = _tile(do_smem, stage)
    lse = lse_smem.index(stage).load(gl.SliceLayout(0, S))
    s = warpgroup_mma_wait(0, deps=(s,))
    p = _weights(s, lse, qk_scale, key_position, query_position, key_end, CAUSAL)
    dv = _start_sums(p.to(do[0].dtype), do, dv)
    mbarrier.wait(p_empty.index(turn), ((step >> 1) & 1) ^ 1)
    p_smem.index(turn).store(p.to(gl.float16))
    mbarrier.arrive(p_full.index(turn), count=1)
    dv = _wait(0, dv)
    mbarrier.arrive(empty.index(step % STAGES), count=1)
    return dv


@gluon.jit
def _keys_step(smem, kv_smem, bars, step, dk, ds_to, STAGES: gl.constexpr):
    """Adds one block of rows to dk of all keys, with the other group's weights; ``ds_to`` as of :func:`_add_rows`."""
    q_smem, do_smem, lse_smem, delta_smem = smem
    k_smem, v_smem = kv_smem
    full, empty, kv_full, p_smem, p_full, p_empty = bars
    BLOCK_M: gl.constexpr = q_smem[0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    stage = step % STAGES
    turn = step & 1
    dp = _start_step(v_smem, do_smem, full, step, S, STAGES)
    q = _tile(q_smem, stage)
    delta = delta_smem.index(stage).load(gl.SliceLayout(0, S))
    mbarrier.wait(p_full.index(turn), (step >> 1) & 1)
    p = p_smem.index(turn).load(S).to(gl.float32)
    mbarrier.arrive(p_empty.index(turn), count=1)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = (p * (dp - delta[None, :])).to(q[0].dtype)
    dk = _start_sums(ds, q, dk)
    if ds_to is not None:
        _hand_over(ds, ds_to, step)
    dk = _wait(0, dk)
    mbarrier.arrive(empty.index(step % STAGES), count=1)
    return dk


@gluon.jit
def _consumer_of_64(part: gl.constexpr, spans, smem, kv_smem, dq_smem, bars, ints, outs, dq_outs, scales,
                    H: gl.constexpr, HK: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr,
                    D: gl.constexpr, DV: gl.constexpr, CUT: gl.constexpr, HAS_DQ: gl.constexpr, RAGGED: gl.constexpr,
                    STAGES: gl.constexpr):
    """One of the two groups that share 64 keys: dv and partial dq (0), dk (1)."""
    segment_begin, segment_end, offsets, first_segment, end_segment = spans
    q_smem, do_smem, lse_smem, delta_smem = smem
    k_smem, v_smem = kv_smem
    count, kv_head, first_row, chunk_end, first_position, chunk_end_position, num_rows = ints
    dk_out, dv_out, dkdv_partial, partial_index, chunk_row, chunk_size = outs
    qk_scale, softmax_scale = scales
    BLOCK_M: gl.constexpr = q_smem[0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    key_position = first_position + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    lane = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S))
    sums = [_zeros(64, it) for it in (v_smem if part == 0 else k_smem)]
    mbarrier.wait(bars[2], 0)
    fence_async_shared()
    indices, places = dq_outs
    step = 0
    if KS > 0:
        for first in range(0, count, BLOCK_M):
            if part == 0:
                sums = _values_step(smem, kv_smem, bars, step, sums, qk_scale, key_position, lane,
                                    chunk_end_position if HAS_DQ and RAGGED else None, False, STAGES)
                if HAS_DQ:
                    if step > 0:
                        _write_dq_partial(k_smem, dq_smem, 0, (step - 1) & 1, step - 1, indices, first - BLOCK_M, count,
                                          places, softmax_scale, kv_head, H, G, KS, SHARED, D)
            elif HAS_DQ:
                ds_to = (dq_smem[0].index(step & 1), dq_smem[2].index(step & 1), dq_smem[3].index(step & 1))
                sums = _keys_step(smem, kv_smem, bars, step, sums, ds_to, STAGES)
            else:
                sums = _keys_step(smem, kv_smem, bars, step, sums, None, STAGES)
            step += 1
        if HAS_DQ and part == 0:
            if step > 0:
                _write_dq_partial(k_smem, dq_smem, 0, (step - 1) & 1, step - 1, indices, (step - 1) * BLOCK_M, count,
                                  places, softmax_scale, kv_head, H, G, KS, SHARED, D)
    for segment in range(first_segment, end_segment):
        _, low, _, blocks = _diagonal_rows(spans, segment, first_position, chunk_end_position, BLOCK_M)
        for i in range(0, blocks * G):
            if part == 0:
                sums = _values_step(smem, kv_smem, bars, step, sums, qk_scale, key_position,
                                    low + i % blocks * BLOCK_M + lane, None, True, STAGES)
            else:
                sums = _keys_step(smem, kv_smem, bars, step, sums, None, STAGES)
            step += 1
    if part == 1:
        sums = [x * softmax_scale for x in sums]
    keys = chunk_end - first_row
    if CUT:
        if partial_index >= 0:
            to = dkdv_partial + (partial_index * chunk_size + first_row - chunk_row) * (D + DV)
            _write_partial_sums(to + (1 - part) * D, sums, keys, D + DV)
            keys = 0
    at = first_row.to(gl.int64) * HK + kv_head
    if part == 0:
        _write_sums(dv_out + at * DV, _tile(k_smem, 0), sums, keys, DV, HK)
    else:
        _write_sums(dk_out + at * D, _tile(v_smem, 0), sums, keys, D, HK)


# Shared memory      written by           read by                                           full      empty (arrivals)
# q, do              loader, cp.async     both groups: products                             full      empty (2)
# lse, delta         loader, cp.async     both groups: loads                                full      empty (2)
# k, v               loader, cp.async     both groups: products; k both halves (dq)         kv_full   never filled again
# ds, half by half   each group its half  the group of the step's turn, both halves: dq     ds_full   ds_empty (1)
# out                the group of a turn  the same, in other lines (own barrier)            -         -
# p, with 64 keys    the group of dv      the group of dk: loads                            p_full    p_empty (1)
# ds, with 64 keys   the group of dk      the group of dv: dq                               ds_full   ds_empty (1)
# ds_full has an arrival of each group that stores, after its stores and their fence; it stores again two steps later,
# after ds_empty.
@gluon.jit(do_not_specialize=["num_rows", "chunk_size", "num_key_tiles", "num_chunks", "num_sequences", "num_segments",
                               "num_extra", "split", "kv_head_begin", "kv_head_end"])
def _attention_bwd_dkdv_sm90_kernel(
    q, k, v, do, terms, indices, indptr, extra_csr_rows,
    cu_seqlens_k, seq_ids, segment_begin, segment_end, offsets, dk, dv, dkdv_partial, dq_partial,
    qk_scale, softmax_scale, num_rows, chunk_size, num_key_tiles, num_chunks, num_sequences, num_segments,
    num_extra, split, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    H: gl.constexpr, HK: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, PACKED: gl.constexpr, EVEN: gl.constexpr, HAS_DQ: gl.constexpr, RAGGED: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LOADER_REGS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, num_warps: gl.constexpr,
):
    """The first ``num_extra * num_key_tiles`` programs take the extra pieces of long lists."""
    tile = gl.program_id(0) % num_key_tiles
    item = gl.program_id(0) // num_key_tiles
    first_csr_row = kv_head_begin * num_chunks
    csr_row = first_csr_row + item - num_extra
    piece = item * 0
    if extra_csr_rows is not None:
        if item < num_extra:
            csr_row, piece = _extra_piece(extra_csr_rows, indptr, first_csr_row, kv_head_end * num_chunks, item, split)
            if piece == 0:
                return
    kv_head = csr_row // num_chunks
    sequence = _find_piece(cu_seqlens_k, num_sequences, chunk_size, csr_row % num_chunks)
    chunk_row, chunk_end = _piece_items(cu_seqlens_k, sequence, chunk_size, csr_row % num_chunks)
    first_row = chunk_row + tile * BLOCK_N
    if first_row >= chunk_end:
        return
    CUT: gl.constexpr = extra_csr_rows is not None
    partial_index = csr_row.to(gl.int64) * 0 - 1
    count = csr_row * 0
    if KS > 0:
        begin, count, partial_index = _piece_of_list(indptr, csr_row, first_csr_row, piece, item, num_extra, split, CUT)
        indices += begin // SHARED  # pieces begin with whole groups of heads
    sequence_row = gl.load(cu_seqlens_k + sequence)
    first_segment = sequence
    end_segment = sequence + 1
    if not PACKED:
        first_segment = _lower_bound(seq_ids, num_segments, sequence)
        end_segment = _lower_bound(seq_ids, num_segments, sequence + 1)
    end_segment = gl.where(piece > 0, first_segment, end_segment)

    dtype: gl.constexpr = q.dtype.element_ty
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    q_smem = _allocate(dtype, STAGES, BLOCK_M, D)
    do_smem = _allocate(dtype, STAGES, BLOCK_M, DV)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], PLAIN)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], PLAIN)
    k_smem = _allocate(dtype, BLOCK_N // 64, 64, D)
    v_smem = _allocate(dtype, BLOCK_N // 64, 64, DV)
    full = _barriers(STAGES, 32 * LOADER_WARPS)
    empty = _barriers(STAGES, 2)
    kv_full = _barriers(1, 32 * LOADER_WARPS).index(0)
    dq_smem = ()
    if HAS_DQ:
        gl.static_assert(BLOCK_M == 64, "partial dq is of 64 rows")
        HALF: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], dtype)
        ds_smem = gl.allocate_shared_memory(dtype, [2 * (BLOCK_N // 64), 64, BLOCK_M], HALF)
        out_smem = _allocate(dtype, BLOCK_N // 64, BLOCK_M, D if D % 64 else 64)
        ds_full = _barriers(2, BLOCK_N // 64)
        ds_empty = _barriers(2, 1)
        dq_smem = (ds_smem, out_smem, ds_full, ds_empty)
    fence_async_shared()

    pointers = (q, k, v, do, terms, indices)
    spans = (segment_begin, segment_end, offsets, first_segment, end_segment)
    smem = (q_smem, do_smem, lse_smem, delta_smem)
    kv_smem = (k_smem, v_smem)
    bars = (full, empty, kv_full)
    ints = (count, kv_head, first_row, chunk_end, first_row - sequence_row, chunk_row - sequence_row + chunk_size,
            num_rows)
    outs = (dk, dv, dkdv_partial, partial_index, chunk_row, chunk_size)
    dq_outs = (indices, (dq_partial, kv_head_begin * G, (kv_head_end - kv_head_begin) * G))
    strides = (stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh)
    scales = (qk_scale, softmax_scale)
    if BLOCK_N == 64:
        P: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], gl.float16)
        p_smem = gl.allocate_shared_memory(gl.float16, [2, 64, BLOCK_M], P)
        p_full = _barriers(2, 1)
        p_empty = _barriers(2, 1)
        fence_async_shared()
        more_bars = (full, empty, kv_full, p_smem, p_full, p_empty)
        gl.warp_specialize([
            (_consumer_of_64, (0, spans, smem, kv_smem, dq_smem, more_bars, ints, outs, dq_outs, scales, H, HK, G, KS,
                               SHARED, D, DV, CUT, HAS_DQ, RAGGED, STAGES)),
            (_consumer_of_64, (1, spans, smem, kv_smem, dq_smem, more_bars, ints, outs, dq_outs, scales, H, HK, G, KS,
                               SHARED, D, DV, CUT, HAS_DQ, RAGGED, STAGES)),
            (_loader, (pointers, spans, smem, kv_smem, bars, ints, strides, H, G, KS, SHARED, D, DV, EVEN, STAGES)),
        ], [4, LOADER_WARPS], [CONSUMER_REGS, LOADER_REGS])
    else:
        gl.warp_specialize([
            (_consumer, (0, spans, smem, kv_smem, dq_smem, bars, ints, outs, dq_outs, scales, H, HK, G, KS, SHARED, D,
                         DV, CUT, HAS_DQ, RAGGED, STAGES)),
            (_consumer, (1, spans, smem, kv_smem, dq_smem, bars, ints, outs, dq_outs, scales, H, HK, G, KS, SHARED, D,
                         DV, CUT, HAS_DQ, RAGGED, STAGES)),
            (_loader, (pointers, spans, smem, kv_smem, bars, ints, strides, H, G, KS, SHARED, D, DV, EVEN, STAGES)),
        ], [4, LOADER_WARPS], [CONSUMER_REGS, LOADER_REGS])
