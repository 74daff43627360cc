"""What every launcher needs of the host: whether kernels are interpreted, and arithmetic of sizes.

Triton's own functions of these names cost microseconds a call.
"""
import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDAOptions

INTERPRETED: bool = knobs.runtime.interpret
"""TRITON_INTERPRET=1: kernels run in Python, on any tensor."""

BF16X6 = "bf16x6" if "bf16x6" in CUDAOptions.allowed_dot_input_precisions else "ieee"
"""Exact products of fp32 on tensor cores, from Triton 3.6 on."""


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
    """How products of a dtype are made: of fp32 by six of bfloat16, which lose nothing that fp32 sums keep."""
    return BF16X6 if dtype == torch.float32 and not INTERPRETED else "ieee"
