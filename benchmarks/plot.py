"""Pictures of stored results for README.md (light and dark) and docs/."""
from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from moba_megatron import plotting
from moba_megatron.plotting import LIGHT, Theme

from . import comparison, report, training
from .planner import pictures

NAMES = {comparison.OWN: "MoBA, this package", "cuDNN": "full, cuDNN", "flash attention 2": "full, FlashAttention-2",
         "moonshot-moba": "MoBA, MoonshotAI", "fla-moba": "MoBA, fla"}
DARK = Theme("#0d1117", "#e6edf3", "#9aa4af", "#58a6ff", "#30363d",
             ("#f0883e", "#3fb950", "#bc8cff", "#9aa4af", "#39c5cf", "#d29922"))
MOST_BYTES = 150_000
"""A picture that a repository keeps is not larger."""
SMOOTHED = 20
"""Steps whose mean a learning curve shows."""


def add_plot(subcommands) -> None:
    p = subcommands.add_parser("plot", help="draw the pictures of README.md and docs/ from stored results")
    p.add_argument("--comparison", type=Path, default=report.RESULTS / "h200/comparison.json", metavar="JSON",
                   help="of `readme`: speed, memory")
    p.add_argument("--gpt", nargs="+", type=Path, metavar="JSON", help="of `gpt`, one file a number of GPUs: "
                   "throughput", default=[report.RESULTS / f"h200/gpt-p{n}.json" for n in (1, 2)])
    p.add_argument("--learning", type=Path, default=report.RESULTS / "h200/learning.json", metavar="JSON",
                   help="of compare_50m, several attentions and seeds: learning")
    p.add_argument("--exchange", type=Path, default=report.RESULTS / "planner/exchange.json",
                   metavar="JSON", help="of `plan-simulate`: exchange_1M, exchange_10M")
    p.add_argument("--selective", type=Path, default=report.RESULTS / "h200/selective.json", metavar="JSON",
                   help="of `plan-measure`: selective")
    p.add_argument("--output", type=Path, default=Path("docs/images"), metavar="DIR", help="(docs/images)")
    p.set_defaults(run=run_plot)


def run_plot(arguments: argparse.Namespace) -> int:
    """Draws what there are results for; 2 where there are none."""
    drawn, folder = [], arguments.output
    if arguments.comparison.is_file():
        result = report.load(arguments.comparison)
        drawn += _both(plot_speed, result, folder / "speed") + [plot_memory(result, folder / "memory.png")]
    gpt = [report.load(path) for path in arguments.gpt if path.is_file()]
    if gpt:
        drawn += _both(plot_throughput, gpt, folder / "throughput")
    if arguments.learning.is_file():
        drawn.append(plot_learning(report.load(arguments.learning), folder / "learning.png"))
    if arguments.exchange.is_file():
        drawn += pictures.simulated(report.load(arguments.exchange), folder)
    if arguments.selective.is_file():
        pictures.measured_variants(report.load(arguments.selective), folder / "selective.png")
        drawn.append(folder / "selective.png")
    print("\n".join(map(str, drawn)) or f"neither {arguments.comparison} nor {arguments.learning} is there: measure "
          "with `python -m benchmarks readme` or `benchmarks.compare_50m`; stored results are in a checkout")
    return 0 if drawn else 2


def _both(plot, result, path: Path) -> list[Path]:
    """A picture for light and one for dark pages."""
    return [plot(result, path.with_suffix(".png"), LIGHT), plot(result, path.with_name(f"{path.name}-dark.png"), DARK)]


def plot_speed(result: dict, path: Path, theme: Theme = LIGHT) -> Path:
    """Forward and backward against the length of the sequence; wrong results are left out."""
    return _against_length(result, lambda row: row["ms"]["median"] if "ms" in row else None,
                           "Attention, forward + backward, ms", " ms", 0, path, theme)


def plot_memory(result: dict, path: Path) -> Path:
    """Peak memory beyond the inputs against the length of the sequence."""
    return _against_length(result, lambda row: (row.get("extra_peak_bytes") or 0) / report.GIB or None,
                           "Peak memory beyond the inputs, GiB", " GiB", 1, path, LIGHT)


def _against_length(result: dict, value, title: str, unit: str, digits: int, path: Path, theme: Theme) -> Path:
    lines: dict[str, list] = defaultdict(list)
    for row in result["rows"]:
        found = value(row) if row["status"] == "ok" else None
        if found is not None:
            lines[row["name"]].append((row["tokens"], found))
    lengths = sorted({tokens for points in lines.values() for tokens, _ in points})
    lines = {name: sorted(points) for name, points in lines.items() if max(points)[0] == lengths[-1]}
    about = result["settings"]
    with plotting.figure(path, theme=theme) as (_, axes):
        labels, others = [], iter(theme.others * 2)
        for name, points in lines.items():
            own = name == comparison.OWN
            colour = theme.accent if own else next(others)
            axes.plot(*zip(*points), color=colour, linewidth=3 if own else 1.5, marker="o", markersize=4)
            labels.append((points[-1][1], f"{NAMES.get(name, name)}: {points[-1][1]:.{digits}f}{unit}", colour))
        plotting.log_axis(axes)
        plotting.length_axis(axes, lengths, f"tokens; {about['heads']} heads of {about['head_dim']}, chunk "
                             f"{about['chunk_size']}, topk {about['topk']}")
        axes.set_title(f"{title}, {result['environment']['device'].removeprefix('NVIDIA ')}")
        plotting.label_ends(axes, labels)
    return path


def plot_throughput(results: list[dict], path: Path, theme: Theme = LIGHT) -> Path:
    """Tokens a second of a GPT's forward and backward at the longest length that full attention was measured at."""
    bars = []
    for result in results:
        rows = [row for row in result["rows"] if row["status"] == "ok" and not row["row"]["fp8"]
                and row["row"]["tp"] == 1 and not row["row"]["recompute"] and row["row"]["full_layers"] == "none"]
        tokens = max(row["row"]["tokens"] for row in rows if row["row"]["attention"] == "full")
        gpus = f"{result['environment']['ranks']} GPU{'s' * (result['environment']['ranks'] > 1)}"
        for attention, name in (("full", "full"), ("moba", "MoBA")):
            chosen = [row for row in rows if row["row"]["attention"] == attention and row["row"]["tokens"] == tokens
                      and (attention == "full" or (row["row"]["chunk_size"], row["row"]["topk"]) == (512, 8))]
            bars.append((f"{name}, {gpus}", max(row["tokens_per_s"] for row in chosen), attention))
    with plotting.figure(path, height=2.4, theme=theme) as (_, axes):
        for i, (name, value, attention) in enumerate(bars):
            axes.barh(i, value / 1e3, color=theme.accent if attention == "moba" else theme.muted, height=0.7)
            axes.text(value / 1e3, i, f" {value / 1e3:.0f}K", va="center", color=theme.ink)
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.15 * max(value for _, value, _ in bars) / 1e3)
        axes.set_xlabel(f"thousand tokens/s; {plotting.short(tokens)} tokens, chunk 512, topk 8", loc="right")
        axes.set_title(f"350M GPT, forward + backward, {results[0]['environment']['device'].removeprefix('NVIDIA ')}")
    return path


def plot_learning(result: dict, path: Path) -> Path:
    """Training loss against tokens, a line an attention: the mean over its seeds, and their range as a band."""
    runs: dict[str, list[dict]] = defaultdict(list)
    for row in result["rows"]:
        if row["status"] == "ok":
            runs[training.name_of(row)].append(row)
    with plotting.figure(path) as (_, axes):
        labels = []
        for (name, rows), colour in zip(runs.items(), (LIGHT.accent, *LIGHT.others)):
            steps = min(len(row["losses"]) for row in rows)
            curves = [_smooth(row["losses"][:steps]) for row in rows]
            tokens = [(step + SMOOTHED) * rows[0]["tokens_per_step"] / 1e6 for step in range(len(curves[0]))]
            mean = [sum(at) / len(at) for at in zip(*curves)]
            axes.fill_between(tokens, [min(at) for at in zip(*curves)], [max(at) for at in zip(*curves)], color=colour,
                              alpha=0.15, linewidth=0)
            axes.plot(tokens, mean, color=colour, linewidth=1.5)
            labels.append((mean[-1], f"{name}: {mean[-1]:.2f}", colour))
        axes.set_yscale("log")
        ticks = [2, 2.5, 3, 4, 5]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"million tokens; band: {len(rows)} seeds", loc="left")
        axes.set_title(f"Training loss, nats per byte, mean of {SMOOTHED} steps")
        plotting.label_ends(axes, labels)
    return path


def _smooth(losses: list[float]) -> list[float]:
    return [sum(losses[i:i + SMOOTHED]) / SMOOTHED for i in range(max(1, len(losses) - SMOOTHED + 1))]
