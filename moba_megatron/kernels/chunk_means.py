"""Chunk means: one pass over the keys, with sums that do not depend on where the keys were cut.

Rows are added one by one, and sums of SUM_BLOCK rows in order, all element by element: no reduction across threads,
so that no choice of the compiler can change a bit, and block sums made elsewhere (context parallelism) add up to the
same means.
"""
import torch
import triton
import triton.language as tl

from ..segments import SUM_BLOCK, Segments
from . import tuning
from .host import cdiv, next_power_of_2
from .jit_helpers import _chunk_keys, _offset
from .launcher import Buffer, empty, launch, stage

PROGRAMS = 2048  # that fill a card


@stage
def chunk_means(k: Buffer, segments: Segments) -> Buffer:
    """As :func:`moba_megatron.reference.chunk_means`: fp32 sums, divided and rounded once; any strides."""
    num_kv_heads, head_dim = k.shape[1:]
    num_chunks, columns = segments.num_chunks(k.shape[0]), num_kv_heads * head_dim
    means = empty((num_chunks, num_kv_heads, head_dim), k.dtype, k.device)
    num_blocks = cdiv(segments.chunk_size, SUM_BLOCK)
    options = _config(k, columns, num_chunks, num_blocks)
    launch(_chunk_means_kernel, (num_chunks * cdiv(columns, options["BLOCK_C"]),),
           k, segments.cu_seqlens_k, means, segments.num_sequences, segments.chunk_size, num_blocks, *k.stride(),
           HK=num_kv_heads, D=head_dim, SUM_BLOCK=SUM_BLOCK, **options)
    return means


@stage
def block_sums(k: Buffer, starts: Buffer, counts: Buffer) -> Buffer:
    """As :func:`moba_megatron.reference.block_sums`: fp32 ``[n, HK, D]``; any strides."""
    num_kv_heads, head_dim = k.shape[1:]
    num_runs, columns = starts.numel(), num_kv_heads * head_dim
    sums = empty((num_runs, num_kv_heads, head_dim), torch.float32, k.device)
    if num_runs == 0:
        return sums
    options = _config(k, columns, num_runs, 1)
    launch(_block_sums_kernel, (cdiv(num_runs, options["BLOCK_B"]) * cdiv(columns, options["BLOCK_C"]),),
           k, starts, counts, sums, num_runs, *k.stride(), HK=num_kv_heads, D=head_dim, SUM_BLOCK=SUM_BLOCK, **options)
    return sums


@stage
def means_from_block_sums(sums: Buffer, chunk_size: int, dtype: torch.dtype) -> Buffer:
    """As :func:`moba_megatron.reference.means_from_block_sums`, of contiguous sums: the bits of :func:`chunk_means`."""
    num_chunks, num_blocks, num_kv_heads, head_dim = sums.contiguous().shape
    means = empty((num_chunks, num_kv_heads, head_dim), dtype, sums.device)
    if means.numel():
        launch(_means_from_block_sums_kernel, (cdiv(means.numel(), 1024),), sums, means, means.numel(),
               num_kv_heads * head_dim, num_blocks, chunk_size, BLOCK=1024, num_warps=4)
    return means


def _config(k: Buffer, columns: int, num_items: int, num_blocks: int) -> dict[str, int]:
    """BLOCK_C columns (heads x dims) and BLOCK_B blocks of rows of a tile of running sums; the table gives its size.
    Wide tiles read long runs; where they leave the card idle, blocks of rows go side by side instead."""
    options = tuning.config("chunk_means", k.device, itemsize=k.dtype.itemsize)
    block_c, block_b = min(next_power_of_2(columns), options.pop("BLOCK")), 1
    while num_items * cdiv(columns, block_c) < PROGRAMS and block_b < min(8, num_blocks):
        block_b, block_c = 2 * block_b, max(block_c // 2, 64)
    return {**options, "BLOCK_B": block_b, "BLOCK_C": block_c}


@triton.jit
def _add_rows(k, first, count, column, stride_s, stride_h, stride_d, HK: tl.constexpr, D: tl.constexpr,
              SUM_BLOCK: tl.constexpr):
    """fp32 sums ``[BLOCK_B, BLOCK_C]`` of ``count`` rows from row ``first``, each ``[BLOCK_B]``, added one by one."""
    at = _offset(first, stride_s)[:, None] + (_offset(column // D, stride_h) + _offset(column % D, stride_d))[None, :]
    inside = (column < HK * D)[None, :]
    total = tl.zeros(at.shape, tl.float32)
    for row in tl.range(0, SUM_BLOCK, loop_unroll_factor=16):
        keep = (row < count)[:, None] & inside
        further = _offset(tl.cast(row, tl.int32), stride_s)  # at += stride_s would hide what is aligned
        total += tl.load(k + at + further, mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit
def _mean(total, chunk_size):
    """The one division, rounded as IEEE says."""
    return tl.div_rn(total, tl.zeros_like(total) + chunk_size)


@triton.jit(do_not_specialize=["num_sequences", "num_blocks"])
def _chunk_means_kernel(k, cu_seqlens_k, means, num_sequences, chunk_size, num_blocks, stride_s, stride_h, stride_d,
                        HK: tl.constexpr, D: tl.constexpr, SUM_BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
                        BLOCK_C: tl.constexpr):
    """BLOCK_C columns of one chunk, BLOCK_B blocks of rows side by side."""
    column_tiles = tl.cdiv(HK * D, BLOCK_C)
    chunk = tl.program_id(0) // column_tiles
    column = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = _chunk_keys(cu_seqlens_k, num_sequences, chunk_size, chunk)
    full = begin + chunk_size <= end
    lane = tl.arange(0, BLOCK_B)
    total = tl.zeros([BLOCK_C], tl.float32)
    for block in range(0, tl.where(full, num_blocks, 0), BLOCK_B):
        first = begin + (block + lane) * SUM_BLOCK
        sums = _add_rows(k, first, end - first, column, stride_s, stride_h, stride_d, HK, D, SUM_BLOCK)
        for i in tl.static_range(BLOCK_B):
            total += tl.sum(tl.where((lane == i)[:, None], sums, 0.0), 0)  # picks out one row, exactly
    tl.store(means + chunk.to(tl.int64) * (HK * D) + column, _mean(total, chunk_size).to(means.dtype.element_ty),
             mask=column < HK * D)


@triton.jit(do_not_specialize=["num_runs"])
def _block_sums_kernel(k, starts, counts, sums, num_runs, stride_s, stride_h, stride_d, HK: tl.constexpr,
                       D: tl.constexpr, SUM_BLOCK: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_C columns of BLOCK_B runs of rows."""
    column_tiles = tl.cdiv(HK * D, BLOCK_C)
    run = tl.program_id(0) // column_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(0) % column_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.load(starts + run, mask=run < num_runs, other=0)
    count = tl.load(counts + run, mask=run < num_runs, other=0)
    total = _add_rows(k, first, count, column, stride_s, stride_h, stride_d, HK, D, SUM_BLOCK)
    tl.store(sums + run.to(tl.int64)[:, None] * (HK * D) + column[None, :], total,
             mask=(run < num_runs)[:, None] & (column < HK * D)[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def _means_from_block_sums_kernel(sums, means, size, columns, num_blocks, chunk_size, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = item // columns * num_blocks * columns + item % columns
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(num_blocks):
        total += tl.load(sums + at, mask=item < size, other=0.0)
        at += columns
    tl.store(means + item, _mean(total, chunk_size).to(means.dtype.element_ty), mask=item < size)
