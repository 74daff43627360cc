"""Decoding: a step of MoBA over a key/value cache against dense attention by torch, each with its error.

Times are of one step, from a CUDA graph of several steps (what serving does) and from eager calls (what the host can
launch). Steps rotate queries and caches, so that none finds its own in the L2 cache.
"""
from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_megatron import environment
from moba_megatron.ops.decode import decode_selection, fill_chunk_means, moba_decode

from . import report, timing

BYTES_PER_SECOND = 4.3e12
"""What an H200 copies; the floors are for that card."""
STEPS = 8
"""Steps of one graph, each with queries of its own."""
CHECKED_SEQUENCES = 2
DENSE_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


@dataclass(frozen=True)
class DecodeCase:
    """One row: the shapes of a step, and its page size (0: contiguous)."""

    name: str
    batch: int
    tokens: int = 1 << 17
    chunk_size: int = 512
    topk: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 0


CASES = (
    DecodeCase("batch16", 16),
    DecodeCase("batch1", 1),
    DecodeCase("batch4", 4),
    DecodeCase("batch16-chunk128", 16, chunk_size=128),
    DecodeCase("batch16-pages64", 16, page=64),
    DecodeCase("batch1-512K", 1, tokens=1 << 19),
    DecodeCase("batch16-mha8", 16, heads=8),
)


@dataclass(frozen=True)
class Inputs:
    """A cache as Transformers keeps it (views ``[B, S, HK, D]`` of ``[B, HK, S, D]``), or its pages; and queries."""

    q: Tensor  # [steps, B, H, D]
    k: Tensor
    v: Tensor
    means: Tensor
    lengths: Tensor
    block_table: Tensor | None


def make_inputs(case: DecodeCase, device: torch.device, dtype: torch.dtype, steps: int, seed: int = 0) -> Inputs:
    """Random caches, full but for the half chunk that the last position stands in, and the means of their chunks."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    table = None
    if case.page:
        each = case.tokens // case.page
        k, v = (normal(case.batch * each, case.page, case.kv_heads, case.head_dim) for _ in range(2))
        table = torch.randperm(case.batch * each, generator=generator, device=device).view(case.batch, each).int()
    else:
        k, v = (normal(case.batch, case.kv_heads, case.tokens, case.head_dim).transpose(1, 2) for _ in range(2))
    lengths = torch.full((case.batch,), case.tokens - case.chunk_size // 2, dtype=torch.int32, device=device)
    means = k.new_zeros(case.batch, case.tokens // case.chunk_size, case.kv_heads, case.head_dim)
    fill_chunk_means(k, means, lengths, case.chunk_size, block_table=table)
    return Inputs(normal(steps, case.batch, case.heads, case.head_dim), k, v, means, lengths, table)


def step(case: DecodeCase, inputs: Inputs, i: int) -> tuple[Tensor, Tensor]:
    """o and lse of the i-th queries."""
    return moba_decode(inputs.q[i % len(inputs.q)], inputs.k, inputs.v, inputs.means, inputs.lengths, case.chunk_size,
                       case.topk, block_table=inputs.block_table, return_lse=True)


def select(case: DecodeCase, inputs: Inputs, i: int) -> Tensor:
    """The first part of a step: the chunks that the i-th queries choose."""
    return decode_selection(inputs.q[i % len(inputs.q)], inputs.k, inputs.means, inputs.lengths, case.chunk_size,
                            case.topk, block_table=inputs.block_table)


def dense_step(case: DecodeCase, inputs: Inputs, backend: SDPBackend | None, i: int) -> Tensor:
    """Dense attention of the i-th queries over all rows of a contiguous cache."""
    q = inputs.q[i % len(inputs.q)][:, :, None]
    k, v = inputs.k.transpose(1, 2), inputs.v.transpose(1, 2)
    grouped = case.heads != case.kv_heads
    if backend is None:
        return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def measure_case(case: DecodeCase, device: torch.device, repeats: int, dense: dict | None = None) -> dict:
    """A row: errors first, then times; dense ones only where ``dense``, another row's, does not give them."""
    row = {"case": asdict(case)}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with timing.measuring(row, device):
        cache_bytes = 2 * case.batch * case.tokens * case.kv_heads * case.head_dim * 2
        sets = [make_inputs(case, device, dtype, STEPS, seed) for seed in range(2 if cache_bytes < 4e9 else 1)]
        row |= check(case, sets[0])
        if row["status"] == "ok":
            row["ms"] = _times(lambda i: step(case, sets[i % len(sets)], i), device, repeats)
            row["gate_ms"] = _times(lambda i: select(case, sets[i % len(sets)], i), device, repeats)
            row["dense_ms"] = dense or ({} if case.page else _dense(case, sets, device, repeats))
    return row


def _times(run: Callable[[int], object], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step: ``eager``, and ``graph`` on CUDA."""
    times = {"eager": timing.summary(timing.measure(run, device, repeats * STEPS))}
    if device.type == "cuda":
        with timing.graph_of(lambda: [run(i) for i in range(STEPS)]) as replay:
            graph = timing.measure(lambda i: replay(), device, repeats)
        times["graph"] = timing.summary([ms / STEPS for ms in graph])
    return times


def _dense(case: DecodeCase, sets: list[Inputs], device: torch.device, repeats: int) -> dict[str, dict]:
    """Times by kernel of torch, those that take the case; ``torch`` is torch's own choice."""
    found = {}
    for backend in (None, *DENSE_BACKENDS) if device.type == "cuda" else (None,):
        name = "torch" if backend is None else backend.name
        try:
            found[name] = _times(lambda i: dense_step(case, sets[i % len(sets)], backend, i), device, repeats)
        except RuntimeError as error:
            found[name] = {"refused": str(error).strip()[:200]}
    return found


def check(case: DecodeCase, inputs: Inputs) -> dict:
    """Means, selection, o and lse of the first step against fp64, for the first and the last sequence.

    Returns:
        ``errors``: relative error and limit (twice that of the same in the inputs' precision, plus a rounding) of o and
        lse; ``wrong_choices``: chosen chunks that are below one that is not chosen, or means off by more than their
        rounding; ``floor_ms`` from the bytes of the distinct (kv head, chunk) pairs; ``status``.
    """
    o, lse = step(case, inputs, 0)
    selected = select(case, inputs, 0).long()
    got, exact, eager, wrong = [], [], [], 0
    for b in sorted({0, case.batch - 1})[:CHECKED_SEQUENCES]:
        k, v = (_rows(x, b, inputs) for x in (inputs.k, inputs.v))
        wrong += _wrong_choices(case, inputs, b, k, selected[b])
        got.append((o[b].double(), lse[b].double()))
        exact.append(_attend(case, inputs.q[0, b], k, v, selected[b], torch.float64))
        eager.append(_attend(case, inputs.q[0, b], k, v, selected[b], torch.float32))
    errors = {}
    for i, name in enumerate(("o", "lse")):
        x, y, z = (torch.stack([pair[i].double() for pair in pairs]) for pairs in (got, exact, eager))
        errors[name] = {"error": ((x - y).norm() / y.norm()).item(),
                        "limit": 2 * ((z - y).norm() / y.norm()).item() + torch.finfo(inputs.q.dtype).eps}
    bad = [name for name, e in errors.items() if not e["error"] <= e["limit"]] + ["selection"] * (wrong > 0)
    return {"errors": errors, "wrong_choices": wrong, "floor_ms": _floor_ms(case, inputs, selected),
            "status": "wrong" if bad else "ok", "reason": ", ".join(bad)}


def _rows(cache: Tensor, b: int, inputs: Inputs) -> Tensor:
    """All keys or values ``[S, HK, D]`` of a sequence, up to its length."""
    length = int(inputs.lengths[b])
    if inputs.block_table is None:
        return cache[b, :length]
    return cache[inputs.block_table[b].long()].flatten(0, 1)[:length]


def _wrong_choices(case: DecodeCase, inputs: Inputs, b: int, k: Tensor, selected: Tensor) -> int:
    own = (k.shape[0] - 1) // case.chunk_size
    means = inputs.means[b, :own].double()
    exact = k[:own * case.chunk_size].unflatten(0, (own, -1)).double().mean(1)
    wrong = int(((means - exact).abs() > torch.finfo(k.dtype).eps * exact.abs() + 1e-6).sum())
    score = torch.einsum("kgd,ckd->kgc", inputs.q[0, b].double().unflatten(0, (case.kv_heads, -1)), means).flatten(0, 1)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, selected, True)
    wrong += int((chosen.sum(1) != min(case.topk - 1, own)).sum())
    worst = score.masked_fill(~chosen, torch.inf).amin(1, keepdim=True)
    return wrong + int((~chosen & (score > worst + 1e-5 * score.abs().amax())).sum())


def _attend(case: DecodeCase, q: Tensor, k: Tensor, v: Tensor, selected: Tensor,
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """o ``[H, DV]`` and lse ``[H]`` of one query in ``dtype``; in fp32, o and the weights are rounded to q's dtype."""
    low, group = dtype == torch.float32, case.heads // case.kv_heads
    own = (k.shape[0] - 1) // case.chunk_size
    rows = (torch.cat((selected, torch.full_like(selected[:, :1], own)), 1)[:, :, None] * case.chunk_size
            + torch.arange(case.chunk_size, device=k.device)).flatten(1)  # [H, topk * chunk_size]
    inside = rows < k.shape[0]
    rows, kv_head = torch.where(inside, rows, 0), torch.arange(case.heads, device=k.device)[:, None] // group
    score = torch.einsum("hd,hnd->hn", q.to(dtype), k[rows, kv_head].to(dtype)) * case.head_dim ** -0.5
    score = score.masked_fill(~inside, -torch.inf)
    p = torch.softmax(score, 1)
    p = p.to(q.dtype).to(dtype) if low else p
    o = torch.einsum("hn,hnd->hd", p, v[rows, kv_head].to(dtype))
    return (o.to(q.dtype) if low else o), torch.logsumexp(score, 1)


def _floor_ms(case: DecodeCase, inputs: Inputs, selected: Tensor) -> dict[str, float]:
    """The time to read what must be read, and what dense attention must read."""
    chunks = inputs.means.shape[1]
    table = torch.zeros(case.batch, case.kv_heads, chunks, dtype=torch.bool, device=selected.device)
    table.scatter_(2, selected.unflatten(1, (case.kv_heads, -1)).flatten(2), True)
    row_bytes = 2 * case.head_dim * inputs.k.element_size()  # a key and a value
    rows = int(table.sum()) * case.chunk_size + case.batch * case.kv_heads * (case.chunk_size // 2)
    means = inputs.means.numel() * inputs.means.element_size()
    return {"moba": 1e3 * (rows * row_bytes + means) / BYTES_PER_SECOND,
            "dense": 1e3 * case.batch * case.tokens * case.kv_heads * row_bytes / BYTES_PER_SECOND}


def _columns(kind: str) -> report.Columns:
    """Times in a CUDA graph or called one by one: MoBA's, the fastest dense kernel's, and their ratio."""
    def ours(row: dict) -> float | None:
        return row.get("ms", {}).get(kind, {}).get("median")

    def dense(row: dict) -> float | None:
        return min((t[kind]["median"] for t in row.get("dense_ms", {}).values() if kind in t), default=None)

    return {f"{kind} ms": lambda row: f"{ours(row):.4f}" if ours(row) else "",
            f"dense {kind} ms": lambda row: f"{dense(row):.4f}" if dense(row) else "",
            f"x dense {kind}": lambda row: f"{dense(row) / ours(row):.2f}" if dense(row) and ours(row) else ""}


def below(result: dict) -> str:
    """What was measured where."""
    about = result["environment"]
    return (f"One step, bf16, heads of {result['rows'][0]['case']['head_dim']}: in a CUDA graph and called one by one; "
            "dense is the fastest of torch's kernels; the floor is what must be read, at "
            f"{BYTES_PER_SECOND / 1e12:g} TB/s. {environment.line(about)}. Made by `{report.called(about)}`.")


TABLE = report.Table({
    "row": report.same("case", "name"), "tokens": report.same("case", "tokens"),
    "heads": lambda row: f"{row['case']['heads']}:{row['case']['kv_heads']}",
    "chunk, topk": lambda row: f"{row['case']['chunk_size']}, {row['case']['topk']}",
    **_columns("graph"), **_columns("eager"),
    "gate ms": lambda row: f"{row['gate_ms']['graph']['median']:.4f}" if row.get("gate_ms", {}).get("graph") else "",
    "floor ms": lambda row: f"{row['floor_ms']['moba']:.4f}" if "floor_ms" in row else "",
    "error o, lse": report.errors(),
    "status": lambda row: row["status"] if row["status"] == "ok" else report.why(row)}, below=below, keep_empty=True)


def add_decode(subcommands) -> None:
    p = subcommands.add_parser("decode", help="a decoding step over a cache, against torch's dense attention")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    p.add_argument("--tokens", type=int, metavar="N", help="another length of the caches, for a quick look")
    p.add_argument("--chunk-size", type=int, metavar="N", help="another chunk size")
    p.add_argument("--repeats", type=int, default=20, help="timed replays of each graph (20)")
    p.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no row after so many seconds")
    p.add_argument("--device", default="cuda", help="cpu: to try it, slowly (cuda)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    p.set_defaults(run=run_decode)


def run_decode(arguments: argparse.Namespace) -> int:
    """Measures the rows, prints the table; 1 if a row failed or was wrong."""
    begin, device = time.perf_counter(), environment.use_device(arguments.device)
    changed = {name: value for name, value in (("tokens", arguments.tokens), ("chunk_size", arguments.chunk_size))
               if value}
    result = {"environment": environment.describe(device), "steps": STEPS, "rows": []}
    print(environment.line(result["environment"]), flush=True)
    for case in CASES:
        if arguments.rows and not any(name in case.name for name in arguments.rows):
            continue
        case = replace(case, **changed)
        if time.perf_counter() - begin > arguments.budget:
            row = {"case": asdict(case), "status": "not run", "reason": "the time budget was spent"}
        else:
            row = measure_case(case, device, arguments.repeats, _same_dense(case, result["rows"]))
        result["rows"].append(row)
        print(f"{case.name}: {row['status']}, {row.get('wall_s', 0):.0f} s", row.get("reason", ""), flush=True)
        if arguments.json:
            report.save(arguments.json, result)
    print(TABLE.text(result), flush=True)
    return int(any(row["status"] in ("failed", "wrong") for row in result["rows"]))


def _same_dense(case: DecodeCase, rows: list[dict]) -> dict | None:
    """Dense times of an earlier row that differs from the case only in how MoBA attends or where rows lie."""
    shape = ("batch", "tokens", "heads", "kv_heads", "head_dim")
    return next((row["dense_ms"] for row in rows if row.get("dense_ms")
                 and all(row["case"][name] == getattr(case, name) for name in shape)), None)
