"""Trains one GPT with MoBA by plain torch and by DeepSpeed on the same tokens: each one's losses, speed and memory.

    python examples/prepare_data.py --input *.py --output-prefix runs/data/python
    torchrun --nproc-per-node 2 -m benchmarks.compare_deepspeed --data-path runs/data/python --json deepspeed.json

Rows: ZeRO 1 to 3, each with a sequence a rank, or with every sequence over all ranks by Ulysses or zigzag; as many
sequences a step as ranks. Plain torch trains on all of them on each GPU by itself, in bf16 with fp32 weights beside, as
ZeRO keeps them: there for its losses (its optimizer is not fused). One process a GPU; without GPUs a toy model on gloo.
The file is written anew after each row.
"""
from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from moba_megatron import environment
from moba_megatron.deepspeed import SequenceParallel, init_distributed

from . import ROOT, report, timing, zero

sys.path.insert(0, str(ROOT / "examples"))
import pretrain_deepspeed as job
from pretraining import data

LENGTH, TOY_LENGTH = 32768, 512
MODEL = ["--num-layers", "24", "--hidden-size", "1024", "--num-attention-heads", "8", "--num-query-groups", "2",
         "--ffn-hidden-size", "2816", "--rotary-base", "500000", "--moba-chunk-size", "512", "--moba-topk", "8"]
TOY = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--num-query-groups", "2",
       "--moba-chunk-size", "32", "--moba-topk", "3"]
TRAINING = ["--train-iters", "6", "--lr", "3e-4", "--lr-warmup-iters", "2", "--bf16", "--log-interval", "1",
            "--split", "1,0,0"]
WARMUP = 2
"""Steps that no time is taken of."""


@dataclass(frozen=True)
class Row:
    """One training: by plain torch (stage None) or DeepSpeed, at a multiple of the basic sequence length."""

    zero_stage: int | None
    method: str
    lengths: int = 1
    recompute: bool = False

    def name(self, length: int) -> str:
        by = "torch" if self.zero_stage is None else f"zero{self.zero_stage}"
        return f"{by}/{self.method}/{self.lengths * length}" + ("/recompute" if self.recompute else "")


ROWS = (Row(None, "none"), Row(1, "none"), Row(3, "zigzag"), Row(2, "ulysses"), Row(1, "zigzag"), Row(3, "ulysses"),
        Row(2, "none"), Row(1, "zigzag", 2), Row(1, "ulysses", 2), Row(3, "none"), Row(2, "zigzag"), Row(1, "ulysses"),
        Row(3, "zigzag", 2, True), Row(1, "none", 2, True))


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="data from examples/prepare_data.py")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the result goes")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after so many")
    return parser.parse_args(argv)


def settings_of(row: Row, data_path: str, ranks: int, toy: bool) -> argparse.Namespace:
    """A row as arguments of `pretrain_deepspeed.py`."""
    flags = [*(TOY if toy else MODEL), *TRAINING, "--data-path", data_path, "--global-batch-size", str(ranks),
             "--seq-length", str(row.lengths * (TOY_LENGTH if toy else LENGTH)),
             "--zero-stage", str(row.zero_stage or 1)]
    if row.method != "none":
        flags += ["--sequence-parallel", row.method, "--sequence-parallel-size", str(ranks)]
    return job.parse_args(flags + ["--activation-checkpointing"] * row.recompute)


def train_plainly(args, device: torch.device) -> list[dict]:
    """The steps by torch alone, every rank for itself: loss, gradient norm, seconds of each."""
    dataset, vocab_size = _text(args)
    torch.manual_seed(args.seed)
    model = job.build_model(args, vocab_size).to(device, torch.bfloat16)
    masters = {p: p.detach().float() for p in model.parameters()}
    optimizer, schedule = job.optimizer_and_schedule(args, model, masters.get)
    args.data_parallel_size = 1
    batches = job.batches(args, dataset, SequenceParallel(), 0, device)
    steps = []
    for _ in range(args.train_iters):
        begin, total = time.perf_counter(), 0.0
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for _ in range(args.global_batch_size):
            batch = next(batches)
            loss = model(batch["tokens"], batch["position_ids"], batch["labels"]).mean() / args.global_batch_size
            loss.backward()
            total += loss.item()
            for weight, master in masters.items():
                master.grad += weight.grad
                weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), args.clip_grad)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for weight, master in masters.items():
                weight.copy_(master)
        steps.append({"loss": total, "grad_norm": norm.item(), "seconds": time.perf_counter() - begin})
    return steps


def train_under_deepspeed(args, device: torch.device) -> list[dict]:
    """The same by the example's own steps; ZeRO 3's weights are made whole, so that all rows begin with the same."""
    dataset, vocab_size = _text(args)
    parallel = SequenceParallel.over_ranks(args.sequence_parallel, args.sequence_parallel_size)
    engine = job.build_engine(args, vocab_size, parallel, device, in_parts=False)
    tokens = args.global_batch_size * args.seq_length
    steps = [{"loss": done["loss"], "grad_norm": done["grad_norm"], "seconds": tokens / done["tokens_per_second"]}
             for _, done in job.steps(args, engine, job.batches(args, dataset, parallel, 0, device), 0, device)]
    engine.destroy()
    return steps


def _text(args) -> tuple:
    blend, tokenizer = data.read_tokenizer(args.data_path)
    return data.build_datasets(args, blend, tokenizer)[0], tokenizer.vocab_size


def measure(row: Row, args, device: torch.device) -> dict:
    """What one training did; ``out of memory`` is equal on all ranks, which hold the same."""
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / report.GIB if cuda else None
    try:
        steps = (train_plainly if row.zero_stage is None else train_under_deepspeed)(args, device)
    except torch.OutOfMemoryError as error:
        return {"status": "out of memory", "reason": str(error)[:300]}
    times = [step["seconds"] for step in steps[WARMUP:]]
    return {"status": "ok", "steps": steps, "ms": timing.summary([1e3 * t for t in times]),
            "tokens_per_s": args.global_batch_size * args.seq_length / statistics.median(times),
            "memory_before_gib": before,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / report.GIB if cuda else None}


def compare(options: argparse.Namespace, device: torch.device) -> dict:
    """All rows, one after the other on all ranks; rank 0 prints each and writes the file."""
    ranks, toy, begin = dist.get_world_size(), device.type != "cuda", time.perf_counter()
    about = environment.describe(device) | {"deepspeed": deepspeed.__version__, "ranks": ranks, "command":
        environment.command(f"torchrun --nproc-per-node {ranks} -m benchmarks.compare_deepspeed")}
    result = {"environment": about, "settings": {}, "rows": []}
    for row in ROWS:
        name = row.name(TOY_LENGTH if toy else LENGTH)
        if options.rows and not any(part in name for part in options.rows):
            continue
        args = settings_of(row, options.data_path, ranks, toy)
        result["settings"] = zero.settings(args)
        late = torch.tensor(float(time.perf_counter() - begin > options.seconds), device=device)
        dist.all_reduce(late)
        done = {"status": "not run"} if late else measure(row, args, device)
        result["rows"].append({"name": name, **asdict(row), "seq_length": args.seq_length, **done})
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - begin:.0f} s: {name}: {done['status']}", flush=True)
            if options.json:
                report.save(options.json, result)
    return result


def main(argv=None) -> int:
    """0; 2 on bad input."""
    options = parse_args(argv)
    device = init_distributed()
    try:
        result = compare(options, device)
    except ValueError as error:
        job.abort(f"error: {error}", 2)
    if dist.get_rank() == 0:
        print(zero.TABLE.text(result))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
