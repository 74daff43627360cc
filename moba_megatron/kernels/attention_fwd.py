"""Attention forward: gathered rows against selected chunks, then the diagonal chunk and the merge of all parts.

What one (query, head) got from one selected chunk is a normalised partial o and its log-sum-exp, for one group of kv
heads at a time (``workspace.py``). Inside the kernels everything is in powers of two.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..segments import Routing, Segments
from . import sm90, tuning
from .bounds import clear_rows
from .host import INTERPRETED, head_block, next_power_of_2, precision
from .jit_helpers import _chunk_keys, _offset, _query_tile
from .launcher import launch
from .routing import Tiles, make_tiles, route
from .tuning_table import is_gluon
from .workspace import head_groups

MAX_HEAD_DIM = 256


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, segments: Segments, softmax_scale: float,
                  routing: Routing | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the diagonal chunk and the selected ones, keys at or before the query.

    With ``(o_j, lse_j)`` the attention over one chunk alone: ``lse = log sum_j exp(lse_j)`` and
    ``o = sum_j exp(lse_j - lse) o_j``.

    Args:
        q: ``[T, H, D]``, bf16, fp16 or fp32 (products in tf32x3); any strides, D and DV at most 256.
        k: ``[S, HK, D]``.
        v: ``[S, HK, DV]``.
        selected: int32 ``[T, H, topk - 1]``, ids of full, earlier chunks, -1 for none.
        segments: places the queries among the keys.
        softmax_scale: multiplies the scores.
        routing: of ``selected``; None to make it here.

    Returns:
        o ``[T, H, DV]`` in q's dtype; lse ``[T, H]``, fp32, natural log; 0 and -inf for rows of no segment.

    Raises:
        TypeError: fp64. ValueError: a head dim above 256, chunks below 16, or 2^31 rows (token, head).
    """
    _check(q, v, selected, segments)
    if softmax_scale < 0:  # the running maximum is taken before the scale
        q, softmax_scale = -q, -softmax_scale
    qk_scale = max(softmax_scale, 1e-30) * math.log2(math.e)  # 0 would turn a masked -inf into NaN
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    total_q, num_heads, _ = q.shape
    num_kv_heads, choices = k.shape[1], selected.shape[2]
    o = torch.empty(total_q, num_heads, v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(total_q, num_heads, dtype=torch.float32, device=q.device)
    if total_q == 0:
        return o, lse
    if not segments.exact:
        clear_rows(segments.cu_seqlens_q, (o, 0), (lse, -math.inf))
    if choices == 0:
        _diagonal_merge(q, k, v, selected, None, None, o, lse, segments, qk_scale, (0, num_kv_heads))
        return o, lse
    selected = selected.contiguous()
    options = _sparse_config(q, k, v, segments.chunk_size, selected.numel())
    if routing is None:
        routing = route(selected, num_kv_heads, segments.num_chunks(k.shape[0]))
    tiles = make_tiles(routing, options["SPLIT"])
    rows_per_head = total_q * (num_heads // num_kv_heads) * choices
    groups = head_groups(num_kv_heads, rows_per_head * (v.shape[2] * q.element_size() + 4))
    rows = rows_per_head * (groups[0][1] - groups[0][0])
    o_partial = torch.empty(rows, v.shape[2], dtype=q.dtype, device=q.device)
    lse_partial = torch.empty(rows, dtype=torch.float32, device=q.device)
    for group in groups:
        _sparse(q, k, v, routing, tiles, o_partial, lse_partial, segments, qk_scale, choices, group, options)
        _diagonal_merge(q, k, v, selected, o_partial, lse_partial, o, lse, segments, qk_scale, group)
    return o, lse


def _check(q: Tensor, v: Tensor, selected: Tensor, segments: Segments) -> None:
    if q.dtype == torch.float64:
        raise TypeError("q must be bfloat16, float16 or float32 for the Triton kernels, got float64: "
                        "use backend='reference'")
    if max(q.shape[2], v.shape[2]) > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM} for the Triton kernels, got {q.shape[2]} for q and "
                         f"k, {v.shape[2]} for v: use backend='reference'")
    rows = max(q.shape[0] * q.shape[1], (v.shape[0] + segments.num_sequences) * v.shape[1])
    if rows >= 2 ** 31:  # numbers of rows (token, head) and of CSR rows (kv head, chunk) are 32 bits wide
        raise ValueError(f"tokens times heads must be below 2^31 for the Triton kernels, got {rows}: use fewer tokens")
    if segments.chunk_size < 16 and selected.shape[2]:
        raise ValueError(f"chunk_size must be at least 16 for the Triton kernels, got {segments.chunk_size}: "
                         "use backend='reference'")


def _sparse_config(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, choices: int) -> dict[str, int]:
    """The sparse pass's configuration, with SPLIT (rows a program) and RESIDENT (a chunk's keys fit one tile)."""
    options = tuning.config("attention_fwd", q.device, head_dim=max(q.shape[2], v.shape[2]), chunk_size=chunk_size,
                            ragged=chunk_size % 64, itemsize=q.element_size(), gluon=sm90.takes(q, k, v))
    if is_gluon(options):
        return {**options, "SPLIT": sm90.rows_per_program(options, choices)}
    options["RESIDENT"] = options["BLOCK_N"] >= chunk_size
    if options["RESIDENT"]:
        return {"SPLIT": 16 * options["BLOCK_M"], "ROW_STAGES": options["num_stages"], **options}
    return {**options, "SPLIT": options["BLOCK_M"]}


def tma_available(device: torch.device) -> bool:
    """Whether tensor descriptors are faster than pointers here: from Hopper on."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def _key_source(x: Tensor, block_n: int, use_tma: bool) -> Tensor | TensorDescriptor:
    """x ``[S, HK, D]`` itself, or a descriptor of ``[HK, S, D]`` whose tiles are padded with zeros beyond D."""
    if not use_tma:
        return x
    total, heads, dim = x.shape
    stride_head = x.stride(1) if heads > 1 else total * x.stride(0)
    return TensorDescriptor(x, [heads, total, dim], [stride_head, x.stride(0), 1],
                            [1, block_n, head_block(dim)])


def _describable(x: Tensor) -> bool:
    strides = x.stride()[:2] if x.shape[1] > 1 else x.stride()[:1]
    return (x.element_size() == 2 and x.data_ptr() % 16 == 0 and x.stride(0) > 0
            and all(s * x.element_size() % 16 == 0 for s in strides))


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset in elements can leave int32."""
    return any(sum((n - 1) * s for n, s in zip(x.shape, x.stride())) >= 2 ** 31 for x in tensors)


def _sparse(q: Tensor, k: Tensor, v: Tensor, routing: Routing, tiles: Tiles, o_partial: Tensor, lse_partial: Tensor,
            segments: Segments, qk_scale: float, choices: int, group: tuple[int, int], options: dict[str, int]) -> None:
    """Fills the partial o and lse of one group of kv heads."""
    if is_gluon(options):
        sm90.kernel_module("attention_fwd").attention_fwd_sparse(q, k, v, routing, tiles, o_partial, lse_partial,
                                                                 segments, qk_scale, choices, group, options)
        return
    options = dict(options)
    resident, split = options.pop("RESIDENT"), options.pop("SPLIT")
    size, num_chunks = segments.chunk_size, segments.num_chunks(k.shape[0])
    heads_per_kv, kv_heads = q.shape[1] // k.shape[1], group[1] - group[0]
    use_tma = (size % options["BLOCK_N"] == 0 and tma_available(q.device) and _describable(k) and _describable(v))
    kernel = _attention_fwd_resident_kernel if resident else _attention_fwd_sparse_kernel
    bound = q.shape[0] * heads_per_kv * kv_heads * choices // split + num_chunks * kv_heads + 1
    launch(kernel, (bound,),
        q,
        _key_source(k, options["BLOCK_N"], use_tma),
        _key_source(v, options["BLOCK_N"], use_tma),
        routing.indices,
        tiles.csr_row,
        tiles.begin,
        tiles.end,
        tiles.indptr,
        segments.cu_seqlens_k,
        o_partial,
        lse_partial,
        qk_scale,
        num_chunks,
        segments.num_sequences,
        *group,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        H=q.shape[1],
        G=heads_per_kv,
        KS=choices,
        D=q.shape[2],
        DV=v.shape[2],
        BLOCK_D=head_block(q.shape[2]),
        BLOCK_DV=head_block(v.shape[2]),
        CHUNK=size,
        USE_TMA=use_tma,
        WIDE=_wide(q, o_partial) or routing.indices.dtype == torch.int64,
        PRECISION=precision(q.dtype),
        **options,
    )


def _diagonal_merge(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, o_partial: Tensor | None,
                    lse_partial: Tensor | None, o: Tensor, lse: Tensor, segments: Segments, qk_scale: float,
                    group: tuple[int, int]) -> None:
    """Writes o and lse of one group of kv heads."""
    heads_per_kv, choices = q.shape[1] // k.shape[1], selected.shape[2]
    options = tuning.config("attention_fwd_diagonal", q.device, head_dim=max(q.shape[2], v.shape[2]),
                            chunk_size=segments.chunk_size, itemsize=q.element_size(), choices=choices)
    num_tiles = q.shape[0] // options["BLOCK_M"] + segments.num_segments
    group_heads = (group[1] - group[0]) * heads_per_kv
    use_tma = choices > 0 and tma_available(q.device) and v.shape[2] % 8 == 0 and v.element_size() == 2
    if use_tma:
        width = choices * v.shape[2]
        o_partial = TensorDescriptor(o_partial, [q.shape[0], group_heads, width], [group_heads * width, width, 1],
                                   [options["BLOCK_M"], 1, head_block(v.shape[2])])
    launch(_attention_fwd_diagonal_kernel, (num_tiles * group_heads,),
        q,
        k,
        v,
        selected,
        o_partial,
        lse_partial,
        o,
        lse,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.seq_ids,
        segments.offsets,
        qk_scale,
        num_tiles,
        segments.num_segments,
        segments.chunk_size,
        group[0] * heads_per_kv,
        group_heads,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        H=q.shape[1],
        G=heads_per_kv,
        KS=choices,
        BLOCK_KS=next_power_of_2(choices) if choices else 1,
        D=q.shape[2],
        DV=v.shape[2],
        BLOCK_D=head_block(q.shape[2]),
        BLOCK_DV=head_block(v.shape[2]),
        USE_TMA=use_tma,
        PRECISION=precision(q.dtype),
        **options,
    )


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
                    KS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                    WIDE: tl.constexpr):
    """The query rows of indices ``begin .. begin + BLOCK_M``, where their results go, which are before ``end``."""
    index = begin + tl.arange(0, BLOCK_M)
    valid = index < end
    choice = tl.load(indices + index, mask=valid, other=0)
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
def _attention_fwd_resident_kernel(
    q, k, v, indices, tile_csr_row, tile_begin, tile_end, tile_indptr, cu_seqlens_k, o_partial, lse_partial,
    qk_scale, num_chunks, num_sequences, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
    USE_TMA: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, ROW_STAGES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A run of indices of one (chunk, kv head): the chunk's keys and values stay, the query rows stream past."""
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
    RAGGED: tl.constexpr = CHUNK < BLOCK_N
    k_rows = _load_keys(k, first_key, first_key + CHUNK, kv_head, stride_kt, stride_kh, D, BLOCK_N, BLOCK_D, USE_TMA,
                        RAGGED)
    v_rows = _load_keys(v, first_key, first_key + CHUNK, kv_head, stride_vt, stride_vh, DV, BLOCK_N, BLOCK_DV, USE_TMA,
                        RAGGED)
    # the stages by name: else only what feeds a dot is loaded ahead, and not the indices that the stores need
    for first in tl.range(begin, end, BLOCK_M, num_stages=ROW_STAGES):
        q_rows, partial_row, valid = _gather_queries(q, indices, first, end, kv_head_begin * G, group_heads, stride_qt,
                                                     stride_qh, H, KS, D, BLOCK_M, BLOCK_D, WIDE)
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if RAGGED:
            s = tl.where(tl.arange(0, BLOCK_N)[None, :] < CHUNK, s, -float("inf"))
        m = tl.max(s, 1) * qk_scale
        p = tl.exp2(s * qk_scale - m[:, None])
        acc = tl.dot(p.to(v_rows.dtype), v_rows, input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV]
        _store_partial(o_partial, lse_partial, partial_row, valid, acc, m, tl.sum(p, 1), DV, BLOCK_DV)


@triton.jit(do_not_specialize=["num_chunks", "num_sequences", "kv_head_begin", "kv_head_end"])
def _attention_fwd_sparse_kernel(
    q, k, v, indices, tile_csr_row, tile_begin, tile_end, tile_indptr, cu_seqlens_k, o_partial, lse_partial,
    qk_scale, num_chunks, num_sequences, kv_head_begin, kv_head_end,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
    USE_TMA: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M indices of one (chunk, kv head): the query rows stay, the chunk's keys and values stream past."""
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
    q_rows, partial_row, valid = _gather_queries(q, indices, begin, end, kv_head_begin * G, group_heads, stride_qt,
                                                 stride_qh, H, KS, D, BLOCK_M, BLOCK_D, WIDE)
    RAGGED: tl.constexpr = CHUNK % BLOCK_N != 0
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for first in range(0, CHUNK, BLOCK_N):
        k_rows = _load_keys(k, first_key + first, first_key + CHUNK, kv_head, stride_kt, stride_kh, D, BLOCK_N, BLOCK_D,
                            USE_TMA, RAGGED)
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if RAGGED:
            s = tl.where(first + tl.arange(0, BLOCK_N)[None, :] < CHUNK, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        v_rows = _load_keys(v, first_key + first, first_key + CHUNK, kv_head, stride_vt, stride_vh, DV, BLOCK_N,
                            BLOCK_DV, USE_TMA, RAGGED)
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
def _merge_partial(acc, m, l, selected, o_partial, lse_partial, first_row, head_in_group, row, group_row, valid,
                   KS: tl.constexpr, BLOCK_KS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
                   BLOCK_M: tl.constexpr, USE_TMA: tl.constexpr):
    """Adds each row's partial results, reading all log-sum-exps first: then loads of o do not wait for each other."""
    j = tl.arange(0, BLOCK_KS)
    chosen = tl.load(selected + row[:, None] * KS + j[None, :], mask=valid[:, None] & (j[None, :] < KS), other=-1) >= 0
    partial_lse = tl.load(lse_partial + group_row[:, None] * KS + j[None, :], mask=chosen, other=-float("inf"))
    m_new = tl.maximum(m, tl.max(partial_lse, 1))
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(tl.exp2(partial_lse - m_new[:, None]), 1)
    cols = tl.arange(0, BLOCK_DV)
    merged = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in tl.range(0, KS, num_stages=3):  # without a count of stages only loads for a dot are pipelined
        chosen_i = tl.load(selected + row * KS + i, mask=valid, other=-1) >= 0
        lse_i = tl.load(lse_partial + group_row * KS + i, mask=chosen_i, other=-float("inf"))
        if USE_TMA:
            o_i = o_partial.load([first_row, head_in_group, i * DV]).reshape(BLOCK_M, BLOCK_DV)
            o_i = tl.where(chosen_i[:, None], o_i, 0.0)  # what nobody wrote may be anything
        else:
            o_i = tl.load(o_partial + (group_row * KS + i)[:, None] * DV + cols[None, :],
                          mask=chosen_i[:, None] & (cols[None, :] < DV), other=0.0)
        merged += tl.exp2(lse_i - m_new)[:, None] * o_i.to(tl.float32)
    return acc * alpha[:, None] + merged, m_new, l


@triton.jit(do_not_specialize=["num_tiles", "num_segments", "chunk_size", "first_head", "group_heads"])
def _attention_fwd_diagonal_kernel(
    q, k, v, selected, o_partial, lse_partial, o, lse, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets,
    qk_scale, num_tiles, num_segments, chunk_size, first_head, group_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, BLOCK_KS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of one segment and head: their diagonal chunks, then the merge with their partial results."""
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
    q_rows = tl.load(q + _offset(head, stride_qh) + _offset(rows, stride_qt)[:, None] + cols[None, :],
                     mask=valid[:, None] & (cols[None, :] < D), other=0.0)

    position = first_position + tl.minimum(rows, q_end - 1) - first_row  # in the sequence
    last_position = first_position + q_end - 1 - first_row
    chunk_begin = position // chunk_size * chunk_size
    key_begin = first_position // chunk_size * chunk_size
    one_chunk = last_position // chunk_size == first_position // chunk_size
    clear = tl.where(one_chunk, (first_position + 1 - key_begin) // BLOCK_N * BLOCK_N, 0)  # keys that every row sees

    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    k_end = k_row + last_position + 1
    for first in range(key_begin, key_begin + clear, BLOCK_N):
        acc, m, l = _diagonal_step(acc, m, l, q_rows, k, v, k_row, k_end, head // G, chunk_begin, position, first,
                                   qk_scale, stride_kt, stride_kh, stride_vt, stride_vh, D, DV, BLOCK_N, BLOCK_D,
                                   BLOCK_DV, PRECISION, MASKED=False)
    for first in range(key_begin + clear, last_position + 1, BLOCK_N):
        acc, m, l = _diagonal_step(acc, m, l, q_rows, k, v, k_row, k_end, head // G, chunk_begin, position, first,
                                   qk_scale, stride_kt, stride_kh, stride_vt, stride_vh, D, DV, BLOCK_N, BLOCK_D,
                                   BLOCK_DV, PRECISION, MASKED=True)
    if KS > 0:
        acc, m, l = _merge_partial(acc, m, l, selected, o_partial, lse_partial, first_row, head_in_group,
                                   row * H + head, row * group_heads + head_in_group, valid, KS, BLOCK_KS, DV, BLOCK_DV,
                                   BLOCK_M, USE_TMA)
    cols_v = tl.arange(0, BLOCK_DV)
    tl.store(o + (row * H + head)[:, None] * DV + cols_v[None, :], (acc * (1.0 / l)[:, None]).to(o.dtype.element_ty),
             mask=valid[:, None] & (cols_v[None, :] < DV))
    tl.store(lse + row * H + head, (m + tl.log2(l)) * 0.6931471805599453, mask=valid)
