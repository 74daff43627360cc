"""Tables of training runs: the 50M model's (`compare_50m.py`), and one whose attention changes on the way."""
from __future__ import annotations

import statistics
from collections import defaultdict

from moba_megatron import environment

from .report import Cell, Columns, Table, called, dash, made_by, same

A6000, A6000_GB = "NVIDIA RTX A6000", 48


def name_of(row: dict) -> str:
    """An attention's name in a table, with its dense kernel."""
    return f"{row['attention']} ({row['dense_kernel']})" if row.get("dense_kernel") else row["attention"]


def _against_full(result: dict) -> list[dict]:
    """The rows, each with full attention's ms at its length and seed."""
    full = {(row["seq_length"], row["seed"]): row["step_ms"]["median"] for row in result["rows"]
            if row["attention"] == "full" and row["status"] == "ok"}
    return [row | {"full_ms": full.get((row["seq_length"], row["seed"]))} for row in result["rows"]]


_RUN = {"attention": name_of, "sequence": lambda row: f"{row['seq_length']:,}"}
JOBS = Table(
    {**_RUN, "ms a step": lambda row: f"{row['step_ms']['median']:.1f}",
     "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
     "1000 steps": lambda row: f"{row['minutes_per_1000_steps']:.1f} min",
     "against full": lambda row: f"{row['full_ms'] / row['step_ms']['median']:.2f}x as fast" if row["full_ms"] else "",
     "peak GiB": lambda row: f"{row['peak_memory_gib']:.1f}" if row["peak_memory_gib"] else "",
     "loss": lambda row: f"{row['losses'][-1]:.3f} after {len(row['losses'])} steps", "note": same("reason")},
    _against_full,
    _RUN | dict.fromkeys(("ms a step", "tokens/s", "1000 steps"), dash) | {
        "note": lambda row: row["status"] if row["status"] == "absent" else row.get("reason", "")}, keep_empty=True)
"""Every run in a line: what `launch/smoke_a6000.sh` prints."""


def beside_a6000(result: dict) -> str:
    """Which card ran, what differs from an RTX A6000, and what is published for that one."""
    about = result["environment"]
    rows = [row for row in result["rows"] if row["status"] == "ok"]
    if not rows:
        said = "No run ended well, so nothing is known of this machine."
    elif about.get("capability") is None:
        said = "No GPU: a toy model on the CPU, whose times mean nothing."
    elif A6000 in about["device"]:
        said = f"This is an {A6000}."
    else:
        said = (f"This is an {about['device']} (compute capability {about['capability']}, {about['device_memory_gib']} "
                f"GiB), not an {A6000} (8.6, {A6000_GB} GB), which is slower: the times above are not that card's.")
    if rows and about.get("capability"):
        limit = rows[0]["memory_limit_gb"]
        said += (f"\nLaunch configurations of {rows[0]['tuning_arch']}; "
                 f"{f'torch may have {limit:g} GB' if limit else 'no limit on memory'}; dense layers by "
                 f"{', '.join(sorted({row['dense_kernel'] for row in rows if row['dense_kernel']})) or 'nothing'}.")
    return said + (f"\nPublished for an {A6000}, 1000 steps (Triton-MoBA's README, its sequence length is not given): "
                   "original MoBA about 85 min, Triton-MoBA about 30, flash attention about 13.")


def _by_name(result: dict) -> list[dict]:
    """An item an attention: its name and its rows by sequence length."""
    found: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in result["rows"]:
        found[name_of(row)][row["seq_length"]] = row
    return [{"name": name, "rows": rows} for name, rows in found.items()]


def _speed_columns(result: dict) -> Columns:
    """ms per 65,536 tokens at each sequence length; tokens/s at the longest that was measured."""
    lengths = sorted({row["seq_length"] for row in result["rows"]})
    longest = max((row["seq_length"] for row in result["rows"] if row["status"] == "ok"), default=None)

    def at(n: int) -> Cell:
        return lambda item: _milliseconds(item["rows"].get(n))

    def tokens_per_s(item: dict) -> str:
        row = item["rows"].get(longest, {"status": "absent"})
        return f"{row['tokens_per_s']:,.0f}" if row["status"] == "ok" else ""

    def peak(item: dict) -> str:
        return ", ".join(f"{row['peak_memory_gib']:.1f}" for _, row in sorted(item["rows"].items())
                         if row["status"] == "ok" and row["peak_memory_gib"])

    return {"attention": same("name"), **{f"{n // 1024}K": at(n) for n in lengths},
            f"tokens/s at {longest // 1024}K" if longest else "tokens/s": tokens_per_s, "peak GiB": peak}


def _milliseconds(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['ms_per_65536_tokens']:.1f}" if row["status"] == "ok" else row["status"]


def _by_attention(result: dict) -> list[dict]:
    """An item an attention: its runs, the last validation of each, and full attention's at the same seeds."""
    found: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in result["rows"]:
        if row["status"] == "ok":
            found[row["attention"]][row["seed"]] = row

    def last(run: dict) -> tuple[float, float]:
        final = run["validations"][-1]
        return final["loss"], final["by_position"][-1][2]

    full = {seed: last(run) for seed, run in found.get("full", {}).items()}
    return [{"name": name, "runs": list(runs.values()), "last": [last(run) for run in runs.values()],
             "pairs": [(last(run), full[seed]) for seed, run in runs.items() if seed in full and name != "full"]}
            for name, runs in found.items()]


def _tokens(item: dict) -> str:
    run = item["runs"][0]
    return f"{run['steps'] * run['tokens_per_step'] / 1e6:.0f}M"


def _minus_full(which: int) -> Cell:
    return lambda item: _spread([ours[which] - full[which] for ours, full in item["pairs"]], "+")


def _spread(values: list[float], sign: str = "") -> str:
    """Mean and, from two values on, half of the range."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"


def _below(result: dict) -> str:
    about, row = result["environment"], result["rows"][0]
    return (f"{environment.line(about)}. Chunk {row['chunk_size']}, topk {row['topk']}, {row['tokens_per_step']:,} "
            f"tokens a step. {made_by(result)}")


SPEED = Table(_speed_columns, _by_name, below=_below, keep_empty=True)
"""End-to-end times, an attention a line."""
LEARNING = Table({
    "attention": lambda item: name_of(item["runs"][0]), "seeds": lambda item: str(len(item["runs"])), "tokens": _tokens,
    "validation loss": lambda item: _spread([loss for loss, _ in item["last"]]),
    "last 1/16 of the sequence": lambda item: _spread([tail for _, tail in item["last"]]),
    "minus full": _minus_full(0), "minus full, last 1/16": _minus_full(1)},
    _by_attention, below=_below, keep_empty=True)
"""Validation losses at the end over seeds, and their difference to full attention's, an attention a line."""


def smoke_text(result: dict) -> str:
    """What the page says of `launch/smoke_a6000.sh`: sentences, no table, for they are two rows."""
    about, rows = result["environment"], result["rows"]
    done = [row for row in rows if row["status"] == "ok"]
    times = " and ".join(f"{row['step_ms']['median']:.0f} ms with {name_of(row)} ({row['ms_per_65536_tokens']:.1f} ms "
                         f"per 65,536 tokens, {row['minutes_per_1000_steps']:.1f} min projected for 1000 steps, "
                         f"{row['peak_memory_gib']:.1f} GiB at most)" for row in done)
    rest = "; ".join(f"{name_of(row)} ({row['reason']})" for row in rows if row["status"] != "ok")
    return (f"Within {done[0]['memory_limit_gb']:g} GB and with the launch configurations of {done[0]['tuning_arch']} "
            f"(`LIMIT=1`), but on an {about['device'].removeprefix('NVIDIA ')}, a step of "
            f"{done[0]['tokens_per_step']:,} tokens in sequences of {done[0]['seq_length']:,} took {times}."
            f"{f' Not measured: {rest}.' if rest else ''} {environment.line(about)}. Made by `{called(about)}`.")


def _windows(result: dict) -> list[dict]:
    """Losses around each change of attention, then the validations after the first one."""
    ours, theirs = (result["validations"][name] for name in ("switched", "dense"))
    return result["windows"] + [
        {"window": "validation", "first": int(step), "last": int(step), "switched": loss, "dense": theirs[step]}
        for step, loss in ours.items() if int(step) > result["switches"][0]]


def _switch_below(result: dict) -> str:
    """What the table of `examples/megatron_lm/dense_moba_dense.sh` says, and where it was made."""
    about, shared = result["environment"], result["settings"]
    to_moba, back = result["switches"]
    differs = {row["window"]: f"{row['difference']:+.4f}" for row in result["windows"]}
    ours, theirs = (result["validations"][name] for name in ("switched", "dense"))
    largest = max(abs(loss - theirs[step]) for step, loss in ours.items())
    return (f"Nats a token, means over the steps. Dense to step {to_moba} (one run, copied), MoBA "
            f"({shared['chunk_size']}, {shared['topk']}) to step {back}, dense again; both see the same batches. "
            f"Against the dense run the loss is {differs['step after switch 1']} in the first step with MoBA, "
            f"{differs['after switch 1']} in the first ten, {differs['step after switch 2']} in the first step back, "
            f"{differs['end']} in the last ten; validations differ by {largest:.4f} at most. {shared['num_layers']} "
            f"layers, {shared['hidden_size']} wide, {shared['global_batch_size']} sequences of "
            f"{shared['seq_length']:,} a step, one seed. {environment.line(about)}. Made by `{called(about)}`.")


SWITCH = Table({
    "loss": same("window"),
    "steps": lambda row: f"{row['first']}-{row['last']}" if row["first"] < row["last"] else str(row["first"]),
    "switched": lambda row: f"{row['switched']:.4f}", "dense throughout": lambda row: f"{row['dense']:.4f}",
    "difference": lambda row: f"{row['switched'] - row['dense']:+.4f}"}, _windows, below=_switch_below)
