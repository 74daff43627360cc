"""Pictures of the router: which chunks were chosen (a trace), and the statistics by layer and head (a report)."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from .report import Report
from .trace import RoutingTrace

MOST_CELLS = 256
"""Rows and columns of a heat map; neighbouring chunks of longer sequences are averaged."""
MOST_PANELS = 8
"""Rows (layers) and columns (heads) of heat maps; of more, evenly spaced ones are drawn."""


def draw_trace(trace: RoutingTrace, path: str | Path) -> None:
    """A heat map for each layer and head: which share of the queries of a chunk attends to a chunk.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    layers, heads = spread(trace.layers, MOST_PANELS), spread(range(trace.num_heads), MOST_PANELS)
    figure, grid = plt.subplots(len(layers), len(heads), figsize=(2.3 * len(heads) + 1.2, 2.3 * len(layers) + 0.8),
                                squeeze=False, sharex=True, sharey=True, layout="constrained")
    image = None
    for row, layer in zip(grid, layers):
        shares = trace.shares(layer)
        for axes, head in zip(row, heads):
            image = axes.imshow(coarse(shares[head], MOST_CELLS), aspect="auto", cmap="magma_r", vmin=0, vmax=1,
                                extent=(0, trace.num_chunks, trace.num_chunks, 0), interpolation="nearest")
        row[0].set_ylabel(f"layer {layer}\nchunk of the query", fontsize=9)
    for axes, head in zip(grid[0], heads):
        axes.set_title(f"head {head}", fontsize=9)
    figure.supxlabel(f"chunk ({trace.chunk_size} keys; the diagonal is the query's own)", fontsize=9)
    figure.colorbar(image, ax=grid, label="share of queries that attend to the chunk", shrink=0.8)
    _save(figure, path)


def draw_report(report: Report, path: str | Path) -> None:
    """A heat map for each statistic: layers down, heads across.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    layers = sorted(report)
    names = list(report[layers[0]])
    heads = len(report[layers[0]][names[0]])
    size = max(1.6, 0.22 * heads) * len(names) + 2, 0.25 * len(layers) + 1.8
    figure, row = plt.subplots(1, len(names), figsize=size, sharey=True, layout="constrained")
    for axes, name in zip(row, names):
        values = np.array([report[layer][name] for layer in layers])
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=None if name == "imbalance" else 0,
                            vmax=None if name == "imbalance" else 1, interpolation="nearest")
        axes.set_title(f"{name.replace('_', ' ')}\nmean {values.mean():.2f}", fontsize=9)
        axes.set_xlabel("head", fontsize=9)
        axes.set_yticks(range(len(layers)), layers)
        axes.set_xticks(spread(range(heads), MOST_PANELS))
        figure.colorbar(image, ax=axes, shrink=0.8)
    row[0].set_ylabel("layer", fontsize=9)
    _save(figure, path)


def coarse(table: np.ndarray, most: int) -> np.ndarray:
    """Means of equal runs of neighbouring rows and columns (the last run may be shorter): at most ``most`` of each."""
    width = -(-len(table) // most)
    starts = np.arange(0, len(table), width)
    lengths = np.diff(np.append(starts, len(table)))
    sums = np.add.reduceat(np.add.reduceat(table, starts, axis=0), starts, axis=1)
    return sums / np.outer(lengths, lengths)


def spread(items, most: int) -> list:
    """At most ``most`` of the items, evenly spaced, the first and the last among them."""
    items = list(items)
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: str | Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
