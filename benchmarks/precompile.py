"""Fills Triton's cache for many problems at once, in several processes, so that a benchmark need not wait."""
from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

from moba_megatron.kernels import tuning

from . import compile_report
from .cases import Case


def problem_of(case: Case) -> compile_report.Problem:
    """What a case compiles."""
    return compile_report.Problem(head_dim=case.head_dim, chunk_size=case.chunk_size, topk=case.topk, heads=case.heads,
                                  kv_heads=case.kv_heads, dtype=case.torch_dtype, tokens=case.tokens, sequences=1,
                                  deterministic=case.deterministic)


def compile_only(problem: compile_report.Problem, capability: int) -> None:
    """Compiles everything that a problem launches; for a worker process."""
    with tuning.forced(tuning.arch_of_capability(*divmod(capability, 10))), compile_report.compiling(capability):
        compile_report.run_stages(problem)


def precompile(cases: list[Case], capability: int, workers: int) -> float:
    """Compiles every case's kernels for an architecture; returns the seconds it took.

    A case that fails to compile is left to fail where it runs.
    """
    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_only, problem, capability) for problem in dict.fromkeys(map(problem_of, cases))]
        for future in futures:
            future.exception()
    return time.perf_counter() - begin
