"""The loss around a change of attention, beside a run without it that saw the same batches: dense_moba_dense.sh's end.

    python examples/megatron_lm/compare_switch.py runs/dense_moba_dense --switches 240 340

reads RUN/switched/log.jsonl and RUN/dense/log.jsonl, prints the table and writes RUN/switch.json.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from pretraining.monitor import read_log  # noqa: E402

WINDOW = 10


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


def main(argv=None) -> int:
    """0; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder with switched/log.jsonl and dense/log.jsonl")
    parser.add_argument("--switches", type=int, nargs="+", required=True, metavar="STEP", help="last step before each")
    args = parser.parse_args(argv)
    try:
        switched, dense = (read_log(args.run / name / "log.jsonl") for name in ("switched", "dense"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = compare(switched, dense, args.switches)
    print(f"{'':22}  {'steps':>9}  switched   dense  difference")
    for row in rows:
        print(f"{row['window']:22}  {row['first']:>4}-{row['last']:<4}  {row['switched']:8.4f}  {row['dense']:6.4f}  "
              f"{row['difference']:+10.4f}")
    validations = [{r["iteration"]: r["loss"] for r in run["validation"]} for run in (switched, dense)]
    for step in sorted(set(validations[0]) & set(validations[1])):
        print(f"validation after step {step}: switched {validations[0][step]:.4f}, dense {validations[1][step]:.4f}")
    start = dense["start"][0]
    (args.run / "switch.json").write_text(json.dumps(
        {"switches": args.switches, "windows": rows, "validations": validations, "device": start["device"],
         "torch": start["torch"], "args": start["args"]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
