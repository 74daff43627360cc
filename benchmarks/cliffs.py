"""Shapes that people train and that are easily slow: odd head dims, small chunks, many choices, short documents, fp32.

Each row beside its error against fp64, what the card needs at least, and the time and memory it may take at most.
"""
from __future__ import annotations

import argparse
import gc
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moba_megatron import environment, moba_attn_varlen
from moba_megatron.ops import get_stages
from moba_megatron.segments import Segments

from . import oracle, report, timing
from .cases import BACKWARD_FLOPS, PEAK_BYTES, PEAK_FLOPS, K, attended_pairs

MORE_MEMORY = 1.1
"""A row may take so many times the memory that it took before."""


def documents(total: int, typical: int, longest: int, seed: int) -> tuple[int, ...]:
    """Lengths of documents, lognormal around the typical one, that fill ``total`` tokens."""
    draw, lengths = random.Random(seed), []
    while sum(lengths) < total:
        lengths.append(max(1, min(longest, int(draw.lognormvariate(math.log(typical), 1.2)))))
    lengths[-1] -= sum(lengths) - total
    return tuple(n for n in lengths if n)


@dataclass(frozen=True)
class Cliff:
    """A row: packed sequences, heads, and what it may take.

    Args:
        lengths: of the sequences.
        head_dim_v: of the values, where it is another.
        inputs: ``normal``; ``projection``, views of one tensor; ``sink``, all queries choose the first chunk.
        most_ms: forward and backward on an H200; None where none was asked for.
        before_gib: memory beyond the inputs that it took at 1782b01.
    """

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    chunk_size: int
    topk: int
    head_dim_v: int | None = None
    dtype: str = "bfloat16"
    inputs: str = "normal"
    most_ms: float | None = None
    before_gib: float | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def value_dim(self) -> int:
        return self.head_dim_v or self.head_dim


_DOCUMENTS = documents(128 * K, 3000, 64 * K, 1)
_32_8 = dict(heads=32, kv_heads=8, head_dim=128)
_16 = dict(heads=16, kv_heads=16, head_dim=128)
_TP8 = dict(heads=4, kv_heads=1, head_dim=128)
CLIFFS = (
    Cliff("128K-128-16", (128 * K,), **_16, chunk_size=128, topk=16, most_ms=30, before_gib=3.3),
    Cliff("128K-128-32", (128 * K,), **_16, chunk_size=128, topk=32, most_ms=60, before_gib=3.6),
    Cliff("128K-64-16", (128 * K,), **_16, chunk_size=64, topk=16, most_ms=28, before_gib=3.3),
    Cliff("128K-32-32", (128 * K,), **_16, chunk_size=32, topk=32, most_ms=65, before_gib=3.6),
    Cliff("tp8-1M-128-8", (K * K,), **_TP8, chunk_size=128, topk=8, most_ms=38, before_gib=9.9),
    Cliff("512K-128-8", (512 * K,), **_16, chunk_size=128, topk=8, most_ms=78, before_gib=9.5),
    Cliff("mla-64K-512-8", (64 * K,), 16, 16, 192, 512, 8, 128, most_ms=42, before_gib=2.3),
    Cliff("d256-64K-512-8", (64 * K,), 16, 4, 256, 512, 8, most_ms=55, before_gib=2.2),
    Cliff("128K-500-8", (128 * K,), **_32_8, chunk_size=500, topk=8, most_ms=86, before_gib=3.7),
    Cliff("d96-128K-512-8", (128 * K,), 32, 32, 96, 512, 8, most_ms=76, before_gib=4.3),
    Cliff("d80-32K-512-8", (32 * K,), 32, 32, 80, 512, 8, most_ms=17, before_gib=1.3),
    Cliff("d64-128K-512-8", (128 * K,), 32, 8, 64, 512, 8, most_ms=45, before_gib=2.4),
    Cliff("d64-128K-128-8", (128 * K,), 32, 8, 64, 128, 8, most_ms=19, before_gib=2.5),
    Cliff("docs-128K-128-8", _DOCUMENTS, **_32_8, chunk_size=128, topk=8, most_ms=29, before_gib=3.7),
    Cliff("64x2K-256-3", (2 * K,) * 64, **_32_8, chunk_size=256, topk=3, most_ms=15, before_gib=3.6),
    Cliff("4K-128-3", (4 * K,), **_32_8, chunk_size=128, topk=3, most_ms=0.9, before_gib=0.16),
    Cliff("sink-128K-512-8", (128 * K,), **_32_8, chunk_size=512, topk=8, inputs="sink", most_ms=82, before_gib=3.7),
    Cliff("fp32-16K-512-8", (16 * K,), 8, 2, 128, 512, 8, dtype="float32", most_ms=25, before_gib=0.6),
    Cliff("base-128K-512-8", (128 * K,), **_32_8, chunk_size=512, topk=8),
    Cliff("view-128K-512-8", (128 * K,), **_32_8, chunk_size=512, topk=8, inputs="projection"),
    Cliff("docs-128K-512-8", _DOCUMENTS, **_32_8, chunk_size=512, topk=8),
    Cliff("16x8K-512-3", (8 * K,) * 16, **_32_8, chunk_size=512, topk=3),
    Cliff("128K-4096-12", (128 * K,), **_32_8, chunk_size=4096, topk=12),
    Cliff("128K-1024-16", (128 * K,), **_32_8, chunk_size=1024, topk=16),
    Cliff("128K-1000-8", (128 * K,), **_32_8, chunk_size=1000, topk=8),
    Cliff("70B-128K-512-8", (128 * K,), 64, 8, 128, 512, 8),
    Cliff("mqa-128K-512-8", (128 * K,), 16, 1, 128, 512, 8),
    Cliff("tp8-1M-4096-12", (K * K,), **_TP8, chunk_size=4096, topk=12),
    Cliff("tp8-1M-512-8", (K * K,), **_TP8, chunk_size=512, topk=8),
    Cliff("fp16-32K-512-8", (32 * K,), **_32_8, chunk_size=512, topk=8, dtype="float16"),
    Cliff("4K-512-3", (4 * K,), **_32_8, chunk_size=512, topk=3),
)
TINY = (
    Cliff("tiny", (70, 1, 200), 4, 2, 32, 32, 3, 16, dtype="float32"),
    Cliff("tiny-sink", (256,), 2, 1, 32, 32, 3, dtype="float32", inputs="sink"),
    Cliff("tiny-view", (256,), 4, 2, 32, 32, 3, dtype="float32", inputs="projection"),
)
"""They try the benchmark itself where there is no GPU."""


def find_cliffs(names: list[str] | None) -> list[Cliff]:
    """The rows of these names; all but the tiny ones for None.

    Raises:
        ValueError: there is no row of a name.
    """
    known = {cliff.name: cliff for cliff in (*CLIFFS, *TINY)}
    for name in names or ():
        if name not in known:
            raise ValueError(f"--rows must name rows, got {name!r}; rows: {', '.join(known)}")
    return [known[name] for name in names] if names else list(CLIFFS)


def floor_ms(cliff: Cliff) -> float:
    """The larger of operations (of chosen pairs, and of the gate's product) and bytes over an H200's measured rates."""
    size, pairs, scores = cliff.chunk_size, 0.0, 0
    for n in cliff.lengths:
        chunks, rest = divmod(n, size)
        pairs += attended_pairs(n, size, cliff.topk)
        scores += (chunks * (chunks - 1) // 2 * size + chunks * rest) * (cliff.topk > 1)
    both = cliff.head_dim + cliff.value_dim
    flops = cliff.heads * (2 * pairs * both * (1 + BACKWARD_FLOPS) + 2 * scores * cliff.head_dim)
    row = (cliff.heads + cliff.kv_heads) * both * getattr(torch, cliff.dtype).itemsize
    moved = cliff.tokens * row * (1 + BACKWARD_FLOPS)
    return 1e3 * max(flops / PEAK_FLOPS, moved / PEAK_BYTES)


def inputs(cliff: Cliff, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, which ask for gradients, and the gradient of o."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(cliff.tokens, *shape, generator=generator, device=device, dtype=getattr(torch, cliff.dtype))

    if cliff.inputs == "projection":  # as Megatron's: a group's queries, its key, its value
        group = cliff.heads // cliff.kv_heads
        sizes = [group * cliff.head_dim, cliff.head_dim, cliff.value_dim]
        q, k, v = normal(cliff.kv_heads, sum(sizes)).split(sizes, -1)
        q = q.reshape(cliff.tokens, cliff.heads, cliff.head_dim)
    else:
        q, k = normal(cliff.heads, cliff.head_dim), normal(cliff.kv_heads, cliff.head_dim)
        v = normal(cliff.kv_heads, cliff.value_dim)
    if cliff.inputs == "sink":
        k[:cliff.chunk_size] += 0.3 * q[:, :cliff.kv_heads].mean(0) + 1
        q += 1
    return *(x.detach().requires_grad_() for x in (q, k, v)), normal(cliff.heads, cliff.value_dim)


def measure_cliff(cliff: Cliff, device: torch.device, backend: str, repeats: int) -> dict:
    """A row: errors first; then, where they are within their limits, milliseconds and memory."""
    row = {"name": cliff.name, "cliff": asdict(cliff), "floor_ms": floor_ms(cliff)}
    with timing.measuring(row, device):
        row |= errors(cliff, device, backend)
        if row["status"] == "ok":
            row |= _times(cliff, device, backend, repeats)
            row["kept"] = _kept(cliff, row)
    return row


def errors(cliff: Cliff, device: torch.device, backend: str) -> dict:
    """Errors against fp64 in the longest, the shortest and the last sequence together; fresh inputs."""
    q, k, v, do = inputs(cliff, device, seed=torch.seed() % 2 ** 31)
    cu_seqlens, ends = _cu_seqlens(cliff, device), torch.tensor(cliff.lengths).cumsum(0).tolist()
    o, lse = moba_attn_varlen(q, k, v, cu_seqlens, max(cliff.lengths), cliff.chunk_size, cliff.topk, backend=backend,
                              return_lse=True)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    samples, selection = [], {"checked": 0, "wrong": 0}
    longest, shortest = (pick(range(len(ends)), key=cliff.lengths.__getitem__) for pick in (max, min))
    with torch.no_grad():
        stages = get_stages(backend, device)
        segments = Segments.from_cu_seqlens(cu_seqlens, max(cliff.lengths), cliff.chunk_size)
        selected = stages.gate(q, stages.chunk_means(k, segments), segments, cliff.topk)
        for i in sorted({longest, shortest, len(ends) - 1}):
            at = slice(ends[i] - cliff.lengths[i], ends[i])
            chosen = torch.where(selected[at] < 0, -1, selected[at] - segments.first_chunk()[i])
            problem = oracle.Problem(q[at], k[at], v[at], do[at], chosen, cliff.chunk_size, cliff.head_dim ** -0.5)
            for name, count in oracle.check_selection(problem, cliff.topk).items():
                selection[name] += count
            samples.append(oracle.sampled_values(problem, *(x[at] for x in (o, lse, dq, dk, dv))))
    return oracle.verdict(oracle.errors(samples, q.dtype), selection)


def _cu_seqlens(cliff: Cliff, device: torch.device) -> Tensor:
    return torch.tensor([0, *cliff.lengths], device=device).cumsum(0).int()


def _times(cliff: Cliff, device: torch.device, backend: str, repeats: int) -> dict:
    *leaves, do = inputs(cliff, device, seed=1)
    cu_seqlens = _cu_seqlens(cliff, device)

    def forward(_=0):
        return moba_attn_varlen(*leaves, cu_seqlens, max(cliff.lengths), cliff.chunk_size, cliff.topk, backend=backend)

    def both(_=0):
        return torch.autograd.grad(forward(), leaves, do)

    result = {"ms": timing.summary(timing.measure(both, device, repeats, 2))}
    with torch.no_grad():
        result["forward_ms"] = timing.summary(timing.measure(forward, device, repeats, 1))
    result["kernels_ms"] = timing.kernel_times(both, device, 2)
    gc.collect()
    return result | {"extra_peak_bytes": timing.extra_peak_bytes(both, device)}


def _kept(cliff: Cliff, row: dict) -> bool | None:
    """Whether time and memory are within what was asked for; None where nothing was."""
    if cliff.most_ms is None or row["extra_peak_bytes"] is None:
        return None
    return (row["ms"]["median"] <= cliff.most_ms
            and row["extra_peak_bytes"] <= MORE_MEMORY * cliff.before_gib * report.GIB)


def _heads(row: dict) -> str:
    cliff = row["cliff"]
    dims = f"{cliff['head_dim']}/{cliff['head_dim_v']}" if cliff["head_dim_v"] else cliff["head_dim"]
    return f"{cliff['heads']}:{cliff['kv_heads']} x {dims}"


WHICH = {"row": report.same("name"), "heads x D": _heads}
TABLE = report.Table({
    **WHICH, "ms": report.median("ms"), "20-80 %": report.spread("ms"),
    "forward": report.median("forward_ms"), "floor": lambda row: report.number(row["floor_ms"]),
    "x floor": lambda row: f"{row['ms']['median'] / row['floor_ms']:.1f}",
    "at most": lambda row: report.number(row["cliff"]["most_ms"]), "GiB": report.extra_gib,
    "kept": lambda row: {True: "yes", False: "no", None: ""}[row["kept"]],
    "error o, dq, dk, dv": report.errors("o", "dq", "dk", "dv")}, failed={**WHICH, "kept": report.why},
    below=lambda result: f"At most: ms, and {MORE_MEMORY} times the memory before. {report.measured_at(result)}")


def add_cliffs(subcommands) -> None:
    p = subcommands.add_parser("cliffs", help="odd shapes that people train, beside what they need at least")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="rows by their whole name")
    p.add_argument("--repeats", type=int, default=7, help="timed runs of each row (7)")
    p.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no row after so many seconds")
    p.add_argument("--backend", choices=("triton", "torch", "reference"), help="unset: triton on cuda, else torch")
    p.add_argument("--device", default="cuda", help="cpu: to try it, with the rows named tiny (cuda)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    p.set_defaults(run=run_cliffs)


def run_cliffs(arguments: argparse.Namespace) -> int:
    """Measures the rows and prints the table; 1 if a row failed or was wrong."""
    begin, device = time.perf_counter(), environment.use_device(arguments.device)
    backend = arguments.backend or ("triton" if device.type == "cuda" else "torch")
    result = {"environment": environment.describe(device), "rows": []}
    for cliff in find_cliffs(arguments.rows):
        if time.perf_counter() - begin > arguments.budget:
            result["rows"].append({"name": cliff.name, "cliff": asdict(cliff), "status": "not run",
                                   "reason": "no time was left"})
            continue
        result["rows"].append(measure_cliff(cliff, device, backend, arguments.repeats))
        print(TABLE.text(result | {"rows": result["rows"][-1:]}), flush=True)
        if arguments.json:
            report.save(arguments.json, result)
    print(TABLE.text(result), flush=True)
    return int(any(row["status"] != "ok" for row in result["rows"]))
