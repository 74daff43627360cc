"""One row of `benchmarks gpt`: build the model, prove which attention runs, then time forward and backward."""
from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from . import timing
from .cases import PEAK_FLOPS
from .distributed import Ranks
from .gpt_cases import Row, Shape
from .gpt_model import AttentionCount, build_model, local_batch, set_up_parallel

SLOW_MS = 3000
SLOW_REPEATS = 3
"""A step slower than SLOW_MS is timed so many times, after one warm-up."""


def measure_row(row: Row, shape: Shape, ranks: Ranks, repeats: int, inner: int, data: bytes | None) -> dict:
    """One row; every rank must call it.

    Returns:
        The row's fields, ``status`` (``ok`` or ``failed``), ``attention`` (what ran), ``loss`` (nats a token) and
        ``grad_norm`` of the first step, ``ms`` of the slowest rank, ``tokens_per_s``, ``peak_bytes`` of the rank that
        needs most, ``linear_floor_ms``.
    """
    result = {"name": row.name, "row": row.as_dict(), "ranks": ranks.size}
    with timing.measuring(result, ranks.device):
        set_up_parallel(row, ranks, inner)
        result |= _measure(row, shape, ranks, repeats, data)
    return result


def _measure(row: Row, shape: Shape, ranks: Ranks, repeats: int, data: bytes | None) -> dict:
    cuda = ranks.device.type == "cuda"
    model = build_model(row, shape, ranks)
    batch = local_batch(row, ranks, data)

    def step(i=0):
        model.zero_grad(set_to_none=True)
        loss = model(attention_mask=None, **batch).float().sum() / row.tokens
        loss.backward()
        return loss.detach()

    with AttentionCount(model) as count:
        loss = step()
    ran = count.check(row, shape.layers)
    first = _first_step(model, loss, row)
    slow = ranks.measure(step, 1, warmup=0)[0] > SLOW_MS
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = ranks.measure(step, SLOW_REPEATS if slow else repeats, warmup=0 if slow else 1)
    median = timing.summary(times)["median"]
    peak = max(ranks.all_values(torch.cuda.max_memory_allocated() if cuda else 0)) or None
    return {"status": "ok", "attention": ran, **first, "ms": timing.summary(times), "times_ms": times,
            "tokens_per_s": 1e3 * row.tokens / median, "peak_bytes": peak,
            "linear_floor_ms": 1e3 * 6 * shape.linear_parameters * row.tokens / (ranks.size * PEAK_FLOPS)}


def _first_step(model: torch.nn.Module, loss: torch.Tensor, row: Row) -> dict:
    """Loss and gradient norm of the whole sequence; they must not depend on the context parallel size.

    Raises:
        RuntimeError: the loss or a gradient is not finite.
    """
    group = parallel_state.get_context_parallel_group()
    loss = loss.clone()
    dist.all_reduce(loss, group=group)
    square = torch.zeros((), dtype=torch.float64, device=loss.device)
    for parameter in model.parameters():
        gradient = parameter.grad.float()
        dist.all_reduce(gradient, group=group)
        square += gradient.double().square().sum()
    loss, norm = loss.item(), square.sqrt().item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise RuntimeError(f"loss and gradients must be finite, got loss {loss}, gradient norm {norm}")
    return {"loss": loss, "grad_norm": norm if row.tp == 1 else None}
