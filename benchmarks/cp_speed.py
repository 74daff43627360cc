"""One row of `benchmarks cp`: the error of P ranks against one GPU first, then times, exposed communication, memory."""
from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moba_megatron import moba_attn_varlen
from moba_megatron.context_parallel import CollectiveCheck, Sequences, context_parallel_attention, record_waits

from . import dense, timing
from .cases import Case, K, make_inputs
from .cp_cases import Row, hierarchy
from .distributed import Ranks
from .speed import FEW, SLOW_MS

LIMITS = {torch.bfloat16: 2.0 ** -7, torch.float16: 2.0 ** -10, torch.float32: 1e-5}
"""Largest relative error against one GPU: two roundings to the dtype, or fp32 sums in another order."""
FULL_TOKENS = 128 * K
"""Length at which full attention is timed; for other lengths its time is scaled by the square."""

OFF_STREAM = "collective check"
"""A stage that a side stream awaits: the compute stream does not stand still for it."""


@dataclass(frozen=True)
class Settings:
    """How the rows are measured.

    Args:
        backend: of the operator.
        repeats: timed runs.
        inner: ranks that exchange heads in a2a+all_gather.
        full: also time cuDNN's full attention on rank 0.
        link: bytes a second that a rank sends in a large all-gather, None for one rank.
    """

    backend: str = "auto"
    repeats: int = 10
    inner: int = 2
    full: bool = True
    link: float | None = None


def measure_row(row: Row, ranks: Ranks, settings: Settings) -> dict:
    """One row; every rank must call it.

    Returns:
        On every rank the row's fields and ``status`` (``ok``, ``wrong``, ``failed``, ``not run``); times only where
        the status is ``ok``: ``ms`` of the slowest rank, ``one_gpu_ms`` and ``efficiency`` (scaled rows), ``exposed``
        and ``quarter_link_ms`` (more than one rank), ``extra_peak_bytes`` of the rank that needs most.
    """
    result = {"name": row.name, "case": row.case.as_dict(), "comm": row.comm, "ranks": ranks.size,
              "backend": settings.backend}
    with timing.measuring(result, ranks.device):
        call = _call(row, ranks, settings)
        if call is None:
            result |= {"status": "not run", "reason": f"{ranks.size} ranks are not {settings.inner} times 2 or more"}
        else:
            result |= _errors(row.case, ranks, call, settings.backend)
            if result["status"] == "ok":
                result |= _times(row, ranks, call, settings)
    return result


@functools.lru_cache(maxsize=None)
def _hierarchical_groups(size: int, inner: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The groups of this rank: ``inner`` neighbours, and the ranks with the same place among theirs."""
    rank = dist.get_rank()
    mine = []
    for members in ([list(range(i, i + inner)) for i in range(0, size, inner)],
                    [list(range(i, size, inner)) for i in range(inner)]):
        groups = [dist.new_group(m) for m in members]
        mine.append(next(g for g, m in zip(groups, members) if rank in m))
    return tuple(mine)


def _call(row: Row, ranks: Ranks, settings: Settings):
    """The one place that calls context parallel attention: ``call(q, k, v) -> o`` on local rows; None if P forbids."""
    case, group = row.case, dist.group.WORLD
    if "+" in row.comm:
        if hierarchy(ranks.size, settings.inner) is None:
            return None
        group = _hierarchical_groups(ranks.size, settings.inner)
    sequences = Sequences.uniform(case.tokens, 1, ranks.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with CollectiveCheck(dist.group.WORLD) as collective:  # as MoBACoreAttention does before each call
            collective.signature = row.name
        return context_parallel_attention(q, k, v, sequences, case.chunk_size, case.topk, group, comm_type=row.comm,
                                          deterministic=case.deterministic, backend=settings.backend)

    call.rows = sequences.rows(ranks.size, ranks.rank).own_rows
    return call


def _one_gpu(case: Case, backend: str):
    cu_seqlens = functools.lru_cache(lambda device: torch.tensor([0, case.tokens], dtype=torch.int32, device=device))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_attn_varlen(q, k, v, cu_seqlens(q.device), case.tokens, case.chunk_size, case.topk,
                                deterministic=case.deterministic, backend=backend)

    return run


def _with_gradients(run, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*leaves)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def _local(whole: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(x[rows] for x in whole)


def _errors(case: Case, ranks: Ranks, call, backend: str) -> dict:
    """Relative errors of o, dq, dk, dv over all ranks against one GPU.

    Each rank computes the whole problem for itself, a kv head with its query heads at a time, which bounds the memory.
    Inputs are fresh in every process group.
    """
    whole = make_inputs(case, ranks.device, seed=ranks.from_first(torch.seed() % 2 ** 31))
    got = _with_gradients(call, *_local(whole, call.rows))
    per_kv = case.heads // case.kv_heads
    sums = torch.zeros(2, 4, dtype=torch.float64, device=ranks.device)
    run = _one_gpu(case, backend)
    for head in range(case.kv_heads):
        query, key = slice(head * per_kv, (head + 1) * per_kv), slice(head, head + 1)
        q, k, v, do = (x[:, part].contiguous() for x, part in zip(whole, (query, key, key, query)))
        want = _with_gradients(run, q, k, v, do)
        for i, (mine, one, part) in enumerate(zip(got, want, (query, query, key, key))):
            one = one[call.rows].double()
            sums[0, i] += (mine[:, part].double() - one).square().sum()
            sums[1, i] += one.square().sum()
    dist.all_reduce(sums)
    limit = LIMITS[case.torch_dtype]
    errors = dict(zip(("o", "dq", "dk", "dv"), (sums[0] / sums[1]).sqrt().tolist()))
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= limit]
    status = {"status": "wrong", "reason": f"differs from one GPU: {', '.join(wrong)} > {limit:.1e}"}
    return {"errors": errors, "limit": limit, **(status if wrong else {"status": "ok"})}


def _times(row: Row, ranks: Ranks, call, settings: Settings) -> dict:
    result = _beside(row, ranks, settings)
    timing.free(ranks.device)
    local = _local(make_inputs(row.case, ranks.device, seed=1), call.rows)
    leaves, do = [x.requires_grad_() for x in local[:3]], local[3]
    timing.free(ranks.device)

    def both(i=0):
        return torch.autograd.grad(call(*leaves), leaves, do)

    def forward(i=0):
        with torch.no_grad():
            return call(*leaves)

    slow = ranks.measure(both, 1, warmup=1)[0] > SLOW_MS
    times = ranks.measure(both, FEW if slow else settings.repeats, warmup=0 if slow else 2)
    result |= {"ms": timing.summary(times), "times_ms": times,
               "forward_ms": timing.summary(ranks.measure(forward, 1 if slow else FEW, warmup=1))}
    gc.collect()
    peaks = ranks.all_values(timing.extra_peak_bytes(both, ranks.device))
    result["extra_peak_bytes"] = max(peaks) if None not in peaks else None
    if "one_gpu_ms" in result:
        result["efficiency"] = result["one_gpu_ms"]["median"] / (ranks.size * result["ms"]["median"])
    if ranks.size > 1:
        result |= _communication(both, ranks, result["ms"]["median"], settings.link, 1 if slow else FEW)
    return result


def _beside(row: Row, ranks: Ranks, settings: Settings) -> dict:
    """The times on one GPU: the same problem, and full attention at a length that it manages."""
    result = {}
    if row.scaled:
        timing.free(ranks.device)
        try:
            result["one_gpu_ms"] = _one_gpu_ms(row.case, ranks, settings.backend, settings.repeats)
        except RuntimeError as error:
            result["one_gpu_missing"] = str(error)
    if settings.full and ranks.device.type == "cuda":
        timing.free(ranks.device)
        full = _full_ms(replace(row.case, tokens=FULL_TOKENS, chunk_size=1, topk=1, name="full"), ranks)
        result["full"] = {"measured_tokens": FULL_TOKENS, "measured_one_gpu_ms": full,
                          "scaled_ms": full * (row.case.tokens / FULL_TOKENS) ** 2 / ranks.size}
    return result


@functools.lru_cache(maxsize=None)
def _one_gpu_ms(case: Case, ranks: Ranks, backend: str, repeats: int) -> dict[str, float]:
    """t(1), on rank 0 while the others wait; ways to communicate share it."""
    def measure():
        inputs, run = make_inputs(case, ranks.device, seed=1), _one_gpu(case, backend)

        def both(i):
            return _with_gradients(run, *inputs)

        slow = timing.measure(both, ranks.device, 1, warmup=1)[0] > SLOW_MS
        return timing.summary(timing.measure(both, ranks.device, FEW if slow else repeats, warmup=0 if slow else 2))

    return ranks.on_first(measure)


@functools.lru_cache(maxsize=None)
def _full_ms(case: Case, ranks: Ranks) -> float:
    """Median ms of cuDNN's full attention, forward and backward, on rank 0 while the others wait."""
    def measure():
        run = dense.cudnn_attention(*make_inputs(case, ranks.device, seed=1))
        return timing.summary(timing.measure(lambda i: run(), ranks.device, FEW, warmup=1))["median"]

    return ranks.on_first(measure)


def _communication(both, ranks: Ranks, ms: float, link: float, steps: int) -> dict:
    """Per stage and step: how long the compute stream stood still for it (slowest rank), and the bytes sent.

    ``quarter_link_ms`` is computed: over a link with a quarter of the measured bytes a second the bytes sent take three
    more times as long as now, and at worst nothing of that hides behind computation.
    """
    with record_waits() as record:
        for _ in range(steps):
            both()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
    everyone = ranks.all_values(record.summary())
    exposed = {stage: {"ms": max(each[stage]["exposed_ms"] for each in everyone) / steps,
                       "sent_bytes": max(each[stage]["sent_bytes"] for each in everyone) / steps}
               for stage in everyone[0] if stage != OFF_STREAM and all(stage in each for each in everyone)}
    sent = sum(x["sent_bytes"] for x in exposed.values())
    return {"exposed": exposed, "sent_bytes": sent, "link_bytes_per_s": link,
            "quarter_link_ms": ms + 3 * 1e3 * sent / link}
