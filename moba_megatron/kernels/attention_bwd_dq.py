"""Attention backward, dq: gathered rows against selected chunks, then the diagonal chunk and the sum of all parts."""
import triton
import triton.language as tl

from .attention_bwd_dkdv import _gather_rows, _load_rows_where
from .attention_fwd import _load_keys
from .jit_helpers import _choice_row, _chunk_keys, _listed, _offset, _query_tile


@triton.jit(do_not_specialize=["num_chunks", "num_sequences", "kv_head_begin", "kv_head_end"])
def _attention_bwd_dq_kernel(
    q, k, v, do, terms, indices, tile_csr_row, tile_begin, tile_end, tile_indptr, cu_seqlens_k, dq_partial,
    qk_scale, softmax_scale, chunk_size, num_chunks, num_sequences, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, USE_TMA: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """BLOCK_M indices of one (chunk, kv head): the rows stay, the chunk's keys and values stream past."""
    tile = tl.program_id(0) + tl.load(tile_indptr + kv_head_begin * num_chunks)
    if tile >= tl.load(tile_indptr + kv_head_end * num_chunks):
        return
    csr_row = tl.load(tile_csr_row + tile)
    begin, end = tl.load(tile_begin + tile), tl.load(tile_end + tile)
    if begin >= end:  # nothing of the list is here; its chunk may even reach beyond the keys
        return
    index = begin + tl.arange(0, BLOCK_M)
    valid = index < end
    choice = _listed(indices, index, valid, KS, SHARED)
    kv_head = csr_row // num_chunks
    first_key, _ = _chunk_keys(cu_seqlens_k, num_sequences, chunk_size, csr_row % num_chunks)

    row, token, head = _choice_row(choice, kv_head, H, G, KS)
    q_rows = _gather_rows(q, token, head, stride_qt, stride_qh, G, D, BLOCK_D)  # choice 0 stands in beyond the end
    do_rows = _gather_rows(do, token, head, stride_dot, stride_doh, G, DV, BLOCK_DV)
    row_lse = tl.load(terms + row.to(tl.int64) * 4, mask=valid, other=float("inf"))
    row_delta = tl.load(terms + row.to(tl.int64) * 4 + 1, mask=valid, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, chunk_size, BLOCK_N):
        k_rows = _load_keys(k, first_key + first, first_key + chunk_size, kv_head, stride_kt, stride_kh, D, BLOCK_N,
                            BLOCK_D, USE_TMA, RAGGED)
        v_rows = _load_keys(v, first_key + first, first_key + chunk_size, kv_head, stride_vt, stride_vh, DV, BLOCK_N,
                            BLOCK_DV, USE_TMA, RAGGED)
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
        p = tl.exp2(s * qk_scale - row_lse[:, None])
        if RAGGED:
            p = tl.where((first + tl.arange(0, BLOCK_N) < chunk_size)[None, :], p, 0.0)
        dp = tl.dot(do_rows, tl.trans(v_rows), input_precision=PRECISION)
        ds = (p * (dp - row_delta[:, None])).to(k_rows.dtype)
        dq = tl.dot(ds, k_rows, dq, input_precision=PRECISION)
    partial_row = (token * ((kv_head_end - kv_head_begin) * G) + head - kv_head_begin * G) * KS + choice % KS
    cols = tl.arange(0, BLOCK_D)
    tl.store(dq_partial + partial_row[:, None] * D + cols[None, :],
             (dq * softmax_scale).to(dq_partial.dtype.element_ty), mask=valid[:, None] & (cols[None, :] < D))


@triton.jit
def _diagonal_dq_step(dq, q_rows, do_rows, row_lse, row_delta, k, v, k_row, k_end, kv_head, keep_from, keep_to, first,
                      qk_scale, stride_kt, stride_kh, stride_vt, stride_vh, D: tl.constexpr, DV: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
                      MASKED: tl.constexpr):
    """One tile of keys; where MASKED a row keeps the key positions ``keep_from .. keep_to``, both included."""
    k_rows = _load_keys(k, k_row + first, k_end, kv_head, stride_kt, stride_kh, D, BLOCK_N, BLOCK_D, False, MASKED)
    v_rows = _load_keys(v, k_row + first, k_end, kv_head, stride_vt, stride_vh, DV, BLOCK_N, BLOCK_DV, False, MASKED)
    s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
    p = tl.exp2(s * qk_scale - row_lse[:, None])
    if MASKED:
        position = first + tl.arange(0, BLOCK_N)
        keep = (position[None, :] >= keep_from[:, None]) & (position[None, :] <= keep_to[:, None])
        p = tl.where(keep, p, 0.0)
    dp = tl.dot(do_rows, tl.trans(v_rows), input_precision=PRECISION)
    ds = (p * (dp - row_delta[:, None])).to(k_rows.dtype)
    return tl.dot(ds, k_rows, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tiles", "num_segments", "chunk_size", "first_head", "group_heads"])
def _attention_bwd_dq_diagonal_kernel(
    q, k, v, do, terms, selected, dq_partial, dq, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets,
    qk_scale, softmax_scale, num_tiles, num_segments, chunk_size, first_head, group_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of one segment and head: their partial dq in order, then their diagonal chunks."""
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
    LATE: tl.constexpr = (q.dtype.element_ty == tl.float32) & (PRECISION == "ieee")  # or they fill the registers
    if not LATE:
        q_rows = _load_rows_where(q + _offset(head, stride_qh), _offset(rows, stride_qt), valid, D, BLOCK_D)
        do_rows = _load_rows_where(do + _offset(head, stride_doh), _offset(rows, stride_dot), valid, DV, BLOCK_DV)
    row_lse = tl.load(terms + (row * H + head) * 4, mask=valid, other=float("inf"))
    row_delta = tl.load(terms + (row * H + head) * 4 + 1, mask=valid, other=0.0)

    # positions in the sequence
    position = first_position + tl.arange(0, BLOCK_M)
    last_position = first_position + tl.minimum(BLOCK_M, q_end - first_row) - 1
    chunk_begin = position // chunk_size * chunk_size
    key_begin = first_position // chunk_size * chunk_size
    one_chunk = last_position // chunk_size == first_position // chunk_size
    clear = tl.where(one_chunk, (first_position + 1 - key_begin) // BLOCK_N * BLOCK_N, 0)  # keys that every row sees
    k_end = k_row + last_position + 1
    cols = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if KS > 0:  # first: two sums at once would not fit in registers
        group_row = row * group_heads + head_in_group
        for j in tl.range(0, KS, num_stages=3):  # without a count of stages only loads for a dot are pipelined
            chosen = tl.load(selected + (row * H + head) // SHARED * KS + j, mask=valid, other=-1) >= 0
            if USE_TMA:
                part = dq_partial.load([first_row, head_in_group, j * D]).reshape(BLOCK_M, BLOCK_D)
                part = tl.where(chosen[:, None], part, 0.0)  # what nobody wrote may be anything
            else:
                part = tl.load(dq_partial + (group_row * KS + j)[:, None] * D + cols[None, :],
                               mask=chosen[:, None] & (cols[None, :] < D), other=0.0)
            acc += part.to(tl.float32)
        acc *= tl.where(softmax_scale == 0, 0.0, 1 / softmax_scale)
    if LATE:
        q_rows = _load_rows_where(q + _offset(head, stride_qh), _offset(rows, stride_qt), valid, D, BLOCK_D)
        do_rows = _load_rows_where(do + _offset(head, stride_doh), _offset(rows, stride_dot), valid, DV, BLOCK_DV)
    for first in range(key_begin, key_begin + clear, BLOCK_N):
        acc = _diagonal_dq_step(acc, q_rows, do_rows, row_lse, row_delta, k, v, k_row, k_end, head // G, chunk_begin,
                                position, first, qk_scale, stride_kt, stride_kh, stride_vt, stride_vh, D, DV, BLOCK_N,
                                BLOCK_D, BLOCK_DV, PRECISION, MASKED=False)
    for first in range(key_begin + clear, last_position + 1, BLOCK_N):
        acc = _diagonal_dq_step(acc, q_rows, do_rows, row_lse, row_delta, k, v, k_row, k_end, head // G, chunk_begin,
                                position, first, qk_scale, stride_kt, stride_kh, stride_vt, stride_vh, D, DV, BLOCK_N,
                                BLOCK_D, BLOCK_DV, PRECISION, MASKED=True)
    acc *= softmax_scale
    tl.store(dq + (row * H + head)[:, None] * D + cols[None, :], acc.to(dq.dtype.element_ty),
             mask=valid[:, None] & (cols[None, :] < D))
