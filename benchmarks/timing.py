"""Times and memory: CUDA events around calls, rotated inputs, peak memory; a plain clock where there is no GPU."""
from __future__ import annotations

import contextlib
import gc
import os
import statistics
import time
import timeit
import traceback
from collections import defaultdict
from typing import Callable
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

L2_MULTIPLE = 4
MOST_INPUT_SETS = 16
__all__ = ["extra_peak_bytes", "free", "graph_of", "input_sets", "kernel_times", "measure", "measuring", "summary"]


def input_sets(bytes_each: int, device: torch.device) -> int:
    """How many sets of inputs to rotate so that a run does not find its own in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_INPUT_SETS, -(-L2_MULTIPLE * cache // bytes_each)))


@contextlib.contextmanager
def measuring(row: dict, device: torch.device):
    """Around the measuring of a row: it says what ended it early, so that the others are measured, and ``wall_s``."""
    begin = time.perf_counter()
    try:
        yield
    except Exception as error:
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip()[:400]}",
                "traceback": traceback.format_exc()[-4000:]}
    free(device)
    row["wall_s"] = time.perf_counter() - begin


def free(device: torch.device) -> None:
    """Gives memory that nothing uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(run: Callable[[int], object], device: torch.device, repeats: int, warmup: int = 2) -> list[float]:
    """Milliseconds of each of ``repeats`` calls ``run(i)`` after warm-up, enqueued without waiting in between."""
    for i in range(warmup):
        run(i)
    if device.type != "cuda":
        return [1e3 * timeit.timeit(lambda: run(i), number=1) for i in range(repeats)]
    torch.cuda.synchronize(device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (begin, end) in enumerate(events):
        begin.record()
        run(i)
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def summary(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, smallest, largest and number of the times."""
    ordered = sorted(times)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8), "min": ordered[0],
            "max": ordered[-1], "runs": len(ordered)}


def extra_peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory allocated during a call beyond what was allocated before it; its results count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


@contextlib.contextmanager
def graph_of(run: Callable[[], object]):
    """Captures ``run()`` into a CUDA graph, warmed up on a side stream; yields its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    yield graph.replay
    del kept


def kernel_times(run: Callable[[], object], device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Milliseconds a call spends in each Triton kernel (all its launches together), and in all else, in order.

    Events stand around every launch, so that the times of small kernels include launch gaps.
    """
    if device.type != "cuda":
        return {}
    run()
    total: dict[str, list[float]] = defaultdict(list)
    original = JITFunction.run
    launches: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, *args, **kwargs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = original(self, *args, **kwargs)
        end.record()
        launches.append((self.fn.__name__, begin, end))
        return result

    # prepared launches do not go through JITFunction.run
    with mock.patch.object(JITFunction, "run", timed), mock.patch.dict(os.environ, MOBA_PREPARED_LAUNCHES="0"):
        for _ in range(repeats):
            launches.clear()
            whole = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            whole[0].record()
            run()
            whole[1].record()
            torch.cuda.synchronize(device)
            once: dict[str, float] = defaultdict(float)
            for name, begin, end in launches:
                once[name] += begin.elapsed_time(end)
            once["(everything else)"] = whole[0].elapsed_time(whole[1]) - sum(once.values())
            for name, ms in once.items():
                total[name].append(ms)
    return {name: statistics.median(times) for name, times in total.items()}
