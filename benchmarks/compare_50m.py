"""Trains the 50M model several times, for every attention, length and seed, and compares; one run a GPU at a time.

    python -m benchmarks.compare_50m --attention moba full --seq-length 8192 32768 --output runs/speed -- --steps 20
    python -m benchmarks.compare_50m --attention moba full hybrid --seed 1 2 --output runs/learning -- --steps 300

What follows `--` goes to train_50m.py. Every run is a process of its own: one that fails costs its row alone.
--output holds a directory a run and result.json, which is written anew after each of them.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moba_megatron import environment

from . import child_environment, report, training
from .gpt_50m import attention as attentions
from .gpt_50m import text
from .train_50m import ABSENT, DEFAULTS, TOY_DEFAULTS

LAST_WORDS = 400
"""Characters of a failed run's output that its row keeps."""
GRACE_S = 60
"""A run that does not stop by itself at the end of its time is ended after so many seconds more."""


def parse_args(argv=None) -> argparse.Namespace:
    """The command line; ``train`` holds what follows ``--``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--attention", nargs="+", default=["moba", "full"], choices=attentions.names(), metavar="NAME")
    add("--seq-length", nargs="+", type=int, default=[None], metavar="TOKENS")
    add("--seed", nargs="+", type=int, default=[1])
    add("--gpus", type=int, help="use so many GPUs (all)")
    add("--minutes", type=float, default=float("inf"), help="for everything; a run that has not begun is left out")
    add("--text", nargs="+", type=Path, metavar="FILE", help="texts; default: this machine's Python sources")
    add("--corpus", type=Path, help="prefix of the text's files, made once (default: in --output)")
    add("--a6000", action="store_true", help="also say how this card differs from the RTX A6000 of the older figures")
    add("--limit-to-a6000", action="store_true",
        help="48 GB of memory and the launch configurations of sm_86, on whatever card this is")
    add("--json", type=Path, metavar="PATH", help="where the result goes (default: result.json in --output)")
    add("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv[:cut])
    args.train = [word for word in argv[cut + 1:] if word != "--"]
    if args.limit_to_a6000:
        args.train += ["--memory-limit-gb", str(training.A6000_GB)]
    args.json = args.json or args.output / "result.json"
    args.corpus = args.corpus or args.output / "text"
    return args


def devices(most: int | None) -> list[dict[str, str]]:
    """For each GPU the environment that makes it the only one a process sees; one empty one without GPUs."""
    import torch
    number = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    ids = visible.split(",")[:number] if visible else [str(i) for i in range(number)]
    return [{"CUDA_VISIBLE_DEVICES": i} for i in ids[:most]] or [{}]


@dataclass(frozen=True)
class Job:
    """A run: its folder's name, what its row says of it, and its flags of train_50m.py."""

    name: str
    about: dict
    flags: tuple[str, ...]


START_S = 60
"""A run that has less time than it takes to begin is not begun, where it can be later."""


class Comparison:
    """All runs, and the file that grows with them.

    Args:
        args: of them ``output``, ``corpus``, ``json``, ``minutes``, ``train`` (flags of every run), ``limit_to_a6000``.
        jobs: the runs.
        free: for each device the environment of its processes.
        go_on: runs that ended well are not repeated, and the others go on from what they saved.
    """

    def __init__(self, args: argparse.Namespace, jobs: list[Job], free: list[dict[str, str]], go_on: bool = False):
        self.args, self.jobs, self.go_on, self.begin = args, jobs, go_on, time.perf_counter()
        self.limits = {"MOBA_TUNING_ARCH": "sm_86"} if args.limit_to_a6000 else {}
        self.free: queue.Queue = queue.Queue()
        for device in free:
            self.free.put(device)
        self.rows: dict[str, dict] = {}
        self.lock = threading.Lock()

    def left(self) -> float:
        """Seconds until the end of --minutes."""
        return 60 * self.args.minutes - (time.perf_counter() - self.begin)

    def run_all(self) -> dict:
        """Every run, as many at a time as there are devices; the result."""
        with ThreadPoolExecutor(self.free.qsize()) as pool:
            list(pool.map(self.run, self.jobs))
        report.save(self.args.json, self.result())
        return self.result()

    def run(self, job: Job) -> None:
        """One run, on the next free device."""
        device = self.free.get()
        try:
            row = self._train(job, device)
        finally:
            self.free.put(device)
        with self.lock:
            self.rows[job.name] = row
            report.save(self.args.json, self.result())
        reason = f": {row['reason']}" if "reason" in row else f", {row['ms_per_65536_tokens']:.1f} ms per 65,536 tokens"
        print(f"{job.name}: {row['status']}{reason} ({row['wall_s']:.0f} s)", flush=True)

    def _train(self, job: Job, device: dict[str, str]) -> dict:
        row = job.about | {"wall_s": 0.0}
        output = self.args.output / job.name
        summary = output / "summary.json"
        if self.go_on and summary.is_file():
            done = json.loads(summary.read_text(encoding="utf-8"))
            if done["status"] == "ok":
                return job.about | done
        if self.left() <= (START_S if self.go_on else 0):
            return row | {"status": "not run", "reason": "the time was spent"}
        output.mkdir(parents=True, exist_ok=True)
        summary.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.train_50m", *job.flags,
                   "--output", str(output), "--corpus", str(self.args.corpus),
                   *(["--minutes", f"{self.left() / 60:.2f}"] if self.left() < float("inf") else []), *self.args.train]
        begin = time.perf_counter()
        with open(output / "output.txt", "w", encoding="utf-8") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT,
                                      env={**child_environment(), **device, **self.limits},
                                      timeout=self.left() + GRACE_S if self.left() < float("inf") else None).returncode
            except subprocess.TimeoutExpired:
                code = "nothing: it did not stop in time"
        row["wall_s"] = time.perf_counter() - begin
        if summary.is_file():
            return job.about | json.loads(summary.read_text(encoding="utf-8"))
        status = "absent" if code == ABSENT else "failed"
        words = (output / "output.txt").read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:]
        return row | {"status": status, "reason": f"ended with {code}: {' '.join(words.split())}"}

    def result(self) -> dict:
        """What is known so far, rows in the order of the jobs."""
        rows = [self.rows[job.name] for job in self.jobs if job.name in self.rows]
        about = next((dict(row["environment"]) for row in rows if "environment" in row), {})
        about["command"] = environment.command()
        return {"environment": about, "rows": [{k: v for k, v in row.items() if k != "environment"} for row in rows]}


def jobs(args: argparse.Namespace) -> list[Job]:
    """A run an attention, sequence length and seed; runs of one seed and length are neighbours."""
    return [Job(f"{attention}-{n or 'default'}-{seed}", {"attention": attention, "seq_length": n or 0, "seed": seed},
                ("--attention", attention, "--seed", str(seed), *(["--seq-length", str(n)] if n else [])))
            for n, seed, attention in itertools.product(args.seq_length, args.seed, args.attention)]


def main(argv=None) -> int:
    """0 where every run ended well (or its package is absent), 1 where one did not, 2 on bad input."""
    args = parse_args(argv)
    free = devices(args.gpus)
    toy = "--toy" in args.train or free == [{}]
    try:
        most = (TOY_DEFAULTS if toy else DEFAULTS)["corpus_bytes"]
        text.prepare(args.corpus, args.text, most)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = Comparison(args, jobs(args), free).run_all()
    print(training.JOBS.text(result))
    if args.a6000:
        print(training.beside_a6000(result))
    return int(any(row["status"] not in ("ok", "absent") for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
