"""A way to split a run over GPUs, and why some ways cannot be."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..context_parallel import COMM_TYPES
from .models import Run

RECOMPUTE = ("none", "selective", "full")
"""``selective`` recomputes attention alone, which saves its lse and selection; ``full`` whole layers."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; their product is the number of GPUs."""

    # tp, cp, pp, dp: tensor (with sequence parallelism), context, pipeline, data
    tp: int
    cp: int
    pp: int
    dp: int
    # of context parallelism, `-` where cp is 1; `p2p` only for Transformer Engine's full attention
    comm_type: str = "-"
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

    def with_recompute(self, recompute: str) -> "Layout":
        return replace(self, recompute=recompute)

    def name(self) -> str:
        inner = f" ({self.inner} x {self.cp // self.inner})" if self.comm_type == "a2a+all_gather" else ""
        sizes = f"TP {self.tp} CP {self.cp} PP {self.pp} DP {self.dp}"
        return f"{sizes} {self.comm_type}{inner}, recompute {self.recompute}"


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def candidates(run: Run, node: int) -> Iterator[Layout]:
    """Every split of the GPUs with tensor parallelism inside a machine, without recompute."""
    for tp in divisors(run.gpus):
        if tp > node:
            break
        for pp in divisors(run.gpus // tp):
            if pp > run.model.layers:
                break
            for cp in divisors(run.gpus // tp // pp):
                for comm_type, inner in _comm_types(run, tp, cp, node):
                    yield Layout(tp, cp, pp, run.gpus // tp // pp // cp, comm_type, inner)


def _comm_types(run: Run, tp: int, cp: int, node: int) -> Iterator[tuple[str, int]]:
    if cp == 1:
        yield "-", 1
        return
    for comm_type in COMM_TYPES:
        if comm_type == "a2a+all_gather":
            # heads inside a machine as far as they go, sequences across
            inner = [d for d in divisors(cp) if 1 < d < cp and tp * d <= node and _heads_fit(run, tp, d)]
            if inner:
                yield comm_type, max(inner)
        elif comm_type != "selective" or run.attention == "moba":
            yield comm_type, 1


def _heads_fit(run: Run, tp: int, ranks: int) -> bool:
    heads, kv_heads = run.model.heads // tp, run.model.kv_heads // tp
    return heads % ranks == 0 and kv_heads > 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def refusals(run: Run, layout: Layout) -> list[str]:
    """Why Megatron or MoBA would not start with this layout; nothing where they would."""
    m, found = run.model, []

    def must(condition: bool, why: str) -> None:
        if not condition:
            found.append(why)

    must(m.heads % layout.tp == 0, f"{m.heads} heads do not divide by TP {layout.tp}")
    must(m.kv_heads % layout.tp == 0, f"{m.kv_heads} kv heads do not divide by TP {layout.tp}")
    must(m.ffn % layout.tp == 0, f"ffn {m.ffn} does not divide by TP {layout.tp}")
    must(m.layers % layout.pp == 0, f"{m.layers} layers do not divide by PP {layout.pp}")
    must(run.batch % layout.dp == 0, f"{run.batch} sequences a step do not divide by DP {layout.dp}")
    pieces = layout.tp * layout.cp * (2 if layout.cp > 1 else 1)
    must(run.seqlen % pieces == 0, f"sequence {run.seqlen} is no multiple of {pieces} (TP x 2 CP)")
    if not found and layout.comm_type == "a2a":
        must(_heads_fit(run, layout.tp, layout.cp),
             f"{m.heads // layout.tp} heads and {m.kv_heads // layout.tp} kv heads do not go with a2a over {layout.cp}")
    return found
