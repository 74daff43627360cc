"""Decoding: one query a sequence over a key/value cache, contiguous or paged; gate, attention to pieces, merge.

Three launches, none of which asks the host anything, so that a step captures into a CUDA graph:
1. a program for each (sequence, kv head): its query heads' scores of the means, exact top-k; where the query opens a
   new chunk, the mean of the chunk before it, which its last key has completed;
2. a program for each (sequence, kv head, choice of one of its query heads, piece of the chunk). Query heads that share
   a kv head and chose the same chunk are served by the first of them: a chunk is read once, not once a head;
3. a program for each (sequence, query head): the merge of its pieces.
"""
import math

import torch
import triton
import triton.language as tl

from ..segments import SUM_BLOCK
from . import tuning
from .chunk_means import _mean
from .host import INTERPRETED, cdiv, head_block, next_power_of_2, precision
from .jit_helpers import _offset
from .launcher import Buffer, empty, launch, stage

MEAN_LANES = 8  # blocks of SUM_BLOCK rows that a program sums side by side for a mean
HEADS_A_GATE = 16  # query heads of a kv head that a program scores with the same means: the fewest of a tensor core
INTERPRETER_PROCESSORS = 4


@stage
def cache_means(k_cache: Buffer, means_cache: Buffer, cache_seqlens: Buffer, chunk_size: int, *,
                block_table: Buffer | None = None, cache_starts: Buffer | None = None) -> None:
    """As :func:`moba_megatron.reference.decode.cache_means`: the same bits as ``chunk_means``; any strides."""
    rows_a_sequence = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    num_chunks = min(means_cache.shape[1], rows_a_sequence // chunk_size)
    if 0 in (num_chunks, means_cache.shape[0]):
        return
    num_kv_heads, head_dim = k_cache.shape[2:]
    launch(_decode_means_kernel, (means_cache.shape[0] * num_chunks * num_kv_heads,),
           **_arguments(cache_seqlens, block_table, cache_starts, k=k_cache, means=means_cache),
           num_chunks=num_chunks, chunk_size=chunk_size, HK=num_kv_heads, D=head_dim, BLOCK_D=next_power_of_2(head_dim),
           SUM_BLOCK=SUM_BLOCK, MEAN_LANES=MEAN_LANES, num_warps=4)


@stage
def decode_gate(q: Buffer, k_cache: Buffer, means_cache: Buffer, cache_seqlens: Buffer, chunk_size: int, topk: int, *,
                block_table: Buffer | None = None, cache_starts: Buffer | None = None) -> Buffer:
    """As :func:`moba_megatron.reference.decode.decode_gate`, the chosen chunks in no particular order."""
    batch, num_heads, head_dim = q.shape
    selected = empty((batch, num_heads, topk - 1), torch.int32, q.device)
    if selected.numel() == 0:
        return selected
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    options = tuning.config("decode_gate", q.device, head_dim=head_dim, itemsize=q.dtype.itemsize)
    launch(_decode_gate_kernel, (batch * num_kv_heads * cdiv(group, HEADS_A_GATE),),
           **_arguments(cache_seqlens, block_table, cache_starts, q=q, k=k_cache, means=means_cache),
           selected=selected, chunk_size=chunk_size, HK=num_kv_heads, G=group, BLOCK_G=HEADS_A_GATE, KS=topk - 1,
           BLOCK_KS=next_power_of_2(topk - 1), D=head_dim, BLOCK_D=head_block(head_dim), SUM_BLOCK=SUM_BLOCK,
           MEAN_LANES=MEAN_LANES, PRECISION=precision(q.dtype), **options)
    return selected


@stage
def decode_attention(q: Buffer, k_cache: Buffer, v_cache: Buffer, selected: Buffer, cache_seqlens: Buffer,
                     chunk_size: int, softmax_scale: float, *, block_table: Buffer | None = None,
                     cache_starts: Buffer | None = None) -> tuple[Buffer, Buffer]:
    """As :func:`moba_megatron.reference.decode.decode_attention`; products of fp32 are :data:`.host.FP32_PRODUCTS`."""
    if q.dtype == torch.float64:
        raise TypeError("q must be bfloat16, float16 or float32 for the Triton kernels, got float64: "
                        "use backend='torch'")
    batch, num_heads, head_dim = q.shape
    num_kv_heads, dim_v, choices = k_cache.shape[2], v_cache.shape[3], selected.shape[2]
    o = empty((batch, num_heads, dim_v), q.dtype, q.device)
    lse = empty((batch, num_heads), torch.float32, q.device)
    if batch == 0:
        return o, lse
    group, shared = num_heads // num_kv_heads, num_heads // selected.shape[1]
    options = tuning.config("decode", q.device, head_dim=max(head_dim, dim_v), itemsize=q.dtype.itemsize)
    candidates = batch * num_kv_heads * (group // shared * choices + 1)
    # as many pieces of a chunk as it takes for PROGRAMS a processor to exist, and the keys of a piece
    processors = (INTERPRETER_PROCESSORS if INTERPRETED
                  else torch.cuda.get_device_properties(q.device).multi_processor_count)
    wanted = min(max(1, options.pop("PROGRAMS") * processors // candidates), cdiv(chunk_size, options["BLOCK_N"]))
    piece_keys = cdiv(cdiv(chunk_size, wanted), options["BLOCK_N"]) * options["BLOCK_N"]
    pieces = cdiv(chunk_size, piece_keys)
    partial_rows = (choices + 1) * pieces
    o_partial = empty((batch * num_heads * partial_rows, dim_v), torch.float32, q.device)
    lse_partial = empty((batch * num_heads * partial_rows,), torch.float32, q.device)
    launch(_decode_attention_kernel, (candidates * pieces,),
           **_arguments(cache_seqlens, block_table, cache_starts, q=q, k=k_cache, v=v_cache), selected=selected,
           o_partial=o_partial, lse_partial=lse_partial, qk_scale=softmax_scale * math.log2(math.e),
           chunk_size=chunk_size, pieces=pieces, piece_keys=piece_keys, HK=num_kv_heads, G=group,
           BLOCK_G=head_block(group), SHARED=shared, KS=choices, BLOCK_KS=next_power_of_2(max(1, choices)), D=head_dim,
           BLOCK_D=head_block(head_dim), DV=dim_v, BLOCK_DV=head_block(dim_v), PRECISION=precision(q.dtype), **options)
    launch(_decode_merge_kernel, (batch * num_heads,), selected, o_partial, lse_partial, o, lse, pieces, SHARED=shared,
           KS=choices, DV=dim_v, BLOCK_DV=next_power_of_2(dim_v),
           BLOCK_S=min(32, max(2, next_power_of_2(partial_rows))), num_warps=4)
    return o, lse


def _arguments(cache_seqlens: Buffer, block_table: Buffer | None, starts: Buffer | None, **tensors: Buffer) -> dict:
    """Queries ``[B, H, D]`` and caches ``[B, S, HK, D]`` with their strides, and where a sequence's rows are, for the
    kernels; a pointer that a kernel does not read is any."""
    strides = {f"stride_{name[0]}{dim}": x.stride(i) for name, x in tensors.items()
               for i, dim in enumerate("bhd" if len(x.shape) == 3 else "bth" if name == "means" else "bthd")}
    page_size = 0 if block_table is None else tensors["k"].shape[1]  # 0: contiguous
    table = cache_seqlens if block_table is None else block_table
    return {**tensors, **strides, "cache_seqlens": cache_seqlens, "block_table": table, "PAGE_SIZE": page_size,
            "stride_table": table.stride(0) if page_size else 0, "HAS_STARTS": starts is not None,
            "cache_starts": cache_seqlens if starts is None else starts}


@triton.jit
def _row_offsets(block_table, sequence, row, stride_b, stride_t, stride_table, PAGE_SIZE: tl.constexpr):
    """Offsets, in elements, of rows of one sequence's part of a cache; int64."""
    if PAGE_SIZE > 0:
        page = tl.load(block_table + _offset(sequence, stride_table) + row // PAGE_SIZE)
        offsets = _offset(page, stride_b) + _offset(row % PAGE_SIZE, stride_t)
    else:
        offsets = _offset(sequence, stride_b) + _offset(row, stride_t)
    return offsets


@triton.jit
def _chunk_mean(k, block_table, cache_starts, sequence, chunk, chunk_size, kv_head, stride_b, stride_t, stride_h,
                stride_d, stride_table, D: tl.constexpr, BLOCK_D: tl.constexpr, SUM_BLOCK: tl.constexpr,
                MEAN_LANES: tl.constexpr, HAS_STARTS: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Mean ``[BLOCK_D]``, fp32, of the keys of a full chunk, added as ``chunk_means`` adds them."""
    first = chunk * chunk_size
    if HAS_STARTS:
        first += tl.load(cache_starts + sequence)
    col = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, MEAN_LANES)
    total = tl.zeros([BLOCK_D], tl.float32)
    k += _offset(kv_head, stride_h)
    for begin in range(0, chunk_size, MEAN_LANES * SUM_BLOCK):
        sums = tl.zeros([MEAN_LANES, BLOCK_D], tl.float32)
        for i in tl.range(0, tl.minimum(SUM_BLOCK, chunk_size), loop_unroll_factor=8):
            row = begin + lane * SUM_BLOCK + i
            inside = row < chunk_size
            at = _row_offsets(block_table, sequence, tl.where(inside, first + row, first), stride_b, stride_t,
                              stride_table, PAGE_SIZE)
            sums += tl.load(k + at[:, None] + _offset(col, stride_d)[None, :],
                            mask=inside[:, None] & (col < D)[None, :], other=0.0).to(tl.float32)
        for i in tl.static_range(MEAN_LANES):
            total += tl.sum(tl.where((lane == i)[:, None], sums, 0.0), 0)  # picks out one row, exactly
    return _mean(total, chunk_size)


@triton.jit(do_not_specialize=["num_chunks", "chunk_size", "stride_table"])
def _decode_means_kernel(k, means, cache_seqlens, block_table, cache_starts, num_chunks, chunk_size, stride_kb,
                         stride_kt, stride_kh, stride_kd, stride_mb, stride_mt, stride_mh, stride_table,
                         HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SUM_BLOCK: tl.constexpr,
                         MEAN_LANES: tl.constexpr, HAS_STARTS: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The mean of one chunk of one sequence and kv head, if the chunk is full."""
    kv_head = tl.program_id(0) % HK
    chunk = tl.program_id(0) // HK % num_chunks
    sequence = tl.program_id(0) // HK // num_chunks
    if (chunk + 1) * chunk_size > tl.load(cache_seqlens + sequence):
        return
    mean = _chunk_mean(k, block_table, cache_starts, sequence, chunk, chunk_size, kv_head, stride_kb, stride_kt,
                       stride_kh, stride_kd, stride_table, D, BLOCK_D, SUM_BLOCK, MEAN_LANES, HAS_STARTS, PAGE_SIZE)
    col = tl.arange(0, BLOCK_D)
    to = means + _offset(sequence, stride_mb) + _offset(chunk, stride_mt) + _offset(kv_head, stride_mh)
    tl.store(to + col, mean.to(means.dtype.element_ty), mask=col < D)


@triton.jit
def _sort_keys(score, chunk):
    """int64 that order as (score, chunk); the smallest of all where a score is NaN or -inf."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score > -float("inf"), (bits.to(tl.int64) << 32) | chunk.to(tl.int64), -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _mean_rows(means, first, own, stride_mt, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """Means ``[BLOCK_C, BLOCK_D]`` of the chunks from ``first``; zeros from chunk ``own`` on."""
    chunk = first + tl.arange(0, BLOCK_C)
    col = tl.arange(0, BLOCK_D)
    return tl.load(means + _offset(chunk, stride_mt)[:, None] + col[None, :],
                   mask=(chunk < own)[:, None] & (col < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["chunk_size", "stride_table"])
def _decode_gate_kernel(
    q, k, means, selected, cache_seqlens, block_table, cache_starts, chunk_size,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd, stride_mb, stride_mt, stride_mh,
    stride_table,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, KS: tl.constexpr, BLOCK_KS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, SUM_BLOCK: tl.constexpr, MEAN_LANES: tl.constexpr,
    PRECISION: tl.constexpr, HAS_STARTS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """BLOCK_G query heads of one kv head of one sequence against the means of all earlier chunks, BLOCK_C at a time."""
    HEAD_BLOCKS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    head = tl.program_id(0) % HEAD_BLOCKS * BLOCK_G + tl.arange(0, BLOCK_G)  # among those of the kv head
    kv_head = tl.program_id(0) // HEAD_BLOCKS % HK
    sequence = tl.program_id(0) // HEAD_BLOCKS // HK
    position = tl.load(cache_seqlens + sequence) - 1
    own = tl.maximum(position, 0) // chunk_size
    # a chunk whose last key came with the query before this one; with no position before, there is none
    fresh = tl.where((position > 0) & (position == own * chunk_size), own - 1, -1)
    col = tl.arange(0, BLOCK_D)
    q_rows = tl.load(q + _offset(sequence, stride_qb) + _offset(kv_head * G + head, stride_qh)[:, None]
                     + _offset(col, stride_qd)[None, :], mask=(head < G)[:, None] & (col < D)[None, :], other=0.0)
    means += _offset(sequence, stride_mb) + _offset(kv_head, stride_mh)
    fresh_score = tl.zeros([BLOCK_G], tl.float32)
    if fresh >= 0:
        mean = _chunk_mean(k, block_table, cache_starts, sequence, fresh, chunk_size, kv_head, stride_kb, stride_kt,
                           stride_kh, stride_kd, stride_table, D, BLOCK_D, SUM_BLOCK, MEAN_LANES, HAS_STARTS, PAGE_SIZE)
        mean = mean.to(means.dtype.element_ty)
        tl.store(means + _offset(fresh, stride_mt) + col, mean, mask=col < D)
        fresh_score = tl.sum(q_rows.to(tl.float32) * mean.to(tl.float32)[None, :], 1)

    NONE: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    place = tl.arange(0, BLOCK_KS)[None, :]
    best = tl.where((place < KS) & (head < G)[:, None], NONE, 0x7FFFFFFFFFFFFFFF).to(tl.int64)  # [BLOCK_G, BLOCK_KS]
    rows = _mean_rows(means, 0, own, stride_mt, D, BLOCK_C, BLOCK_D)
    for first in range(0, own, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        score = tl.dot(q_rows, tl.trans(rows), input_precision=PRECISION)  # [BLOCK_G, BLOCK_C]
        rows = _mean_rows(means, first + BLOCK_C, own, stride_mt, D, BLOCK_C, BLOCK_D)  # they arrive meanwhile
        # the fresh mean may not be in memory yet, or come from another program that stores the same
        score = tl.where((chunk == fresh)[None, :], fresh_score[:, None], score)
        score = tl.where((chunk < own)[None, :], score, -float("inf"))
        keys = _sort_keys(score, chunk[None, :])
        found = tl.max(keys, 1)
        worst = tl.min(best, 1)
        while tl.max((found > worst).to(tl.int32), 0) > 0:  # KS times at most for the first block, seldom later
            at = tl.min(tl.where(best == worst[:, None], place, BLOCK_KS), 1)
            best = tl.where((place == at[:, None]) & (found > worst)[:, None], found[:, None], best)
            keys = tl.where(keys == found[:, None], NONE, keys)
            found = tl.max(keys, 1)
            worst = tl.min(best, 1)
    chosen = tl.where(best == NONE, -1, best & 0x7FFFFFFF).to(tl.int32)
    row = (_offset(sequence, HK) + kv_head) * G + head
    tl.store(selected + row[:, None] * KS + place, chosen, mask=(head < G)[:, None] & (place < KS))


@triton.jit
def _choice(selected, list_id, candidate, own, G: tl.constexpr, SHARED: tl.constexpr, KS: tl.constexpr,
            BLOCK_G: tl.constexpr, BLOCK_KS: tl.constexpr):
    """A candidate of a kv head's list: its chunk, -1 if another program has it; where heads have it, -1 for nowhere.
    Candidates ``0 .. G / SHARED * KS`` are the heads' choices, of which the first of equals counts; the last is the
    own chunk."""
    head = tl.arange(0, BLOCK_G)
    chunk = own
    place = tl.where(head < G, KS, -1)
    if KS > 0:
        if SHARED > 1:
            if candidate < KS:
                chunk = tl.load(selected + list_id.to(tl.int64) * KS + candidate)
                place = tl.where(head < G, candidate, -1)
        elif candidate < G * KS:
            j = tl.arange(0, BLOCK_KS)
            selected += list_id.to(tl.int64) * (G * KS)
            inside = (head < G)[:, None] & (j < KS)[None, :]
            table = tl.load(selected + head[:, None] * KS + j[None, :], mask=inside, other=-1)
            chunk = tl.load(selected + candidate)
            place = tl.max(tl.where(table == chunk, j[None, :], -1), 1)
            leader = tl.min(tl.where(place >= 0, head, BLOCK_G), 0)
            chunk = tl.where(leader == candidate // KS, chunk, -1)
    return chunk, place


@triton.jit(do_not_specialize=["chunk_size", "pieces", "piece_keys", "stride_table"])
def _decode_attention_kernel(
    q, k, v, selected, o_partial, lse_partial, cache_seqlens, block_table, cache_starts,
    qk_scale, chunk_size, pieces, piece_keys,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_table,
    HK: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr, KS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_KS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, HAS_STARTS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """A piece of one chunk for the query heads of one kv head that chose it."""
    piece = tl.program_id(0) % pieces
    CANDIDATES: tl.constexpr = G // SHARED * KS + 1
    candidate = tl.program_id(0) // pieces % CANDIDATES
    list_id = tl.program_id(0) // pieces // CANDIDATES
    sequence = list_id // HK
    kv_head = list_id % HK
    length = tl.load(cache_seqlens + sequence)
    chunk, place = _choice(selected, list_id, candidate, tl.maximum(length - 1, 0) // chunk_size, G, SHARED, KS,
                           BLOCK_G, BLOCK_KS)
    if chunk < 0:
        return
    begin = chunk * chunk_size + piece * piece_keys
    end = tl.minimum(tl.minimum(begin + piece_keys, (chunk + 1) * chunk_size), length)
    start = 0
    if HAS_STARTS:
        start = tl.load(cache_starts + sequence)
    head = tl.arange(0, BLOCK_G)
    col, col_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_rows = tl.load(q + _offset(sequence, stride_qb) + _offset(kv_head * G + head, stride_qh)[:, None]
                     + _offset(col, stride_qd)[None, :], mask=(head < G)[:, None] & (col < D)[None, :], other=0.0)
    k += _offset(kv_head, stride_kh)
    v += _offset(kv_head, stride_vh)
    m = tl.full([BLOCK_G], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        inside = row < end
        row = start + tl.where(inside, row, begin)
        k_at = _row_offsets(block_table, sequence, row, stride_kb, stride_kt, stride_table, PAGE_SIZE)
        k_rows = tl.load(k + k_at[:, None] + _offset(col, stride_kd)[None, :],
                         mask=inside[:, None] & (col < D)[None, :], other=0.0)
        s = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION) * qk_scale  # [BLOCK_G, BLOCK_N]
        s = tl.where(inside[None, :], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m - shift)
        l = l * alpha + tl.sum(p, 1)
        v_at = _row_offsets(block_table, sequence, row, stride_vb, stride_vt, stride_table, PAGE_SIZE)
        v_rows = tl.load(v + v_at[:, None] + _offset(col_v, stride_vd)[None, :],
                         mask=inside[:, None] & (col_v < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    to = ((list_id * G + head).to(tl.int64) * (KS + 1) + place) * pieces + piece
    tl.store(lse_partial + to, tl.where(l > 0, m + tl.log2(l), l - float("inf")), mask=place >= 0)
    tl.store(o_partial + to[:, None] * DV + col_v[None, :], acc / tl.where(l == 0, 1.0, l)[:, None],
             mask=(place >= 0)[:, None] & (col_v < DV)[None, :])


@triton.jit(do_not_specialize=["pieces"])
def _decode_merge_kernel(selected, o_partial, lse_partial, o, lse, pieces, SHARED: tl.constexpr, KS: tl.constexpr,
                         DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr):
    """Adds the pieces of one (sequence, query head), BLOCK_S at a time, in order."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_DV)
    partial_rows = (KS + 1) * pieces
    m = -float("inf")
    l = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, partial_rows, BLOCK_S):
        i = first + tl.arange(0, BLOCK_S)
        j = i // pieces
        chosen = tl.load(selected + row // SHARED * KS + j, mask=j < KS, other=0)
        valid = (i < partial_rows) & (chosen >= 0)
        partial_lse = tl.load(lse_partial + row * partial_rows + i, mask=valid, other=-float("inf"))
        o_rows = tl.load(o_partial + (row * partial_rows + i)[:, None] * DV + col[None, :],
                         mask=valid[:, None] & (col < DV)[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(partial_lse, 0))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(partial_lse - shift)
        alpha = tl.exp2(m - shift)
        l = l * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * o_rows, 0)
        m = m_new
    tl.store(o + row * DV + col, (acc / tl.where(l == 0, 1.0, l)).to(o.dtype.element_ty), mask=col < DV)
    tl.store(lse + row, tl.where(l == 0, -float("inf"), (m + tl.log2(l)) * 0.6931471805599453))
