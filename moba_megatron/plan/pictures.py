"""Pictures of predictions: time against sequence length, bytes and scaling against ranks."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .calibration import Calibration
from .cards import Card
from .models import Run, default_batch
from .search import plan

SHORTEST = 1 << 15


def lengths_around(seqlen: int) -> list[int]:
    """Powers of two from 32K to four times the run's length, and the length itself."""
    found = {seqlen}
    length = SHORTEST
    while length <= 4 * seqlen:
        found.add(length)
        length *= 2
    return sorted(found)


def costs_by_length(run: Run, card: Card, calibration: Calibration) -> dict[str, list[tuple[int, float]]]:
    """For MoBA and for full attention: (sequence length, GPU seconds a million tokens) of the cheapest layout.

    The batch is about four million tokens at each length.
    """
    found: dict[str, list[tuple[int, float]]] = {"moba": [], "full": []}
    for seqlen in lengths_around(run.seqlen):
        for attention, points in found.items():
            batch = run.batch if seqlen == run.seqlen else default_batch(seqlen)
            fit, _ = plan(replace(run, seqlen=seqlen, batch=batch, attention=attention), card, calibration)
            if fit:
                points.append((seqlen, fit[0].cost))
    return found


def time_against_length(run: Run, card: Card, calibration: Calibration, path: Path) -> None:
    """Draws :func:`costs_by_length` into ``path`` (.png or .svg)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    names = {"moba": f"MoBA, chunk {run.moba.chunk_size}, topk {run.moba.topk}, full layers: "
                     f"{run.moba.full_attention_layers}", "full": "full attention"}
    for attention, points in costs_by_length(run, card, calibration).items():
        if points:
            axes.plot(*zip(*points), marker="o", label=names[attention])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda tokens, _: _short(tokens))
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel("GPU seconds a million tokens")
    axes.set_title(f"Predicted, {run.model.parameters / 1e9:.2g}B parameters on {run.gpus} x {card.name}, best layout",
                   fontsize=10)
    _finish(pyplot, figure, axes, path)


def scaling(rows: list[dict], title: str, path: Path) -> None:
    """Draws simulated rows of one length: received bytes and efficiency of a layer against ranks.

    Args:
        rows: of ``simulate.sweep``.
        title: above the picture.
        path: .png or .svg.
    """
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8))
    lines: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        lines.setdefault((row["comm"], row["routing"]), []).append(row)
    routings = list(dict.fromkeys(routing for _, routing in lines))
    styles = {"all_gather": "k-", "a2a": "k:", "chunks travel": "--", "queries travel": "-.",
              "selective": "--o", "mixed": "-"}
    for (comm, routing), points in lines.items():
        color = {} if styles[comm].startswith("k") else {"color": f"C{routings.index(routing)}"}
        name = comm if routing == "any" else f"{comm}, {routing}"
        ranks = [row["ranks"] for row in points]
        left.plot(ranks, [row["worst_bytes"] / 1e9 for row in points], styles[comm], label=name, **color)
        right.plot(ranks, [row["efficiency"] for row in points], styles[comm], label=name, **color)
    for axes, label in ((left, "GB received by the busiest rank, a layer and step"),
                        (right, "efficiency of the attention layer")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter("{x:g}")
    left.set_yscale("log")
    right.set_ylim(0, 1.05)
    right.grid(True, alpha=0.3)
    figure.suptitle(title, fontsize=10)
    left.grid(True, alpha=0.3)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(pyplot, figure, path)


def measured_ways(result: dict, path: Path) -> None:
    """Draws what ``plan.measure`` measured: milliseconds and GiB sent by all ranks, of every way for every routing.

    Args:
        result: its JSON.
        path: .png or .svg.
    """
    pyplot = _pyplot()
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    ways, routings = (list(dict.fromkeys(row[key] for row in rows)) for key in ("way", "routing"))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.2), sharey=True)
    height = 0.8 / len(routings)
    values = (("forward and backward, ms; line: reckoned beforehand", lambda row: row["ms"]["median"]),
              ("sent by all ranks, GiB", lambda row: sum(row["sent_bytes"]) / 2**30))
    for axis, (label, value) in zip(axes, values):
        for row in rows:
            routing = routings.index(row["routing"])
            at = ways.index(row["way"]) + (routing - (len(routings) - 1) / 2) * height
            axis.barh(at, value(row), height, color=f"C{routing}",
                      label=row["routing"] if row["way"] == ways[0] else None)
            if axis is axes[0] and row.get("reckoned_ms"):
                axis.vlines(row["reckoned_ms"], at - height / 2, at + height / 2, color="k")
        axis.set_xlabel(label)
        axis.grid(True, axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(ways)), ways)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8)
    job, about = result["job"], result["environment"]
    figure.suptitle(f"Measured: {about['ranks']} x {about['device']}, {_short(job['tokens'])} tokens, {job['heads']}:"
                    f"{job['kv_heads']} heads, chunks of {job['chunk_size']}, topk {job['topk']}", fontsize=10)
    _save(pyplot, figure, path)


def _short(tokens: float) -> str:
    return f"{tokens / 2**20:g}M" if tokens >= 1 << 20 else f"{tokens / 2**10:g}K"


def _finish(pyplot, figure, axes, path: Path) -> None:
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    _save(pyplot, figure, path)


def _save(pyplot, figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _pyplot():
    """matplotlib without a display.

    Raises:
        ImportError: it is not installed; says how.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'moba_megatron[plot]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
