"""A trace as one self-contained HTML page: page.html with the numbers put in as JSON; nothing else is loaded."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .picture import coarse
from .report import Report
from .trace import RoutingTrace

MOST_CELLS = 128
"""Rows and columns of the map; neighbouring chunks of longer sequences are averaged, which bounds the page's size."""
TEMPLATE = Path(__file__).with_name("page.html")
MARK = "{{data}}"


def write_page(trace: RoutingTrace, path: str | Path, report: Report | None = None,
               excerpts: Sequence[str] | None = None) -> None:
    """Writes the page.

    Args:
        trace: what was chosen.
        path: of the file.
        report: the statistics of the same pass, by layer and head.
        excerpts: the beginning of each chunk's text.
    """
    text = json.dumps(page_data(trace, report, excerpts), separators=(",", ":"), ensure_ascii=False)
    text = text.replace("<", "\\u003c")  # so that no text can end the script element
    Path(path).write_text(TEMPLATE.read_text(encoding="utf-8").replace(MARK, text), encoding="utf-8")


def page_data(trace: RoutingTrace, report: Report | None = None, excerpts: Sequence[str] | None = None) -> dict:
    """The numbers behind the page.

    Returns:
        JSON values; ``shares[layer][head]`` lists, for each row of the map and each column up to the diagonal, how many
        queries in a thousand attend to the chunk. A row or column is ``width`` chunks.
    """
    width = -(-trace.num_chunks // MOST_CELLS)
    shares = {}
    for layer in trace.layers:
        tables = [coarse(table, MOST_CELLS) for table in trace.shares(layer)]
        below = np.tril_indices(len(tables[0]))
        shares[str(layer)] = [np.rint(1000 * table[below]).astype(int).tolist() for table in tables]
    statistics = {str(layer): {name: [round(value, 4) for value in values] for name, values in heads.items()}
                  for layer, heads in (report or {}).items()}
    about = {name: value for name, value in trace.about.items() if value is not None}
    return {"about": about, "chunk_size": trace.chunk_size, "topk": trace.topk,
            "seq_length": trace.seq_length, "sequences": trace.sequences, "num_chunks": trace.num_chunks,
            "num_heads": trace.num_heads, "num_kv_heads": trace.num_kv_heads, "width": width, "shares": shares,
            "statistics": statistics, "excerpts": list(excerpts or [])}
