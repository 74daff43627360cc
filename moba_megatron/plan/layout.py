"""A way to split a run over GPUs, and why some ways cannot be."""
from collections.abc import Iterator
from dataclasses import dataclass

from ..context_parallel import COMM_TYPES
from .models import Run

RECOMPUTE = ("none", "selective", "full")
"""``selective`` recomputes attention alone, which saves its lse and selection; ``full`` whole layers."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; their product is the number of GPUs."""

    tp: int  # tensor, with sequence parallelism
    cp: int  # context
    pp: int  # pipeline
    dp: int  # data
    comm_type: str = "-"  # of context parallelism, `-` where cp is 1; `p2p`: only Transformer Engine's full attention
    inner: int = 1  # for `a2a+all_gather`, ranks that exchange heads
    recompute: str = "none"  # one of RECOMPUTE

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def heads_split(self) -> int:
        """Ranks over which context parallelism spreads heads."""
        return {"a2a": self.cp, "a2a+all_gather": self.inner}.get(self.comm_type, 1)

    @property
    def sequence_split(self) -> int:
        """Ranks over which queries are spread while they attend."""
        return self.cp // self.heads_split

    def name(self) -> str:
        inner = f" ({self.inner} x {self.cp // self.inner})" if self.comm_type == "a2a+all_gather" else ""
        sizes = f"TP {self.tp} CP {self.cp} PP {self.pp} DP {self.dp}"
        return f"{sizes} {self.comm_type}{inner}, recompute {self.recompute}"


def divisors(n: int, most: int | None = None) -> list[int]:
    return [d for d in range(1, min(n, most or n) + 1) if n % d == 0]


def candidates(run: Run, node: int) -> Iterator[Layout]:
    """Every split of the GPUs with tensor parallelism inside a machine, without recompute."""
    for tp in divisors(run.gpus, node):
        for pp in divisors(run.gpus // tp, run.model.layers):
            for cp in divisors(run.gpus // tp // pp):
                # heads inside a machine as far as they go, sequences across
                fitting = (d for d in divisors(cp) if 1 < d < cp and tp * d <= node and _heads_fit(run, tp, d))
                inner = max(fitting, default=0)
                for comm_type in COMM_TYPES if cp > 1 else ("-",):
                    places = inner if comm_type == "a2a+all_gather" else 1
                    if places and (comm_type != "selective" or run.attention == "moba"):
                        yield Layout(tp, cp, pp, run.gpus // tp // pp // cp, comm_type, places)


def _heads_fit(run: Run, tp: int, ranks: int) -> bool:
    heads, kv_heads = run.model.heads // tp, run.model.kv_heads // tp
    return heads % ranks == 0 and kv_heads > 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def refusals(run: Run, layout: Layout) -> list[str]:
    """Why Megatron or MoBA would not start with this layout; nothing where they would."""
    m, pieces = run.model, layout.tp * layout.cp * (2 if layout.cp > 1 else 1)
    found = [why for rest, why in (
        (m.heads % layout.tp, f"{m.heads} heads do not divide by TP {layout.tp}"),
        (m.kv_heads % layout.tp, f"{m.kv_heads} kv heads do not divide by TP {layout.tp}"),
        (m.ffn % layout.tp, f"ffn {m.ffn} does not divide by TP {layout.tp}"),
        (m.layers % layout.pp, f"{m.layers} layers do not divide by PP {layout.pp}"),
        (run.batch % layout.dp, f"{run.batch} sequences a step do not divide by DP {layout.dp}"),
        (run.seqlen % pieces, f"sequence {run.seqlen} is no multiple of {pieces} (TP x 2 CP)")) if rest]
    if not found and layout.comm_type == "a2a" and not _heads_fit(run, layout.tp, layout.cp):
        found.append(f"{m.heads // layout.tp} heads and {m.kv_heads // layout.tp} kv heads do not go with a2a over "
                     f"{layout.cp}")
    return found
