"""What the public operators demand of their arguments, with errors that name the argument, the demand and what came."""
from __future__ import annotations

import math
import os

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CHECK_CUDA_VALUES = os.environ.get("MOBA_CHECK_INPUTS", "0") == "1"
"""Also read cu_seqlens back from the GPU to check its values. Off by default: it stops the host at every call."""


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q ``[T, H, D]``, k ``[S, HK, D]``, v ``[S, HK, DV]``: shapes, dtypes and devices.

    Raises:
        TypeError: not a tensor, or a dtype that is not a float, or dtypes that differ.
        ValueError: shapes or devices that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions [tokens, heads, head_dim], got shape {tuple(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"v must have k's tokens and heads {tuple(k.shape[:2])}, got {tuple(v.shape[:2])}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k must have q's head_dim {q.shape[2]}, got {k.shape[2]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q's heads must be a positive multiple of k's heads, got {heads} and {kv_heads}")
    if q.shape[2] < 1 or v.shape[2] < 1:
        raise ValueError(f"head_dim must be at least 1, got {q.shape[2]} for q and k, {v.shape[2]} for v")


def check_whole(name: str, value: int, minimum: int) -> int:
    """An int of at least ``minimum``; a bool, a float or a tensor is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if isinstance(value, int) and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The scale of the scores: 1/sqrt(head_dim) for None, else a finite number."""
    if softmax_scale is None:
        return head_dim ** -0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale must be a float or None, got {softmax_scale!r}")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)


def check_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int, total: int, device: torch.device) -> Tensor:
    """Cumulative lengths ``[B + 1]`` of ``total`` packed tokens; returns them as int32.

    Values are checked where reading them is free: on the CPU, or with ``MOBA_CHECK_INPUTS=1``.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 (or int64), got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [sequences + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be on q's device {device}, got {cu_seqlens.device}")
    check_whole("max_seqlen", max_seqlen, 0)
    if total >= 2 ** 31:
        raise ValueError(f"at most 2^31 - 1 packed tokens are supported, got {total}")
    if not torch.compiler.is_compiling() and (device.type == "cpu" or CHECK_CUDA_VALUES):
        _check_cu_seqlens_values(cu_seqlens.tolist(), max_seqlen, total)
    return cu_seqlens.int()


def _check_cu_seqlens_values(values: list[int], max_seqlen: int, total: int) -> None:
    if values[0] != 0 or values[-1] != total:
        raise ValueError(f"cu_seqlens must run from 0 to the number of tokens {total}, got {values[0]} to {values[-1]}")
    lengths = [b - a for a, b in zip(values, values[1:])]
    if min(lengths) < 0:
        at = next(i for i, n in enumerate(lengths) if n < 0)
        raise ValueError(f"cu_seqlens must not decrease, got {values[at]} then {values[at + 1]} at index {at + 1}")
    if max(lengths) > max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest sequence, {max(lengths)} tokens, got {max_seqlen}")
