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


def _with_plain(result: dict) -> list[dict]:
    """The rows but those not run; those of DeepSpeed with plain torch's at their length."""
    rows = [row for row in result["rows"] if row["status"] != "not run"]
    plain = {row["seq_length"]: row for row in rows if row["zero_stage"] is None and row["status"] == "ok"}
    return [row if row["zero_stage"] is None else row | {"plain": plain.get(row["seq_length"])} for row in rows]


def _difference(steps: int | None) -> report.Cell:
    return lambda row: f"{loss_difference(row, row['plain'], steps):.1e}" if row.get("plain") else ""


def _memory(row: dict) -> str:
    """The peak of rank 0 without what earlier rows left; with it, as a bound, where that is not known."""
    if row["peak_memory_gib"] is None:
        return ""
    before = row["memory_before_gib"]
    return f"< {row['peak_memory_gib']:.1f}" if before is None else f"{row['peak_memory_gib'] - before:.1f}"


def below(result: dict) -> str:
    """What was measured where."""
    about, shared = result["environment"], result["settings"]
    return (f"{shared['num_layers']} layers, {shared['hidden_size']} wide, {shared['num_attention_heads']} heads, "
            f"{shared['num_query_groups']} kv groups, MoBA ({shared['moba_chunk_size']}, {shared['moba_topk']}) in "
            f"every layer, bf16, {shared['global_batch_size']} sequences a step, {about['ranks']} ranks, optimizer "
            "included. `differs by`: the loss from plain torch's, in the first step and at most in "
            f"{shared['train_iters']}, nats a token. Plain torch has all sequences on one GPU and an optimizer that is "
            "not fused: it is there for its "
            f"losses. `peak GiB`: rank 0, beyond what earlier rows left; `<`: with that.{report.not_run(result)} "
            f"{environment.line(about)}, DeepSpeed {about['deepspeed']}. Made by `{report.called(about)}`"
            f"{about.get('note', '')}.")


_ROW = {"ZeRO": lambda row: "plain torch" if row["zero_stage"] is None else str(row["zero_stage"]),
        "a sequence on": lambda row: "one rank" if row["method"] == "none" else f"all ranks, {row['method']}",
        "tokens": lambda row: f"{row['seq_length']:,}"}
TABLE = report.Table(
    {**_ROW, "ms/step": report.median("ms"), "p20-p80": report.spread("ms"),
     "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}", "peak GiB": _memory,
     "loss, step 1": lambda row: f"{row['steps'][0]['loss']:.4f}", "differs by": _difference(1),
     "in any step by": _difference(None), "grad norm, step 1": lambda row: f"{row['steps'][0]['grad_norm']:.2f}",
     "note": lambda row: "recomputed" if row["recompute"] else ""},
    _with_plain, _ROW | {"note": report.same("status")}, below)
"""A training a line."""
