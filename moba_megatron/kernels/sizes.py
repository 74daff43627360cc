"""Arithmetic of sizes on the host; Triton's own functions of these names cost microseconds a call there."""
from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    """The quotient, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n of at least 1."""
    return 1 << (n - 1).bit_length()


def head_block(dim: int) -> int:
    """Columns of a tile that holds rows of a head of this size: a power of two that tensor cores take, 16 at least."""
    return max(16, next_power_of_2(dim))
