"""Draws a run: loss.png (training and validation), position.png (loss by position), selection.png (chosen chunks).

    python examples/plot_run.py runs/quickstart

Reads log.jsonl and, where it exists, selection.npz from the directory, and writes the pictures beside them.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from pretraining.monitor import read_log

_MOST_CELLS = 256  # rows and columns of a heat map; longer sequences are averaged


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


def plot_selection(selection: Path, path: Path) -> None:
    """For each sparse layer and head a heat map: which share of the queries at a position attends to a chunk."""
    from matplotlib import pyplot as plt

    with np.load(selection) as file:
        chunk_size = int(file["chunk_size"])
        layers = {int(name.removeprefix("layer_")): file[name] for name in file.files if name != "chunk_size"}
    if not layers:
        raise ValueError(f"{selection} holds no layer: every layer attends densely")
    heads = min(8, next(iter(layers.values())).shape[1])
    figure, grid = plt.subplots(len(layers), heads, figsize=(2.3 * heads + 1.2, 2.3 * len(layers) + 0.8), squeeze=False,
                                sharex=True, sharey=True, layout="constrained")
    image = None
    for row, (number, selected) in enumerate(sorted(layers.items())):
        for head in range(heads):
            share = attended_share(selected[:, head], chunk_size)
            image = grid[row, head].imshow(share, aspect="auto", cmap="magma_r", vmin=0, vmax=1,
                                           extent=(0, -(-len(selected) // chunk_size), len(selected), 0),
                                           interpolation="nearest")
            if row == 0:
                grid[row, head].set_title(f"head {head}", fontsize=9)
        grid[row, 0].set_ylabel(f"layer {number}\nquery position", fontsize=9)
    figure.supxlabel(f"chunk ({chunk_size} keys; the diagonal is the query's own)", fontsize=9)
    figure.colorbar(image, ax=grid, label="share of queries that attend to the chunk", shrink=0.8)
    _save(figure, path)


def attended_share(selected: np.ndarray, chunk_size: int) -> np.ndarray:
    """Share of queries that attend to each chunk, for runs of neighbouring queries.

    Args:
        selected: [queries, topk - 1] chosen chunks of one head, -1 for none.
        chunk_size: keys in a chunk; the query's own chunk counts as attended.

    Returns:
        [at most 256, at most 256] values in 0..1.
    """
    queries = len(selected)
    chunks = -(-queries // chunk_size)
    chosen = np.zeros((queries, chunks + 1))
    np.put_along_axis(chosen, np.where(selected < 0, chunks, selected), 1.0, axis=1)
    chosen = chosen[:, :chunks]
    chosen[np.arange(queries), np.arange(queries) // chunk_size] = 1.0
    for axis in (0, 1):
        starts = np.arange(0, chosen.shape[axis], -(-chosen.shape[axis] // _MOST_CELLS))
        counts = np.diff(np.append(starts, chosen.shape[axis]))
        chosen = np.add.reduceat(chosen, starts, axis=axis) / np.expand_dims(counts, 1 - axis)
    return chosen


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
            plot_selection(args.run / "selection.npz", args.run / "selection.png")
    except ImportError:
        print("error: drawing needs matplotlib: pip install -e '.[plot]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
