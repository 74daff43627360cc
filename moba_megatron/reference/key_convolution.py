"""Key convolution in plain torch, differentiable by autograd."""
import torch
import torch.nn.functional as F
from torch import Tensor


def key_convolution(k: Tensor, weight: Tensor, cu_seqlens: Tensor, halo: Tensor | None) -> Tensor:
    """As :func:`moba_megatron.ops.key_convolution`, of what that has checked; in at least fp32, rounded once."""
    total, taps = k.shape[0], weight.shape[1]
    wide = torch.promote_types(k.dtype, torch.float32)
    row = cu_seqlens.new_ones(total, dtype=torch.int64).cumsum(0) - 1  # a fake where cu_seqlens is one
    behind = (row >= cu_seqlens[-1])[:, None, None]
    k = k.masked_fill(behind, 0)  # a NaN behind the last run must not reach a gradient
    if halo is None:
        halo = k.new_zeros(cu_seqlens.numel() - 1, taps - 1, *k.shape[1:])
    rows = torch.cat((k, halo.flatten(0, 1))).to(wide)
    run = (torch.searchsorted(cu_seqlens.long(), row, right=True) - 1).clamp(max=cu_seqlens.numel() - 2)
    place = row - cu_seqlens.long()[run]
    filtered = k.new_zeros(k.shape, dtype=wide)
    for tap in range(taps):
        in_halo = total + run * (taps - 1) + taps - 1 + place - tap
        filtered = filtered + weight[:, tap].to(wide) * rows[torch.where(place >= tap, row - tap, in_halo)]
    return (rows[:total] + F.silu(filtered)).masked_fill(behind, 0).to(k.dtype)
