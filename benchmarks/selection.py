"""Query heads that choose alone against the query heads of a kv head that choose together, in turns on one card.

Each way as one operator and as its halves: ``given`` is :func:`moba_megatron.sparse_attn_varlen` of what
:func:`moba_megatron.select_chunks` selected before. Errors are those of both ways against fp64, the larger each.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from moba_megatron import environment, moba_attn_varlen, select_chunks, sparse_attn_varlen
from moba_megatron.reference import group_queries

from . import oracle, report, timing
from .cases import Case, K, find_cases, floor_ms, make_inputs

CASES = (Case("128K-128-16", 128 * K, 128, 16, 32, 8), Case("128K-512-8", 128 * K, 512, 8, 32, 8))
WAYS = ("head", "given head", "group", "given group")


def measure_selection(case: Case, device: torch.device, backend: str, turns: int) -> dict:
    """A row: errors first; then, where they are within their limits, milliseconds of each way."""
    row = {"case": case.as_dict(), "floor_ms": floor_ms(case)}
    with timing.measuring(row, device):
        *leaves, do = make_inputs(case, device, seed=torch.seed() % 2 ** 31)
        for x in leaves:
            x.requires_grad_()
        cu_seqlens = torch.tensor([0, case.tokens], dtype=torch.int32, device=device)
        places = cu_seqlens, case.tokens, case.chunk_size
        chosen = {shared: select_chunks(*leaves[:2], *places, case.topk, shared=shared, backend=backend)
                  for shared in ("head", "group")}

        def attend(way: str, **more):
            if way.startswith("given"):
                return sparse_attn_varlen(*leaves, chosen[way.split()[1]], *places, backend=backend, **more)
            return moba_attn_varlen(*leaves, *places, case.topk, shared=way, backend=backend, **more)

        row |= _errors(case, leaves, do, chosen, attend)
        if row["status"] == "ok":
            both = {way: [] for way in WAYS}
            for turn in range(turns):
                for way, times in both.items():
                    times += timing.measure(lambda _, way=way: torch.autograd.grad(attend(way), leaves, do), device, 2,
                                            0 if turn else 2)
            row |= {way: timing.summary(times) for way, times in both.items()}
            row["ratio"] = row["head"]["median"] / row["group"]["median"]
    return row


def _errors(case: Case, leaves: list[Tensor], do: Tensor, chosen: dict[str, Tensor], attend) -> dict:
    """Against fp64, the selection too; and whether the halves give the operator's bits."""
    found, selection, same = [], {"checked": 0, "wrong": 0}, True
    for shared, selected in chosen.items():
        results = []
        for way in (shared, f"given {shared}"):
            o, lse = attend(way, return_lse=True)
            results.append((o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do)))
        same = same and all(map(torch.equal, *results))
        with torch.no_grad():
            q, k, v = (x.detach() for x in leaves)
            group = case.heads // case.kv_heads if shared == "group" else 1
            queries = group_queries(q, case.kv_heads) if shared == "group" else q
            choice = oracle.Problem(queries, k, v, do[:, ::group], selected, case.chunk_size, 1.0)
            for name, count in oracle.check_selection(choice, case.topk).items():
                selection[name] += count
            problem = oracle.Problem(q, k, v, do, selected.repeat_interleave(group, 1), case.chunk_size,
                                     case.head_dim ** -0.5)
            found.append(oracle.check_values(problem, *results[0]))
    worst = {name: max((each[name] for each in found), key=lambda x: x["error"] / x["limit"]) for name in found[0]}
    row = oracle.verdict(worst, selection)
    return row if same else row | {"status": "wrong", "reason": "the halves give other bits than the operator"}


WHICH = {"row": lambda row: row["case"]["name"], "heads x D": report.heads}
TABLE = report.Table({
    **WHICH, **{f"{way}, ms": report.median(way) for way in WAYS},
    "head / group": lambda row: f"{row['ratio']:.3f}", "floor": lambda row: report.number(row["floor_ms"]),
    "error o, dq, dk, dv": report.errors("o", "dq", "dk", "dv")}, failed={**WHICH, "floor": report.why},
    below=lambda result: f"Same bits as halves and as one operator. {report.measured_at(result)}")

LEARNED = report.Table({
    "seed": lambda item: str(item[0]), **{name: lambda item, name=name: f"{item[1][name]:.4f}" for name in (
        "indexer", "gate", "best", "difference")}}, lambda result: enumerate(result["seeds"], 1),
    below=lambda result: f"Indexer over gate {result['difference']:.4f}, 95 % interval {result['interval'][0]:.4f} to "
                         f"{result['interval'][1]:.4f}. {report.measured_at(result)}")
"""What examples/learned_router.py measures: dense attention's mass inside the choices."""


def add_selection(subcommands) -> None:
    p = subcommands.add_parser("selection", help="heads that choose alone or together, whole and with given chunks")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="rows of the kernels' table in place of the two")
    p.add_argument("--turns", type=int, default=7, help="turns of two timed runs each (7)")
    p.add_argument("--backend", choices=("triton", "torch", "reference"), help="unset: triton on cuda, else torch")
    p.add_argument("--device", default="cuda", help="cpu: to try it, with --rows tiny (cuda)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured")
    p.set_defaults(run=run_selection)


def run_selection(arguments: argparse.Namespace) -> int:
    """Measures the rows and prints the table; 1 if a row failed or was wrong."""
    device = environment.use_device(arguments.device)
    backend = arguments.backend or ("triton" if device.type == "cuda" else "torch")
    cases = find_cases(arguments.rows) if arguments.rows else CASES
    result = {"environment": environment.describe(device),
              "rows": [measure_selection(case, device, backend, arguments.turns) for case in cases]}
    print(TABLE.text(result), flush=True)
    if arguments.json:
        report.save(arguments.json, result)
    return int(any(row["status"] != "ok" for row in result["rows"]))
