"""The public operator: a short causal convolution over keys, before MoBA forms their means (arXiv 2511.11571)."""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import get_stages
from .validation import cast_under_autocast, check_cu_seqlens, check_tensor

WIDTHS = (3, 5)


def key_convolution(k: Tensor, weight: Tensor, cu_seqlens: Tensor, halo: Tensor | None = None, *,
                    backend: str = "auto") -> Tensor:
    """Depthwise causal convolution of the keys with a residual: ``k'[t] = k[t] + silu(sum_l w[l] * k[t - l])``.

    Neighbouring keys leave their mark on each other, so a chunk's mean says more about what is in the chunk. With a
    weight of zeros it is the identity. Runs do not see each other.

    Args:
        k: ``[S, HK, D]``, packed keys; any strides.
        weight: ``[HK, W, D]``, W of 3 or 5, any float dtype; tap l meets the key l rows before.
        cu_seqlens: int32 ``[N + 1]`` on k's device, 0 to S: runs of consecutive rows; rows behind the last give 0.
        halo: ``[N, W - 1, HK, D]``, the keys before each run where it does not start a sequence; None for zeros.
        backend: ``auto``, ``triton``, ``torch`` or ``reference``.

    Returns:
        ``[S, HK, D]`` in k's dtype; differentiable in k, weight and halo.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device; the message names it.

    Source: arXiv 2511.11571, section on key convolution.
    """
    if halo is not None:
        k, halo = cast_under_autocast(k, halo)
    for name, x, dims in (("k", k, 3), ("weight", weight, 3), *([] if halo is None else [("halo", halo, 4)])):
        check_tensor(name, x, dims, device=getattr(k, "device", None), of="k")
    if 0 in k.shape[1:]:
        raise ValueError(f"k must have at least one head, and head_dim 1, got shape {tuple(k.shape)}")
    if weight.shape[1] not in WIDTHS or weight.shape[::2] != k.shape[1:]:
        raise ValueError(f"weight must have shape [{k.shape[1]}, W, {k.shape[2]}] (k's heads and head_dim) with W of "
                         f"{' or '.join(map(str, WIDTHS))}, got {tuple(weight.shape)}")
    if halo is not None and (halo.shape[1:] != (weight.shape[1] - 1, *k.shape[1:]) or halo.dtype != k.dtype):
        raise ValueError(f"halo must have shape [runs, {weight.shape[1] - 1}, *{tuple(k.shape[1:])}] and k's dtype "
                         f"{k.dtype}, got {tuple(halo.shape)} and {halo.dtype}")
    cu_seqlens = check_cu_seqlens(cu_seqlens, k.shape[0], k.shape[0], k.device)
    if halo is not None and halo.shape[0] != cu_seqlens.numel() - 1:
        raise ValueError(f"halo must have one entry for each of the {cu_seqlens.numel() - 1} runs of cu_seqlens, got "
                         f"{halo.shape[0]}")
    stages = get_stages(backend, k.device)
    cu_seqlens = stages.bounded_lengths(cu_seqlens, k.shape[0])
    if hasattr(stages, "key_convolution_fwd"):
        halo = halo if halo is None else halo.contiguous()
        return _KeyConvolution.apply(k, weight.contiguous(), cu_seqlens, halo, stages)
    return stages.key_convolution(k, weight, cu_seqlens, halo)  # in torch, differentiable as it is


class _KeyConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, weight, cu_seqlens, halo, stages):
        ctx.save_for_backward(k, weight, cu_seqlens, halo)
        ctx.stages = stages
        return stages.key_convolution_fwd(k, weight, cu_seqlens, halo)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        k, weight, cu_seqlens, halo = ctx.saved_tensors
        dk, dweight, dhalo = ctx.stages.key_convolution_bwd(dout, k, weight, cu_seqlens, halo)
        return dk, dweight.to(weight.dtype), None, dhalo, None
