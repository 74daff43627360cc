"""Where MoBA is plain causal attention: the fastest dense kernel inside torch, as a pair of stage functions.

cuDNN for sequences of one length, flash attention 2 (torch's own build) for packed ones. A function that returns None
declines, and the caller goes on with the project's kernels; forward and backward may be mixed, since both take o and
lse.
"""
from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger("moba_megatron")
CUDNN, FLASH = "cuDNN", "flash attention 2"


def dense_causal(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                 scale: float) -> tuple[Tensor, Tensor] | None:
    """Causal self-attention over packed sequences.

    Args:
        q: ``[T, H, D]``, bf16 or fp16 on CUDA; k: ``[T, HK, D]``; v: ``[T, HK, DV]``; any strides.
        cu_seqlens: int32 ``[B + 1]``, 0 to T.
        max_seqlen: upper bound of a sequence's length.
        scale: multiplies the scores.

    Returns:
        o ``[T, H, DV]``, lse ``[T, H]`` (natural log, fp32); or None where no dense kernel fits.
    """
    kernel = dense_kernel(q, k, v, cu_seqlens, max_seqlen)
    if kernel is None:
        return None
    if kernel == CUDNN:
        batch = cu_seqlens.numel() - 1
        o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(_batched(x, batch) for x in (q, k, v)), None, True, 0.0, True, False, scale=scale)
        lse = lse.reshape(batch, q.shape[1], max_seqlen).transpose(1, 2).flatten(0, 1)
        return _packed(o).contiguous(), lse.contiguous()
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False, scale=scale)
    return o, lse.t().contiguous()


def dense_causal_bwd(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                     cu_seqlens: Tensor, max_seqlen: int, scale: float, *,
                     deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of :func:`dense_causal`.

    Args:
        do: ``[T, H, DV]``, gradient of o.
        dlse: gradient of lse; these kernels cannot take one, so anything but None declines.
        q, k, v, cu_seqlens, max_seqlen, scale: as forward.
        o, lse: forward's results, of whichever kernel.
        deterministic: declines, since these kernels add up dq in any order.

    Returns:
        dq ``[T, H, D]``, dk ``[T, HK, D]``, dv ``[T, HK, DV]``; or None.
    """
    kernel = dense_kernel(q, k, v, cu_seqlens, max_seqlen)
    if kernel is None or dlse is not None or deterministic:
        return None
    do = do if do.stride(-1) == 1 and _aligned(do) else do.contiguous()
    if kernel == CUDNN:
        batch = cu_seqlens.numel() - 1
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # the state of dropout's generator
        lse = lse.unflatten(0, (batch, max_seqlen)).transpose(1, 2).contiguous()[..., None]
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(_batched(x, batch) for x in (do, q, k, v, o)), lse, unused, unused, None, None, None, max_seqlen,
            max_seqlen, 0.0, True, scale=scale)
        return tuple(_packed(x).contiguous() for x in grads)
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = torch.ops.aten._flash_attention_backward(
        do, q, k, v, o, lse.t().contiguous(), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, state,
        state[0], scale=scale)
    return tuple(x.contiguous() for x in grads)


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> str | None:
    """Which dense kernel takes these tensors, from what the host knows; None for none. Says its choice once."""
    choice = _choose(q, k, v, cu_seqlens.numel() - 1, max_seqlen)
    _say(choice, str(q.dtype), q.shape[2], v.shape[2])
    return choice


def _choose(q: Tensor, k: Tensor, v: Tensor, batch: int, max_seqlen: int) -> str | None:
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or 0 in (q.numel(), batch):
        return None
    dim = q.shape[2]
    if dim != v.shape[2] or dim % 8 or dim > 256 or not all(map(_aligned, (q, k, v))):
        return None
    # no length exceeds the bound, so a full total means that every length meets it
    if q.shape[0] == batch * max_seqlen:
        views = tuple(_batched(x, batch) for x in (q, k, v))
        params = torch.backends.cuda.SDPAParams(*views, None, 0.0, True, k.shape[1] != q.shape[1])
        if torch.backends.cuda.can_use_cudnn_attention(params):
            return CUDNN
    # the backward of larger head dims needs the shared memory of sm_80 or sm_90
    if dim <= 128 or torch.cuda.get_device_capability(q.device) in ((8, 0), (9, 0)):
        return FLASH
    return None


@functools.lru_cache(maxsize=None)
def _say(choice: str | None, dtype: str, dim: int, dim_v: int) -> None:
    logger.info("moba_megatron: dense causal attention (%s, head dim %d and %d) by %s", dtype, dim, dim_v,
                choice or "the project's own kernels")


def _aligned(x: Tensor) -> bool:
    """Rows that 16-byte loads can read."""
    return (x.stride(2) == 1 and x.data_ptr() % 16 == 0
            and all(s * x.element_size() % 16 == 0 for s in x.stride()[:2]))


def _batched(x: Tensor, batch: int) -> Tensor:
    """``[B * S, H, D]`` as ``[B, H, S, D]``, a view."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` as ``[B * S, H, D]``."""
    return x.transpose(1, 2).flatten(0, 1)
