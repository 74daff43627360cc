"""Losses of a GPT on every parallel layout beside those of one process, from the tests and stored: by hand.

    PYTHONPATH=. python tests/megatron/layouts.py benchmarks/results/cpu/layouts.json

gloo and fp64; the rows of several hosts need Linux, root and iproute2. Where there are GPUs NCCL and fp32, on --ranks
of them. MOBA_TEST_DTYPE names another dtype, as ``bfloat16``.
"""
import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import megatron.core
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "examples")]
from ranks import run_ranks  # noqa: E402

from benchmarks import layouts, report  # noqa: E402
from moba_megatron import environment  # noqa: E402
from tests.fault import test_several_hosts as several_hosts  # noqa: E402
from tests.megatron import (  # noqa: E402
    test_dynamic_context_parallel,
    test_experts,
    test_megatron_parallel,
    test_packed_rows,
)


def row(name: str, ranks: int, results: list[dict]) -> dict:
    """Of what every rank found: the loss, and the largest relative error of a parameter's gradient."""
    loss = next(result["loss"] for result in results if result["loss"] is not None)
    return {"name": name, "ranks": ranks, "loss": loss, "expected": results[0]["expected"],
            "gradients": max(max(result["grads"].values()) for result in results)}


def of_packed_rows(name: str, ranks: int, results: list[dict], run: tuple[str, str]) -> dict:
    loss, expected = (sum(map(sum, losses)) for losses in (results[0][run][0], results[0]["expected"]))
    return row(name, ranks, [{"loss": loss, "expected": expected, "grads": result[run][1]} for result in results])


def of_groups(results: list[dict]) -> dict:
    """Of groups that come with the batch: errors of o, dq, dk and dv by kind of batch, the largest of a rank's; of each
    rank how often its host waited, by layer, and what it held after each round."""
    kinds = results[0]["errors"]
    return {"errors": {" ".join(map(str, kind)): [max(errors) for errors in zip(*(r["errors"][kind] for r in results))]
                       for kind in kinds},
            "waits": [result["waits"] for result in results], "held": [result["held"] for result in results]}


def of_hosts(name: str, count: int, victim: int | None, directory: Path) -> dict:
    _, found, expected = several_hosts.train(count, victim, directory)
    norms = {step: abs(ours[2] / theirs[2] - 1) for step, (ours, theirs) in enumerate(zip(found, expected))}
    return row(name, count * several_hosts.LAYOUTS[count][0], [
        {"loss": found[-1][1], "expected": expected[-1][1], "grads": norms}])


def of_layouts(results: list[dict]) -> list[dict]:
    return [row(name, len(results), [result["layouts"][name] for result in results])
            for name in results[0]["layouts"] if name != "cp1"]


def of_experts(results: list[dict]) -> list[dict]:
    return [row(name, len(results), [result[name] for result in results]) for name in results[0]]


def of_rows(results: list[dict]) -> list[dict]:
    return [of_packed_rows(f"packed rows, {run}", ranks, results, (run, "real and padded lengths"))
            for run, (ranks, _) in test_packed_rows.RUNS.items()]


def of_hybrid(results: list[dict]) -> list[dict]:
    return [row("--hybrid-context-parallel", len(results), results)]


PARTS = {
    "layouts": (test_megatron_parallel.train_layouts, of_layouts),
    "experts": (test_experts.everything, of_experts),
    "rows": (test_packed_rows.everything, of_rows),
    "groups": (test_dynamic_context_parallel.attend, of_groups),
    "hybrid": (test_dynamic_context_parallel.train_one_step, of_hybrid),
}
"""Name -> what its ranks run, and what is stored of what they found."""


def main() -> int:
    """0; 1 where a part broke, whose rows are then missing."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, help="JSON for the result")
    p.add_argument("--ranks", type=int, default=4, choices=(2, 4), help="processes of a run (4)")
    p.add_argument("--parallel", type=int, default=1, metavar="N", help="parts at a time (1)")
    p.add_argument("--seconds", type=int, default=600, metavar="S", help="limit of a part (600)")
    args = p.parse_args()
    gpu, begin, broken = torch.cuda.is_available(), time.monotonic(), []
    about = environment.describe(torch.device("cuda" if gpu else "cpu")) | {
        "dtype": os.environ.get("MOBA_TEST_DTYPE", "float32" if gpu else "float64"),
        "megatron_core": megatron.core.__version__,
        "command": environment.command("PYTHONPATH=. python tests/megatron/layouts.py")}
    whole = args.ranks == 4 and not gpu
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(args.parallel) as pool:
        def found(name):
            (folder := Path(directory, name)).mkdir()
            function, of = PARTS[name]
            try:
                return of(run_ranks(function, args.ranks, folder, backend="nccl" if gpu else "gloo",
                                    seconds=args.seconds))
            except AssertionError as error:
                broken.append(name)
                print(f"{name}: {error}", file=sys.stderr)
                return []
            finally:
                print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)

        names = [name for name in PARTS if name != "hybrid" or whole and test_dynamic_context_parallel.has_loader()]
        results = dict(zip(names, pool.map(found, names)))
        dynamic = results.pop("groups")
        rows = sum(results.values(), [])
        for name, count, victim in (("two hosts, one lost", 2, 1), ("four hosts", 4, None)) if whole else ():
            rows.append(of_hosts(name, count, victim, Path(directory, f"hosts{count}")))
    report.save(args.file, {"environment": about, "rows": rows, "groups": dynamic})
    print(layouts.TABLE.text({"rows": rows}))
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
