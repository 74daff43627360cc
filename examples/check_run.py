"""Checks a run that was stopped and resumed: the loss fell, and the resumed part continues the curve.

    python examples/check_run.py runs/quickstart

Exits with status 1 and a message where it did not.
"""
import argparse
import statistics
import sys
from pathlib import Path

from pretraining.monitor import read_log

_WINDOW = 10  # steps whose mean is compared


def check(records: dict) -> list[str]:
    """What is wrong with the run; an empty list where nothing is."""
    problems = []
    iterations = [r["iteration"] for r in records["step"]]
    losses = {r["iteration"]: r["loss"] for r in records["step"]}
    if iterations != list(range(1, iterations[-1] + 1)):
        problems.append("the log must hold every step once, in order; train with --log-interval 1")
    first, last = _mean(losses, 1, _WINDOW), _mean(losses, iterations[-1] - _WINDOW + 1, iterations[-1])
    if not last < 0.8 * first:
        problems.append(f"the loss fell too little: {first:.3f} in the first {_WINDOW} steps, {last:.3f} in the last")
    resumed = [r["iteration"] for r in records["start"] if r["iteration"] > 0]
    if not resumed:
        problems.append("the run was never resumed")
    for step in resumed:
        before = [losses[i] for i in losses if step - _WINDOW < i <= step]
        after = [losses[i] for i in losses if step < i <= step + _WINDOW]
        # Batches differ: the mean may wander by some standard deviations of a step's loss. Lost weights show far more.
        band = 3 * statistics.pstdev(before) + 0.05
        if not statistics.mean(after) < statistics.mean(before) + band:
            problems.append(f"the loss jumped when the run resumed after step {step}: {statistics.mean(before):.3f} "
                            f"before, {statistics.mean(after):.3f} after")
    return problems


def summary(records: dict) -> str:
    """The run in two lines: the training loss from start to end, and the last validation."""
    losses = {r["iteration"]: r["loss"] for r in records["step"]}
    last = max(losses)
    end = _mean(losses, last - _WINDOW + 1, last)
    text = f"training loss {losses[1]:.3f} at step 1, {end:.3f} in the last {_WINDOW} of {last} steps (nats per token)"
    for start in records["start"]:
        if start["iteration"] > 0:
            step = start["iteration"]
            text += f"\nresumed after step {step}: loss {losses[step]:.3f} before, {losses[step + 1]:.3f} right after"
    if records["validation"]:
        result = records["validation"][-1]
        text += (f"\nvalidation loss {result['loss']:.3f}, trailing {result['trailing_loss']:.3f}, "
                 f"after step {result['iteration']}")
    return text


def _mean(losses: dict[int, float], first: int, last: int) -> float:
    return statistics.mean(loss for iteration, loss in losses.items() if first <= iteration <= last)


def main(argv=None) -> int:
    """0 where the run is sound, 1 where it is not, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory, with log.jsonl")
    args = parser.parse_args(argv)
    try:
        records = read_log(args.run / "log.jsonl")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems = check(records)
    print(summary(records))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
