"""The loss around a change of attention, beside a run without it that saw the same batches: dense_moba_dense.sh's end.

    python -m benchmarks.compare_switch runs/dense_moba_dense --switches 240 340

reads RUN/switched/log.jsonl and RUN/dense/log.jsonl, prints the table and writes RUN/switch.json, on the machine that
trained.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch

from moba_megatron import environment

from . import ROOT, report

sys.path.insert(0, str(ROOT / "examples"))
from pretraining.monitor import read_log  # noqa: E402

WINDOW = 10
SETTINGS = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "seq_length",
            "global_batch_size", "train_iters", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "weight_decay",
            "bf16", "seed")


def windows(switches: list[int], last: int) -> list[tuple[str, int, int]]:
    """(what, first step, last step) of what is compared: just before and just after each switch, and the run's end."""
    found = []
    for number, step in enumerate(switches, 1):
        found.append((f"before switch {number}", step - WINDOW + 1, step))
        found.append((f"step after switch {number}", step + 1, step + 1))
        found.append((f"after switch {number}", step + 1, min(step + WINDOW, last)))
    return [*found, ("end", last - WINDOW + 1, last)]


def compare(switched: dict, dense: dict, switches: list[int]) -> list[dict]:
    """Mean losses of both runs in each window, nats a token."""
    losses = [{r["iteration"]: r["loss"] for r in run["step"]} for run in (switched, dense)]
    rows = []
    for what, first, last in windows(switches, max(losses[0])):
        ours, theirs = (statistics.mean(run[i] for i in range(first, last + 1)) for run in losses)
        rows.append({"window": what, "first": first, "last": last, "switched": ours, "dense": theirs,
                     "difference": ours - theirs})
    return rows


def result_of(switched: dict, dense: dict, switches: list[int], command: str) -> dict:
    """Everything that is kept of the two runs: where and by what they were made, what they were, what they lost."""
    start = dense["start"][0]
    moba = next(run["args"] for run in switched["start"] if run["args"]["attention"] == "moba")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment.describe(device) | {"device": start["device"], "torch": start["torch"], "command": command}
    return {"environment": about,
            "settings": {name: start["args"][name] for name in SETTINGS} | {
                "chunk_size": moba["moba_chunk_size"], "topk": moba["moba_topk"]},
            "switches": switches, "windows": compare(switched, dense, switches),
            "validations": {name: {r["iteration"]: r["loss"] for r in run["validation"]}
                            for name, run in (("switched", switched), ("dense", dense))}}


def main(argv=None) -> int:
    """0; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder with switched/log.jsonl and dense/log.jsonl")
    parser.add_argument("--switches", type=int, nargs="+", required=True, metavar="STEP", help="last step before each")
    parser.add_argument("--command", default=environment.command(),
                        help="what made the runs, for the result")
    args = parser.parse_args(argv)
    try:
        switched, dense = (read_log(args.run / name / "log.jsonl") for name in ("switched", "dense"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = result_of(switched, dense, args.switches, args.command)
    print(f"{'':22}  {'steps':>9}  switched   dense  difference")
    for row in result["windows"]:
        print(f"{row['window']:22}  {row['first']:>4}-{row['last']:<4}  {row['switched']:8.4f}  {row['dense']:6.4f}  "
              f"{row['difference']:+10.4f}")
    ours, theirs = result["validations"].values()
    for step in sorted(set(ours) & set(theirs)):
        print(f"validation after step {step}: switched {ours[step]:.4f}, dense {theirs[step]:.4f}")
    report.save(args.run / "switch.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
