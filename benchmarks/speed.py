"""The speed table: every row's error against an fp64 oracle first, and only then its time and memory."""
from __future__ import annotations

import functools
import gc
import statistics
from dataclasses import replace

import torch

from moba_megatron import moba_attn_varlen
from moba_megatron.ops import get_stages
from moba_megatron.segments import Segments

from . import dense, oracle, timing
from .cases import CASES, Case, floor_ms, make_inputs, plain_twin

SLOW_MS = 500
"""Above this a run needs no second warm-up, and what only explains the result is run a few times instead of many."""
FEW = 3


def measure_case(case: Case, device: torch.device, backend: str = "triton", repeats: int = 10, stages: bool = False,
                 graph: bool = False, dense_limit_ms: float = 1500) -> dict:
    """One row of the table.

    Args:
        case: what to measure.
        device: where.
        backend: of the operator.
        repeats: timed runs.
        stages: also time each stage and each kernel.
        graph: also time replays of a CUDA graph of forward and backward.
        dense_limit_ms: cuDNN's full attention is skipped where it is expected to take longer.

    Returns:
        The case's fields and ``floor_ms``, ``errors``, ``selection``, ``status`` (``ok``, ``wrong`` or ``failed``);
        times only where the status is ``ok``.
    """
    row = {"case": case.as_dict(), "floor_ms": floor_ms(case), "backend": backend}
    with timing.measuring(row, device):
        row |= errors(case, device, backend)
        if row["status"] == "ok":
            row |= _times(case, device, backend, repeats, stages, graph)
            row |= _dense(case, device, dense_limit_ms)
    return row


def _call(case: Case, q, k, v, backend: str, **options):
    cu_seqlens = torch.tensor([0, case.tokens], dtype=torch.int32, device=q.device)

    def run(q=q, k=k, v=v):
        return moba_attn_varlen(q, k, v, cu_seqlens, case.tokens, case.chunk_size, case.topk, backend=backend,
                                deterministic=case.deterministic, **options)

    return run


def errors(case: Case, device: torch.device, backend: str) -> dict:
    """Selection, o, lse, dq, dk, dv of this very case against the oracle; inputs are fresh in every process."""
    q, k, v, do = make_inputs(case, device, seed=torch.seed() % 2 ** 31)
    for x in (q, k, v):
        x.requires_grad_()
    o, lse = _call(case, q, k, v, backend, return_lse=True)()
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    with torch.no_grad():
        selected = select(case, q, k, backend)
        problem = oracle.Problem(q, k, v, do, selected, case.chunk_size, case.head_dim ** -0.5)
        selection = oracle.check_selection(problem, case.topk)
        errors = oracle.check_values(problem, o, lse, dq, dk, dv)
    return oracle.verdict(errors, selection)


def select(case: Case, q, k, backend: str):
    """The selection alone, by the stages under test."""
    stages = get_stages(backend, q.device)
    cu_seqlens = torch.tensor([0, case.tokens], dtype=torch.int32, device=q.device)
    segments = Segments.from_cu_seqlens(cu_seqlens, case.tokens, case.chunk_size)
    return stages.gate(q, stages.chunk_means(k, segments), segments, case.topk)


def _times(case: Case, device: torch.device, backend: str, repeats: int, stages: bool, graph: bool) -> dict:
    q, k, v, do = make_inputs(case, device, seed=1)
    sets = [(q, k, v, do)]
    size = sum(x.numel() * x.element_size() for x in sets[0])
    sets += [make_inputs(case, device, seed=2 + i) for i in range(timing.input_sets(size, device) - 1)]
    for q, k, v, _ in sets:
        for x in (q, k, v):
            x.requires_grad_()
    run = _call(case, *sets[0][:3], backend)

    def both(i=0):
        *leaves, do = sets[i % len(sets)]
        return torch.autograd.grad(run(*leaves), leaves, do)

    def forward(i=0):
        with torch.no_grad():
            return run(*sets[i % len(sets)][:3])

    first = timing.measure(both, device, 1, warmup=1)[0]
    slow = first > SLOW_MS
    warmup, less = (1, FEW) if slow else (3, repeats)
    times = timing.measure(both, device, repeats, warmup)
    result = {"ms": timing.summary(times), "times_ms": times, "input_sets": len(sets),
              "forward_ms": timing.summary(timing.measure(forward, device, less, 1))}
    gc.collect()
    result["extra_peak_bytes"] = timing.extra_peak_bytes(both, device)
    if graph and not slow and device.type == "cuda":
        with timing.graph_of(both) as replay:
            result["graph_ms"] = timing.summary(timing.measure(lambda i: replay(), device, repeats, warmup))
    if stages:
        result["stages_ms"] = _stage_times(case, device, backend, sets[0], less)
        result["kernels_ms"] = timing.kernel_times(both, device, FEW)
    return result


def _stage_times(case: Case, device: torch.device, backend: str, inputs, repeats: int) -> dict[str, float]:
    """Median ms of each stage called alone."""
    stages = get_stages(backend, device)
    q, k, v, do = (x.detach() for x in inputs)
    cu_seqlens = torch.tensor([0, case.tokens], dtype=torch.int32, device=device)
    segments = Segments.from_cu_seqlens(cu_seqlens, case.tokens, case.chunk_size)
    scale = case.head_dim ** -0.5
    means = stages.chunk_means(k, segments)
    selected = stages.gate(q, means, segments, case.topk)
    o, lse = stages.attention_fwd(q, k, v, selected, segments, scale)
    calls = {
        "chunk_means": lambda i: stages.chunk_means(k, segments),
        "gate": lambda i: stages.gate(q, means, segments, case.topk),
        "attention_fwd": lambda i: stages.attention_fwd(q, k, v, selected, segments, scale),
        "attention_bwd": lambda i: stages.attention_bwd(do, None, q, k, v, o, lse, selected, segments, scale,
                                                        deterministic=case.deterministic),
    }
    return {name: statistics.median(timing.measure(call, device, repeats, 1)) for name, call in calls.items()}


def _dense(case: Case, device: torch.device, limit_ms: float) -> dict:
    """cuDNN's full attention on the same shapes, or why it was left out."""
    if device.type != "cuda":
        return {"cudnn_skipped": "needs a GPU"}
    expected = dense.expected_ms(case)
    if expected > limit_ms:
        return {"cudnn_skipped": f"would take about {expected / 1e3:.1f} s a run"}
    if plain_twin(case) is not None:
        return {"cudnn_skipped": f"the same as in {plain_twin(case).name}"}
    try:
        return {"cudnn_ms": _cudnn_times(replace(CASES[0], tokens=case.tokens, heads=case.heads, kv_heads=case.kv_heads,
                                                 head_dim=case.head_dim), device)}
    except RuntimeError as error:
        return {"cudnn_skipped": f"{type(error).__name__}: {str(error).strip()[:200]}"}


@functools.lru_cache(maxsize=None)
def _cudnn_times(case: Case, device: torch.device) -> dict[str, float]:
    """Of the case's shape; rows that differ in chunks alone share it."""
    run = dense.cudnn_attention(*make_inputs(case, device, seed=1))
    repeats = FEW if dense.expected_ms(case) > SLOW_MS / 2 else 10
    return timing.summary(timing.measure(lambda i: run(), device, repeats, warmup=1))
