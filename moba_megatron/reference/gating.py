"""Gate and top-k, reference: scores by a fixed tree of additions, exact selection with the project's tie rule."""
import torch
from torch import Tensor

from ..segments import Segments
from .chunk_means import accumulate_dtype, halving_sum

SCORE_ELEMENTS = 1 << 22  # products held at once: bounds the memory of a block of queries


def gate(q: Tensor, means: Tensor, segments: Segments, topk: int) -> Tensor:
    """The ``topk - 1`` best earlier chunks of each query and head (arXiv 2502.13189, equations 5 and 6). Ties go to the
    later chunk. A chunk whose score is NaN or -inf is never selected. Of q ``[T, H, D]`` and means
    ``[num_chunks, HK, D]``; ``topk`` counts a query's own chunk too. Returns int32 ``[T, H, topk - 1]``: chunk ids,
    best first, -1 where fewer exist."""
    if 0 in (q.shape[0], topk - 1, means.shape[0]):
        return torch.full((*q.shape[:2], topk - 1), -1, dtype=torch.int32, device=q.device)
    return best_chunks(q, means, *earlier_chunks(segments, q.shape[0]), topk - 1)


def earlier_chunks(segments: Segments, total_q: int) -> tuple[Tensor, Tensor]:
    """Of each query the id of its sequence's first chunk, and of its own: two int64 ``[T]``, alike behind the last."""
    sequence, position = segments.query_positions(total_q)
    first = segments.first_chunk()[sequence]
    own = first + position // segments.chunk_size
    return first, torch.where(torch.arange(total_q, device=own.device) < segments.cu_seqlens_q[-1], own, first)


def best_chunks(q: Tensor, means: Tensor, first: Tensor, own: Tensor, wanted: int) -> Tensor:
    """The ``wanted`` best of the chunks ``first`` to ``own - 1`` of each query, as of :func:`gate`."""
    (total_q, num_heads, dim), num_chunks = q.shape, means.shape[0]
    selected = torch.full((total_q, num_heads, wanted), -1, dtype=torch.int32, device=q.device)
    ids, dtype = torch.arange(num_chunks, device=q.device), accumulate_dtype(q.dtype)
    table = means.to(dtype).repeat_interleave(num_heads // means.shape[1], 1).permute(1, 2, 0)  # [H, D, num_chunks]
    rows = max(1, SCORE_ELEMENTS // (num_heads * num_chunks * dim))
    for begin in range(0, total_q, rows):
        block = slice(begin, begin + rows)
        # the same bits whatever the other rows and chunks are
        score = halving_sum(q[block].to(dtype)[..., None] * table[None], 2)  # [rows, H, num_chunks]
        earlier = (ids[None] >= first[block, None]) & (ids[None] < own[block, None])
        score = score.masked_fill(~earlier[:, None] | score.isnan(), -torch.inf)
        # a stable descending sort of the flipped scores puts the later of two equal chunks first
        value, order = torch.sort(score.flip(2), dim=2, descending=True, stable=True)
        best = torch.where(value == -torch.inf, -1, num_chunks - 1 - order)[:, :, :wanted]
        selected[block, :, :best.shape[2]] = best.int()
    return selected
