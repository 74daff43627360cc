"""Attention backward, dk and dv: a tile of keys stays, the rows that attend to it stream past; partial dq too.

A program owns BLOCK_N keys of one (chunk, kv head). It streams the chunk's list of gathered (query, head) rows, then
the queries whose diagonal chunk it is, so that dk and dv are complete and are written once. A list of more than
``split`` rows is cut: every piece writes fp32 partial sums, which a second kernel adds in order. Nothing is atomic.
"""
import triton
import triton.language as tl

from .jit_helpers import (
    _choice_row,
    _chunk_keys,
    _extra_piece,
    _find_piece,
    _listed,
    _lower_bound,
    _offset,
    _partial_row,
    _piece_items,
    _piece_of_list,
)


@triton.jit
def _gather_rows(pointer, token, head, stride_t, stride_h, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of tokens and heads (int64; a scalar head if G is 1), zero beyond D."""
    cols = tl.arange(0, BLOCK_D)
    if G == 1:
        rows = (pointer + _offset(head, stride_h)) + _offset(token, stride_t)[:, None]
    else:
        rows = pointer + (_offset(token, stride_t) + _offset(head, stride_h))[:, None]
    if D < BLOCK_D:
        x = tl.load(rows + cols[None, :], mask=cols[None, :] < D, other=0.0)
    else:
        x = tl.load(rows + cols[None, :])
    return x


@triton.jit
def _load_rows_where(pointer, offsets, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows at int64 ``offsets``, zero where not ``keep`` and beyond D."""
    cols = tl.arange(0, BLOCK_D)
    mask = keep[:, None]
    if D < BLOCK_D:
        mask = mask & (cols[None, :] < D)
    return tl.load(pointer + offsets[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _load_terms(terms, row, BLOCK_M: tl.constexpr):
    """lse, in powers of two, and delta of int64 rows.

    Four columns make this load large enough for the compiler to stage it in shared memory. One value a thread and row
    would be loaded again by every thread that needs it, with its own address.
    """
    x = tl.load(terms + row[:, None] * 4 + tl.arange(0, 4)[None, :])
    lse, delta = tl.split(x.reshape(BLOCK_M, 2, 2))
    lse, _ = tl.split(lse)
    delta, _ = tl.split(delta)
    return lse, delta


@triton.jit
def _weights(k, v, q, do, lse, delta, keep, qk_scale, HAS_KEEP: tl.constexpr, PRECISION: tl.constexpr):
    """p and ds of one block of rows, ``[BLOCK_N, BLOCK_M]``, in the operands' dtype."""
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.exp2(s * qk_scale - lse[None, :])
    if HAS_KEEP:
        p = tl.where(keep, p, 0.0)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # runs while the weights are computed
    ds = p * (dp - delta[None, :])
    return p.to(do.dtype), ds.to(q.dtype)


@triton.jit(do_not_specialize=["num_rows", "num_key_tiles", "num_chunks", "num_sequences", "num_segments",
                               "num_extra", "split", "kv_head_begin", "kv_head_end"])
def _attention_bwd_dkdv_kernel(
    q, k, v, do, terms, indices, indptr, extra_csr_rows,
    cu_seqlens_k, seq_ids, segment_begin, segment_end, offsets, dk, dv, dkdv_partial, dq_partial,
    qk_scale, softmax_scale, num_rows, chunk_size, num_key_tiles, num_chunks, num_sequences, num_segments,
    num_extra, split, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    H: tl.constexpr, HK: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACKED: tl.constexpr, HAS_DQ: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The first ``num_extra * num_key_tiles`` programs take the extra pieces of long lists; HAS_DQ: partial dq too."""
    pid = tl.program_id(0)
    tile = pid % num_key_tiles
    item = pid // num_key_tiles
    first_csr_row = kv_head_begin * num_chunks
    csr_row = first_csr_row + item - num_extra
    piece = item * 0
    if extra_csr_rows is not None:
        if item < num_extra:
            csr_row, piece = _extra_piece(extra_csr_rows, indptr, first_csr_row, kv_head_end * num_chunks, item, split)
            if piece == 0:
                return
    kv_head = csr_row // num_chunks
    chunk = csr_row % num_chunks
    sequence = _find_piece(cu_seqlens_k, num_sequences, chunk_size, chunk)
    chunk_row, chunk_end = _piece_items(cu_seqlens_k, sequence, chunk_size, chunk)
    first_row = chunk_row + tile * BLOCK_N
    if first_row >= chunk_end:
        return
    rows = first_row + tl.arange(0, BLOCK_N)
    key_row = rows.to(tl.int64)
    key_valid = rows < chunk_end
    key_position = rows - tl.load(cu_seqlens_k + sequence)
    k_rows = _load_rows_where(k + _offset(kv_head, stride_kh), _offset(rows, stride_kt), key_valid, D, BLOCK_D)
    v_rows = _load_rows_where(v + _offset(kv_head, stride_vh), _offset(rows, stride_vt), key_valid, DV, BLOCK_DV)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    partial_index = piece.to(tl.int64) * 0 - 1
    if KS > 0:
        begin, count, partial_index = _piece_of_list(indptr, csr_row, first_csr_row, piece, item, num_extra, split,
                                                     extra_csr_rows is not None)
        group_heads = (kv_head_end - kv_head_begin) * G
        indices += begin // SHARED  # pieces begin with whole groups of heads
        lane = tl.arange(0, BLOCK_M)
        choice = _listed(indices, tl.minimum(lane, count - 1), lane * 0 < count, KS, SHARED)  # the last one fills up
        for first in range(0, count, BLOCK_M):
            row, token, head = _choice_row(choice, kv_head, H, G, KS)
            valid = first + lane < count
            q_rows = _gather_rows(q, token, head, stride_qt, stride_qh, G, D, BLOCK_D)
            do_rows = _gather_rows(do, token, head, stride_dot, stride_doh, G, DV, BLOCK_DV)
            row_lse, row_delta = _load_terms(terms, tl.where(valid, row, num_rows).to(tl.int64), BLOCK_M)
            this_choice = choice
            # the next rows are looked up one block ahead: their gathers then need not wait for their numbers
            choice = _listed(indices, tl.minimum(first + BLOCK_M + lane, count - 1), None, KS, SHARED)
            p, ds = _weights(k_rows, v_rows, q_rows, do_rows, row_lse, row_delta, key_valid[:, None], qk_scale,
                             HAS_KEEP=HAS_DQ and RAGGED, PRECISION=PRECISION)
            dv_acc = tl.dot(p, do_rows, dv_acc, input_precision=PRECISION)
            dk_acc = tl.dot(ds, q_rows, dk_acc, input_precision=PRECISION)
            if HAS_DQ:
                dq = tl.dot(tl.trans(ds), k_rows, input_precision=PRECISION) * softmax_scale
                cols = tl.arange(0, BLOCK_D)
                partial_row = _partial_row(this_choice, kv_head, kv_head_begin * G, group_heads, H, G, KS)
                tl.store(dq_partial + partial_row[:, None] * D + cols[None, :], dq.to(dq_partial.dtype.element_ty),
                         mask=valid[:, None] & (cols[None, :] < D))

    if piece == 0:
        first_position = first_row - tl.load(cu_seqlens_k + sequence)
        segment = sequence
        last_segment = sequence
        if not PACKED:
            segment = _lower_bound(seq_ids, num_segments, sequence)
            last_segment = _lower_bound(seq_ids, num_segments, sequence + 1) - 1
        while segment <= last_segment:
            row_begin = tl.load(segment_begin + segment)
            origin = tl.load(offsets + segment)
            low = tl.maximum(origin, first_position)
            high = tl.minimum(origin + tl.load(segment_end + segment) - row_begin,
                              first_position - tile * BLOCK_N + chunk_size)
            blocks = tl.maximum(tl.cdiv(high - low, BLOCK_M), 0)
            for i in range(0, blocks * G):
                head = kv_head * G + i // blocks
                query_position = low + i % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
                valid = query_position < high
                token = row_begin - origin + query_position
                q_rows = _load_rows_where(q + _offset(head, stride_qh), _offset(token, stride_qt), valid, D, BLOCK_D)
                do_rows = _load_rows_where(do + _offset(head, stride_doh), _offset(token, stride_dot), valid, DV,
                                           BLOCK_DV)
                row_lse, row_delta = _load_terms(terms, tl.where(valid, _offset(token, H) + head, num_rows), BLOCK_M)
                p, ds = _weights(k_rows, v_rows, q_rows, do_rows, row_lse, row_delta,
                                 key_position[:, None] <= query_position[None, :], qk_scale, HAS_KEEP=True,
                                 PRECISION=PRECISION)
                dv_acc = tl.dot(p, do_rows, dv_acc, input_precision=PRECISION)
                dk_acc = tl.dot(ds, q_rows, dk_acc, input_precision=PRECISION)
            segment += 1

    dk_acc *= softmax_scale
    cols = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    keep = key_valid[:, None] & (cols[None, :] < D)
    keep_v = key_valid[:, None] & (cols_v[None, :] < DV)
    if extra_csr_rows is not None:
        if partial_index >= 0:
            to = dkdv_partial + (partial_index * chunk_size + rows - chunk_row)[:, None] * (D + DV)
            tl.store(to + cols[None, :], dk_acc, mask=keep)
            tl.store(to + D + cols_v[None, :], dv_acc, mask=keep_v)
    row = (key_row * HK + kv_head)[:, None]
    whole = (key_row * 0 > partial_index)[:, None]
    tl.store(dk + row * D + cols[None, :], dk_acc.to(dk.dtype.element_ty), mask=keep & whole)
    tl.store(dv + row * DV + cols_v[None, :], dv_acc.to(dv.dtype.element_ty), mask=keep_v & whole)


@triton.jit(do_not_specialize=["num_chunks", "num_sequences", "num_extra", "split", "kv_head_begin", "kv_head_end"])
def _attention_bwd_dkdv_sum_kernel(
    indptr, extra_csr_rows, cu_seqlens_k, dkdv_partial, dk, dv,
    chunk_size, num_chunks, num_sequences, num_extra, split, kv_head_begin, kv_head_end,
    HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the partial sums of one cut list in the order of its pieces, and writes dk and dv."""
    first_extra = tl.program_id(0)
    csr_row, piece = _extra_piece(extra_csr_rows, indptr, kv_head_begin * num_chunks, kv_head_end * num_chunks,
                                first_extra, split)
    if piece != 1:
        return
    first_row, _ = _chunk_keys(cu_seqlens_k, num_sequences, chunk_size, csr_row % num_chunks)  # listed chunks are full
    in_chunk = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    cols_v = tl.arange(0, BLOCK_DV)
    keep = (in_chunk < chunk_size)[:, None] & (cols[None, :] < D)
    keep_v = (in_chunk < chunk_size)[:, None] & (cols_v[None, :] < DV)
    at = dkdv_partial + ((num_extra + first_extra).to(tl.int64) * chunk_size + in_chunk)[:, None] * (D + DV)
    dk_acc = tl.load(at + cols[None, :], mask=keep, other=0.0)
    dv_acc = tl.load(at + D + cols_v[None, :], mask=keep_v, other=0.0)
    length = (tl.load(indptr + csr_row + 1) - tl.load(indptr + csr_row)).to(tl.int32)
    for piece in range(1, tl.cdiv(length, split)):
        at = dkdv_partial + ((first_extra + piece - 1).to(tl.int64) * chunk_size + in_chunk)[:, None] * (D + DV)
        dk_acc += tl.load(at + cols[None, :], mask=keep, other=0.0)
        dv_acc += tl.load(at + D + cols_v[None, :], mask=keep_v, other=0.0)
    to = ((first_row + in_chunk).to(tl.int64) * HK + csr_row // num_chunks)[:, None]
    tl.store(dk + to * D + cols[None, :], dk_acc.to(dk.dtype.element_ty), mask=keep)
    tl.store(dv + to * DV + cols_v[None, :], dv_acc.to(dv.dtype.element_ty), mask=keep_v)
