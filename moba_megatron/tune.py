"""Finds launch configurations for the card at hand and writes them as a file that MOBA_TUNING_FILE names.

    python -m moba_megatron.tune card.json

Each stage starts from the packaged row and moves one number at a time (a tile halved or doubled, warps, pipeline
stages) as long as that makes the stage's function faster by more than noise. A configuration that does not compile,
does not fit the card or changes the result is passed over.
"""
import argparse
import functools
import itertools
import os
import time
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from . import environment, kernels
from .kernels import tuning
from .segments import Segments

LEAST_GAIN, RUNS = 0.02, 5
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
CHOICES = {"num_warps": (1, 2, 4, 8), "num_stages": (1, 2, 3, 4)}


def neighbours(config: dict[str, int]) -> list[dict[str, int]]:
    """Configurations that differ in one number: tiles by a factor of two, warps and pipeline stages by one choice."""
    found = []
    for name, value in config.items():
        if name in CHOICES:
            at = CHOICES[name].index(value) if value in CHOICES[name] else 0
            found += [{**config, name: CHOICES[name][i]} for i in (at + 1, at - 1) if 0 <= i < len(CHOICES[name])]
        elif name.startswith("BLOCK_") or name == "SPLIT":
            found += [{**config, name: v} for v in (2 * value, value // 2)
                      if name == "SPLIT" or SMALLEST_BLOCK <= v <= LARGEST_BLOCK]
    return found


def climb(start: dict[str, int], measure: Callable[[dict[str, int]], float | None],
          more: Callable[[], bool]) -> tuple[dict[str, int], float, float]:
    """From a configuration, which must work, to the best one that single steps reach: that one, its ms, the start's ms.
    ``measure``: ms of a configuration, None if it does not work; ``more``: whether there is time to go on."""
    best, first = dict(start), measure(start)
    if first is None:
        raise RuntimeError(f"the packaged configuration {start} does not run on this card")
    best_ms, left, tried = first, neighbours(best), [best]
    while left and more():
        if (candidate := left.pop(0)) not in tried:
            tried.append(candidate)
            if (ms := measure(candidate)) is not None and ms < best_ms * (1 - LEAST_GAIN):
                best, best_ms, left = candidate, ms, neighbours(candidate)
    return best, best_ms, first


def _functions(arguments: argparse.Namespace, device: torch.device, head_dim: int,
               chunk_size: int) -> dict[str, Callable[[], object]]:
    """Prefix of stage names -> the function that runs such stages, on inputs of its own."""
    dtype = getattr(torch, arguments.dtype)
    q, do, k, v = (torch.randn(arguments.tokens, heads, head_dim, device=device, dtype=dtype) for heads in
                   (arguments.heads, arguments.heads, arguments.kv_heads, arguments.kv_heads))
    cu_seqlens = torch.tensor([0, arguments.tokens], dtype=torch.int32, device=device)
    segments = Segments.from_cu_seqlens(cu_seqlens, arguments.tokens, chunk_size)
    means = kernels.chunk_means(k, segments)
    selected = kernels.gate(q, means, segments, arguments.topk)
    scale = head_dim ** -0.5
    forward = functools.partial(kernels.attention_fwd, q, k, v, selected, segments, scale)
    o, lse = forward()
    return {"chunk_means": lambda: kernels.chunk_means(k, segments),
            "gate": lambda: kernels.gate(q, means, segments, arguments.topk),
            "route": forward, "attention_fwd": forward,
            "attention_bwd": lambda: kernels.attention_bwd(do, None, q, k, v, o, lse, selected, segments, scale)}


def _as_tensors(result) -> list[Tensor]:
    return [x.detach().clone() for x in (result if isinstance(result, tuple) else (result,))]


def _measurer(stage: str, run: Callable[[], object], forced: dict) -> Callable[[dict[str, int]], float | None]:
    """The function that times one configuration of a stage, the stages already tuned being as they were found."""
    with tuning.forced(configs=forced):
        expected = _as_tensors(run())

    def measure(config: dict[str, int]) -> float | None:
        with tuning.forced(configs={**forced, stage: config}):
            try:
                if not all(map(_same, expected, _as_tensors(run()))):
                    return None
                return 1e3 * Timer("run()", globals={"run": run}).timeit(RUNS).mean  # after two calls to warm up
            except Exception as error:  # too much shared memory, no such layout: this one is not for this card
                print(f"    {config}: {type(error).__name__}", flush=True)
                return None

    return measure


def _same(expected: Tensor, got: Tensor) -> bool:
    if expected.is_floating_point():
        return bool((expected.float() - got.float()).norm() <= 1e-2 * expected.float().norm())
    return not (expected.sort(-1).values != got.sort(-1).values).float().mean() > 1e-3  # near ties may fall either way


def tune(arguments: argparse.Namespace) -> dict:
    """Tunes every stage for the given head dims and chunk sizes; what MOBA_TUNING_FILE reads, with its origin."""
    end, device = time.perf_counter() + arguments.budget, environment.use_device(arguments.device)
    about = environment.describe(device)
    print(environment.line(about), flush=True)
    rows: dict[tuple, dict] = {}
    for head_dim, chunk_size in itertools.product(sorted(arguments.head_dims), sorted(arguments.chunk_sizes)):
        forced: dict[str, dict[str, int]] = {}
        for prefix, run in _functions(arguments, device, head_dim, chunk_size).items():
            looked_up: list = []
            with tuning.forced(record=looked_up):
                run()
            for stage, (key, row) in {stage: (dict(key), row) for stage, key, row in looked_up}.items():
                wanted = stage.startswith(prefix) and stage in (arguments.stages or (stage,))
                if stage in forced or not wanted or not neighbours(row.config) or time.perf_counter() > end:
                    continue
                measure = _measurer(stage, run, forced)
                forced[stage], ms, first = climb(row.config, measure, lambda: time.perf_counter() < end)
                why = f"D={head_dim}, chunk {chunk_size}: {first:.3f} -> {ms:.3f} ms"
                print(f"  {stage}, {why}: {forced[stage]}", flush=True)
                if chunk_size == max(arguments.chunk_sizes):  # this row is for still larger ones
                    key.pop("chunk_size", None)
                rows[stage, tuple(key.items())] = {
                    "stage": stage, "archs": tuning.arch_of(device), "config": forced[stage], "upto": key,
                    "why": f"tune, {about['device']}, {about['when']}, {why}"}
    return {"environment": about, "rows": list(rows.values())}


def main(argv: list[str] | None = None) -> int:
    """Tunes, writes, and says how much was gained."""
    p = argparse.ArgumentParser(prog="python -m moba_megatron.tune", description=__doc__)
    p.add_argument("output", type=Path, help="file to write")
    p.add_argument("--stages", nargs="+", metavar="STAGE", help="only these stages of the tuning table")
    p.add_argument("--head-dims", nargs="+", type=int, default=[64, 128], metavar="D")
    p.add_argument("--chunk-sizes", nargs="+", type=int, default=[128, 512], metavar="N")
    p.add_argument("--topk", type=int, default=8)
    p.add_argument("--tokens", type=int, default=1 << 16, help="length of the sequence that is timed (65536)")
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int, default=4)
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    p.add_argument("--device", default="cuda", help="cpu: to try it, slowly (cuda)")
    p.add_argument("--budget", type=float, default=600, metavar="S", help="stop after so many seconds (600)")
    arguments = p.parse_args(argv)
    environment.need_device(p, arguments.device)
    environment.save(arguments.output, tune(arguments))
    print(f"wrote {arguments.output}: use it with MOBA_TUNING_FILE={os.path.abspath(arguments.output)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
