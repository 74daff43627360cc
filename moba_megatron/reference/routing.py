"""Routing, reference: the choices of all queries sorted by (kv head, chunk), by torch's own sort."""
import torch
from torch import Tensor

from ..segments import Routing, index_dtype


def route(selected: Tensor, num_kv_heads: int, num_chunks: int) -> Routing:
    """Sorts the choices of all queries by (kv head, chunk), tokens in order.

    Args:
        selected: int32 ``[T, H, topk - 1]``, chunk ids, -1 for none.
        num_kv_heads: kv heads HK; query head h belongs to kv head ``h // (H / HK)``.
        num_chunks: bound of the chunk ids.
    """
    num_csr_rows = num_kv_heads * num_chunks
    kv_head = torch.arange(selected.shape[1], device=selected.device) // (selected.shape[1] // num_kv_heads)
    csr_row = torch.where(selected < 0, num_csr_rows, kv_head[:, None] * num_chunks + selected).flatten()
    dtype = index_dtype(selected.numel())
    ordered, indices = torch.sort(csr_row, stable=True)
    indptr = torch.searchsorted(ordered, torch.arange(num_csr_rows + 1, device=selected.device))
    return Routing(indices.to(dtype), indptr.to(dtype))
