"""Draws a run: loss.png (training and validation), position.png (loss by position), selection.png (chosen chunks).

    python examples/plot_run.py runs/quickstart

Reads log.jsonl and, where it exists, selection.npz from the directory, and writes the pictures beside them.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from pretraining.monitor import read_log

from moba_megatron.inspect.picture import draw_trace
from moba_megatron.inspect.trace import load_trace


def plot_loss(records: dict, path: Path) -> None:
    """The loss of each step, its running mean, the validations, and where the run was resumed."""
    from matplotlib import pyplot as plt

    iterations = [r["iteration"] for r in records["step"]]
    losses = np.array([r["loss"] for r in records["step"]])
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(iterations, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    window = max(1, len(losses) // 20)
    if window > 1:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(iterations[window - 1:], mean, color="tab:blue", label=f"training, mean of {window} steps")
    if records["validation"]:
        axes.plot([r["iteration"] for r in records["validation"]], [r["loss"] for r in records["validation"]],
                  "o", color="tab:orange", label="validation")
    for start in records["start"]:
        if start["iteration"] > 0:
            axes.axvline(start["iteration"], color="grey", linestyle="--", linewidth=1, label="stopped and resumed")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_position(records: dict, path: Path) -> None:
    """The loss by position of every validation: how much the model gains from what lies far back."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for record in records["validation"]:
        middle = [(first + last) / 2 for first, last, _ in record["by_position"]]
        losses = [loss for _, _, loss in record["by_position"]]
        axes.plot(middle, losses, "o-", label=f"after step {record['iteration']}")
    axes.set_xlabel("position in the sequence (tokens)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print(path)


def main(argv=None) -> int:
    """Draws what the directory holds; 0 on success, 2 with a message on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory")
    args = parser.parse_args(argv)
    try:
        import matplotlib

        matplotlib.use("Agg")
        records = read_log(args.run / "log.jsonl")
        plot_loss(records, args.run / "loss.png")
        if records["validation"]:
            plot_position(records, args.run / "position.png")
        if (args.run / "selection.npz").is_file():
            draw_trace(load_trace(args.run / "selection.npz"), args.run / "selection.png")
            print(args.run / "selection.png")
    except ImportError:
        print("error: drawing needs matplotlib: pip install -e '.[plot]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
