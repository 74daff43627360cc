"""Where MoBA is plain causal attention: the fastest dense kernel that is there, as a pair of stage functions.

cuDNN for sequences that are known to be of one length; for packed ones flash-attn 4 on Hopper and Blackwell where
installed, else flash attention 2 (torch's own build); or what MOBA_DENSE says, if any. A function that returns None
declines, and the caller goes on with the project's kernels; forward and backward may be mixed, both take o and lse.
"""
import functools
import logging
import os

import torch
from torch import Tensor

from . import flash_attn_4
from .backend import get_stages
from .flash_attn_4 import Variant

logger = logging.getLogger("moba_megatron")
CUDNN, FLASH, FLASH_4 = "cuDNN", "flash attention 2", "flash-attn 4"
CHOICES = {"auto": (CUDNN, FLASH_4, FLASH), "cudnn": (CUDNN,), "flash2": (FLASH,), "fa4": (FLASH_4,), "own": ()}
"""MOBA_DENSE: the kernels it leaves, the first of them that can."""


def dense_causal(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, *,
                 exact: bool = False) -> tuple[Tensor, Tensor] | None:
    """Causal self-attention over packed sequences: o and lse, or None where no dense kernel fits. ``exact``, as of
    ``Segments``: without it cuDNN, which takes equal lengths only, declines."""
    kernel = dense_kernel(q, k, v, cu_seqlens, max_seqlen, exact=exact)
    if kernel is None:
        return None
    if kernel == CUDNN:
        batch = cu_seqlens.numel() - 1
        o, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(_batched(x, batch) for x in (q, k, v)), None, True, 0.0, True, False, scale=scale)
        lse = lse.reshape(batch, q.shape[1], max_seqlen).transpose(1, 2).flatten(0, 1)
        return _packed(o).contiguous(), lse.contiguous()
    if kernel == FLASH:
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False, scale=scale)
    else:
        o, lse = flash_attn_4.forward(q, k, v, cu_seqlens, max_seqlen, scale)
    # theirs has q's order of dimensions
    return _cleared(exact, cu_seqlens, (o.contiguous(), 0), (lse.t().contiguous(), -torch.inf))


def dense_causal_bwd(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                     cu_seqlens: Tensor, max_seqlen: int, scale: float, *, exact: bool = False,
                     deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of :func:`dense_causal`, whichever kernel o and lse are of; or None. Only flash-attn 4 can take a
    ``dlse`` or be ``deterministic``: declines without it."""
    kernel = dense_kernel(q, k, v, cu_seqlens, max_seqlen, exact=exact, deterministic=deterministic,
                          with_dlse=dlse is not None)
    if kernel is None:
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
    lse = lse.t().contiguous()
    if kernel == FLASH:
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            do, q, k, v, o, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, state, state[0],
            scale=scale)
    else:
        dlse = None if dlse is None else dlse.t().contiguous()
        grads = flash_attn_4.backward(do, dlse, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, deterministic)
    return _cleared(exact, cu_seqlens, *((x.contiguous(), 0) for x in grads))


def _cleared(exact: bool, cu_seqlens: Tensor, *filled: tuple[Tensor, float]) -> tuple[Tensor, ...]:
    """The tensors, with rows behind the last sequence filled: FlashAttention does not write them."""
    if not exact:
        get_stages("auto", cu_seqlens.device).clear_rows(cu_seqlens, *filled)
    return tuple(x for x, _ in filled)


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, exact: bool = False,
                 deterministic: bool = False, with_dlse: bool = False) -> str | None:
    """Which dense kernel takes these tensors, from what the host knows; None for none. Says its choice once. ValueError
    where MOBA_DENSE is none of its values, ImportError where it asks for flash-attn 4, which is not there."""
    variant = Variant(q.device, q.dtype, q.shape[2], v.shape[2], q.shape[1] // k.shape[1], deterministic, with_dlse)
    choice = _choose(dense_setting(), variant, q, k, v, cu_seqlens.numel() - 1, max_seqlen, exact)
    _say(choice, variant)
    return choice


def dense_setting() -> str:
    """MOBA_DENSE, ``auto`` where unset; ValueError where it is none of its values."""
    setting = os.environ.get("MOBA_DENSE") or "auto"
    if setting not in CHOICES:
        raise ValueError(f"environment variable MOBA_DENSE must be one of {', '.join(CHOICES)}; got {setting!r}")
    return setting


def dense_kernels() -> str:
    """What is to be alike on ranks that attend densely together: MOBA_DENSE, and whether flash-attn 4 is there."""
    setting = dense_setting()
    there = FLASH_4 in CHOICES[setting] and flash_attn_4.module() is not None
    return f"MOBA_DENSE={setting} {'with' if there else 'without'} flash-attn 4"


def _choose(setting: str, variant: Variant, q: Tensor, k: Tensor, v: Tensor, batch: int, max_seqlen: int,
            exact: bool) -> str | None:
    capability = _capability(q.device)
    if capability is None or q.dtype not in (torch.bfloat16, torch.float16) or 0 in (q.numel(), batch):
        return None
    if any(dim % 8 or dim > 256 for dim in (variant.dim, variant.dim_v)) or not all(map(_aligned, (q, k, v))):
        return None
    # what torch's kernels can do: one head dim, a gradient of o alone, in any order of sums
    plain = variant.dim == variant.dim_v and not variant.deterministic and not variant.with_dlse
    for kernel in CHOICES[setting]:
        if kernel == CUDNN:
            takes = exact and plain and _cudnn_takes(q, k, v, batch, max_seqlen)
        elif kernel == FLASH:
            # the backward of larger head dims needs the shared memory of sm_80 or sm_90
            takes = plain and (variant.dim <= 128 or capability in ((8, 0), (9, 0)))
        else:
            takes = flash_attn_4.fits(capability, variant) and flash_attn_4.usable(variant)
            if setting == "fa4" and flash_attn_4.module() is None:
                raise ImportError("MOBA_DENSE=fa4 asks for flash-attn 4, which cannot be imported: install it, or "
                                  "unset MOBA_DENSE")
        if takes:
            return kernel
    return None


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor, batch: int, max_seqlen: int) -> bool:
    # no length exceeds the bound, so a full total means that every length meets it
    if q.shape[0] != batch * max_seqlen:
        return False
    views = tuple(_batched(x, batch) for x in (q, k, v))
    params = torch.backends.cuda.SDPAParams(*views, None, 0.0, True, k.shape[1] != q.shape[1])
    with torch.cuda.device_of(q):  # it looks at the current device
        return torch.backends.cuda.can_use_cudnn_attention(params)


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.lru_cache(maxsize=None)
def _say(choice: str | None, variant: Variant) -> None:
    asked = "".join(name for name, wanted in ((", deterministic gradients", variant.deterministic),
                                              (", with lse's gradient", variant.with_dlse)) if wanted)
    logger.info("moba_megatron: dense causal attention (%s, head dim %d and %d%s) by %s", variant.dtype, variant.dim,
                variant.dim_v, asked, choice or "the project's own kernels")


def _aligned(x: Tensor) -> bool:
    """Rows that 16-byte loads can read, each in a place of its own."""
    return (x.stride(2) == 1 and x.data_ptr() % 16 == 0
            and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2]))


def _batched(x: Tensor, batch: int) -> Tensor:
    """``[B * S, H, D]`` as ``[B, H, S, D]``, a view."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` as ``[B * S, H, D]``."""
    return x.transpose(1, 2).flatten(0, 1)
