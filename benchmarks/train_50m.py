"""Trains a 50M-parameter byte-level GPT on one device, or goes on with a small pretrained model: any attention.

    python -m benchmarks.train_50m --attention moba --output runs/moba
    python -m benchmarks.train_50m --attention full --seq-length 32768 --tokens-per-step 65536 --output runs/full
    python -m benchmarks.train_50m --attention moba --pretrained model.gguf --lr 1e-4 --output runs/continued

The text is the Python source of this machine unless --text names files. Runs with the same seed, sequence length and
text see the same batches and start from the same weights, whatever they attend with. Without a GPU it trains a toy.
--output holds log.jsonl (a line a step) and summary.json; with --save-seconds also checkpoint.pt, from which the same
command goes on after a stop, with the bits that it would have had where the device's operations repeat theirs.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moba_megatron import environment
from moba_megatron.kernels import tuning

from . import cases
from .baselines import AbsentError
from .gpt_50m import attention as attentions
from .gpt_50m import pretrained, tasks, text
from .gpt_50m.loop import POSITION_BINS, Plan, Step, Trainer, timing
from .gpt_50m.model import GPT, TOY, Shape

MICRO_BATCH_TOKENS = 65_536
ABSENT = 3
"""Exit status where --attention needs a package that is not there."""
TOY_DEFAULTS = {"seq_length": 256, "tokens_per_step": 1024, "chunk_size": 32, "steps": 4, "eval_tokens": 1024,
                "corpus_bytes": 1_000_000}
DEFAULTS = {"seq_length": 8192, "tokens_per_step": 524_288, "chunk_size": 512, "steps": 1000, "eval_tokens": 2_097_152,
            "corpus_bytes": 400_000_000}
SAME = ("attention", "seq_length", "tokens_per_step", "micro_batch_tokens", "chunk_size", "topk", "steps", "lr", "seed",
        "full_attention_layers", "key_conv", "task_share", "rotary_base", "log_interval", "toy")
"""Arguments that a run which goes on must have been begun with."""


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
    add("--full-attention-layers", default="none", metavar="RULE", help="dense layers of moba: last:N, every:N, 1,2,24")
    add("--key-conv", type=int, default=0, help="taps of the key convolution in MoBA layers, 3 or 5; 0: none")
    add("--steps", type=int, help=f"({DEFAULTS['steps']})")
    add("--lr", type=float, default=1e-3, help="the peak, after a warm-up over 5%% of the steps (1e-3)")
    add("--seed", type=int, default=1, help="of the weights and of the batches' order")
    add("--pretrained", type=Path, metavar="GGUF", help="a model of Transformers' to go on with, and its tokenizer")
    add("--rotary-base", type=float, help="of the pretrained model, in place of its own")
    add("--generate", type=int, default=0, help="answers that the pretrained model generates at the end (0)")
    add("--task-share", type=float, default=0.0, help="share of the training sequences with a retrieval task (0)")
    add("--task-sequences", type=int, default=0, help="sequences of each retrieval test at the end; 0: no tests")
    add("--text", nargs="+", type=Path, metavar="FILE", help="texts, in this order; default: this machine's Python")
    add("--corpus", type=Path, help="prefix of the text's files, made once (default: in --output)")
    add("--corpus-bytes", type=int, help=f"most text that is read ({DEFAULTS['corpus_bytes']:,})")
    add("--eval-tokens", type=int, help=f"tokens of a validation; 0: none ({DEFAULTS['eval_tokens']:,})")
    add("--eval-interval", type=int, default=0, help="steps between validations, the first before any step; 0: only "
        "at the end")
    add("--save-seconds", type=float, default=0.0, help="save every so many seconds, and go on from it; 0: neither")
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
    if args.eval_interval % args.log_interval:
        raise ValueError(f"--eval-interval must be a multiple of --log-interval {args.log_interval}, got "
                         f"{args.eval_interval}")
    return Plan(args.steps, sequences, total // sequences, args.seq_length, args.lr, log_interval=args.log_interval)


def floor_ms(shape: Shape, args: argparse.Namespace) -> float:
    """ms of a step that the operations alone take on an H200: 6 a weight and token, and the attended keys."""

    def attended(chunk_size: int) -> float:
        return cases.flops(cases.Case("", args.seq_length, chunk_size, args.topk, shape.heads, shape.heads,
                                      shape.head_dim)) / args.seq_length

    weights = shape.layers * (4 * shape.width ** 2 + 2 * shape.width * shape.hidden) + shape.vocabulary * shape.width
    dense = attentions.dense_layers(args.attention, shape.layers, args.full_attention_layers)
    per_token = (6 * weights + sum(dense) * attended(args.seq_length)
                 + (shape.layers - sum(dense)) * attended(args.chunk_size))
    return 1e3 * per_token * args.tokens_per_step / cases.PEAK_FLOPS


@dataclass(frozen=True)
class Setup:
    """What is trained: a trainer, texts to train on and to validate with, retrieval tests, and what a summary says."""

    trainer: Trainer
    train: text.Windows | tasks.Mixed
    validation: text.Windows
    tasks: tasks.Tasks
    about: dict


def setup(args: argparse.Namespace, device: torch.device) -> Setup:
    """The model, its attention and its text, as the arguments say."""
    plan = plan_of(args)
    prefix = args.corpus or args.output / "text"
    torch.set_float32_matmul_precision("high")
    if args.pretrained:
        shape, model, attention, tokenizer = None, *pretrained.build(args, plan.seq_length, device)
        files = text.prepare(prefix, args.text, args.corpus_bytes, tokenizer.encode)
        retrieval = tokenizer.tasks(plan.seq_length)
    else:
        shape = TOY if args.toy else Shape()
        attention = attentions.build(args.attention, shape.layers, shape.head_dim, args.chunk_size, args.topk, device,
                                     args.full_attention_layers, args.key_conv)
        files = text.prepare(prefix, args.text, args.corpus_bytes)
        torch.manual_seed(args.seed)
        model = GPT(shape, attention, plan.seq_length).to(device)
        retrieval = tasks.Tasks.of_bytes(plan.seq_length)
        if device.type == "cuda" and not args.no_compile:
            model.compile_parts(attention.traceable)
    train, validation = (text.Windows(path, plan.seq_length, device, seed, bool(args.pretrained))
                         for path, seed in zip(files, (args.seed, None)))
    about = {
        **{name: getattr(args, name) for name in SAME}, "dense_kernel": attention.dense_label,
        "pretrained": args.pretrained and args.pretrained.name,
        "micro_batch_tokens": plan.sequences * plan.seq_length, "tokens_per_step": plan.tokens_per_step,
        "parameters": sum(p.numel() for p in model.parameters()), "text_bytes": train.text.numel(),
        "text": json.loads(prefix.with_name(prefix.name + ".json").read_text()),
        "tuning_arch": tuning.arch_of(device) if device.type == "cuda" else None,
        "floor_ms": None if args.toy or shape is None else floor_ms(shape, args),
        "memory_limit_gb": args.memory_limit_gb, "task_sequences": args.task_sequences,
    }
    if args.task_share:
        train = tasks.Mixed(train, retrieval, args.task_share, args.seed)
    return Setup(Trainer(model, attention, plan, device), train, validation, retrieval, about)


def run(args: argparse.Namespace) -> dict:
    """Trains as the arguments say and returns the summary, which is also in --output."""
    begin = saved_at = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and args.memory_limit_gb:
        share = args.memory_limit_gb * 1e9 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), torch.cuda.current_device())
    found = setup(args, device)
    trainer, plan = found.trainer, found.trainer.plan
    args.output.mkdir(parents=True, exist_ok=True)
    summary = found.about | {"environment": environment.describe(device)}
    checkpoint, records = args.output / "checkpoint.pt", [{"kind": "start", **summary}]
    if args.save_seconds and checkpoint.is_file():
        records = go_on(trainer, checkpoint, found.about)

    with open(args.output / "log.jsonl", "w", encoding="utf-8") as log:
        log.writelines(json.dumps(record) + "\n" for record in records)

        def record(kind: str, values: dict) -> None:
            records.append({"kind": kind, **values})
            log.write(json.dumps(records[-1]) + "\n")
            log.flush()

        def validate(step: int, task_sequences: int) -> None:
            if args.eval_tokens:
                values = {"step": step, **trainer.validate(found.validation, args.eval_tokens // plan.seq_length)}
                if args.task_sequences:
                    values |= tasks.evaluate(found.tasks, found.validation, trainer.predict, plan.sequences,
                                             task_sequences)
                record("validation", values)

        first = sum(each["kind"] == "step" for each in records)
        if args.eval_interval and not first:
            validate(0, 1)
        for step in trainer.train(found.train, lambda: time.perf_counter() - begin > 60 * args.minutes, first):
            record("step", vars(step))
            if step.step % plan.log_interval == 0 or step.step == plan.steps:
                print(f"step {step.step}/{plan.steps} | loss {step.loss:.4f} | {step.ms:.1f} ms | "
                      f"{1e3 * plan.tokens_per_step / step.ms:,.0f} tokens/s", flush=True)
                if args.eval_interval and step.step % args.eval_interval == 0 and step.step < plan.steps:
                    validate(step.step, 1)
                late = time.perf_counter() - saved_at > args.save_seconds or step.step == plan.steps
                if args.save_seconds and late:
                    trainer.save(checkpoint, records=json.dumps(records))
                    saved_at = time.perf_counter()
        steps = [Step(**{name: each[name] for name in Step.__dataclass_fields__}) for each in records
                 if each["kind"] == "step"]
        if steps[-1].step == plan.steps or not args.save_seconds:
            validate(steps[-1].step, args.task_sequences)
        else:
            trainer.save(checkpoint, records=json.dumps(records))
    validations = [{k: v for k, v in each.items() if k != "kind"} for each in records if each["kind"] == "validation"]
    summary |= results(summary, steps, validations, device)
    if args.pretrained and args.generate and summary["status"] == "ok":
        summary["generation"] = pretrained.generation(trainer.model, args, found.tasks, found.validation, device)
    summary["wall_s"] = time.perf_counter() - begin
    (args.output / "summary.json").write_text(json.dumps(summary) + "\n", encoding="utf-8")
    return summary


def go_on(trainer: Trainer, checkpoint: Path, about: dict) -> list[dict]:
    """Restores the trainer and returns the records so far.

    Raises:
        ValueError: the run was begun with other arguments, or another text.
    """
    saved = torch.load(checkpoint, map_location=trainer.device, weights_only=True)
    records = json.loads(saved["records"])
    start = records[0]
    for name in (*SAME, "pretrained", "text"):
        if start[name] != about[name]:
            raise ValueError(f"--{name.replace('_', '-')} must be {start[name]!r}, with which the run in "
                             f"{checkpoint.parent.name} began, got {about[name]!r}: another --output begins anew")
    trainer.restore(saved)
    return records


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
