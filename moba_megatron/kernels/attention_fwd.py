"""Attention forward: gathered rows against selected chunks, then the diagonal chunk and the merge of all parts.

What one (query, head) got from one selected chunk is a normalised partial o and its log-sum-exp, for one group of kv
heads at a time (``workspace.py``). Inside the kernels everything is in powers of two.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Routing, Segments
from . import sm90
from .attention_call import AttentionCall, check
from .bounds import clear_rows
from .host import precision
from .jit_helpers import _chunk_keys, _listed, _offset, _query_tile
from .launcher import Buffer, empty, launch, rows, scratch_limit, stage
from .routing import Tiles, make_tiles, route, route_in_tiles
from .tuning_table import is_gluon
from .workspace import head_groups


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, segments: Segments, softmax_scale: float,
                  routing: Routing | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the diagonal chunk and the selected ones, keys at or before the query.

    With ``(o_j, lse_j)`` the attention over one chunk alone: ``lse = log sum_j exp(lse_j)`` and
    ``o = sum_j exp(lse_j - lse) o_j``. Products of fp32 are :data:`.host.FP32_PRODUCTS`.

    Args, Returns: as :func:`moba_megatron.reference.attention_fwd`; routing: of ``selected``, None to make it here.

    Raises:
        TypeError: fp64. ValueError: a head dim above 256, chunks below 16, or 2^31 rows (token, head).
    """
    check(q, v, selected, segments)
    if softmax_scale < 0:  # the running maximum is taken before the scale
        q, softmax_scale = -q, -softmax_scale
    return _attention_fwd(*map(rows, (q, k, v)), selected.contiguous(), segments, max(softmax_scale, 1e-30),
                          routing)[:2]


def route_and_attend(q: Buffer, k: Buffer, v: Buffer, selected: Buffer, segments: Segments, softmax_scale: float
                     ) -> tuple[Buffer, Buffer, Routing]:
    """:func:`attention_fwd` for a scale of at least 0, and the routing that it makes, within another call."""
    check(q, v, selected, segments)
    return _attention_fwd(q, k, v, selected, segments, max(softmax_scale, 1e-30), None)


@stage
def _attention_fwd(q: Buffer, k: Buffer, v: Buffer, selected: Buffer, segments: Segments, softmax_scale: float,
                   routing: Routing | None) -> tuple[Buffer, Buffer, Routing | None]:
    o = empty((*q.shape[:2], v.shape[2]), q.dtype, q.device)
    lse = empty(q.shape[:2], torch.float32, q.device)
    if q.shape[0] == 0:
        return o, lse, routing or (route(selected, k.shape[1], segments.num_chunks(k.shape[0]),
                                         q.shape[1] // selected.shape[1]) if selected.shape[2] else None)
    if not segments.exact:
        clear_rows(segments.cu_seqlens_q, (o, 0), (lse, -math.inf))
    # a scale of 0 would turn a masked -inf into NaN
    stage = AttentionCall(q, k, v, selected, segments, softmax_scale, precision(q.dtype))
    if stage.choices == 0:
        _attention_fwd_diagonal(stage, None, None, o, lse, (0, stage.kv_heads))
        return o, lse, None
    options = _sparse_config(stage)
    split = options.pop("SPLIT")
    if routing is None:
        routing, tiles = route_in_tiles(selected, stage.kv_heads, stage.num_chunks, split, stage.shared)
    else:
        tiles = make_tiles(routing, split)
    rows_per_head = stage.rows_per_kv_head * stage.choices
    groups = head_groups(stage.kv_heads, rows_per_head * (v.shape[2] * q.dtype.itemsize + 4), scratch_limit())
    partial_rows = rows_per_head * (groups[0][1] - groups[0][0])
    o_partial = empty((partial_rows, v.shape[2]), q.dtype, q.device)
    lse_partial = empty((partial_rows,), torch.float32, q.device)
    sparse = sm90.kernel_module("attention_fwd").attention_fwd_sparse if is_gluon(options) else _attention_fwd_sparse
    for group in groups:
        sparse(stage, routing, tiles, o_partial, lse_partial, group, options)
        _attention_fwd_diagonal(stage, o_partial, lse_partial, o, lse, group)
    return o, lse, routing


def _sparse_config(call: AttentionCall) -> dict[str, int]:
    """The sparse pass's configuration with SPLIT, rows of a tile of a list; ROW_STAGES where a chunk fits one tile."""
    size = call.segments.chunk_size
    options = call.config("attention_fwd", gluon=call.gluon)
    if is_gluon(options):
        return {**options, "SPLIT": sm90.rows_per_program(options, call.selected.numel() * call.shared, call.shared)}
    if options["BLOCK_N"] >= size:
        return {"SPLIT": 16 * options["BLOCK_M"], "ROW_STAGES": options["num_stages"], **options}
    return {**options, "SPLIT": options["BLOCK_M"]}


def _attention_fwd_sparse(call: AttentionCall, routing: Routing, tiles: Tiles, o_partial: Buffer, lse_partial: Buffer,
                          group: tuple[int, int], options: dict[str, int]) -> None:
    """Fills the partial o and lse of one group of kv heads."""
    grid, lists = call.over_lists(routing, tiles, group)
    wide = _wide(call.q, o_partial) or routing.indices.dtype == torch.int64
    launch(_attention_fwd_sparse_kernel, grid, **call.arguments(
        _attention_fwd_sparse_kernel, **call.key_tiles(options["BLOCK_N"]), **lists, o_partial=o_partial,
        lse_partial=lse_partial, CHUNK=call.segments.chunk_size, WIDE=wide, **options))


def _wide(*tensors: Buffer) -> bool:
    """Whether an offset in elements can leave int32."""
    return any(sum((n - 1) * s for n, s in zip(x.shape, x.stride())) >= 2 ** 31 for x in tensors)


def _attention_fwd_diagonal(call: AttentionCall, o_partial: Buffer | None, lse_partial: Buffer | None, o: Buffer,
                            lse: Buffer, group: tuple[int, int]) -> None:
    """Writes o and lse of one group of kv heads."""
    options = call.config("attention_fwd_diagonal", choices=call.choices, gluon=call.gluon_diagonal)
    if is_gluon(options):
        run = sm90.kernel_module("attention_diagonal").attention_fwd_diagonal
        return run(call, o_partial, lse_partial, o, lse, group, options)
    grid, queries = call.over_queries(options["BLOCK_M"], group)
    o_partial, use_tma = call.partial_tiles(o_partial, o.shape[2], options["BLOCK_M"], group)
    launch(_attention_fwd_diagonal_kernel, grid, **call.arguments(
        _attention_fwd_diagonal_kernel, **queries, o_partial=o_partial, lse_partial=lse_partial, o=o, lse=lse,
        USE_TMA=use_tma, **options))


@triton.jit
def _load_keys(source, row, end, head, stride_row, stride_head, D: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_D: tl.constexpr, USE_TMA: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``row .. row + BLOCK_N`` of one head, ``[BLOCK_N, BLOCK_D]``; zeros from row ``end`` on where MASKED."""
    if USE_TMA:
        tile = source.load([head, row, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        rows = row + tl.arange(0, BLOCK_N)
        cols = tl.arange(0, BLOCK_D)
        pointers = source + _offset(head, stride_head) + _offset(rows, stride_row)[:, None] + cols[None, :]
        if MASKED:
            tile = tl.load(pointers, mask=(rows[:, None] < end) & (cols[None, :] < D), other=0.0)
        elif D < BLOCK_D:
            tile = tl.load(pointers, mask=cols[None, :] < D, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _gather_queries(q, indices, begin, end, first_head, group_heads, stride_qt, stride_qh, H: tl.constexpr,
                    KS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """The query rows of indices ``begin .. begin + BLOCK_M``, where their results go, which are before ``end``."""
    index = begin + tl.arange(0, BLOCK_M)
    valid = index < end
    choice = _listed(indices, index, valid, KS, SHARED)
    token = choice // (H * KS)
    within = choice - token * (H * KS)  # head * KS + j
    if WIDE:
        token = token.to(tl.int64)
        row = _offset(token, stride_qt) + _offset(within // KS, stride_qh)
    else:
        row = token * stride_qt + within // KS * stride_qh
    cols = tl.arange(0, BLOCK_D)
    pointers = q + row[:, None] + cols[None, :]
    if D < BLOCK_D:
        rows = tl.load(pointers, mask=cols[None, :] < D, other=0.0)
    else:
        rows = tl.load(pointers)  # choice 0 stands in beyond the end
    partial_row = token * (group_heads * KS) + (within - first_head * KS)
    return rows, partial_row, valid


@triton.jit
def _store_partial(o_partial, lse_partial, partial_row, valid, acc, m, l, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Writes the normalised partial results."""
    cols = tl.arange(0, BLOCK_DV)
    o = acc * (1.0 / l)[:, None]
    tl.store(o_partial + partial_row[:, None] * DV + cols[None, :], o.to(o_partial.dtype.element_ty),
             mask=valid[:, None] & (cols[None, :] < DV))
    tl.store(lse_partial + partial_row, m + tl.log2(l), mask=valid)


@triton.jit(do_not_specialize=["num_chunks", "num_sequences", "kv_head_begin", "kv_head_end"])
def _attention_fwd_sparse_kernel(
    q, k, v, indices, tile_csr_row, tile_begin, tile_end, tile_indptr, cu_seqlens_k, o_partial, lse_partial,
    qk_scale, num_chunks, num_sequences, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
    USE_TMA: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROW_STAGES: tl.constexpr = 0,
):
    """A run of indices of one (chunk, kv head): with ROW_STAGES the chunk's keys and values, which are one tile, stay,
    and the query rows stream past; else BLOCK_M query rows stay."""
    tile = tl.program_id(0) + tl.load(tile_indptr + kv_head_begin * num_chunks)
    end_tile = tl.load(tile_indptr + kv_head_end * num_chunks)
    here = tl.minimum(tile, end_tile - 1)  # so that the table's loads need not wait for end_tile's
    csr_row = tl.load(tile_csr_row + here)
    begin = tl.load(tile_begin + here)
    end = tl.load(tile_end + here)
    if (tile >= end_tile) | (begin >= end):
        return
    kv_head = csr_row // num_chunks
    first_key, _ = _chunk_keys(cu_seqlens_k, num_sequences, CHUNK, csr_row % num_chunks)
    group_heads = (kv_head_end - kv_head_begin) * G
    RAGGED: tl.constexpr = CHUNK % BLOCK_N != 0
    end_key = first_key + CHUNK
    if ROW_STAGES:
        k_rows = _load_keys(k, first_key, end_key, kv_head, stride_kt, stride_kh, D, BLOCK_N, BLOCK_D, USE_TMA, RAGGED)
        v_rows = _load_keys(v, first_key, end_key, kv_head, stride_vt, stride_vh, DV, BLOCK_N, BLOCK_DV, USE_TMA,
                            RAGGED)
        # the stages by name: else only what feeds a dot is loaded ahead, and not the indices that the stores need
        for first in tl.range(begin, end, BLOCK_M, num_stages=ROW_STAGES):
            q_rows, partial_row, valid = _gather_queries(q, indices, first, end, kv_head_begin * G, group_heads,
                                                         stride_qt, stride_qh, H, KS, SHARED, D, BLOCK_M, BLOCK_D, WIDE)
            s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if RAGGED:
                s = tl.where(tl.arange(0, BLOCK_N)[None, :] < CHUNK, s, -float("inf"))
            m = tl.max(s, 1) * qk_scale
            p = tl.exp2(s * qk_scale - m[:, None])
            acc = tl.dot(p.to(v_rows.dtype), v_rows, input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV]
            _store_partial(o_partial, lse_partial, partial_row, valid, acc, m, tl.sum(p, 1), DV, BLOCK_DV)
    else:
        q_rows, partial_row, valid = _gather_queries(q, indices, begin, end, kv_head_begin * G, group_heads, stride_qt,
                                                     stride_qh, H, KS, SHARED, D, BLOCK_M, BLOCK_D, WIDE)
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for first in range(0, CHUNK, BLOCK_N):
            k_rows = _load_keys(k, first_key + first, end_key, kv_head, stride_kt, stride_kh, D, BLOCK_N, BLOCK_D,
                                USE_TMA, RAGGED)
            s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            if RAGGED:
                s = tl.where(first + tl.arange(0, BLOCK_N)[None, :] < CHUNK, s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
            p = tl.exp2(s * qk_scale - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, 1)
            v_rows = _load_keys(v, first_key + first, end_key, kv_head, stride_vt, stride_vh, DV, BLOCK_N, BLOCK_DV,
                                USE_TMA, RAGGED)
            acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
        _store_partial(o_partial, lse_partial, partial_row, valid, acc, m, l, DV, BLOCK_DV)


@triton.jit
def _diagonal_step(acc, m, l, q_rows, k, v, k_row, k_end, kv_head, keep_from, keep_to, first, qk_scale,
              stride_kt, stride_kh, stride_vt, stride_vh, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """One tile of keys; where MASKED a row keeps the key positions ``keep_from .. keep_to``, both included."""
    k_rows = _load_keys(k, k_row + first, k_end, kv_head, stride_kt, stride_kh, D, BLOCK_N, BLOCK_D, False, MASKED)
    s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
    if MASKED:
        position = first + tl.arange(0, BLOCK_N)
        keep = (position[None, :] >= keep_from[:, None]) & (position[None, :] <= keep_to[:, None])
        s = tl.where(keep, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    if MASKED:  # a row whose chunk begins after this tile has seen no key yet
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    else:
        shift = m_new
    p = tl.exp2(s * qk_scale - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    v_rows = _load_keys(v, k_row + first, k_end, kv_head, stride_vt, stride_vh, DV, BLOCK_N, BLOCK_DV, False, MASKED)
    acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l


@triton.jit
def _merge_partial(selected, o_partial, lse_partial, first_row, head_in_group, list_row, group_row, valid,
                   KS: tl.constexpr, BLOCK_KS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
                   BLOCK_M: tl.constexpr, USE_TMA: tl.constexpr):
    """Each row's partial results together, as a step leaves them: sums, maximum, and the weights' sum. All log-sum-exps
    are read first: then loads of o do not wait for each other."""
    j = tl.arange(0, BLOCK_KS)[None, :]
    chosen = tl.load(selected + list_row[:, None] * KS + j, mask=valid[:, None] & (j < KS), other=-1) >= 0
    partial_lse = tl.load(lse_partial + group_row[:, None] * KS + j, mask=chosen, other=-float("inf"))
    m = tl.max(partial_lse, 1)
    shift = tl.where(m == -float("inf"), 0.0, m)  # a row may have chosen nothing
    l = tl.sum(tl.exp2(partial_lse - shift[:, None]), 1)
    cols = tl.arange(0, BLOCK_DV)
    merged = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in tl.range(0, KS, num_stages=3):  # without a count of stages only loads for a dot are pipelined
        chosen_i = tl.load(selected + list_row * KS + i, mask=valid, other=-1) >= 0
        lse_i = tl.load(lse_partial + group_row * KS + i, mask=chosen_i, other=-float("inf"))
        if USE_TMA:
            o_i = o_partial.load([first_row, head_in_group, i * DV]).reshape(BLOCK_M, BLOCK_DV)
            o_i = tl.where(chosen_i[:, None], o_i, 0.0)  # what nobody wrote may be anything
        else:
            o_i = tl.load(o_partial + (group_row * KS + i)[:, None] * DV + cols[None, :],
                          mask=chosen_i[:, None] & (cols[None, :] < DV), other=0.0)
        merged += tl.exp2(lse_i - shift)[:, None] * o_i.to(tl.float32)
    return merged, m, l


@triton.jit(do_not_specialize=["num_tiles", "num_segments", "chunk_size", "first_head", "group_heads"])
def _attention_fwd_diagonal_kernel(
    q, k, v, selected, o_partial, lse_partial, o, lse, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets,
    qk_scale, num_tiles, num_segments, chunk_size, first_head, group_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, SHARED: tl.constexpr, BLOCK_KS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of one segment and head: their partial results together, then their diagonal chunks."""
    tile = num_tiles - 1 - tl.program_id(0) // group_heads  # later tiles may have more keys: they start first
    head_in_group = tl.program_id(0) % group_heads
    head = first_head + head_in_group
    first_row, q_end, first_position, k_row, _ = _query_tile(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments,
                                                             chunk_size, tile, BLOCK_M)
    if first_row >= q_end:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < q_end
    row = rows.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    LATE: tl.constexpr = (q.dtype.element_ty == tl.float32) & (PRECISION == "ieee")  # or they fill the registers
    if not LATE:
        q_rows = tl.load(q + _offset(head, stride_qh) + _offset(rows, stride_qt)[:, None] + cols[None, :],
                         mask=valid[:, None] & (cols[None, :] < D), other=0.0)

    position = first_position + tl.minimum(rows, q_end - 1) - first_row  # in the sequence
    last_position = first_position + q_end - 1 - first_row
    chunk_begin = position // chunk_size * chunk_size
    key_begin = first_position // chunk_size * chunk_size
    one_chunk = last_position // chunk_size == first_position // chunk_size
    clear = tl.where(one_chunk, (first_position + 1 - key_begin) // BLOCK_N * BLOCK_N, 0)  # keys that every row sees

    if KS > 0:  # first: two sums at once would not fit in registers
        acc, m, l = _merge_partial(selected, o_partial, lse_partial, first_row, head_in_group,
                                   (row * H + head) // SHARED, row * group_heads + head_in_group, valid, KS, BLOCK_KS,
                                   DV, BLOCK_DV, BLOCK_M, USE_TMA)
    else:
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if LATE:
        q_rows = tl.load(q + _offset(head, stride_qh) + _offset(rows, stride_qt)[:, None] + cols[None, :],
                         mask=valid[:, None] & (cols[None, :] < D), other=0.0)
    k_end = k_row + last_position + 1
    for first in range(key_begin, key_begin + clear, BLOCK_N):
        acc, m, l = _diagonal_step(acc, m, l, q_rows, k, v, k_row, k_end, head // G, chunk_begin, position, first,
                                   qk_scale, stride_kt, stride_kh, stride_vt, stride_vh, D, DV, BLOCK_N, BLOCK_D,
                                   BLOCK_DV, PRECISION, MASKED=False)
    for first in range(key_begin + clear, last_position + 1, BLOCK_N):
        acc, m, l = _diagonal_step(acc, m, l, q_rows, k, v, k_row, k_end, head // G, chunk_begin, position, first,
                                   qk_scale, stride_kt, stride_kh, stride_vt, stride_vh, D, DV, BLOCK_N, BLOCK_D,
                                   BLOCK_DV, PRECISION, MASKED=True)
    cols_v = tl.arange(0, BLOCK_DV)
    tl.store(o + (row * H + head)[:, None] * DV + cols_v[None, :], (acc * (1.0 / l)[:, None]).to(o.dtype.element_ty),
             mask=valid[:, None] & (cols_v[None, :] < DV))
    tl.store(lse + row * H + head, (m + tl.log2(l)) * 0.6931471805599453, mask=valid)
