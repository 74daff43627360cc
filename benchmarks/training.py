"""Tables of training runs: the 50M model's (`compare_50m.py`), and one whose attention changes on the way."""
from __future__ import annotations

import statistics
from collections import defaultdict

from moba_megatron import environment

from .report import as_markdown, called, made_by

A6000, A6000_GB = "NVIDIA RTX A6000", 48


def name_of(row: dict) -> str:
    """An attention's name in a table, with its dense kernel."""
    return f"{row['attention']} ({row['dense_kernel']})" if row.get("dense_kernel") else row["attention"]


def job_table(rows: list[dict]) -> list[dict[str, str]]:
    """Every run in a line: what `launch/smoke_a6000.sh` prints."""
    full = {(row["seq_length"], row["seed"]): row["step_ms"]["median"] for row in rows
            if row["attention"] == "full" and row["status"] == "ok"}
    lines = []
    for row in rows:
        line = {"attention": name_of(row), "sequence": f"{row['seq_length']:,}", "ms a step": "-", "tokens/s": "-",
                "1000 steps": "-", "against full": "", "peak GiB": "", "loss": "",
                "note": row["status"] if row["status"] == "absent" else row.get("reason", "")}
        if row["status"] == "ok":
            ms, dense = row["step_ms"]["median"], full.get((row["seq_length"], row["seed"]))
            line |= {"ms a step": f"{ms:.1f}", "tokens/s": f"{row['tokens_per_s']:,.0f}",
                     "1000 steps": f"{row['minutes_per_1000_steps']:.1f} min",
                     "against full": f"{dense / ms:.2f}x as fast" if dense else "",
                     "peak GiB": f"{row['peak_memory_gib']:.1f}" if row["peak_memory_gib"] else "",
                     "loss": f"{row['losses'][-1]:.3f} after {len(row['losses'])} steps"}
        lines.append(line)
    return lines


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


def speed_table(rows: list[dict]) -> list[dict[str, str]]:
    """An attention a line, ms per 65,536 tokens at each sequence length."""
    lengths = sorted({row["seq_length"] for row in rows})
    by_name: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in rows:
        by_name[name_of(row)][row["seq_length"]] = row
    longest = max((n for n in lengths if any(row["status"] == "ok" for row in rows if row["seq_length"] == n)),
                  default=None)
    lines = []
    for name, found in by_name.items():
        line = {"attention": name}
        for n in lengths:
            line[f"{n // 1024}K"] = _milliseconds(found.get(n))
        at = found.get(longest)
        ok = at is not None and at["status"] == "ok"
        line[f"tokens/s at {longest // 1024}K" if longest else "tokens/s"] = f"{at['tokens_per_s']:,.0f}" if ok else ""
        line["peak GiB"] = ", ".join(f"{row['peak_memory_gib']:.1f}" for n, row in sorted(found.items())
                                     if row["status"] == "ok" and row["peak_memory_gib"])
        lines.append(line)
    return lines


def _milliseconds(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['ms_per_65536_tokens']:.1f}" if row["status"] == "ok" else row["status"]


def learning_table(rows: list[dict]) -> list[dict[str, str]]:
    """An attention a line: validation losses at the end, over seeds, and the difference to full attention."""
    by_name: dict[str, dict[int, dict]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok":
            by_name[row["attention"]][row["seed"]] = row
    full = by_name.get("full", {})
    lines = []
    for name, runs in by_name.items():
        final = [run["validations"][-1] for run in runs.values()]
        any_run = next(iter(runs.values()))
        pairs = [run["validations"][-1]["loss"] - full[seed]["validations"][-1]["loss"]
                 for seed, run in runs.items() if seed in full]
        tail = [run["validations"][-1]["by_position"][-1][2] - full[seed]["validations"][-1]["by_position"][-1][2]
                for seed, run in runs.items() if seed in full]
        lines.append({
            "attention": name_of(any_run), "seeds": str(len(runs)),
            "tokens": f"{any_run['steps'] * any_run['tokens_per_step'] / 1e6:.0f}M",
            "validation loss": _spread([v["loss"] for v in final]),
            "last 1/16 of the sequence": _spread([v["by_position"][-1][2] for v in final]),
            "minus full": _spread(pairs, "+") if name != "full" else "",
            "minus full, last 1/16": _spread(tail, "+") if name != "full" else "",
        })
    return lines


def _spread(values: list[float], sign: str = "") -> str:
    """Mean and, from two values on, half of the range."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"


def _markdown(table, result: dict) -> str:
    about, row = result["environment"], result["rows"][0]
    return (f"{as_markdown(table(result['rows']))}\n\n{environment.line(about)}. Chunk {row['chunk_size']}, topk "
            f"{row['topk']}, {row['tokens_per_step']:,} tokens a step. {made_by(result)}")


def speed_markdown(result: dict) -> str:
    """The table of end-to-end times."""
    return _markdown(speed_table, result)


def learning_markdown(result: dict) -> str:
    """The table of final losses."""
    return _markdown(learning_table, result)


def smoke_markdown(result: dict) -> str:
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


def switch_table(result: dict) -> list[dict[str, str]]:
    """Losses around each change of attention, then the validations after the first one."""
    lines = []
    for row in result["windows"]:
        steps = f"{row['first']}-{row['last']}" if row["first"] < row["last"] else str(row["first"])
        lines.append(_switch_line(row["window"], steps, row["switched"], row["dense"]))
    ours, theirs = (result["validations"][name] for name in ("switched", "dense"))
    return lines + [_switch_line("validation", step, loss, theirs[step]) for step, loss in ours.items()
                    if int(step) > result["switches"][0]]


def _switch_line(what: str, steps: str, switched: float, dense: float) -> dict[str, str]:
    return {"loss": what, "steps": steps, "switched": f"{switched:.4f}", "dense throughout": f"{dense:.4f}",
            "difference": f"{switched - dense:+.4f}"}


def switch_markdown(result: dict) -> str:
    """The table of `examples/megatron_lm/dense_moba_dense.sh`, what it says, and where it was made."""
    about, shared = result["environment"], result["settings"]
    to_moba, back = result["switches"]
    differs = {row["window"]: f"{row['difference']:+.4f}" for row in result["windows"]}
    ours, theirs = (result["validations"][name] for name in ("switched", "dense"))
    largest = max(abs(loss - theirs[step]) for step, loss in ours.items())
    return (f"{as_markdown(switch_table(result))}\n\nNats a token, means over the steps. Dense to step {to_moba} (one "
            f"run, copied), MoBA ({shared['chunk_size']}, {shared['topk']}) to step {back}, dense again; both see the "
            "same batches. Against the dense run the loss is "
            f"{differs['step after switch 1']} in the first step with MoBA, {differs['after switch 1']} in the first "
            f"ten, {differs['step after switch 2']} in the first step back, {differs['end']} in the last ten; "
            f"validations differ by {largest:.4f} at most. {shared['num_layers']} layers, {shared['hidden_size']} "
            f"wide, {shared['global_batch_size']} sequences of {shared['seq_length']:,} a step, one seed. "
            f"{environment.line(about)}. Made by `{called(about)}`.")
