"""Bounds, reference: lengths that nobody has looked at are made safe, as the kernels make them."""
from dataclasses import replace

import torch
from torch import Tensor

from ..segments import Segments


def bounded_lengths(cu_seqlens: Tensor, total: int) -> Tensor:
    """cu_seqlens, int32 ``[B + 1]``, with values clamped to 0 .. ``total``, from 0 on, none below the one before."""
    cu_seqlens = cu_seqlens.clamp(0, total)
    return torch.cat((torch.zeros_like(cu_seqlens[:1]), cu_seqlens[1:].cummax(0).values))


def clear_rows(cu_seqlens: Tensor, *filled: tuple[Tensor, float]) -> None:
    """Fills the rows of tensors behind the last sequence: those from ``cu_seqlens[-1]`` on."""
    for x, value in filled:
        x[int(cu_seqlens[-1]):] = value


def bounded(segments: Segments, total_q: int, total_k: int) -> Segments:
    """Segments that address nothing beyond ``total_q`` queries and ``total_k`` keys; the same where they do not anyway.
    Where a segment has more queries than its sequence has keys, no query belongs to any. Of ``packed`` segments only
    the lengths are looked at."""
    if segments.exact:
        return segments
    cu_k = bounded_lengths(segments.cu_seqlens_k, total_k)
    if segments.packed:
        return replace(segments, cu_seqlens_q=cu_k, cu_seqlens_k=cu_k)
    cu_q, ids = bounded_lengths(segments.cu_seqlens_q, total_q), segments.seq_ids.clamp(0, segments.num_sequences - 1)
    room = cu_k.diff()[ids.long()] - cu_q.diff()
    offsets = torch.minimum(segments.offsets, room).clamp(min=0)
    return replace(segments, cu_seqlens_q=cu_q * (room >= 0).all(), cu_seqlens_k=cu_k, seq_ids=ids, offsets=offsets)
