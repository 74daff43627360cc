"""What the benchmarks of several ranks share: joining under torchrun, times of the slowest rank, agreed decisions."""
from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist

from . import timing

LINK_BYTES = {"cuda": 1 << 27, "cpu": 1 << 16}


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of every benchmark of several ranks."""
    p.add_argument("--inner", type=int, default=2, help="ranks that exchange heads in a2a+all_gather (2)")
    p.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no row after so many seconds")
    p.add_argument("--precompile", type=int, default=0, metavar="N", help="first compile the kernels in N processes")
    p.add_argument("--json", type=Path, metavar="PATH", help="write everything measured, after every row")
    p.add_argument("--show", type=Path, metavar="PATH", help="print a stored result as markdown, measure nothing")


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun."""

    rank: int
    size: int
    device: torch.device

    def say(self, *words: object) -> None:
        """Prints, from rank 0 alone."""
        if self.rank == 0:
            print(*words, flush=True)

    def barrier(self) -> None:
        """Waits for every rank, the host too."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def from_first(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_first(self, run: Callable[[], object]):
        """What ``run()`` returns on rank 0, on every rank; the others wait. An error there is raised everywhere."""
        value = error = None
        if self.rank == 0:
            try:
                value = run()
            except Exception as e:  # the others must not wait for ever
                error = f"{type(e).__name__}: {str(e).strip()[:400]}"
        value, error = self.from_first((value, error))
        if error is not None:
            raise RuntimeError(f"on rank 0: {error}")
        return value

    def all_values(self, value) -> list:
        """Every rank's value, by rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def slowest(self, times: list[float]) -> list[float]:
        """Of each of the times, the largest over the ranks."""
        x = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()

    def measure(self, run: Callable[[int], object], repeats: int, warmup: int) -> list[float]:
        """Milliseconds of each call on the slowest rank, the ranks having started together."""
        for i in range(warmup):
            run(i)
        self.barrier()
        return self.slowest(timing.measure(run, self.device, repeats, warmup=0))


def join(device: str, timeout_s: float = 180) -> Ranks:
    """Joins torchrun's processes, or makes a group of one where there is no torchrun.

    Args:
        device: ``cuda`` (NCCL, one GPU a rank) or ``cpu`` (gloo).
        timeout_s: a collective that waits longer ends the process, so that a rank that failed does not hang the others.
    """
    cuda = device == "cuda"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    # else a collective waits until the attention kernel that runs meanwhile has no more programs to start
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), **alone)
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cuda", local) if cuda else torch.device("cpu"))


def leave() -> None:
    """Ends the process group; what comes later is the exit status."""
    dist.barrier()
    dist.destroy_process_group()


def link_bytes_per_s(ranks: Ranks) -> float | None:
    """Bytes a second that each rank sends in a large all-gather; None for one rank."""
    if ranks.size == 1:
        return None
    x = torch.zeros(LINK_BYTES[ranks.device.type], dtype=torch.uint8, device=ranks.device)
    whole = x.new_empty(ranks.size * x.numel())
    times = ranks.measure(lambda i: dist.all_gather_into_tensor(whole, x), repeats=10, warmup=3)
    return (ranks.size - 1) * x.numel() / (1e-3 * timing.summary(times)["median"])
