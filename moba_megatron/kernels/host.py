"""What every launcher needs of the host: whether kernels are interpreted, and arithmetic of sizes.

Triton's own functions of these names cost microseconds a call.
"""
import os

import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDAOptions

INTERPRETED: bool = knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in Python, on any tensor

FP32_PRODUCTS = os.environ.get("MOBA_FP32_PRODUCTS") or "bf16x6"
"""How products of fp32 are made: ``bf16x6``, six of bfloat16 on tensor cores, from Triton 3.6 on; or ``ieee``."""
if FP32_PRODUCTS not in ("bf16x6", "ieee"):
    raise ValueError(f"MOBA_FP32_PRODUCTS must be bf16x6 or ieee, got {FP32_PRODUCTS!r}")
if FP32_PRODUCTS not in CUDAOptions.allowed_dot_input_precisions:
    FP32_PRODUCTS = "ieee"


def cdiv(x: int, y: int) -> int:
    """The quotient, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n of at least 1."""
    return 1 << (n - 1).bit_length()


def head_block(dim: int) -> int:
    """Columns of a tile that holds rows of a head of this size: a power of two that tensor cores take, 16 at least."""
    return max(16, next_power_of_2(dim))


def precision(dtype: torch.dtype) -> str:
    """How products of a dtype are made. Six of bfloat16 lose nothing that sums in fp32 keep."""
    return FP32_PRODUCTS if dtype == torch.float32 and not INTERPRETED else "ieee"
