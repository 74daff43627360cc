"""What is measured: the rows of the speed table, and the floor that the card sets."""
from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

PEAK_FLOPS = 790e12
PEAK_BYTES = 4.3e12
"""Measured on the H200: bf16 matrix products of cuBLAS; bytes read and written by a large copy."""
BACKWARD_FLOPS = 2.5
"""Backward over forward: five matrix products against two."""
SKEW = 4.0


@dataclass(frozen=True)
class Case:
    """One row: one sequence of ``tokens``, forward and backward, gate and routing included."""

    name: str
    tokens: int
    chunk_size: int
    topk: int
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: str = "bfloat16"
    skewed: bool = False
    deterministic: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def as_dict(self) -> dict:
        return asdict(self)


K = 1024
CASES = (
    Case("8K-512-3", 8 * K, 512, 3),
    Case("32K-512-3", 32 * K, 512, 3),
    Case("32K-128-8", 32 * K, 128, 8),
    Case("128K-128-8", 128 * K, 128, 8),
    Case("128K-512-8", 128 * K, 512, 8),
    Case("128K-2048-3", 128 * K, 2048, 3),
    Case("512K-128-8", 512 * K, 128, 8),
    Case("512K-4096-12", 512 * K, 4096, 12),
    Case("gqa-128K-512-8", 128 * K, 512, 8, heads=32, kv_heads=8),
    Case("1head-32K-512-3", 32 * K, 512, 3, heads=1, kv_heads=1),
    Case("d64-32K-512-3", 32 * K, 512, 3, heads=8, kv_heads=8, head_dim=64),
    Case("fp16-128K-512-8", 128 * K, 512, 8, dtype="float16"),
    Case("skewed-128K-512-8", 128 * K, 512, 8, skewed=True),
    Case("deterministic-128K-512-8", 128 * K, 512, 8, deterministic=True),
    Case("skewed-128K-128-8", 128 * K, 128, 8, skewed=True),
    Case("deterministic-128K-128-8", 128 * K, 128, 8, deterministic=True),
)
TINY = (
    Case("tiny", 256, 32, 3, heads=4, kv_heads=2, head_dim=32, dtype="float32"),
    Case("tiny-skewed", 256, 32, 3, heads=2, kv_heads=1, head_dim=32, dtype="float32", skewed=True),
)
"""Not in the table: they try the benchmark itself where there is no GPU."""


def find_cases(names: list[str] | None) -> list[Case]:
    """The cases whose names contain any of the words; all of the table for None.

    Raises:
        ValueError: a word matches nothing.
    """
    if not names:
        return list(CASES)
    found = []
    for word in names:
        exact = [case for case in (*CASES, *TINY) if case.name == word]
        matches = exact or [case for case in CASES if word in case.name]
        if not matches:
            raise ValueError(f"--rows must name rows of the table, got {word!r}; rows: "
                             f"{', '.join(case.name for case in (*CASES, *TINY))}")
        found += [case for case in matches if case not in found]
    return found


def flops(case: Case) -> float:
    """Floating-point operations of forward and backward over the attended keys; the gate is left out."""
    pairs = attended_pairs(case.tokens, case.chunk_size, case.topk)
    return 4 * case.head_dim * case.heads * pairs * (1 + BACKWARD_FLOPS)


def attended_pairs(tokens: int, size: int, topk: int) -> float:
    """Pairs of a query and a key that it attends to, of one head, in a sequence with chunks of ``size``."""
    chunks, rest = divmod(tokens, size)
    own = chunks * size * (size + 1) / 2 + rest * (rest + 1) / 2
    return own + sum(min(i, topk - 1) for i in range(chunks)) * size * size + rest * min(chunks, topk - 1) * size


def bytes_moved(case: Case) -> float:
    """Every input read once and every output written once: q, k, v, o forward; those, do, dq, dk, dv backward."""
    row = case.head_dim * case.torch_dtype.itemsize * case.tokens
    return row * (case.heads * (1 + 1 + 1 + 1 + 1 + 1) + case.kv_heads * (2 + 2 + 2))


def floor_ms(case: Case) -> float:
    """No implementation on an H200 is much faster than this."""
    return 1e3 * max(flops(case) / PEAK_FLOPS, bytes_moved(case) / PEAK_BYTES)


def make_inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v, do. Skewed: the first chunk's keys and all queries share a direction, so every query picks it."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(case.tokens, heads, case.head_dim, generator=generator, device=device,
                           dtype=case.torch_dtype)

    q, k, v, do = normal(case.heads), normal(case.kv_heads), normal(case.kv_heads), normal(case.heads)
    if case.skewed:
        q[..., 0] += SKEW
        k[:case.chunk_size, :, 0] += SKEW
    return q, k, v, do


def plain_twin(case: Case) -> Case | None:
    """The row that a fp16, skewed or deterministic row is compared with."""
    plain = replace(case, dtype="bfloat16", skewed=False, deterministic=False)
    if (plain.dtype, plain.skewed, plain.deterministic) == (case.dtype, case.skewed, case.deterministic):
        return None
    shape = ("tokens", "chunk_size", "topk", "heads", "kv_heads", "head_dim", "dtype", "skewed", "deterministic")
    return next((c for c in CASES if all(getattr(c, n) == getattr(plain, n) for n in shape)), None)
