"""Compiles what context parallel schedules launch, for groups of heads too, in several processes before ranks start."""
from __future__ import annotations

import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moba_megatron import kernels
from moba_megatron.context_parallel import Sequences
from moba_megatron.context_parallel.attention import make_schedule
from moba_megatron.kernels import tuning
from moba_megatron.ops.pipeline import Pipeline

from . import compile_report
from .cases import Case


@dataclass(frozen=True)
class Job:
    """A schedule to compile: one of COMM_TYPES over ``size`` ranks, ``inner`` of which exchange heads in a level."""

    comm_type: str
    size: int
    tokens: int
    chunk_size: int
    topk: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    inner: int = 2
    head_groups: int | None = None
    deterministic: bool = False
    packed: bool = False


def job_of(case: Case, comm_type: str, size: int, inner: int = 2) -> Job:
    """What ``size`` ranks compile for a case."""
    return Job(comm_type, size, case.tokens, case.chunk_size, case.topk, case.heads, case.kv_heads, case.head_dim,
               case.torch_dtype, inner, deterministic=case.deterministic)


def compile_schedule(job: Job, capability: int) -> None:
    """Compiles everything that forward and backward launch; for a worker process, since it joins a group of its own."""
    group = _group(job.size, job.inner if job.comm_type.startswith("a2a+") else None)
    sequences = Sequences.uniform(job.tokens, 1, torch.device("meta"))
    if job.packed:
        sequences = Sequences.packed(sequences.cu_seqlens, job.tokens, job.tokens)
    chunk_size, topk = job.chunk_size, job.topk
    if job.tokens <= topk * chunk_size:
        chunk_size, topk = job.tokens, 1
    pipeline = Pipeline(kernels, topk, job.head_dim ** -0.5, job.deterministic, True)
    comm_type = "all_gather" if job.comm_type == "selective" else job.comm_type  # it launches the same kernels
    q, k, v = (torch.empty(job.tokens // job.size, heads, job.head_dim, dtype=job.dtype, device="meta")
               for heads in (job.heads, job.kv_heads, job.kv_heads))
    with tuning.forced(tuning.arch_of_capability(*divmod(capability, 10))), compile_report.compiling(capability):
        schedule = make_schedule(comm_type, pipeline, sequences, chunk_size, group, job.head_groups)
        o, saved = schedule.forward(q, k, v)
        schedule.backward(torch.empty_like(o), saved, job.dtype)


@functools.lru_cache(maxsize=1)  # the group made last is the one that still exists
def _group(size: int, inner: int | None) -> dist.ProcessGroup | list[dist.ProcessGroup]:
    """A group over which nothing travels, or two levels of such groups; this process is rank 0."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    if inner is None:
        return dist.group.WORLD
    return [dist.new_group(list(range(inner))), dist.new_group(list(range(0, size, inner)))]


def compile_schedules(jobs: list[Job], capability: int, workers: int) -> float:
    """Compiles every job for an architecture; returns the seconds it took.

    A job that fails to compile is left to fail where it runs.
    """
    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(compile_schedule, job, capability) for job in dict.fromkeys(jobs)]:
            future.exception()
    return time.perf_counter() - begin
