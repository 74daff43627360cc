"""Gate and top-k in one kernel: scores of a tile of queries against tiles of chunk means, and a streaming selection.

Nothing of the size queries x chunks is stored. Tiles of chunks are walked from the latest back, so that among equals the
later chunk is met first and stays. What makes it fast: the k-th best of column maxima over the latest WARM tiles is a
lower bound of the k-th best score, so hardly anything that is not chosen in the end passes the comparison; and what
passes is packed into bits, one look at a row's scores for each chunk that is really taken in.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Segments
from . import tuning
from .jit_helpers import _query_tile


def gate(q: Tensor, means: Tensor, segments: Segments, topk: int) -> Tensor:
    """The ``topk - 1`` best earlier chunks of each query and head (arXiv 2502.13189, equations 5 and 6).

    Ties go to the later chunk. A chunk whose score is NaN or -inf is never selected. A score depends on its query and
    its chunk alone, not on the other rows of the tile, so that parts of a sequence choose what the whole would.

    Args:
        q: ``[T, H, D]``, bf16, fp16 or fp32 (products in full fp32); any strides.
        means: ``[num_chunks, HK, D]``.
        segments: places the queries.
        topk: chunks a query attends to, its own included.

    Returns:
        int32 ``[T, H, topk - 1]``: chunk ids, best first, -1 where fewer exist.
    """
    total, num_heads, head_dim = q.shape
    choices = topk - 1
    selected = torch.empty(total, num_heads, choices, dtype=torch.int32, device=q.device)
    if selected.numel() == 0:
        return selected
    q = q if q.stride(2) == 1 else q.contiguous()
    means = means.contiguous()
    options = tuning.config("gate", q.device, head_dim=head_dim, itemsize=q.element_size(), choices=choices)
    num_tiles = total // options["BLOCK_M"] + segments.num_segments
    _gate_kernel[(num_tiles * num_heads,)](
        q,
        means,
        selected,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.seq_ids,
        segments.offsets,
        segments.num_segments,
        num_tiles,
        segments.chunk_size,
        q.stride(0),
        q.stride(1),
        H=num_heads,
        HK=means.shape[1],
        D=head_dim,
        KS=choices,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        PRECISION="ieee",
        **options,
    )
    return selected


@triton.jit
def _scores(q_rows, means, first, limit, HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """Scores ``[BLOCK_M, BLOCK_N]`` of chunks ``first ..`` of the sequence; 0 from chunk ``limit`` on."""
    chunk = first + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    keep = (chunk < limit)[:, None]
    if D < BLOCK_D:
        keep = keep & (col < D)[None, :]
    rows = tl.load(means + chunk[:, None] * (HK * D) + col[None, :], mask=keep, other=0.0)  # [BLOCK_N, BLOCK_D]
    return tl.dot(q_rows, tl.trans(rows), input_precision=PRECISION)


@triton.jit
def _warm_threshold(q_rows, means, earlier, limit, KS: tl.constexpr, HK: tl.constexpr, D: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                    WARM: tl.constexpr):
    """A value below the KS-th best score of each row: from the KS-th best maximum of the columns of some tiles.

    Each column's maximum over the tiles is the score of another chunk, so KS chunks reach the KS-th of them.
    """
    best = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
    last = tl.cdiv(limit, BLOCK_N) * BLOCK_N
    for first in range(tl.maximum(last - WARM * BLOCK_N, 0), last, BLOCK_N):
        s = _scores(q_rows, means, first, limit, HK, D, BLOCK_D, BLOCK_N, PRECISION)
        s = tl.where((first + tl.arange(0, BLOCK_N))[None, :] < earlier[:, None], s, -float("inf"))
        best = tl.maximum(best, s)
    bound = tl.max(best, 1)
    for _ in range(KS - 1):
        best = tl.where(best == bound[:, None], -float("inf"), best)
        bound = tl.max(best, 1)
    bound = tl.minimum(bound, 3.0e38)
    return bound - tl.abs(bound) * 2.4e-7 - 1e-30  # strictly below, also after rounding; -inf stays


@triton.jit
def _low_columns(count):
    """32 bits, the first column in the highest: set for columns below ``count``."""
    kept = tl.maximum(32 - count, 0)
    return tl.where(count > 0, tl.full(count.shape, -1, tl.int32) << tl.minimum(kept, 31), 0)


@triton.jit
def _pack(hits, BLOCK_N: tl.constexpr):
    """``[BLOCK_M, BLOCK_N]`` booleans as two words a row, columns 0..31 and 32..63, the first column in the top bit."""
    col = tl.arange(0, BLOCK_N)
    bits = tl.where(hits, (tl.full([BLOCK_N], 1, tl.int32) << (31 - col % 32))[None, :], 0)
    if BLOCK_N == 32:
        early = tl.sum(bits, 1)
        late = early * 0
    else:
        words = tl.sum(tl.reshape(bits, [bits.shape[0], 2, 32]), 2)
        early, late = tl.split(words)
    return early, late


@triton.jit
def _lowest_bit(word):
    """Number of the lowest set bit, from the exponent of that bit as a float; anything for 0."""
    bit = (word & -word).to(tl.float32)
    return ((bit.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _insert(values, chunks, value, chunk, KS: tl.constexpr):
    """Inserts into rows sorted from the best down, behind equals; the last falls out."""
    new_values = ()
    new_chunks = ()
    next_value = value
    next_chunk = chunk
    for j in tl.static_range(KS):
        behind = value > values[j]  # once true, true for all that follow: equals keep their order
        new_values = new_values + (tl.where(behind, next_value, values[j]),)
        new_chunks = new_chunks + (tl.where(behind, next_chunk, chunks[j]),)
        next_value = tl.where(behind, values[j], value)
        next_chunk = tl.where(behind, chunks[j], chunk)
    return new_values, new_chunks


@triton.jit(do_not_specialize=["num_segments", "num_tiles"])
def _gate_kernel(
    q, means, selected, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets,
    num_segments, num_tiles, chunk_size, stride_qt, stride_qh,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, KS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WARM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of one segment and head against the earlier chunks of their sequence."""
    tile = num_tiles - 1 - tl.program_id(0) // H  # later queries have more chunks: they start first
    head = tl.program_id(0) % H
    row, row_end, position, _, first_chunk = _query_tile(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments,
                                                         chunk_size, tile, BLOCK_M)
    if row >= row_end:
        return
    lane = tl.arange(0, BLOCK_M)
    rows = (row + lane).to(tl.int64)
    valid = row + lane < row_end
    earlier = tl.where(valid, (position + lane) // chunk_size, 0)  # chunks that the query may choose
    limit = (position + tl.minimum(BLOCK_M, row_end - row) - 1) // chunk_size
    col = tl.arange(0, BLOCK_D)
    q_rows = tl.load(q + head.to(tl.int64) * stride_qh + rows[:, None] * stride_qt + col[None, :],
                     mask=valid[:, None] & (col < D)[None, :], other=0.0)
    means += (first_chunk.to(tl.int64) * HK + head // (H // HK)) * D

    threshold = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if WARM > 0:
        threshold = _warm_threshold(q_rows, means, earlier, limit, KS, HK, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
                                    WARM)
    values = (tl.full([BLOCK_M], -float("inf"), tl.float32),) * KS
    chunks = (tl.full([BLOCK_M], -1, tl.int32),) * KS
    column = tl.arange(0, BLOCK_N)
    num_steps = tl.cdiv(limit, BLOCK_N)
    for step in range(0, num_steps):
        first = (num_steps - 1 - step) * BLOCK_N
        s = _scores(q_rows, means, first, limit, HK, D, BLOCK_D, BLOCK_N, PRECISION)
        early, late = _pack(s > threshold[:, None], BLOCK_N)
        early = early & _low_columns(earlier - first)
        late = late & _low_columns(earlier - first - 32)
        go = tl.max(((early | late) != 0).to(tl.int32), 0)
        while go > 0:
            is_late = late != 0
            word = tl.where(is_late, late, early)
            found = tl.where(is_late, 63, 31) - _lowest_bit(word)
            word_left = word & (word - 1)
            late = tl.where(is_late, word_left, late)
            early = tl.where(is_late, early, word_left)
            go = tl.max(((early | late) != 0).to(tl.int32), 0)
            value = tl.sum(tl.where(column[None, :] == found[:, None], s, 0.0), 1)  # picks out one score, exactly
            value = tl.where(word != 0, value, -float("inf"))
            values, chunks = _insert(values, chunks, value, first_chunk + first + found, KS)
            threshold = tl.maximum(threshold, values[KS - 1])

    for j in tl.static_range(KS):
        tl.store(selected + (rows * H + head) * KS + j, chunks[j], mask=valid)
