"""Which chunks were chosen (a trace), and the statistics by layer and head (a report): pictures, and an HTML page."""
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import plotting
from .report import Report, as_record
from .trace import NUMBERS, RoutingTrace

MOST_CELLS, PAGE_CELLS = 256, 128
"""Rows and columns of a heat map, and of the page's; neighbouring chunks of longer sequences are averaged."""
MOST_PANELS = 8  # rows (layers) and columns (heads) of heat maps; of more, evenly spaced ones are drawn
TEMPLATE = Path(__file__).with_name("page.html")
MARK = "{{data}}"


def draw_trace(trace: RoutingTrace, path: str | Path) -> None:
    """A heat map for each layer and head: which share of the queries of a chunk attends to a chunk."""
    layers, heads = spread(trace.layers, MOST_PANELS), spread(range(trace.num_heads), MOST_PANELS)
    ticks = spread(range(trace.num_chunks), 3)
    with plotting.figure(path, rows=len(layers), columns=len(heads), width=max(plotting.WIDTH, 1.05 * len(heads)),
                         height=1.05 * len(layers) + 1.1, squeeze=False, sharex=True, sharey=True) as (drawn, grid):
        for row, layer in zip(grid, layers):
            shares = trace.shares(layer)
            for axes, head in zip(row, heads):
                table = coarse(shares[head], MOST_CELLS)
                future = np.triu(np.ones_like(table, dtype=bool), 1)
                image = axes.imshow(np.ma.masked_array(table, future), aspect="auto", cmap="magma_r", vmin=0, vmax=1,
                                    extent=(-0.5, trace.num_chunks - 0.5, trace.num_chunks - 0.5, -0.5),
                                    interpolation="nearest")
                axes.set_xticks(ticks, ticks)
                axes.set_yticks(ticks, ticks)
                axes.grid(visible=False)
                axes.tick_params(labelsize=8)
            row[0].set_ylabel(f"layer {layer}", fontsize=9)
        for axes, head in zip(grid[0], heads):
            axes.set_title(f"head {head}", fontsize=9)
        drawn.suptitle(f"Down: the query's chunk. Across: the chunk it attends to.\n{trace.chunk_size} keys a chunk, "
                       f"topk {trace.topk}", fontsize=9, x=0.02, ha="left")
        drawn.colorbar(image, ax=grid, label="share of the chunk's queries", location="bottom", aspect=40, pad=0.02)


def draw_report(report: Report, path: str | Path) -> None:
    """A heat map for each statistic, one below the other: layers down, heads across."""
    layers = sorted(report)
    names = list(report[layers[0]])
    heads = len(report[layers[0]][names[0]])
    with plotting.figure(path, rows=len(names), width=max(plotting.WIDTH, 0.14 * heads + 1.4),
                         height=(max(0.5, 0.14 * len(layers)) + 0.75) * len(names), squeeze=False) as (drawn, grid):
        for axes, name in zip(grid[:, 0], names):
            values = np.array([report[layer][name] for layer in layers])
            image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest",
                                **({} if name == "imbalance" else {"vmin": 0, "vmax": 1}))
            axes.set_title(f"{name.replace('_', ' ')}, mean {values.mean():.2f}", fontsize=9)
            shown = spread(range(len(layers)), MOST_PANELS)
            axes.set_yticks(shown, [layers[i] for i in shown])
            axes.set_xticks(spread(range(heads), MOST_PANELS))
            axes.set_ylabel("layer")
            axes.grid(visible=False)
            drawn.colorbar(image, ax=axes)
        axes.set_xlabel("head")


def write_page(trace: RoutingTrace, path: str | Path, report: Report | None = None,
               excerpts: Sequence[str] | None = None) -> None:
    """A trace, the same pass's statistics and the beginning of each chunk's text as one self-contained HTML page:
    page.html with the numbers put in as JSON; nothing else is loaded."""
    text = json.dumps(page_data(trace, report, excerpts), separators=(",", ":"), ensure_ascii=False)
    text = text.replace("<", "\\u003c")  # so that no text can end the script element
    Path(path).write_text(TEMPLATE.read_text(encoding="utf-8").replace(MARK, text), encoding="utf-8")


def page_data(trace: RoutingTrace, report: Report | None = None, excerpts: Sequence[str] | None = None) -> dict:
    """The numbers behind the page, as JSON values; ``shares[layer][head]`` lists, for each row of the map and each
    column up to the diagonal, how many queries in a thousand attend to the chunk. A row or column is ``width`` chunks.
    """
    width = -(-trace.num_chunks // PAGE_CELLS)
    shares = {}
    for layer in trace.layers:
        tables = [coarse(table, PAGE_CELLS) for table in trace.shares(layer)]
        below = np.tril_indices(len(tables[0]))
        shares[str(layer)] = [np.rint(1000 * table[below]).astype(int).tolist() for table in tables]
    return {"about": {name: value for name, value in trace.about.items() if value is not None},
            **{name: getattr(trace, name) for name in (*NUMBERS, "num_chunks")}, "width": width, "shares": shares,
            "statistics": {layer: record["heads"] for layer, record in as_record(report or {}).items()},
            "excerpts": list(excerpts or [])}


def coarse(table: np.ndarray, most: int) -> np.ndarray:
    """Means of equal runs of neighbouring rows and columns (the last run may be shorter): at most ``most`` of each."""
    starts = np.arange(0, len(table), -(-len(table) // most))
    lengths = np.diff(np.append(starts, len(table)))
    return np.add.reduceat(np.add.reduceat(table, starts, axis=0), starts, axis=1) / np.outer(lengths, lengths)


def spread(items, most: int) -> list:
    """At most ``most`` of the items, evenly spaced, the first and the last among them."""
    items = list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)]
