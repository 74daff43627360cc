"""Measures the ways of context parallel attention on real ranks, for routings that differ, and counts their bytes.

    torchrun --nproc-per-node 2 -m benchmarks plan-measure --json selective.json
"""
from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from moba_megatron import environment
from moba_megatron.context_parallel import Sequences, context_parallel_attention, record_waits, selective
from moba_megatron.ops import get_stages, moba_attention
from moba_megatron.rendezvous import report_error
from moba_megatron.segments import Segments

from .. import report, timing
from ..distributed import Ranks, join, leave
from .simulate import traffic_of_selection

ROUTINGS = ("uniform", "local", "sink")
LARGEST_ERROR = 2e-2
"""Relative error of o and gradients against one rank, in bf16."""
STRENGTH = 4.0
"""How far the features that make a routing stand out of the noise."""


@dataclass(frozen=True)
class Job:
    """What is measured: one sequence of ``tokens``."""

    tokens: int
    chunk_size: int
    topk: int
    heads: int
    kv_heads: int
    dim: int
    backend: str


def make_inputs(job: Job, routing: str, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v, do of the whole sequence, the same on every rank.

    local: queries and keys carry waves of their chunk's number, which agree best for near chunks. sink: all queries and
    the first chunk's keys share a direction.
    """
    generator = torch.Generator(device).manual_seed(11)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, do = (torch.randn(job.tokens, heads, job.dim, generator=generator, device=device, dtype=dtype)
                   for heads in (job.heads, job.kv_heads, job.kv_heads, job.heads))
    if routing == "local":
        waves = job.dim // 8
        chunk = torch.arange(job.tokens, device=device)[:, None] // job.chunk_size
        angle = chunk * torch.logspace(math.log10(3), -3, waves, device=device)
        feature = torch.cat((angle.cos(), angle.sin()), 1)[:, None].to(dtype) * STRENGTH
        q[..., :2 * waves] += feature
        k[..., :2 * waves] += feature
    elif routing == "sink":
        q[..., 0] += STRENGTH
        k[:job.chunk_size, :, 0] += STRENGTH
    return q, k, v, do


FETCH = "selective, fetch"
NAMES = ("all_gather", "a2a", FETCH)


def measure_way(name: str, job: Job, inputs: tuple[Tensor, ...], expected: list[Tensor], ranks: Ranks,
                repeats: int) -> dict:
    """Errors, time of the slowest rank, bytes sent by all ranks."""
    sequences = Sequences.uniform(job.tokens, 1, ranks.device)
    rows = sequences.rows(ranks.size, ranks.rank).own_rows
    leaves = [x[rows].requires_grad_() for x in inputs[:3]]
    do = inputs[3][rows]

    def both(i: int = 0) -> list[Tensor]:
        o = context_parallel_attention(*leaves, sequences, job.chunk_size, job.topk, dist.group.WORLD,
                                       comm_type=name.split(",")[0], backend=job.backend)
        return [o, *torch.autograd.grad(o, leaves, do)]

    with mock.patch.object(selective, "GATHER_SHARE", math.inf):  # chunks are fetched, whatever is cheaper
        with record_waits() as record:
            got = both()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        stages = record.summary()
        errors = [((a - b[rows]).double().norm() / b[rows].double().norm()).item() for a, b in zip(got, expected)]
        times = ranks.measure(both, repeats, 1)
    sent = ranks.all_values({stage: entry["sent_bytes"] for stage, entry in stages.items()})
    return {"ms": timing.summary(times), "errors": dict(zip(("o", "dq", "dk", "dv"), ranks.slowest(errors))),
            "sent_bytes": [sum(x for stage, x in by_stage.items() if stage.split()[1] not in ("sums", "choices"))
                           for by_stage in sent], "stages": sent}


def counted_bytes(name: str, job: Job, selected: Tensor, size: int, item: int) -> list[int] | None:
    """Bytes that each rank's choices ought to move where chunks are fetched, counted on the selection of one rank.

    K and V come twice, fp32 sums of dK and dV go back. ``item``: bytes of an element; None for other ways.
    """
    if name != FETCH:
        return None
    piece = numpy.arange(job.tokens) // (job.tokens // (2 * size))
    owner = numpy.minimum(piece, 2 * size - 1 - piece)
    rows = traffic_of_selection(selected.cpu().numpy(), owner, owner, job.chunk_size, job.kv_heads, size)
    return (rows * 2 * job.dim * (2 * item + 4)).tolist()


def add_measure(subcommands) -> None:
    p = subcommands.add_parser("plan-measure", help="the ways of context parallelism on real ranks, by routing")
    p.add_argument("--tokens", type=int, default=131072)
    p.add_argument("--chunk-size", type=int, default=512)
    p.add_argument("--topk", type=int, default=8)
    p.add_argument("--heads", type=int, default=32)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    p.add_argument("--ways", nargs="+", choices=NAMES, default=list(NAMES))
    p.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no row after so many seconds")
    p.add_argument("--precompile", type=int, default=0, metavar="N", help="first compile the kernels in N processes")
    p.add_argument("--backend", default="auto", choices=("auto", "triton", "torch", "reference"))
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured, after every row")
    p.set_defaults(run=run_measure)


def run_measure(arguments: argparse.Namespace) -> int:
    """Measures every way for every routing; 1 where one is wrong."""
    job = Job(arguments.tokens, arguments.chunk_size, arguments.topk, arguments.heads, arguments.kv_heads,
              arguments.dim, arguments.backend)
    begin, ranks = time.perf_counter(), join(arguments.device)
    if job.tokens % (2 * ranks.size * job.chunk_size):
        report_error("--tokens must be a multiple of 2 * ranks * --chunk-size = "
                     f"{2 * ranks.size * job.chunk_size}, got {job.tokens}")
        return 2
    about = environment.describe(ranks.device) | {"ranks": ranks.size, "command": environment.command(
        "torchrun --nproc-per-node %d -m benchmarks" % ranks.size)}
    _precompile(job, ranks, arguments.precompile)
    result = {"environment": about, "job": vars(job), "rows": []}
    for routing in arguments.routings:
        inputs = make_inputs(job, routing, ranks.device)
        expected, selected = one_rank(job, inputs)
        for name in arguments.ways:
            row = {"routing": routing, "way": name, "ranks": ranks.size}
            if name == "a2a" and job.kv_heads % ranks.size:
                continue
            if ranks.from_first(time.perf_counter() - begin > arguments.budget):
                row |= {"status": "not run", "reason": "the time budget was spent"}
            else:
                row |= _row(name, job, inputs, expected, selected, ranks, arguments.repeats)
            result["rows"].append(row)
            if arguments.json and ranks.rank == 0:
                report.save(arguments.json, result)
            ranks.say(_line(row))
    leave()
    return int(any(row["status"] in ("wrong", "failed") for row in result["rows"]))


def _row(name: str, job: Job, inputs: tuple[Tensor, ...], expected: list[Tensor], selected: Tensor,
         ranks: Ranks, repeats: int) -> dict:
    try:
        row = measure_way(name, job, inputs, expected, ranks, repeats)
    except Exception as error:  # the other ways shall still be measured; where all ranks fail alike they can be
        return {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip()[:400]}"}
    row["counted_bytes"] = counted_bytes(name, job, selected, ranks.size, inputs[0].element_size())
    return row | {"status": "ok" if max(row["errors"].values()) < LARGEST_ERROR else "wrong"}


def _precompile(job: Job, ranks: Ranks, workers: int) -> None:
    """Rank 0 fills Triton's cache with what the schedules launch."""
    if workers and ranks.rank == 0 and ranks.device.type == "cuda":
        from ..cp_compile import Job as Schedule
        from ..cp_compile import compile_schedules
        shape = job.tokens, job.chunk_size, job.topk, job.heads, job.kv_heads, job.dim
        major, minor = torch.cuda.get_device_capability(ranks.device)
        schedules = [Schedule(comm, size, *shape) for comm, size in (("a2a", 1), ("all_gather", ranks.size),
                                                                    ("a2a", ranks.size))
                     if comm != "a2a" or job.kv_heads % size == 0]
        ranks.say(f"compiled in {compile_schedules(schedules, 10 * major + minor, workers):.0f} s")
    ranks.barrier()


def one_rank(job: Job, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
    """o, dq, dk, dv and the selection without context parallelism."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    cu_seqlens = torch.tensor([0, job.tokens], dtype=torch.int32, device=leaves[0].device)
    segments = Segments.from_cu_seqlens(cu_seqlens, job.tokens, job.chunk_size)
    o = moba_attention(*leaves, segments, job.topk, backend=job.backend)
    grads = torch.autograd.grad(o, leaves, inputs[3])
    stages = get_stages(job.backend, o.device)
    with torch.no_grad():
        selected = stages.gate(leaves[0], stages.chunk_means(leaves[1], segments), segments, job.topk)
    return [o.detach(), *grads], selected


def _line(row: dict) -> str:
    if "ms" not in row:
        return f"{row['routing']}, {row['way']}: {row['status']}: {row['reason']}"
    counted = f", counted {sum(row['counted_bytes']) / 2**20:.2f}" if row["counted_bytes"] else ""
    return (f"{row['routing']}, {row['way']}: {row['ms']['median']:.2f} ms, all ranks sent "
            f"{sum(row['sent_bytes']) / 2**20:.2f} MiB{counted}, largest error {max(row['errors'].values()):.1e}")
