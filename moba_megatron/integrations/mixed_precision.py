"""The dtype that attention computes in where a host mixes several."""
from __future__ import annotations

import torch
from torch import Tensor


def same_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype, as torch's attention wants them and the FlashAttention integrations make them.

    Under ``torch.autocast`` its dtype, as for ``scaled_dot_product_attention``: rotary embeddings and norms leave q and
    k in fp32 beside a v in bf16. Elsewhere v's, which no such step has touched. fp64 stays.
    """
    device_type = q.device.type
    dtype = v.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    # As they are where nothing is to be done, under torch.compile too: a cache's keys carry attributes.
    q, k, v = (x if x.dtype == dtype else x.to(dtype) for x in (q, k, v))
    return q, k, v
