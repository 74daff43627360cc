"""Draws a run: loss.png (training and validation), position.png (loss by position), selection.png (chosen chunks).

    python examples/plot_run.py runs/quickstart

Reads log.jsonl and, where it exists, selection.npz from the directory, and writes the pictures beside them.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from pretraining.monitor import read_log

from moba_megatron import plotting
from moba_megatron.inspect.picture import draw_trace
from moba_megatron.inspect.trace import load_trace
from moba_megatron.plotting import LIGHT


def plot_loss(records: dict, path: Path) -> None:
    """The loss of each step, its running mean, the validations, and where the run was resumed."""
    iterations = [r["iteration"] for r in records["step"]]
    losses = np.array([r["loss"] for r in records["step"]])
    with plotting.figure(path) as (_, axes):
        axes.plot(iterations, losses, color=LIGHT.accent, alpha=0.3, linewidth=0.8)
        labels, window = [], max(1, len(losses) // 20)
        if window > 1:
            mean = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes.plot(iterations[window - 1:], mean, color=LIGHT.accent, linewidth=2)
            labels.append((mean[-1], f"training: {mean[-1]:.2f}", LIGHT.accent))
        if records["validation"]:
            values = [(r["iteration"], r["loss"]) for r in records["validation"]]
            axes.plot(*zip(*values), "o", color=LIGHT.others[0], markersize=5)
            labels.append((values[-1][1], f"validation: {values[-1][1]:.2f}", LIGHT.others[0]))
        for start in records["start"]:
            if start["iteration"] > 0:
                axes.axvline(start["iteration"], color=LIGHT.muted, linestyle="--", linewidth=1)
                axes.text(start["iteration"], axes.get_ylim()[1], " resumed", color=LIGHT.muted, va="top", fontsize=8)
        axes.set_xlabel(f"step; line: mean of {window} steps", loc="left")
        axes.set_title("Loss, nats per token")
        plotting.label_ends(axes, labels)
    print(path)


def plot_position(records: dict, path: Path) -> None:
    """The loss by position of every validation, with two standard errors as a band: the gain from far back."""
    with plotting.figure(path) as (_, axes):
        labels = []
        for record, colour in zip(records["validation"][-4:], (*LIGHT.others[:3], LIGHT.accent)[-4:]):
            middle = [(first + last) / 2 for first, last, _ in record["by_position"]]
            losses = np.array([loss for _, _, loss in record["by_position"]])
            axes.plot(middle, losses, "o-", color=colour, markersize=3)
            if "standard_errors" in record:  # logs of 0.1 have none
                noise = 2 * np.array(record["standard_errors"])
                axes.fill_between(middle, losses - noise, losses + noise, color=colour, alpha=0.2, linewidth=0)
            labels.append((losses[-1], f"step {record['iteration']}: {losses[-1]:.2f}", colour))
        axes.set_xlabel("position in the sequence; band: 2 standard errors", loc="left")
        axes.set_title("Validation loss, nats per token")
        plotting.label_ends(axes, labels)
    print(path)


def main(argv=None) -> int:
    """Draws what the directory holds; 0 on success, 2 with a message on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's directory")
    args = parser.parse_args(argv)
    try:
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
