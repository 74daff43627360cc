"""Routing, reference: the choices of all queries sorted by (kv head, chunk), by torch's own sort."""
from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Routing, entry_dtype


def route(selected: Tensor, num_kv_heads: int, num_chunks: int) -> Routing:
    """Sorts the choices of all queries by (kv head, chunk), tokens in order.

    Args:
        selected: int32 ``[T, H, topk - 1]``, chunk ids, -1 for none.
        num_kv_heads: kv heads HK; query head h belongs to kv head ``h // (H / HK)``.
        num_chunks: bound of the chunk ids.
    """
    num_buckets = num_kv_heads * num_chunks
    kv_head = torch.arange(selected.shape[1], device=selected.device) // (selected.shape[1] // num_kv_heads)
    bucket = torch.where(selected < 0, num_buckets, kv_head[:, None] * num_chunks + selected).flatten()
    dtype = entry_dtype(selected.numel())
    ordered, entries = torch.sort(bucket, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_buckets + 1, device=selected.device))
    return Routing(entries.to(dtype), starts.to(dtype))
