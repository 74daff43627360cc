"""Routing, reference: the choices of all queries sorted by (kv head, chunk), by torch's own sort."""
import torch
from torch import Tensor

from ..segments import Routing, index_dtype


def route(selected: Tensor, num_kv_heads: int, num_chunks: int, shared: int = 1) -> Routing:
    """Sorts the choices of all queries, int32 ``[T, H / shared, topk - 1]``, by (kv head, chunk), tokens in order. They
    are chunk ids below ``num_chunks``, -1 for none; ``shared`` query heads share one. Query head h belongs to kv head
    ``h // (H / HK)``."""
    num_csr_rows = num_kv_heads * num_chunks
    kv_head = torch.arange(selected.shape[1], device=selected.device) // (selected.shape[1] // num_kv_heads)
    csr_row = torch.where(selected < 0, num_csr_rows, kv_head[:, None] * num_chunks + selected).flatten()
    dtype = index_dtype(selected.numel() * shared)
    ordered, indices = torch.sort(csr_row, stable=True)
    indptr = torch.searchsorted(ordered, torch.arange(num_csr_rows + 1, device=selected.device))
    first = indices * shared - indices % max(1, selected.shape[2]) * (shared - 1)  # the number of the first head's
    return Routing(first.to(dtype), (indptr * shared).to(dtype), shared)
