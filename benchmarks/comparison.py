"""This package beside others and beside full attention: time, memory and error of each, at several lengths."""
from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_megatron import environment, moba_attn_varlen

from . import child_environment, oracle, report, speed, timing
from .baselines import BASELINES, AbsentError, Attend
from .cases import Case, make_inputs

OWN = "moba_megatron"
WRONG = 0.1
"""A relative error above this is no matter of rounding or near ties: other keys were attended to."""
SLOW_MS = 200
MANY_CHUNKS = 32
"""The error is taken at the first length with more chunks than this: some implementations go wrong from there on."""
MOST_DENSE_TOKENS = 32768
"""Full attention's error is not taken beyond: it is the same, and the oracle becomes slow."""
LENGTHS = (8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Entry:
    """One implementation: a row of the table."""

    name: str
    kind: str  # moba or full
    source: str
    load: Callable[[], Attend]
    version: Callable[[], str] = lambda: ""


def _dense(backend: SDPBackend) -> Attend:
    def attend(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk):
        with sdpa_kernel(backend):
            o = scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in (q, k, v)), is_causal=True)
        return o.transpose(1, 2)[0]

    return attend


def _own(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, chunk_size: int, topk: int) -> Tensor:
    return moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk)


def entries() -> list[Entry]:
    """All rows: this package, full attention inside torch, then what the user may have installed."""
    own = [Entry(OWN, "moba", "this package", lambda: _own),
           Entry("cuDNN", "full", "torch", lambda: _dense(SDPBackend.CUDNN_ATTENTION)),
           Entry("flash attention 2", "full", "torch", lambda: _dense(SDPBackend.FLASH_ATTENTION))]
    return own + [Entry(p.name, p.kind, p.source, p.load, p.version) for p in BASELINES]


def add_readme(subcommands) -> None:
    p = subcommands.add_parser("readme", help="the comparison with other implementations and full attention")
    p.add_argument("--tokens", nargs="+", type=int, default=list(LENGTHS), metavar="N", help="sequence lengths")
    p.add_argument("--only", nargs="+", choices=[entry.name for entry in entries()], metavar="NAME",
                   help="only these rows: " + ", ".join(entry.name for entry in entries()))
    p.add_argument("--chunk-size", type=int, default=512)
    p.add_argument("--topk", type=int, default=3)
    p.add_argument("--heads", type=int, default=16)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--repeats", type=int, default=10, help="timed runs of each row (10)")
    p.add_argument("--timeout", type=float, default=180, metavar="S", help="for all lengths of one row (180)")
    p.add_argument("--here", action="store_true", help="in this process, not in one for each row: a crash ends it all")
    p.add_argument("--device", default="cuda", help="cpu: to try it, slowly (cuda)")
    p.add_argument("--json", type=Path, required=True, metavar="PATH", help="write everything measured")
    p.set_defaults(run=run_readme)


def run_readme(arguments: argparse.Namespace) -> int:
    """Measures every row and prints the table; 1 where one of this package failed or was wrong."""
    device = environment.use_device(arguments.device)
    result = {"environment": environment.describe(device), "rows": [], "settings": {
        name: getattr(arguments, name) for name in ("chunk_size", "topk", "heads", "head_dim", "dtype")}}
    for entry in entries():
        if arguments.only and entry.name not in arguments.only:
            continue
        for row in (_measured_here if arguments.here else _isolated)(entry, arguments, device):
            result["rows"].append(row)
            report.save(arguments.json, result)
            print(f"{row['name']}, {row['tokens']} tokens: {row['status']}"
                  + (f", {row['ms']['median']:.3f} ms" if "ms" in row else f": {row['reason']}"), flush=True)
    print(TABLE.text(result))
    return int(any(row["name"] == OWN and row["status"] != "ok" for row in result["rows"]))


def _measured_here(entry: Entry, arguments: argparse.Namespace, device: torch.device):
    """Yields the rows of one implementation, shortest first; after a failure the longer ones are not tried."""
    about = {"name": entry.name, "kind": entry.kind, "source": entry.source}
    try:
        attend = entry.load()
        about["version"] = entry.version()
    except AbsentError as error:
        yield from ({**about, "tokens": n, "status": "absent", "reason": str(error)} for n in arguments.tokens)
        return
    failed = None
    for tokens in sorted(arguments.tokens):
        case = Case(f"{tokens}-{arguments.chunk_size}-{arguments.topk}", tokens, arguments.chunk_size, arguments.topk,
                    arguments.heads, arguments.heads, arguments.head_dim, arguments.dtype)
        row = {**about, "tokens": tokens, "chunks": -(-tokens // arguments.chunk_size)}
        begin = time.perf_counter()
        if failed is None:
            try:
                row |= measure(entry, attend, case, device, arguments.repeats)
            except Exception as error:  # the other implementations shall still be measured
                failed = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
                row |= {"status": "failed", "reason": failed}
        else:
            row |= {"status": "failed", "reason": f"not tried after: {failed}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield row | {"wall_s": time.perf_counter() - begin}


def _isolated(entry: Entry, arguments: argparse.Namespace, device: torch.device):
    """The same rows, by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        options = [(f"--{name.replace('_', '-')}", str(getattr(arguments, name))) for name in (
            "chunk_size", "topk", "heads", "head_dim", "dtype", "repeats", "device")]
        command = [sys.executable, "-m", "benchmarks", "readme", "--here", "--only", entry.name, "--json",
                   str(path), "--tokens", *map(str, arguments.tokens), *(word for pair in options for word in pair)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout,
                                  env=child_environment())
            reason = f"the process ended with {done.returncode}: {_last_line(done.stderr)}"
        except subprocess.TimeoutExpired:
            reason = f"took longer than {arguments.timeout:g} s"
        rows = report.load(path)["rows"] if path.exists() else []
    yield from rows
    for tokens in sorted(arguments.tokens)[len(rows):]:
        yield {"name": entry.name, "kind": entry.kind, "source": entry.source, "tokens": tokens, "status": "failed",
               "reason": reason}


FLASH_MOBA = report.Table(
    {"tokens, chunk size, topk": lambda row: f"{length(row['tokens'])}, {row['chunk_size']}, {row['topk']}",
     "heads": report.same("heads"), "FlashMoBA, ms": lambda row: report.number(row["flash_moba_ms"]),
     "cuDNN full, ms": lambda row: report.number(row.get("cudnn_ms"))}, below=lambda result: f"{result['about']}.")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


def measure(entry: Entry, attend: Attend, case: Case, device: torch.device, repeats: int) -> dict:
    """One implementation at one length: its error first, then time and memory of forward and backward.

    Returns:
        ``status`` (``ok`` or ``wrong``), ``errors`` of o, dq, dk, dv, ``ms``, ``forward_ms``, ``extra_peak_bytes``;
        for this package on CUDA also ``graph_ms``, a CUDA graph's replay.
    """
    cu_seqlens = torch.tensor([0, case.tokens], dtype=torch.int32, device=device)

    def forward(q, k, v):
        return attend(q, k, v, cu_seqlens, case.tokens, case.chunk_size, case.topk)

    row = {"status": "ok"}
    if entry.kind == "moba" or case.tokens <= MOST_DENSE_TOKENS:
        row = _errors(entry, forward, case, device)
    sets = [make_inputs(case, device, seed=1)]
    size = sum(x.numel() * x.element_size() for x in sets[0])
    sets += [make_inputs(case, device, seed=2 + i) for i in range(timing.input_sets(size, device) - 1)]
    for inputs in sets:
        for x in inputs[:3]:
            x.requires_grad_()

    def both(i=0):
        *leaves, do = sets[i % len(sets)]
        return torch.autograd.grad(forward(*leaves), leaves, do)

    def alone(i=0):
        with torch.no_grad():
            return forward(*sets[i % len(sets)][:3])

    first = timing.measure(both, device, 1, warmup=1)[0]
    times = timing.measure(both, device, speed.FEW if first > SLOW_MS else repeats, warmup=1)
    row |= {"ms": timing.summary(times), "forward_ms": timing.summary(timing.measure(alone, device, speed.FEW, 1)),
            "extra_peak_bytes": timing.extra_peak_bytes(both, device)}
    if entry.name == OWN and device.type == "cuda":
        with timing.graph_of(both) as replay:
            row["graph_ms"] = timing.summary(timing.measure(lambda i: replay(), device, repeats, 1))
    return row


def _errors(entry: Entry, forward: Callable[..., Tensor], case: Case, device: torch.device) -> dict:
    """Relative errors against fp64; for MoBA over the chunks that the definition selects."""
    q, k, v, do = make_inputs(case, device, seed=0)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = forward(*leaves)
    dq, dk, dv = torch.autograd.grad(o, leaves, do)
    with torch.no_grad():
        if entry.kind == "full":
            selected = torch.empty(case.tokens, case.heads, 0, dtype=torch.int32, device=device)
            chunk_size = case.tokens
        else:
            selected, chunk_size = speed.select(case, q, k, "auto"), case.chunk_size
        problem = oracle.Problem(q.detach(), k.detach(), v.detach(), do, selected, chunk_size, case.head_dim ** -0.5)
        errors = oracle.check_values(problem, o, None, dq, dk, dv)
        wrong = [name for name, e in errors.items() if not e["error"] <= (
            e["limit"] if entry.name == OWN else max(WRONG, e["limit"]))]
        if entry.kind == "moba" and oracle.check_selection(problem, case.topk)["wrong"]:
            raise AssertionError("the selection that the errors are taken against is not the definition's")
    status = {"status": "wrong", "reason": "error of " + ", ".join(wrong)} if wrong else {"status": "ok"}
    return {"errors": errors, **status}


def _groups(result: dict) -> list[dict]:
    """An item an implementation, with its rows by length; behind it one of its times in a CUDA graph."""
    groups = []
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        found = {row["tokens"]: row for row in result["rows"] if row["name"] == name}
        kind = next(iter(found.values()))["kind"]
        groups.append({"name": name, "kind": kind, "found": found, "graph": False})
        graph = {n: {"status": "ok", "ms": row["graph_ms"]} for n, row in found.items() if "graph_ms" in row}
        if graph:
            groups.append({"name": f"{name}, in a CUDA graph", "kind": "moba", "found": graph, "graph": True})
    return groups


def _columns(result: dict) -> report.Columns:
    """ms at each length, memory at the longest, error where there are many chunks."""
    lengths = sorted({row["tokens"] for row in result["rows"]})
    checked = next((n for n in lengths if n > MANY_CHUNKS * result["settings"]["chunk_size"]), None)

    def at(n: int) -> report.Cell:
        return lambda item: _milliseconds(item["found"].get(n))

    return {"implementation": report.same("name"),
            "attention": lambda item: "MoBA" if item["kind"] == "moba" else "full",
            **{length(n): at(n) for n in lengths},
            "extra GiB": lambda item: report.extra_gib(item["found"].get(lengths[-1], {})),
            "error o, dq, dk, dv": lambda item: report.errors("o", "dq", "dk", "dv")(item["found"].get(checked, {})),
            "note": lambda item: "" if item["graph"] else _note(item["found"])}


def not_measured(result: dict) -> list[str]:
    """The implementations that can be compared and that the result has no time of."""
    known = {row["name"] for row in result["rows"] if row["status"] != "absent"}
    return [entry.name for entry in entries() if entry.name not in known]


def length(tokens: int) -> str:
    """A number of tokens as 32K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _milliseconds(row: dict | None) -> str:
    if row is None or row["status"] == "absent":
        return ""
    return report.number(row["ms"]["median"]) if "ms" in row else row["status"]


def _note(found: dict[int, dict]) -> str:
    some = next(iter(found.values()))
    if some["status"] == "absent":
        return "absent"
    notes = [some["version"]] if some.get("version") else []
    notes += dict.fromkeys(f"commit {row['commit']}" for row in found.values() if "commit" in row)
    for n, row in found.items():
        if row["status"] == "wrong":
            notes.append(f"wrong at {length(n)}")
        elif row["status"] == "failed" and "not tried" not in row["reason"]:
            notes.append(f"failed at {length(n)}")
    return "; ".join(notes)


def below(result: dict) -> str:
    """What was measured where."""
    settings, left = result["settings"], not_measured(result)
    rest = f" Not measured: {', '.join(left)}." if left else ""
    return (f"Forward and backward, ms, {settings['heads']} heads of {settings['head_dim']}, {settings['dtype']}, "
            f"batch 1, chunk {settings['chunk_size']}, topk {settings['topk']}; errors at the first length with more "
            f"than {MANY_CHUNKS} chunks; extra memory at the longest.{rest} {report.measured_at(result)}")


TABLE = report.Table(_columns, _groups, below=below, keep_empty=True)
PAGE = replace(TABLE, items=lambda result: [x for x in _groups(result) if x["name"] not in not_measured(result)])
"""Without what was absent, which is named below it."""
