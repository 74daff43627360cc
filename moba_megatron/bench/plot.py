"""Pictures of stored results, each as PNG and SVG: time and memory against sequence length, and learning curves."""
from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from . import comparison, report, training

WIDTH, HEIGHT, DPI = 7.2, 4.6, 110
MARKERS = "osD^vP*Xh<>"
DASHES = ("-", "--", "-.", ":")
GREYS = ("0.0", "0.35", "0.55", "0.7")
"""Lines differ in marker, dash and darkness, so that nothing depends on colour."""
MOST_BYTES = 150_000
"""A picture that a repository keeps is not larger."""
SMOOTHED = 10
"""Steps whose mean a learning curve shows."""


def add_plot(subcommands) -> None:
    p = subcommands.add_parser("plot", help="speed.*, memory.* (results of `readme`) and learning.* as PNG and SVG")
    p.add_argument("--comparison", type=Path, default=report.RESULTS / "h200/comparison.json", metavar="JSON",
                   help="of `bench readme`")
    p.add_argument("--learning", type=Path, default=report.RESULTS / "h200/learning.json", metavar="JSON",
                   help="of examples/compare_50m.py, several attentions and seeds")
    p.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR", help="where the pictures go (docs)")
    p.set_defaults(run=run_plot)


def run_plot(arguments: argparse.Namespace) -> int:
    """Draws what there are results for; 2 where there are none."""
    drawn = []
    if arguments.comparison.is_file():
        result = report.load(arguments.comparison)
        drawn += plot_speed(result, arguments.output / "speed") + plot_memory(result, arguments.output / "memory")
    if arguments.learning.is_file():
        drawn += plot_learning(report.load(arguments.learning), arguments.output / "learning")
    print("\n".join(map(str, drawn)) or f"neither {arguments.comparison} nor {arguments.learning} is there: measure "
          "with `python -m moba_megatron.bench readme` or examples/compare_50m.py")
    return 0 if drawn else 2


def plot_speed(result: dict, path: Path) -> list[Path]:
    """Forward and backward against the length of the sequence; wrong results are left out."""
    lines = _by_name(result, lambda row: row["ms"]["median"] if "ms" in row else None)
    lines |= {f"{name}, in a CUDA graph": points for name, points in
              _by_name(result, lambda row: row["graph_ms"]["median"] if "graph_ms" in row else None).items()}
    return _against_length(result, lines, "forward and backward, ms", path)


def plot_memory(result: dict, path: Path) -> list[Path]:
    """Peak memory beyond the inputs against the length of the sequence."""
    lines = _by_name(result, lambda row: (row.get("extra_peak_bytes") or 0) / report.GIB or None)
    return _against_length(result, lines, "peak memory beyond the inputs, GiB", path)


def _by_name(result: dict, value) -> dict[str, list[tuple[int, float]]]:
    """Implementation -> (tokens, value) of its right rows."""
    lines: dict[str, list] = defaultdict(list)
    for row in result["rows"]:
        found = value(row) if row["status"] == "ok" else None
        if found is not None:
            lines[row["name"]].append((row["tokens"], found))
    return dict(lines)


def _against_length(result: dict, lines: dict[str, list[tuple[int, float]]], label: str, path: Path) -> list[Path]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    for i, (name, points) in enumerate(lines.items()):
        own = name.startswith("moba_megatron")
        axes.plot(*zip(*sorted(points)), marker=MARKERS[i % len(MARKERS)], linestyle=DASHES[i % len(DASHES)],
                  color="black" if own else GREYS[1 + i % 3], linewidth=2.4 if own else 1.3, markersize=6, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(ticks, [comparison.length(n) for n in ticks])
    settings = result["settings"]
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel(label)
    axes.set_title(f"{result['environment']['device']}, {settings['heads']} heads of {settings['head_dim']}, "
                   f"{settings['dtype']}, chunk {settings['chunk_size']}, topk {settings['topk']}", fontsize=10)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_learning(result: dict, path: Path) -> list[Path]:
    """Training loss against tokens, and the validation's loss by position, of every attention; a line a seed."""
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row["status"] == "ok"]
    names = list(dict.fromkeys(row["attention"] for row in rows))
    figure, (curves, positions) = plt.subplots(1, 2, figsize=(2 * WIDTH - 4, HEIGHT), layout="constrained")
    for row in rows:
        i = names.index(row["attention"])
        first = row is next(other for other in rows if other["attention"] == row["attention"])
        style = {"color": GREYS[i % len(GREYS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.2,
                 "label": training.name_of(row) if first else None}
        losses = _smooth(row["losses"])
        tokens = [(step + SMOOTHED) * row["tokens_per_step"] / 1e6 for step in range(len(losses))]
        curves.plot(tokens, losses, **style)
        parts = row["validations"][-1]["by_position"]
        positions.plot([(begin + end) / 2 for begin, end, _ in parts], [loss for _, _, loss in parts],
                       marker=MARKERS[i], markersize=4, **style)
    curves.set_xlabel("tokens, millions")
    curves.set_ylabel(f"training loss, nats per byte (mean of {SMOOTHED} steps)")
    curves.set_yscale("log")
    positions.set_xlabel("position in the sequence")
    positions.set_ylabel("validation loss, nats per byte")
    for axes in (curves, positions):
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.legend(fontsize=8)
    return _save(figure, path)


def _smooth(losses: list[float]) -> list[float]:
    return [sum(losses[i:i + SMOOTHED]) / SMOOTHED for i in range(len(losses) - SMOOTHED + 1)]


def _save(figure, path: Path) -> list[Path]:
    """PNG for the README and SVG beside it, without a date, so that the same results make the same files."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with plt.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(written[0], dpi=DPI)
        figure.savefig(written[1], metadata={"Date": None})
    plt.close(figure)
    return written
