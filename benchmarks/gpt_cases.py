"""What `benchmarks gpt` measures: a GPT of 24 layers at several lengths, attentions and layouts."""
from __future__ import annotations

from dataclasses import asdict, dataclass

from moba_megatron.config import MoBAConfig

from .cases import Case, K


@dataclass(frozen=True)
class Shape:
    """A GPT: RoPE, RMSNorm, SwiGLU, grouped heads, no bias, one byte a token."""

    layers: int = 24
    hidden: int = 1024
    heads: int = 8
    groups: int = 2
    head_dim: int = 128
    ffn: int = 2816
    vocabulary: int = 256

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers, the output layer included."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.hidden * self.vocabulary


SHAPE = Shape()
TINY_SHAPE = Shape(layers=2, hidden=32, heads=4, groups=2, head_dim=8, ffn=48)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        tokens: of the one sequence, over all ranks.
        attention: ``full`` (Transformer Engine's own) or ``moba``.
        chunk_size, topk, full_layers: of MoBA.
        comm: ``cp_comm_type`` under context parallelism.
        tp: tensor parallel ranks (with sequence parallelism); the others are context parallel.
        recompute: every layer's forward again in backward.
        fp8: linear layers in fp8 (current scaling); attention stays bf16.
    """

    tokens: int
    attention: str
    chunk_size: int = 512
    topk: int = 8
    full_layers: str = "none"
    comm: str | None = None
    tp: int = 1
    recompute: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        attention = f"moba-{self.chunk_size}-{self.topk}" if self.attention == "moba" else self.attention
        parts = [f"{self.tokens // K}K" if self.tokens >= K else str(self.tokens), attention, self.comm,
                 None if self.full_layers == "none" else self.full_layers, f"tp{self.tp}" if self.tp > 1 else None,
                 "recompute" if self.recompute else None, "fp8" if self.fp8 else None]
        return "/".join(part for part in parts if part)

    @property
    def moba(self) -> MoBAConfig | None:
        if self.attention != "moba":
            return None
        return MoBAConfig(chunk_size=self.chunk_size, topk=self.topk, full_attention_layers=self.full_layers)

    def as_dict(self) -> dict:
        return asdict(self)


def _moba(tokens: int, **options) -> Row:
    return Row(tokens, "moba", **options)


ONE = (
    _moba(128 * K), Row(128 * K, "full"), Row(32 * K, "full"), _moba(32 * K),
    _moba(32 * K, topk=3), _moba(128 * K, topk=3), _moba(128 * K, full_layers="last:3"), _moba(128 * K, fp8=True),
    _moba(32 * K, chunk_size=4096, topk=12), _moba(128 * K, chunk_size=4096, topk=12), Row(32 * K, "full", fp8=True),
    _moba(256 * K, recompute=True),
)
TWO = (
    _moba(128 * K, comm="all_gather"), _moba(128 * K, comm="a2a"),
    Row(128 * K, "full", comm="p2p"), _moba(256 * K, comm="all_gather", recompute=True), _moba(128 * K, tp=2),
    Row(128 * K, "full", comm="a2a"), Row(128 * K, "full", tp=2),
    _moba(128 * K, comm="all_gather", full_layers="last:3"), _moba(128 * K, comm="all_gather", fp8=True),
)
FOUR = (
    _moba(128 * K, comm="all_gather"), _moba(128 * K, comm="a2a"),
    Row(128 * K, "full", comm="p2p"), _moba(256 * K, comm="all_gather"),
    _moba(256 * K, comm="a2a"), Row(256 * K, "full", comm="p2p"),
    _moba(1024 * K, comm="all_gather", recompute=True), _moba(128 * K, comm="a2a+all_gather"),
    Row(128 * K, "full", comm="all_gather"), _moba(128 * K, comm="all_gather", tp=2),
    Row(128 * K, "full", comm="p2p", tp=2),
)
TINY = (Row(256, "moba", 32, 3, comm="all_gather"), Row(256, "full", comm="all_gather"),
        Row(256, "moba", 32, 3, comm="all_gather", full_layers="last:1", recompute=True))
"""Not in the table: they try the benchmark where there is no GPU."""


def rows_for(size: int, names: list[str] | None, tiny: bool) -> list[Row]:
    """The rows for a number of ranks whose names contain any of the words; from the most wanted to the least.

    Raises:
        ValueError: a word matches nothing.
    """
    rows = TINY if tiny else {1: ONE, 2: TWO}.get(size, FOUR)
    if not names:
        return list(rows)
    found = []
    for word in names:
        matches = [row for row in rows if row.name == word] or [row for row in rows if word in row.name]
        if not matches:
            raise ValueError(f"--rows must name rows for {size} ranks, got {word!r}; rows: "
                             f"{', '.join(row.name for row in rows)}")
        found += [row for row in matches if row not in found]
    return found


def compiled_case(row: Row, shape: Shape) -> Case:
    """The attention of a layer as the kernels' benchmark describes it: what its rank will compile."""
    return Case(row.name, row.tokens, row.chunk_size, row.topk, heads=max(1, shape.heads // row.tp),
                kv_heads=max(1, shape.groups // row.tp), head_dim=shape.head_dim)
