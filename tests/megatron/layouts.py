"""Losses of a GPT on every parallel layout beside those of one process, from the tests and stored: by hand.

    PYTHONPATH=. python tests/megatron/layouts.py benchmarks/results/cpu/layouts.json

gloo; the rows of several hosts need Linux, root and iproute2.
"""
import sys
import tempfile
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


def of_hosts(name: str, count: int, victim: int | None, directory: Path) -> dict:
    _, found, expected = several_hosts.train(count, victim, directory)
    norms = {step: abs(ours[2] / theirs[2] - 1) for step, (ours, theirs) in enumerate(zip(found, expected))}
    return row(name, count * several_hosts.LAYOUTS[count][0], [
        {"loss": found[-1][1], "expected": expected[-1][1], "grads": norms}])


def main() -> int:
    """0; an assertion of the tests' helpers where a run broke."""
    if len(sys.argv) != 2:
        print("error: the argument must name the file for the result", file=sys.stderr)
        return 2
    about = environment.describe(torch.device("cpu")) | {
        "megatron_core": megatron.core.__version__,
        "command": environment.command("PYTHONPATH=. python tests/megatron/layouts.py")}
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        def found(name, module, size=4, function="everything"):
            (folder := Path(directory, name)).mkdir()
            return run_ranks(getattr(module, function), size, folder)

        results = found("parallel", test_megatron_parallel)
        rows += [row(name, 4, [result["layouts"][name] for result in results])
                 for name in test_megatron_parallel.LAYOUTS if name != "cp1"]
        results = found("experts", test_experts)
        rows += [row(name, 4, [result[name] for result in results]) for name in test_experts.RUNS]
        results = found("rows", test_packed_rows, 2)
        rows += [of_packed_rows(f"packed rows, {run}", ranks, results, (run, "real and padded lengths"))
                 for run, (ranks, _) in test_packed_rows.RUNS.items()]
        if test_dynamic_context_parallel.has_loader():
            rows.append(row("--hybrid-context-parallel", 4,
                            found("hybrid", test_dynamic_context_parallel, function="train_one_step")))
        for name, count, victim in (("two hosts, one lost", 2, 1), ("four hosts", 4, None)):
            rows.append(of_hosts(name, count, victim, Path(directory, f"hosts{count}")))
    report.save(Path(sys.argv[1]), {"environment": about, "rows": rows})
    print(layouts.TABLE.text({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
