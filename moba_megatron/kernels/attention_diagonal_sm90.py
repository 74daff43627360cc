"""Diagonal chunks and the sums of partial results on Hopper (Gluon), of o and of dq.

A program takes tiles of 128 queries of one head, one after the other: 64 for each of two groups of warps, in turns the
earlier, which reads fewer keys: a group skips what none of its rows attends to. A warp finds the tiles; the loader
copies all by TMA, also of the next tile: a row's partial results first, which are added up before its own chunk.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from . import jit_helpers, sm90
from .attention_call import AttentionCall
from .jit_helpers_sm90 import (
    LOADER_WARPS,
    _allocate,
    _barriers,
    _copy_keys,
    _hand,
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

_query_tile = gluon.jit(jit_helpers._query_tile.fn)


def attention_fwd_diagonal(call: AttentionCall, o_partial: Buffer, lse_partial: Buffer, o: Buffer, lse: Buffer,
                           group: tuple[int, int], options: dict[str, int]) -> None:
    """Writes o and lse of one group of kv heads."""
    _launch(_attention_fwd_diagonal_sm90_kernel, call, o_partial, call.v.shape[2], group, options,
            lse_partial=lse_partial, o=o, lse=lse)


def attention_bwd_dq_diagonal(call: AttentionCall, dq_partial: Buffer, dq: Buffer, group: tuple[int, int],
                              options: dict[str, int]) -> None:
    """Writes dq of one group of kv heads."""
    _launch(_attention_bwd_dq_diagonal_sm90_kernel, call, dq_partial, call.q.shape[2], group, options, dq=dq)


def _launch(kernel, call: AttentionCall, partial: Buffer, dim: int, group: tuple[int, int], options: dict[str, int],
            **own) -> None:
    grid, queries = call.over_queries(sm90.ROWS, group)
    width = queries["group_heads"] * call.choices
    partial = Buffer(partial.place, (call.q.shape[0], width, dim), (width * dim, dim, 1), partial.dtype, partial.device)
    tensors = {"q": call.q, "do": call.do or call.q, "k": call.k, "v": call.v, "partial": partial}
    for name, x in tensors.items():
        rows = options["BLOCK_N"] if name in "kv" else 64
        parts = [sm90.described(x, rows, columns) for columns in sm90.widths(x.shape[2])]
        own |= {name: parts[0], f"{name}_rest": parts[1] if len(parts) > 1 else None}
    own |= sm90.strides_of_eight(**tensors) | {"k_rows": call.k, "v_rows": call.v, **queries, **options}
    arguments = {name: x for name, x in own.items() if name in kernel.arg_names or name in options}
    launch(kernel, (min(*grid, sm90.processors(call.q.device)),), **call.arguments(kernel, **arguments))


@gluon.jit
def _copy_masked(source, smem, full, row, end, kv_head, strides, D: gl.constexpr, ROWS: gl.constexpr):
    """Starts the copy of a tile of keys or values, by thread if it reaches beyond ``end``: zeros from there on."""
    if row + smem[0].shape[0] <= end:
        _copy_keys(source[0], smem, full, row, end, kv_head, strides[0], strides[1], D, True, ROWS)
        mbarrier.arrive(full, count=32 * LOADER_WARPS - 1)
    else:
        _copy_keys((source[1], None), smem, full, row, end, kv_head, strides[0], strides[1], D, False, ROWS)


@gluon.jit
def _find_tiles(work, find, group_heads):
    """One warp, which looks for the program's tiles that have rows: how many, the first, that one's position, the head
    within the group, and the row of the sequence's first key. A search is several loads that wait for each other."""
    cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments, chunk_size, num_tiles = find
    item = 0
    for number in range(gl.program_id(0), num_tiles * group_heads, gl.num_programs(0)):
        tile = num_tiles - 1 - number // group_heads
        row, row_end, position, k_row, _ = _query_tile(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments,
                                                       chunk_size, tile, 128)
        if row < row_end:
            _hand(work, item, (gl.minimum(row_end - row, 128), row, position, number % group_heads, k_row), 1)
            item += 1
    _hand(work, item, (0, 0, 0, 0, 0), 1)


@gluon.jit
def _copy_halves(sources, smem, bars, use, SIZE: gl.constexpr, row, item, head, strides, DIMS: gl.constexpr,
                 ROWS: gl.constexpr):
    """Starts copies of a tile's rows as soon as their places are free: of each group its half, in turns the first."""
    full, empty = bars
    for part in gl.static_range(2):
        at = use % SIZE * 2 + part
        mbarrier.wait(empty.index(at), ((use // SIZE) & 1) ^ 1)
        for i in gl.static_range(len(smem)):
            _copy_keys(sources[i], _tile(smem[i], at), full.index(at), row + ((item + part) & 1) * 64, 0, head, 0,
                       strides[i], DIMS[i], True, ROWS)


@gluon.jit
def _load_tiles(rows, keys, partial, smem, bars, work, ints, strides, G: gl.constexpr, KS: gl.constexpr,
                DIMS: gl.constexpr, PARTIAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
                SLOTS: gl.constexpr):
    """The loader: of each tile its partial results, rows of q (and do), keys and values."""
    row_bars, full, empty, partial_bars = bars[:2], bars[2:4], bars[4:6], bars[6:]
    chunk_size, first_head, group_heads = ints
    ROWS: gl.constexpr = _row_layout(DIMS[0])
    item, step, slot, tile = 0, 0, 0, _take(work, 0)
    while tile[0] > 0:
        count, row, position, head_in_group, k_row = [x.to(gl.int32) for x in tile]
        head = first_head + head_in_group
        for i in range(KS):
            _copy_halves((partial,), smem[3:], partial_bars, slot, SLOTS, row, item, head_in_group * KS + i,
                         (PARTIAL // 8,), (PARTIAL,), ROWS)
            slot += 1
        first = position // chunk_size * chunk_size
        for key in range(first, position + count, BLOCK_N):
            for n in gl.static_range(2):
                mbarrier.wait(empty[n].index(step % STAGES), ((step // STAGES) & 1) ^ 1)
                _copy_masked(keys[n], _tile(smem[1 + n], step % STAGES), full[n].index(step % STAGES), k_row + key,
                             k_row + position + count, head // G, strides[1 + n], DIMS[n], ROWS)
            step += 1
            if key == first:  # before the rows: a group that is done with its own goes on while the other one is not
                _copy_halves(rows, smem[0], row_bars, item, 1, row, item, head, strides[0], DIMS, ROWS)
        item += 1
        tile = _take(work, item)


@gluon.jit
def _load_choices(selected, lse_partial, tile, first_row, ints, H: gl.constexpr, KS: gl.constexpr,
                  BLOCK_KS: gl.constexpr, SHARED: gl.constexpr):
    """Of 64 rows of a tile the chosen chunks, -1 for none, and the log-sum-exps of their partial results, if given."""
    count, row, position, head_in_group, _ = tile
    chunk_size, first_head, group_heads = ints
    L: gl.constexpr = gl.BlockedLayout([1, BLOCK_KS], [32, 1], [4, 1], [1, 0])
    lane = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    j = gl.arange(0, BLOCK_KS, layout=gl.SliceLayout(0, L))[None, :]
    listed = (lane < count)[:, None] & (j < KS)
    list_row = ((row + lane) * H + first_head + head_in_group) // SHARED
    chosen = gl.load(selected + list_row[:, None] * KS + j, mask=listed, other=-1)
    lse = 0.0
    if lse_partial is not None:
        group_row = (row + lane) * group_heads + head_in_group
        lse = gl.load(lse_partial + group_row[:, None] * KS + j, mask=listed, other=-float("inf"))
    return chosen, lse


@gluon.jit
def _weigh(choices, weight_smem, first_weight, HAS_LSE: gl.constexpr, KS: gl.constexpr):
    """Stores 64 rows' weights, 0 where none is chosen: 1, or by log-sum-exps. Returns their maximum, and the sum."""
    chosen, lse = choices
    if HAS_LSE:
        lse = gl.where(chosen >= 0, lse, -float("inf"))
        m = gl.max(lse, 1)
        weights = gl.exp2(lse - gl.where(m == -float("inf"), 0.0, m)[:, None])  # a row may have chosen nothing
    else:
        weights = gl.where(chosen >= 0, 1.0, 0.0)
        m = gl.max(weights, 1)
    j = gl.arange(0, weights.shape[1], layout=gl.SliceLayout(0, weights.type.layout))[None, :]
    for i in range(KS):
        weight_smem.index(first_weight + i).store(gl.sum(gl.where(j == i, weights, 0.0), 1))
    return m, gl.sum(weights, 1)


@gluon.jit
def _add_partial(part: gl.constexpr, acc, weight_smem, partial_smem, bars, slot, KS: gl.constexpr,
                 BLOCK_KS: gl.constexpr):
    """Adds 64 rows' partial results, as soon as they are there, with their weights."""
    partial_full, partial_empty = bars
    SLOTS: gl.constexpr = partial_smem[0].shape[0] // 2
    for i in range(KS):
        at = slot % SLOTS * 2 + part
        mbarrier.wait(partial_full.index(at), (slot // SLOTS) & 1)
        tile = _tile(partial_smem, at)
        sums = ()
        for n in gl.static_range(len(acc)):
            weight = weight_smem.index(part * BLOCK_KS + i).load(gl.SliceLayout(1, acc[n].type.layout))[:, None]
            x = gl.where(weight > 0, tile[n].load(acc[n].type.layout).to(gl.float32), 0.0)  # unwritten: may be anything
            sums = sums + (acc[n] + weight * x,)
        acc = sums
        mbarrier.arrive(partial_empty.index(at), count=1)
        slot += 1
    return acc, slot


@gluon.jit
def _seen(s, key, position, chunk_size):
    """Whether rows at these positions attend to the keys of a tile from ``key`` on."""
    keys = key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))[None, :]
    return (keys <= position[:, None]) & (keys >= (position // chunk_size * chunk_size)[:, None])


@gluon.jit
def _skip(full, empty, step, end, STAGES: gl.constexpr):
    """Gives tiles of keys and values back unused; when they are there: else it could be those before that are given."""
    for i in range(step, end):
        for n in gl.static_range(2):
            mbarrier.wait(full[n].index(i % STAGES), (i // STAGES) & 1)
            mbarrier.arrive(empty[n].index(i % STAGES), count=1)
    return end


@gluon.jit
def _consumer(part: gl.constexpr, given, outs, smem, weight_smem, bars, work, ints, scales, H: gl.constexpr,
              KS: gl.constexpr, BLOCK_KS: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr):
    """64 rows of every 128, by one group of four warps: of o and lse, or, with backward's terms, of dq."""
    row_smem, k_smem, v_smem, partial_smem = smem
    row_full, row_empty, k_full, v_full, k_empty, v_empty, partial_full, partial_empty = bars
    selected, lse_partial, terms = given
    out, lse_out = outs
    chunk_size, first_head, group_heads = ints
    qk_scale, softmax_scale = scales
    FORWARD: gl.constexpr = terms is None
    STAGES: gl.constexpr = k_smem[0].shape[0]
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUT: gl.constexpr = _row_layout(D)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S)
    item, step, slot, tile = 0, 0, 0, _take(work, 0)
    choices = _load_choices(selected, lse_partial, tile, part * 64, ints, H, KS, BLOCK_KS, SHARED)
    while tile[0] > 0:
        count, row, position, head_in_group, _ = tile
        count, position = count.to(gl.int32), position.to(gl.int32)
        head = first_head + head_in_group
        first_row = ((item + part) & 1) * 64
        lane = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
        m, l = [gl.convert_layout(of_rows, gl.SliceLayout(1, S))
                for of_rows in _weigh(choices, weight_smem, part * BLOCK_KS, FORWARD, KS)]
        if not FORWARD:
            at = terms + ((row + gl.minimum(lane, count - 1)) * H + head) * 4
            m, l = gl.load(at), gl.load(at + 1)
        acc, slot = _add_partial(part, [_zeros(64, it) for it in (v_smem if FORWARD else row_smem[0])], weight_smem,
                                 partial_smem, (partial_full, partial_empty), slot, KS, BLOCK_KS)
        if not FORWARD:
            acc = [x * gl.where(softmax_scale == 0, 0.0, 1 / softmax_scale) for x in acc]
        positions = position + gl.minimum(lane, count - 1)
        mbarrier.wait(row_full.index(part), item & 1)
        first = position // chunk_size * chunk_size
        own = (position + gl.minimum(first_row, count - 1)) // chunk_size * chunk_size
        end = gl.where(first_row < count, position + gl.minimum(count, first_row + 64), 0)
        last_step = step + gl.cdiv(position + count - first, BLOCK_N)
        step = _skip(bars[2:4], bars[4:6], step, step + (own - first) // BLOCK_N, STAGES)
        for key in range(own - (own - first) % BLOCK_N, end, BLOCK_N):
            stage, phase = step % STAGES, (step // STAGES) & 1
            masked = (key + BLOCK_N > position + first_row + 1) | (key < (end - 1) // chunk_size * chunk_size)
            here = part + (step >> 30)  # is part: descriptors are made here, and not kept in registers
            mbarrier.wait(k_full.index(stage), phase)
            fence_async_shared()
            s = _start_scores(_tile(row_smem[0], here), _tile(k_smem, stage), zero)
            if FORWARD:
                s = warpgroup_mma_wait(0, deps=(s,))
                mbarrier.arrive(k_empty.index(stage), count=1)
                if masked:  # else all rows see all keys
                    s = gl.where(_seen(s, key, positions, chunk_size), s, -float("inf"))
                m_new = gl.maximum(m, gl.max(s, 1) * qk_scale)
                shift = gl.where(m_new == -float("inf"), 0.0, m_new)  # a row may have seen no key yet
                p = gl.exp2(s * qk_scale - shift[:, None])
                alpha = gl.exp2(m - shift)
                l = l * alpha + gl.sum(p, 1)
                m = m_new
                acc = [x * gl.convert_layout(alpha, gl.SliceLayout(1, x.type.layout))[:, None] for x in acc]
                mbarrier.wait(v_full.index(stage), phase)
                fence_async_shared()
                acc = _wait(0, _start_sums(p.to(v_smem[0].dtype), _tile(v_smem, stage), acc))
                mbarrier.arrive(v_empty.index(stage), count=1)
            else:
                mbarrier.wait(v_full.index(stage), phase)
                fence_async_shared()
                dp = _start_scores(_tile(row_smem[1], here), _tile(v_smem, stage), zero)
                s = warpgroup_mma_wait(len(v_smem), deps=(s,))
                p = gl.exp2(s * qk_scale - m[:, None])
                if masked:
                    p = gl.where(_seen(s, key, positions, chunk_size), p, 0.0)
                dp = warpgroup_mma_wait(0, deps=(dp,))
                mbarrier.arrive(v_empty.index(stage), count=1)
                ds = (p * (dp - l[:, None])).to(k_smem[0].dtype)
                acc = _wait(0, _start_sums(ds, _tile(k_smem, stage), acc))
                mbarrier.arrive(k_empty.index(stage), count=1)
            step += 1
        step = _skip(bars[2:4], bars[4:6], step, last_step, STAGES)
        item += 1
        tile = _take(work, item)
        choices = _load_choices(selected, lse_partial, tile, 64 - first_row, ints, H, KS, BLOCK_KS, SHARED)
        if FORWARD:
            acc = [x * gl.convert_layout(1.0 / l, gl.SliceLayout(1, x.type.layout))[:, None] for x in acc]
            gl.store(lse_out + (row + lane) * H + head, (m + gl.log2(l)) * 0.6931471805599453, mask=lane < count)
        else:
            acc = [x * softmax_scale for x in acc]
        x = _through_tile(_tile(row_smem[0], part), acc, OUT)
        fence_async_shared()  # the next rows come by TMA
        mbarrier.arrive(row_empty.index(part), count=1)
        at_row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
        _store_rows(out, (row + at_row) * H + head, x, at_row < count, D, OUT)


@gluon.jit
def _run(rows, keys, partial, given, outs, find, strides, ints, scales, DIMS: gl.constexpr, PARTIAL: gl.constexpr,
         H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, BLOCK_KS: gl.constexpr,
         D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
         LOADER_REGS: gl.constexpr, CONSUMER_REGS: gl.constexpr):
    """Sets up shared memory, and the groups of warps at work; DIMS: of rows of q (and do)."""
    dtype: gl.constexpr = keys[0][1].dtype.element_ty
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    smem = ([_allocate(dtype, 2, 64, dim) for dim in DIMS], _allocate(dtype, STAGES, BLOCK_N, D),
            _allocate(dtype, STAGES, BLOCK_N, DV), _allocate(dtype, 2 * SLOTS, 64, PARTIAL))
    weights = gl.allocate_shared_memory(gl.float32, [2 * BLOCK_KS, 64], PLAIN)
    bars = (_barriers(2, len(DIMS)), _barriers(2, 1), _barriers(STAGES, 32 * LOADER_WARPS),
            _barriers(STAGES, 32 * LOADER_WARPS), _barriers(STAGES, 2), _barriers(STAGES, 2), _barriers(2 * SLOTS, 1),
            _barriers(2 * SLOTS, 1))
    work = _work(5, 3)
    fence_async_shared()
    gl.warp_specialize([
        (_consumer, (0, given, outs, smem, weights, bars, work, ints, scales, H, KS, BLOCK_KS, SHARED, PARTIAL)),
        (_consumer, (1, given, outs, smem, weights, bars, work, ints, scales, H, KS, BLOCK_KS, SHARED, PARTIAL)),
        (_load_tiles, (rows, keys, partial, smem, bars, work, ints, strides, G, KS, (D, DV), PARTIAL, BLOCK_N,
                      STAGES, SLOTS)),
        (_find_tiles, (work, find, ints[2])),
    ], [4, LOADER_WARPS, 1], [CONSUMER_REGS, LOADER_REGS, 24])


# Shared memory   written by                read by                                 full           empty (arrivals)
# q and do        loader, TMA               the half's group                        row_full       row_empty (1)
# the same        its group: o, dq          its group, in other lines               own barrier    the same
# k               loader, TMA or cp.async   both groups: scores, dq                 k_full         k_empty (2)
# v               loader, TMA or cp.async   both groups: values, dp                 v_full         v_empty (2)
# partial         loader, TMA               the half's group                        partial_full   partial_empty (1)
# weights         their group               their group                             own barrier
# work            the warp that finds tiles both groups and the loader              full           empty (3)
@gluon.jit(do_not_specialize=["num_tiles", "num_segments", "chunk_size", "first_head", "group_heads"])
def _attention_fwd_diagonal_sm90_kernel(
    q, q_rest, k, k_rest, k_rows, v, v_rest, v_rows, partial, partial_rest, selected, lse_partial, o, lse,
    cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, qk_scale, num_tiles, num_segments, chunk_size, first_head,
    group_heads, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, BLOCK_KS: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, LOADER_REGS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, num_warps: gl.constexpr,
):
    """Tiles of 128 queries of one segment and head: their partial results together, then their diagonal chunks."""
    find = (cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments, chunk_size, num_tiles)
    strides = ((stride_qh,), (stride_kt, stride_kh), (stride_vt, stride_vh))
    _run(((q, q_rest),), (((k, k_rest), k_rows), ((v, v_rest), v_rows)), (partial, partial_rest),
         (selected, lse_partial, None), (o, lse), find, strides, (chunk_size, first_head, group_heads), (qk_scale, 0.0),
         (D,), DV, H, G, KS, SHARED, BLOCK_KS, D, DV, BLOCK_N, STAGES, SLOTS, LOADER_REGS, CONSUMER_REGS)


@gluon.jit(do_not_specialize=["num_tiles", "num_segments", "chunk_size", "first_head", "group_heads"])
def _attention_bwd_dq_diagonal_sm90_kernel(
    q, q_rest, do, do_rest, k, k_rest, k_rows, v, v_rest, v_rows, partial, partial_rest, selected, terms, dq,
    cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, qk_scale, softmax_scale, num_tiles, num_segments, chunk_size,
    first_head, group_heads, stride_qh, stride_doh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr, SHARED: gl.constexpr, BLOCK_KS: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, LOADER_REGS: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, num_warps: gl.constexpr,
):
    """Tiles of 128 queries of one segment and head: their partial dq in order, then their diagonal chunks."""
    find = (cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments, chunk_size, num_tiles)
    strides = ((stride_qh, stride_doh), (stride_kt, stride_kh), (stride_vt, stride_vh))
    _run(((q, q_rest), (do, do_rest)), (((k, k_rest), k_rows), ((v, v_rest), v_rows)), (partial, partial_rest),
         (selected, None, terms), (dq, None), find, strides, (chunk_size, first_head, group_heads),
         (qk_scale, softmax_scale), (D, DV), D, H, G, KS, SHARED, BLOCK_KS, D, DV, BLOCK_N, STAGES, SLOTS, LOADER_REGS,
         CONSUMER_REGS)
