"""Beside the gate, reference: the sum of a group's queries, and given choices made harmless."""
from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segments
from .chunk_means import means_from_block_sums
from .gating import earlier_chunks


def group_queries(q: Tensor, num_kv_heads: int) -> Tensor:
    """The sum of the queries of each kv head: its gate scores are the sums of the heads'. It is divided by a power of
    two, the first that is no less than the number of heads: that keeps the order of the scores, and any dtype's range.
    Heads are added in order in fp32 (fp64 for fp64), and the result is rounded once, as chunk means are. Of
    ``[T, H, D]`` that is ``[T, HK, D]`` in q's dtype."""
    groups = q.unflatten(1, (num_kv_heads, -1)).transpose(1, 2)
    return means_from_block_sums(groups, 1 << (groups.shape[1] - 1).bit_length(), q.dtype)


def keep_earlier(selected: Tensor, segments: Segments) -> Tensor:
    """Given choices, int32 ``[T, H or HK, n]`` of any values, with -1 in place of what no gate could have chosen. What
    stays is a chunk of the query's sequence, before its own, and named for the first time."""
    first, own = (x[:, None, None] for x in earlier_chunks(segments, selected.shape[0]))
    ordered, order = selected.sort(dim=2, stable=True)
    again = torch.zeros_like(selected, dtype=torch.bool)
    again.scatter_(2, order[..., 1:], ordered[..., 1:] == ordered[..., :-1])
    return torch.where((selected >= first) & (selected < own) & ~again, selected, -1)
