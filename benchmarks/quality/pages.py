"""Tables and pictures of docs/quality.md from stored results."""
from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from moba_megatron import plotting
from moba_megatron.plotting import LIGHT

from .. import ROOT, report
from .variants import LENGTHS, Variant, grid

PAGE = "docs/quality.md"
STORED = {name: report.RESULTS / f"quality/{name}.json" for name in ("scratch", "untrained", "continued")}
"""Where each part's result is, unless --json says otherwise."""
MODEL = "--pretrained SmolLM2-135M-Instruct.Q4_1.gguf"
COMMANDS = {part: f"python -m benchmarks.quality {part} {flags}"
            for part, flags in (("scratch", "--output runs/scratch"), ("untrained", f"{MODEL} --text plays"),
                                ("continued", f"{MODEL} --output runs/continued"))}
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
"""Student's t, two-sided 95 %, by degrees of freedom from 1; beyond 30 that of 30, a little too wide."""


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % t-interval; None of a single value."""
    if len(values) < 2:
        return statistics.mean(values), None
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), T975[min(len(values) - 1, len(T975)) - 1] * error


def said(values: list[float], sign: str = "", digits: int = 4) -> str:
    """An interval for a table; nothing of nothing."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def last(run: dict) -> dict:
    return run["validations"][-1]


MEASURES: dict[str, tuple[Callable[[dict], float], int]] = {
    "loss": (lambda validation: validation["loss"], 4),
    "last 1/16": (lambda validation: validation["by_position"][-1], 4),
    "copied, %": (lambda validation: 100 * statistics.mean(validation["copying"].values()), 1),
    "recalled, %": (lambda validation: 100 * statistics.mean(validation["recall"].values()), 1)}
"""Name -> how it is read off a validation, and its digits in tables."""


def ended(result: dict) -> list[dict]:
    return [row for row in result["rows"] if row["status"] == "ok"]


def by_variant(result: dict, begun: bool = False) -> list[dict]:
    """An item a variant: its runs that ended, and pairs of them and full attention's of the same seed and text.

    Args:
        begun: also the runs that stopped, as far as they were validated.
    """
    found: dict[str, dict[int, dict]] = {}
    for row in result["rows"]:
        if row["status"] == "ok" or begun and row.get("validations"):
            found.setdefault(row["variant"], {})[row["seed"]] = row
    return [{"variant": name, "runs": list(runs.values()),
             "pairs": _pairs(runs, found.get("full", {})) if name != "full" else []} for name, runs in found.items()]


def _pairs(runs: dict[int, dict], others: dict[int, dict]) -> list[tuple[dict, dict]]:
    """Runs by seed, each with the other of the same seed and text."""
    return [(run, others[seed]) for seed, run in runs.items() if seed in others and run["text"] == others[seed]["text"]]


def _of(name: str) -> report.Cell:
    """The column of a measure at the end of the runs."""
    value, digits = MEASURES[name]
    return lambda item: said([value(last(run)) for run in item["runs"]], digits=digits)


def _minus(name: str) -> report.Cell:
    """The same, of each pair the first minus the second."""
    value, digits = MEASURES[name]
    return lambda item: said([value(last(run)) - value(last(other)) for run, other in item["pairs"]], "+", digits)


def _label(item: dict) -> str:
    return Variant.of(item["variant"]).label()


_RUNS = {
    "attention": _label, "seeds": lambda item: str(len(item["runs"])),
    "tokens": lambda item: f"{item['runs'][0]['steps'] * item['runs'][0]['tokens_per_step'] / 1e6:.1f}M",
    "validation loss": _of("loss"), "minus full": _minus("loss"),
    "last 1/16": _of("last 1/16"), "minus full, last 1/16": _minus("last 1/16"),
    "copied, %": _of("copied, %"), "recalled, %": _of("recalled, %")}


def _why_not(row: dict) -> str:
    """A run that did not end, for the line below a table."""
    seen = (f", validated to {last(row)['step'] * row['tokens_per_step'] / 1e6:.1f}M tokens"
            if row.get("validations") else "")
    return f"{row['variant']}, seed {row['seed']} ({row['status']}{seen})"


def _runs_below(result: dict) -> str:
    row, texts = ended(result)[0], {row["text"]["train"]["sha256"]: row["text"] for row in ended(result)}.values()
    which = ", ".join(f"{text['train']['tokens']:,} tokens, sha256 {text['train']['sha256'][:16]}, validation "
                      f"{text['validation']['sha256'][:16]}" for text in texts)
    left = ", ".join(_why_not(row) for row in result["rows"] if row["status"] != "ok")
    return (f"Nats a token, sequences of {row['seq_length']:,} tokens, {row['tokens_per_step']:,} a step; "
            f"{100 * row['task_share']:g} % of the sequences hold a task. ±: 95 % t-interval over seeds; `minus full` "
            f"pairs runs of a seed and text.{f' Not ended: {left}.' if left else ''} Training text {which}. "
            f"{report.measured_at(result)}")


SCRATCH = report.Table({**_RUNS, "tokens/s, first seed": lambda item: f"{item['runs'][0]['tokens_per_s']:,.0f}"},
                       by_variant, below=_runs_below)


def _of_two(result: dict) -> list[dict]:
    """An item for each two variants that have pairs of runs: the later one's, each with the earlier one's."""
    by_seed = [(item, {run["seed"]: run for run in item["runs"]}) for item in by_variant(result)]
    found = [{"name": f"{_label(b)} minus {_label(a)}", "pairs": _pairs(of_b, of_a)}
             for (a, of_a), (b, of_b) in itertools.combinations(by_seed, 2)]
    return [item for item in found if item["pairs"]]


DIFFERENCES = report.Table({"difference": lambda item: item["name"], "seeds": lambda item: str(len(item["pairs"])),
                            **{name: _minus(name) for name in MEASURES}}, _of_two)


def _positions(result: dict) -> report.Columns:
    def at(i: int) -> report.Cell:
        return lambda item: said([run["by_position"][i] - full["by_position"][i] for run, full in (
            tuple(map(last, pair)) for pair in item["pairs"])], "+")

    length = ended(result)[0]["seq_length"]
    return {"minus full at": _label, **{f"{i * length // 16:,}-{(i + 1) * length // 16:,}": at(i)
                                        for i in (0, 1, 3, 7, 11, 15)}}


POSITIONS = report.Table(_positions, lambda result: [item for item in by_variant(result) if item["pairs"]])


def retrieval(task: str) -> report.Table:
    """A task by variant, in percent: copying by distance, recall by depth, each the mean over lists of all lengths."""
    def columns(result: dict) -> report.Columns:
        def at(cells: list[str]) -> report.Cell:
            return lambda item: said([100 * statistics.mean(last(run)[task][cell] for cell in cells)
                                      for run in item["runs"]], digits=0)

        places: dict[str, list[str]] = {}
        for cell in last(ended(result)[0])[task]:
            places.setdefault(cell.split("@")[-1], []).append(cell)
        return {"attention": _label, **{place: at(cells) for place, cells in places.items()}}

    return report.Table(columns, by_variant)


def _validation(run: dict, step: int) -> dict | None:
    """What a run was found to be after so many steps, if it was looked at then."""
    return next((each for each in run["validations"] if each["step"] == step), None)


def _after(item: dict, name: str, step: int) -> list[float]:
    """A measure of full attention's runs after so many steps, or what the others' add to it."""
    value, _ = MEASURES[name]
    if item["variant"] == "full":
        return [value(each) for run in item["runs"] if (each := _validation(run, step))]
    both = [(_validation(run, step), _validation(full, step)) for run, full in item["pairs"]]
    return [value(a) - value(b) for a, b in both if a and b]


def _recovery(result: dict) -> report.Columns:
    """A few steps, the last ones of runs that stopped among them."""
    row = ended(result)[0]
    steps = [each["step"] for each in row["validations"]]
    stopped = {last(run)["step"] for item in by_variant(result, begun=True) for run in item["runs"]}
    chosen = sorted({*steps[:3], steps[len(steps) // 2], steps[-1]} | stopped & set(steps))

    def at(step: int) -> report.Cell:
        return lambda item: said(_after(item, item["measure"], step), "+" * (item["variant"] != "full"),
                                 MEASURES[item["measure"]][1])

    return {"after": lambda item: item["measure"],
            "attention": lambda item: _label(item) + " minus full" * (item["variant"] != "full"),
            **{f"{step * row['tokens_per_step'] / 1e6:.1f}M": at(step) for step in chosen}}


def _recovery_below(result: dict) -> str:
    row = ended(result)[0]
    batch = row["micro_batch_tokens"] // row["seq_length"]
    return (f"Columns: tokens of training. Retrieval is tested on {batch} sequences a cell, at the end on "
            f"{-(-row['task_sequences'] // batch) * batch}.")


CONTINUED = report.Table(_RUNS, by_variant, below=_runs_below)
RECOVERY = report.Table(_recovery, lambda result: [
    item | {"measure": name} for name in ("loss", "last 1/16", "recalled, %")
    for item in by_variant(result, begun=True) if item["variant"] == "full" or item["pairs"]], below=_recovery_below)


def _generated(result: dict) -> list[dict]:
    """An item an attention and way of decoding: what its runs generated."""
    return [{"variant": item["variant"], "decode": decode, "found": found} for item in by_variant(result)
            for decode in ("dense", "moba")
            if (found := [run["generation"][decode] for run in item["runs"] if decode in run.get("generation", {})])]


GENERATION = report.Table({
    "trained with": _label, "decoding": lambda item: {"dense": "dense", "moba": "by MoBA"}[item["decode"]],
    "loss of one sequence": lambda item: said([each["loss"] for each in item["found"]]),
    "right answers": lambda item: (f"{sum(each['right'] for each in item['found'])} of "
                                   f"{sum(each['answers'] for each in item['found'])}")}, _generated)


def _against_dense(result: dict) -> list[dict]:
    """The rows, each with full attention's of the same texts."""
    full = {(row["tokens"], row["sha256"]): row for row in result["rows"] if row["variant"] == "full"}
    return [row | {"full": full.get((row["tokens"], row["sha256"]))} for row in result["rows"]]


def _paired(name: str) -> report.Cell:
    return lambda row: said([a - b for a, b in zip(row[name], row["full"][name])], "+", 3) if (
        row["full"] and row["variant"] != "full") else ""


def _attended(row: dict) -> str:
    variant = Variant.of(row["variant"])
    return f"{100 * variant.chunk_size * variant.topk / row['tokens']:.0f}" if variant.topk else "100"


def _untrained_below(result: dict) -> str:
    rows = result["rows"]
    texts = {row["tokens"]: row for row in rows}
    which = "; ".join(f"{n:,} tokens: {len(row['losses'])} texts, sha256 {row['sha256'][:16]}"
                      for n, row in texts.items())
    left = ", ".join([f"{name} at {n:,}" for n in texts for name in grid(n) if not any(
        (row["tokens"], row["variant"]) == (n, name) for row in rows)] + [f"{n:,} tokens" for n in LENGTHS
                                                                          if n not in texts])
    return (f"{result['pretrained']}, nats a token. ±: 95 % t-interval of the difference, paired by text. `keys`: the "
            f"most that a query attends to in MoBA layers, of the sequence. {which}."
            f"{f' Not run: {left}.' if left else ''} {report.measured_at(result)}")


UNTRAINED = report.Table({
    "tokens": lambda row: f"{row['tokens']:,}", "attention": _label, "keys, %": _attended,
    "loss": lambda row: f"{statistics.mean(row['losses']):.3f}", "minus full": _paired("losses"),
    "last 1/16": lambda row: f"{statistics.mean(row['trailing']):.3f}", "minus full, last 1/16": _paired("trailing")},
    _against_dense, below=_untrained_below)
TABLES = {
    "quality-scratch": ("scratch", SCRATCH), "quality-differences": ("scratch", DIFFERENCES),
    "quality-positions": ("scratch", POSITIONS),
    "quality-copying": ("scratch", retrieval("copying")), "quality-recall": ("scratch", retrieval("recall")),
    "quality-untrained": ("untrained", UNTRAINED),
    "quality-continued": ("continued", CONTINUED), "quality-recovery": ("continued", RECOVERY),
    "quality-continued-positions": ("continued", POSITIONS),
    "quality-continued-copying": ("continued", retrieval("copying")),
    "quality-continued-recall": ("continued", retrieval("recall")), "quality-generation": ("continued", GENERATION)}
"""Name -> which stored result, and the table made of it."""


def markdown(name: str, result: dict | None) -> str:
    """A table, or that nothing was run and how to."""
    part, table = TABLES[name]
    rows = result["rows"] if result else []
    if not any(row.get("status", "ok") == "ok" for row in rows):
        return f"Not run: `{COMMANDS[part]}`."
    return table.markdown(result)


def add_draw(subcommands) -> None:
    p = subcommands.add_parser("draw", help="docs/quality.md's tables and pictures from benchmarks/results/quality")
    p.add_argument("--page", type=Path, default=ROOT / PAGE, metavar="MD", help=f"({PAGE})")
    p.set_defaults(run=run_draw)


def run_draw(arguments: argparse.Namespace) -> int:
    """Writes the tables into the page and the pictures beside it; 0."""
    words, results = arguments.page.read_text(), {part: report.load(path) for part, path in STORED.items()
                                                  if path.is_file()}
    for name, (part, _) in TABLES.items():
        begin, end = report.between_markers(words, name)
        words = words[:begin] + markdown(name, results.get(part)) + "\n" + words[end:]
    arguments.page.write_text(words)
    folder = arguments.page.parent / "images"
    for part, result in results.items():
        for path in PICTURES[part](result, folder):
            print(path)
    return 0


def _lines(axes, lines: dict[str, list[tuple[float, float, float | None]]]) -> None:
    """A line a name, of (x, y, half the interval), labelled at its end."""
    labels = []
    for (name, points), colour in zip(lines.items(), (LIGHT.accent, *LIGHT.others)):
        x, y, half = zip(*points)
        axes.plot(x, y, color=colour, linewidth=1.5)
        if None not in half:
            axes.fill_between(x, [a - b for a, b in zip(y, half)], [a + b for a, b in zip(y, half)], color=colour,
                              alpha=0.15, linewidth=0)
        labels.append((y[-1], name, colour))
    axes.axhline(0, color=LIGHT.muted, linewidth=0.8)
    axes.margins(x=0)
    plotting.label_ends(axes, labels)


def _narrow(item: dict) -> str:
    """The label in lines, for a picture."""
    return _label(item).replace("), ", "),\n")


def _settings(item: dict) -> str:
    """The label without its first word, for a picture of MoBA alone."""
    stopped = any(run["status"] != "ok" for run in item["runs"])
    return _label(item).removeprefix("MoBA ") + ", stopped" * stopped


def plot_positions(result: dict, path: Path) -> Path:
    """Loss minus full attention's by position, mean over seeds with its interval."""
    length = ended(result)[0]["seq_length"]
    lines = {_settings(item): [((i + 0.5) * length / 16, *interval([last(run)["by_position"][i] - last(
        full)["by_position"][i] for run, full in item["pairs"]])) for i in range(16)]
        for item in by_variant(result) if item["pairs"]}
    with plotting.figure(path) as (_, axes):
        axes.set_title("MoBA's loss minus full attention's, nats a token")
        axes.set_xlabel("position in the sequence; band: 95 %", loc="left")
        _lines(axes, lines)
    return path


def plot_recovery(result: dict, path: Path) -> Path:
    """Validation loss minus full attention's after the same tokens, of runs that stopped too."""
    lines = {}
    for item in by_variant(result, begun=True):
        steps = sorted({each["step"] for run, _ in item["pairs"] for each in run["validations"]})
        points = [(step * item["runs"][0]["tokens_per_step"] / 1e6, *interval(values)) for step in steps
                  if (values := _after(item, "loss", step))]
        lines |= {_settings(item): points} if points else {}
    with plotting.figure(path) as (_, axes):
        axes.set_title("MoBA's validation loss minus dense, nats a token")
        axes.set_xlabel("million tokens of training", loc="left")
        _lines(axes, lines)
    return path


def heat(axes, table: list[list[float | None]], rows: list[str], columns: list[str], text: str, **options) -> None:
    """A heat map with its numbers; None stays empty."""
    cells = [[float("nan") if x is None else x for x in row] for row in table]
    axes.imshow(cells, aspect="auto", cmap="Blues", **options)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.grid(visible=False)
    middle = (options["vmin"] + options["vmax"]) / 2
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value is not None:
                axes.text(x, y, format(value, text), ha="center", va="center", fontsize=7,
                          color="white" if value > middle else LIGHT.ink)


def plot_retrieval(result: dict, path: Path) -> Path:
    """Copying by distance, a row a variant; recall by pairs and depth, a map a variant. Percent, means over seeds."""
    items = by_variant(result)

    def mean(item: dict, task: str, cell: str) -> float:
        return 100 * statistics.mean(last(run)[task][cell] for run in item["runs"])

    about = last(items[0]["runs"][0])
    pairs, depths = (list(dict.fromkeys(cell.split("@")[i] for cell in about["recall"])) for i in (0, 1))
    scale = {"vmin": 0, "vmax": 100}
    with plotting.figure(path, rows=1 + len(items), height=1.6 + 1.35 * len(items)) as (_, axes):
        heat(axes[0], [[mean(item, "copying", d) for d in about["copying"]] for item in items],
             [_narrow(item) for item in items], list(about["copying"]), ".0f", **scale)
        axes[0].set_title("Copied, %, by distance")
        for item, at in zip(items, axes[1:]):
            heat(at, [[mean(item, "recall", f"{n}@{depth}") for depth in depths] for n in pairs], pairs, depths, ".0f",
                 **scale)
            at.set_title(f"Recalled, %: {_label(item)}")
            at.set_ylabel("pairs")
        axes[-1].set_xlabel("depth of the list", loc="left")
    return path


def plot_untrained(result: dict, path: Path) -> Path:
    """What each chunk size and topk adds to the loss, a map a length."""
    rows = [row for row in _against_dense(result) if row["full"]]
    grid = {(row["tokens"], *row["variant"].split("-")[1:]): statistics.mean(row["losses"]) - statistics.mean(
        row["full"]["losses"]) for row in rows if row["variant"].count("-") == 2}
    lengths, chunks, topks = (sorted({int(key[i]) for key in grid}) for i in range(3))
    with plotting.figure(path, rows=len(lengths), height=0.6 + 1.6 * len(lengths), squeeze=False) as (_, axes):
        for length, (at,) in zip(lengths, axes):
            heat(at, [[grid.get((length, str(chunk), str(topk))) for topk in topks] for chunk in chunks],
                 list(map(str, chunks)), list(map(str, topks)), "+.2f", vmin=0, vmax=max(grid.values()))
            at.set_title(f"Loss added without training, {plotting.short(length)} tokens")
            at.set_ylabel("chunk")
        at.set_xlabel("topk", loc="left")
    return path


PICTURES = {
    "scratch": lambda result, folder: [plot_positions(result, folder / "quality-positions.png"),
                                       plot_retrieval(result, folder / "quality-retrieval.png")],
    "untrained": lambda result, folder: [plot_untrained(result, folder / "quality-untrained.png")],
    "continued": lambda result, folder: [plot_recovery(result, folder / "quality-recovery.png"),
                                         plot_retrieval(result, folder / "quality-continued-retrieval.png")]}
