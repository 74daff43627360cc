"""The table of training under DeepSpeed beside plain torch (`benchmarks/compare_deepspeed.py`)."""
from __future__ import annotations

from moba_megatron import environment

from . import report

SETTINGS = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "rotary_base",
            "moba_chunk_size", "moba_topk", "global_batch_size", "train_iters", "lr", "lr_warmup_iters", "bf16")


def settings(args) -> dict:
    """What all rows of a result share, out of a run's arguments."""
    return {name: getattr(args, name) for name in SETTINGS}


def loss_difference(row: dict, plain: dict, steps: int | None = None) -> float:
    """Largest difference of the losses of two rows, in nats a token, over the first steps (or all)."""
    return max(abs(a["loss"] - b["loss"]) for a, b in list(zip(row["steps"], plain["steps"]))[:steps])


def table(result: dict) -> list[dict[str, str]]:
    """A training a line."""
    rows = [row for row in result["rows"] if row["status"] != "not run"]
    plain = {row["seq_length"]: row for row in rows if row["zero_stage"] is None and row["status"] == "ok"}
    lines = []
    for row in rows:
        line = {"ZeRO": "plain torch" if row["zero_stage"] is None else str(row["zero_stage"]),
                "a sequence on": "one rank" if row["method"] == "none" else f"all ranks, {row['method']}",
                "tokens": f"{row['seq_length']:,}", "ms/step": "", "p20-p80": "", "tokens/s": "", "peak GiB": "",
                "loss, step 1": "", "differs by": "", "in any step by": "", "grad norm, step 1": "",
                "note": "recomputed" if row["recompute"] else ""}
        if row["status"] == "ok":
            ms, first = row["ms"], row["steps"][0]
            line |= {"ms/step": report.number(ms["median"]), "tokens/s": f"{row['tokens_per_s']:,.0f}",
                     "p20-p80": f"{report.number(ms['p20'])}-{report.number(ms['p80'])}", "peak GiB": _memory(row),
                     "loss, step 1": f"{first['loss']:.4f}", "grad norm, step 1": f"{first['grad_norm']:.2f}"}
            if row["zero_stage"] is not None and row["seq_length"] in plain:
                line["differs by"] = f"{loss_difference(row, plain[row['seq_length']], 1):.1e}"
                line["in any step by"] = f"{loss_difference(row, plain[row['seq_length']]):.1e}"
        else:
            line["note"] = row["status"]
        lines.append(line)
    return [{name: line[name] for name in line if any(other[name] for other in lines)} for line in lines]


def _memory(row: dict) -> str:
    """The peak of rank 0 without what earlier rows left; with it, as a bound, where that is not known."""
    if row["peak_memory_gib"] is None:
        return ""
    before = row["memory_before_gib"]
    return f"< {row['peak_memory_gib']:.1f}" if before is None else f"{row['peak_memory_gib'] - before:.1f}"


def markdown(result: dict) -> str:
    """The table and, below it, what was measured where."""
    about, shared = result["environment"], result["settings"]
    rest = report.measured_and_rest(result["rows"])[1]
    return (f"{report.as_markdown(table(result))}\n\n{shared['num_layers']} layers, {shared['hidden_size']} wide, "
            f"{shared['num_attention_heads']} heads, {shared['num_query_groups']} kv groups, MoBA "
            f"({shared['moba_chunk_size']}, {shared['moba_topk']}) in every layer, bf16, "
            f"{shared['global_batch_size']} sequences a step, {about['ranks']} ranks, optimizer included. `differs "
            f"by`: the loss from plain torch's, in the first step and at most in {shared['train_iters']}, nats a "
            "token. Plain torch has all sequences on one GPU and an optimizer that is not fused: it is there for its "
            f"losses. `peak GiB`: rank 0, beyond what earlier rows left; `<`: with that.{rest} "
            f"{environment.line(about)}, DeepSpeed {about['deepspeed']}. Made by `{report.called(about)}`"
            f"{about.get('note', '')}.")
