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


class Comparison:
    """All runs, and the file that grows with them."""

    def __init__(self, args: argparse.Namespace, free: list[dict[str, str]]):
        self.args, self.begin = args, time.perf_counter()
        self.limits = {"MOBA_TUNING_ARCH": "sm_86"} if args.limit_to_a6000 else {}
        self.free: queue.Queue = queue.Queue()
        for device in free:
            self.free.put(device)
        self.rows: dict[tuple, dict] = {}
        self.lock = threading.Lock()

    def left(self) -> float:
        """Seconds until the end of --minutes."""
        return 60 * self.args.minutes - (time.perf_counter() - self.begin)

    def run(self, job: tuple[str, int | None, int]) -> None:
        """One run, on the next free device."""
        device = self.free.get()
        try:
            row = self._train(job, device)
        finally:
            self.free.put(device)
        with self.lock:
            self.rows[job] = row
            report.save(self.args.json, self.result())
        reason = f": {row['reason']}" if "reason" in row else f", {row['ms_per_65536_tokens']:.1f} ms per 65,536 tokens"
        print(f"{_name(job)}: {row['status']}{reason} ({row['wall_s']:.0f} s)", flush=True)

    def _train(self, job: tuple[str, int | None, int], device: dict[str, str]) -> dict:
        attention, seq_length, seed = job
        row = {"attention": attention, "seq_length": seq_length or 0, "seed": seed, "wall_s": 0.0}
        if self.left() <= 0:
            return row | {"status": "not run", "reason": "the time was spent"}
        output = self.args.output / _name(job)
        output.mkdir(parents=True, exist_ok=True)
        (output / "summary.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.train_50m", "--attention", attention, "--seed", str(seed),
                   "--output", str(output), "--corpus", str(self.args.corpus),
                   *(["--seq-length", str(seq_length)] if seq_length else []),
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
        if (output / "summary.json").is_file():
            return json.loads((output / "summary.json").read_text(encoding="utf-8"))
        status = "absent" if code == ABSENT else "failed"
        words = (output / "output.txt").read_text(encoding="utf-8", errors="replace").strip()[-LAST_WORDS:]
        return row | {"status": status, "reason": f"ended with {code}: {' '.join(words.split())}"}

    def result(self) -> dict:
        """What is known so far, rows in the order of the jobs."""
        rows = [self.rows[job] for job in jobs(self.args) if job in self.rows]
        about = next((dict(row["environment"]) for row in rows if "environment" in row), {})
        about["command"] = environment.command()
        return {"environment": about, "rows": [{k: v for k, v in row.items() if k != "environment"} for row in rows]}


def jobs(args: argparse.Namespace) -> list[tuple[str, int | None, int]]:
    """Attention, sequence length and seed of every run; runs of one seed and length are neighbours."""
    return [(attention, n, seed) for n, seed, attention in itertools.product(args.seq_length, args.seed,
                                                                             args.attention)]


def _name(job: tuple[str, int | None, int]) -> str:
    attention, seq_length, seed = job
    return f"{attention}-{seq_length or 'default'}-{seed}"


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
    comparison = Comparison(args, free)
    with ThreadPoolExecutor(len(free)) as pool:
        list(pool.map(comparison.run, jobs(args)))
    result = comparison.result()
    report.save(args.json, result)
    print(training.JOBS.text(result))
    if args.a6000:
        print(training.beside_a6000(result))
    return int(any(row["status"] not in ("ok", "absent") for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
