"""Chunk means, reference: sums of keys by a fixed tree, so that a mean does not depend on where the keys were cut."""
import torch
from torch import Tensor

from ..segments import SUM_BLOCK, Segments


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def halving_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over one dimension by a fixed tree of additions: element i meets element i + half, again and again. Only
    element-wise additions take part, so the result is the same bits on any device and in any batch."""
    x = x.movedim(dim, 0)
    n = x.shape[0]
    while n > 1:
        half = (n + 1) // 2
        top = x[:n // 2] + x[half:n]
        x = torch.cat((top, x[n // 2:half])) if n % 2 else top
        n = half
    return x[0]


def block_sums(k: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Sums of runs of keys ``[S, HK, D]``: ``[n, HK, D]``, fp32 (fp64 for fp64 keys). ``starts``, ``counts``: int32
    ``[n]``, the first row of each run, and its rows, 0 to SUM_BLOCK."""
    dtype = accumulate_dtype(k.dtype)
    if starts.numel() == 0 or k.shape[0] == 0:
        return torch.zeros(starts.numel(), *k.shape[1:], dtype=dtype, device=k.device)
    # zeros above the longest run change no sum, so the tree need not be SUM_BLOCK rows high for short chunks
    row = torch.arange(1 << max(0, int(counts.max()) - 1).bit_length(), device=k.device)
    inside = row[None] < counts[:, None]
    rows = torch.where(inside, starts[:, None].long() + row[None], 0)
    return halving_sum(k[rows].to(dtype).masked_fill(~inside[:, :, None, None], 0), 1)


def means_from_block_sums(sums: Tensor, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """Adds the block sums of each chunk in order, divides, and rounds once, to ``dtype``: ``[num_chunks, HK, D]``.
    ``sums``: ``[num_chunks, ceil(chunk_size / SUM_BLOCK), HK, D]``, added in fp32, or fp64."""
    total, *others = sums.to(accumulate_dtype(sums.dtype)).unbind(1)
    for x in others:
        total = total + x
    return (total / chunk_size).to(dtype)


def block_rows(segments: Segments, total_k: int) -> tuple[Tensor, Tensor]:
    """First row and number of rows of each SUM_BLOCK of each full chunk: two int32 ``[num_chunks, blocks]``."""
    size = segments.chunk_size
    first = segments.first_chunk()
    ids = torch.arange(segments.num_chunks(total_k), device=first.device)
    sequence = torch.searchsorted(first, ids, right=True) - 1
    cu = segments.cu_seqlens_k.long()
    start = cu[sequence] + (ids - first[sequence]) * size
    full = start + size <= cu[sequence + 1]
    offset = torch.arange(0, size, SUM_BLOCK, device=first.device)
    counts = torch.clamp(size - offset, max=SUM_BLOCK)[None] * full[:, None]
    return (start[:, None] + offset[None]).int(), counts.int()


def chunk_means(k: Tensor, segments: Segments) -> Tensor:
    """Mean key of every full chunk of packed keys ``[S, HK, D]`` (arXiv 2502.13189, equation 6). Returns
    ``[num_chunks, HK, D]`` in k's dtype; rows of unused or incomplete chunks are 0."""
    starts, counts = block_rows(segments, k.shape[0])
    sums = block_sums(k, starts.flatten(), counts.flatten())
    return means_from_block_sums(sums.unflatten(0, starts.shape), segments.chunk_size, k.dtype)
