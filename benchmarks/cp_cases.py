"""What `benchmarks cp` measures: shapes, ways to communicate."""
from __future__ import annotations

from dataclasses import dataclass

from .cases import Case, K

COMMS = ("all_gather", "a2a", "a2a+all_gather")
GQA = {"heads": 32, "kv_heads": 8}
SHAPES = (
    Case("128K-512-8", 128 * K, 512, 8),
    Case("128K-128-8", 128 * K, 128, 8),
    Case("gqa-128K-512-8", 128 * K, 512, 8, **GQA),
    Case("gqa-128K-128-8", 128 * K, 128, 8, **GQA),
    Case("512K-512-8", 512 * K, 512, 8),
    Case("512K-128-8", 512 * K, 128, 8),
    Case("gqa-512K-512-8", 512 * K, 512, 8, **GQA),
    Case("gqa-512K-128-8", 512 * K, 128, 8, **GQA),
    Case("gqa-1M-512-8", 1024 * K, 512, 8, **GQA),
    Case("gqa-1M-4096-12", 1024 * K, 4096, 12, **GQA),
)
TINY = (
    Case("tiny", 256, 32, 3, heads=4, kv_heads=2, head_dim=32, dtype="float32"),
    Case("tiny-long", 512, 32, 3, heads=4, kv_heads=4, head_dim=32, dtype="float32"),
)
"""Not in the table: they try the benchmark itself where there is no GPU."""
LONGEST_SCALED = 512 * K
"""Beyond this a row says that it runs, in which time and memory; there is no time on one GPU beside it."""


@dataclass(frozen=True)
class Row:
    """A shape and how its ranks communicate."""

    case: Case
    comm: str

    @property
    def name(self) -> str:
        return f"{self.case.name}/{self.comm}"

    @property
    def scaled(self) -> bool:
        return self.case.tokens <= LONGEST_SCALED


def find_rows(names: list[str] | None, comms: list[str]) -> list[Row]:
    """Rows whose shape's name contains any of the words (exact names first), shape after shape.

    Raises:
        ValueError: a word matches nothing.
    """
    shapes = list(SHAPES)
    if names:
        shapes = []
        for word in names:
            found = [c for c in (*SHAPES, *TINY) if c.name == word] or [c for c in SHAPES if word in c.name]
            if not found:
                raise ValueError(f"--rows must name rows of the table, got {word!r}; rows: "
                                 f"{', '.join(c.name for c in (*SHAPES, *TINY))}")
            shapes += [c for c in found if c not in shapes]
    return [Row(case, comm) for case in shapes for comm in comms]


def hierarchy(size: int, inner: int) -> tuple[int, int] | None:
    """(ranks that exchange heads, ranks that gather) of a2a+all_gather; None where ``size`` has no such factors."""
    return (inner, size // inner) if size % inner == 0 and size // inner > 1 and inner > 1 else None
