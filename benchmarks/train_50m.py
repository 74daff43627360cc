"""Trains a 50M-parameter byte-level GPT on one device: plain torch, real text, any attention.

    python -m benchmarks.train_50m --attention moba --output runs/moba
    python -m benchmarks.train_50m --attention full --seq-length 32768 --tokens-per-step 65536 --output runs/full

The text is the Python source of this machine unless --text names files. Runs with the same seed, sequence length and
text see the same batches and start from the same weights, whatever they attend with. Without a GPU it trains a toy.
--output holds log.jsonl (a line a step) and summary.json.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from moba_megatron import environment
from moba_megatron.kernels import tuning

from . import cases
from .baselines import AbsentError
from .gpt_50m import attention as attentions
from .gpt_50m import text
from .gpt_50m.loop import POSITION_BINS, Plan, Trainer, timing
from .gpt_50m.model import GPT, TOY, Shape

MICRO_BATCH_TOKENS = 65_536
ABSENT = 3
"""Exit status where --attention needs a package that is not there."""
TOY_DEFAULTS = {"seq_length": 256, "tokens_per_step": 1024, "chunk_size": 32, "steps": 4, "eval_tokens": 1024,
                "corpus_bytes": 1_000_000}
DEFAULTS = {"seq_length": 8192, "tokens_per_step": 524_288, "chunk_size": 512, "steps": 1000, "eval_tokens": 2_097_152,
            "corpus_bytes": 400_000_000}


def parse_args(argv=None) -> argparse.Namespace:
    """The command line; what depends on the machine is filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--attention", default="moba", choices=attentions.names(), help="full: cuDNN where it runs, else flash "
        "attention 2; hybrid: MoBA but for the last 3 layers; others need their package")
    add("--seq-length", type=int, help=f"tokens of a sequence ({DEFAULTS['seq_length']})")
    add("--tokens-per-step", type=int, help=f"at least a sequence ({DEFAULTS['tokens_per_step']:,})")
    add("--micro-batch-tokens", type=int, default=MICRO_BATCH_TOKENS,
        help=f"tokens run at once, at least a sequence ({MICRO_BATCH_TOKENS:,})")
    add("--chunk-size", type=int, help=f"keys in a chunk ({DEFAULTS['chunk_size']})")
    add("--topk", type=int, default=3, help="chunks a query attends to, its own included (3)")
    add("--steps", type=int, help=f"({DEFAULTS['steps']})")
    add("--lr", type=float, default=1e-3, help="the peak, after a warm-up over 5%% of the steps (1e-3)")
    add("--seed", type=int, default=1, help="of the weights and of the batches' order")
    add("--text", nargs="+", type=Path, metavar="FILE", help="texts, in this order; default: this machine's Python")
    add("--corpus", type=Path, help="prefix of the text's files, made once (default: in --output)")
    add("--corpus-bytes", type=int, help=f"most text that is read ({DEFAULTS['corpus_bytes']:,})")
    add("--eval-tokens", type=int, help=f"tokens of a validation; 0: none ({DEFAULTS['eval_tokens']:,})")
    add("--eval-interval", type=int, default=0, help="steps between validations; 0: only at the end")
    add("--log-interval", type=int, default=10)
    add("--minutes", type=float, default=float("inf"), help="stop after so long, at the end of a log interval")
    add("--memory-limit-gb", type=float, help="let torch have so much of the GPU's memory, in 10^9 bytes")
    add("--no-compile", action="store_true", help="do not compile the blocks")
    add("--toy", action="store_true", help="a toy model and little text, as without a GPU")
    add("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    args.toy = args.toy or not torch.cuda.is_available()
    for name, value in (TOY_DEFAULTS if args.toy else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    """How many sequences and micro batches make a step.

    Raises:
        ValueError: the sizes do not divide.
    """
    if args.seq_length % POSITION_BINS or args.seq_length < 1:
        raise ValueError(f"--seq-length must be a positive multiple of {POSITION_BINS}, got {args.seq_length}")
    total = max(1, args.tokens_per_step // args.seq_length)
    sequences = max(1, min(total, args.micro_batch_tokens // args.seq_length))
    if total % sequences or args.tokens_per_step > total * args.seq_length:
        raise ValueError(f"--tokens-per-step must be a multiple of a micro batch's {sequences * args.seq_length} "
                         f"tokens, got {args.tokens_per_step}")
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    return Plan(args.steps, sequences, total // sequences, args.seq_length, args.lr, log_interval=args.log_interval)


def floor_ms(shape: Shape, args: argparse.Namespace) -> float:
    """ms of a step that the operations alone take on an H200: 6 a weight and token, and the attended keys."""

    def attended(chunk_size: int) -> float:
        return cases.flops(cases.Case("", args.seq_length, chunk_size, args.topk, shape.heads, shape.heads,
                                      shape.head_dim)) / args.seq_length

    weights = shape.layers * (4 * shape.width ** 2 + 2 * shape.width * shape.hidden) + shape.vocabulary * shape.width
    dense = attentions.dense_layers(args.attention, shape.layers)
    per_token = (6 * weights + sum(dense) * attended(args.seq_length)
                 + (shape.layers - sum(dense)) * attended(args.chunk_size))
    return 1e3 * per_token * args.tokens_per_step / cases.PEAK_FLOPS


def run(args: argparse.Namespace) -> dict:
    """Trains as the arguments say and returns the summary, which is also in --output."""
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan, shape = plan_of(args), TOY if args.toy else Shape()
    if device.type == "cuda" and args.memory_limit_gb:
        share = args.memory_limit_gb * 1e9 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), torch.cuda.current_device())
    attention = attentions.build(args.attention, shape.layers, shape.head_dim, args.chunk_size, args.topk, device)
    files = text.prepare(args.corpus or args.output / "text", args.text, args.corpus_bytes)
    train, validation = (text.Windows(path, plan.seq_length, device, seed)
                         for path, seed in zip(files, (args.seed, None)))
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = GPT(shape, attention, plan.seq_length).to(device)
    if device.type == "cuda" and not args.no_compile:
        model.compile_parts(attention.traceable)
    trainer = Trainer(model, attention, plan, device)
    summary = {
        "attention": args.attention, "dense_kernel": attention.dense_label, "seq_length": plan.seq_length,
        "chunk_size": args.chunk_size, "topk": args.topk, "seed": args.seed, "toy": args.toy, "steps": plan.steps,
        "tokens_per_step": plan.tokens_per_step, "micro_batch_tokens": plan.sequences * plan.seq_length,
        "parameters": sum(p.numel() for p in model.parameters()), "text_bytes": train.text.numel(),
        "tuning_arch": tuning.arch_of(device) if device.type == "cuda" else None,
        "floor_ms": None if args.toy else floor_ms(shape, args), "memory_limit_gb": args.memory_limit_gb,
        "environment": environment.describe(device),
    }
    steps, validations = [], []
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "log.jsonl", "w", encoding="utf-8") as log:

        def record(kind: str, values: dict) -> None:
            log.write(json.dumps({"kind": kind, **values}) + "\n")
            log.flush()

        record("start", summary)

        def validate(step: int) -> None:
            if args.eval_tokens:
                validations.append({"step": step, **trainer.validate(validation, args.eval_tokens // plan.seq_length)})
                record("validation", validations[-1])

        for step in trainer.train(train, lambda: time.perf_counter() - begin > 60 * args.minutes):
            steps.append(step)
            record("step", vars(step))
            if step.step % plan.log_interval == 0 or step.step == plan.steps:
                print(f"step {step.step}/{plan.steps} | loss {step.loss:.4f} | {step.ms:.1f} ms | "
                      f"{1e3 * plan.tokens_per_step / step.ms:,.0f} tokens/s", flush=True)
            if args.eval_interval and step.step % args.eval_interval == 0 and step.step < plan.steps:
                validate(step.step)
        validate(steps[-1].step)
    summary |= results(summary, steps, validations, device)
    summary["wall_s"] = time.perf_counter() - begin
    (args.output / "summary.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    return summary


def results(summary: dict, steps: list, validations: list[dict], device: torch.device) -> dict:
    """Times, memory, losses and validations of a run that ended."""
    times = timing(steps)
    per_token = times["median"] / summary["tokens_per_step"]
    return {
        "status": "ok" if steps[-1].step == summary["steps"] else "stopped",
        "first_step_ms": steps[0].ms, "step_ms": times, "ms_per_65536_tokens": per_token * 65_536,
        "tokens_per_s": 1e3 / per_token,
        "minutes_per_1000_steps": times["median"] / 60,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2 ** 30 if device.type == "cuda" else None,
        "losses": [round(step.loss, 5) for step in steps], "validations": validations,
    }


def main(argv=None) -> int:
    """0 after a run, 2 with a message on bad input, 3 where the attention's package is absent."""
    args = parse_args(argv)
    try:
        summary = run(args)
    except AbsentError as error:
        print(f"absent: {error}", file=sys.stderr)
        return ABSENT
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{summary['attention']}: {summary['step_ms']['median']:.1f} ms a step of {summary['tokens_per_step']:,} "
          f"tokens, {summary['tokens_per_s']:,.0f} tokens/s, training loss {summary['losses'][-1]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
