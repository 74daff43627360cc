"""Pretrains a GPT with MoBA under DeepSpeed: ZeRO 0 to 3, Ulysses or context parallelism, started by plain torchrun.

    python examples/prepare_data.py --plays --output-prefix runs/data/plays
    torchrun --nproc-per-node 2 examples/pretrain_deepspeed.py --zero-stage 3 --num-layers 4 --hidden-size 128 \\
        --num-attention-heads 4 --num-query-groups 2 --seq-length 1024 --sequence-parallel ulysses \\
        --sequence-parallel-size 2 --train-iters 100 --lr 3e-3 --data-path runs/data/plays \\
        --moba-chunk-size 64 --moba-topk 3 --moba-full-attention-layers last:1

The deepspeed launcher starts it as well. It reads the data files of `pretrain_gpt.py` and writes its logs; with a GPU
it runs on NCCL, without one on gloo. A checkpoint that DeepSpeed's converter made universal resumes on any number of
ranks, at ZeRO 1 and 2 from either, at ZeRO 3 from ZeRO 3:

    python -m deepspeed.checkpoint.ds_to_universal --input_folder DIR/iter_0000100 --output_folder DIR/universal
    torchrun ... examples/pretrain_deepspeed.py --load DIR --universal-checkpoint ...
"""
import json
import math
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import deepspeed
import pretraining  # noqa: F401  (before Megatron-Core: it quietens its import)
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from pretraining import checkpointing, data
from pretraining.agreement import RunError, SharedError, abort, gather, lost_rank, on_all_ranks, on_first_rank
from pretraining.arguments import add_data_args, add_logging_args, require_in_range, require_positive
from pretraining.deepspeed_settings import deepspeed_config
from pretraining.monitor import Monitor
from pretraining.torch_gpt import GPT, GPTConfig

from moba_megatron import deepspeed as moba_deepspeed
from moba_megatron.deepspeed import METHODS, MoBAAttention, SequenceParallel
from moba_megatron.megatron.arguments import add_moba_arguments, config_from_args
from moba_megatron.rendezvous import ArgumentParser

# What must agree between a checkpoint and the run that loads it, or the weights mean something else.
ARCHITECTURE = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
                "rotary_base")
# What must agree, or DeepSpeed's files are others.
FORMAT = ("zero_stage", "bf16")


def parse_args(argv=None):
    """Parses and validates everything that can be judged without the data and the checkpoint."""
    parser = ArgumentParser(description="Pretrains a GPT with MoBA under DeepSpeed.", fromfile_prefix_chars="@",
                    usage="torchrun --nproc-per-node N examples/pretrain_deepspeed.py FLAGS   (--help lists them)")
    _add_deepspeed_args(parser)
    _add_training_args(parser)
    add_data_args(parser)
    add_logging_args(parser)
    add_moba_arguments(parser)
    args = parser.parse_args(argv)
    try:
        args.moba_config = config_from_args(args)
        _derive_and_validate(args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return args


def _add_deepspeed_args(parser):
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1)
    group.add_argument("--sequence-parallel", choices=METHODS, default="none",
                       help="ulysses: DeepSpeed's all-to-all; zigzag: this package's context parallelism")
    group.add_argument("--sequence-parallel-size", type=int, default=1, help="ranks that share a sequence")
    group.add_argument("--activation-checkpointing", action="store_true", help="recompute each layer in backward")
    group.add_argument("--deepspeed-config", metavar="FILE.json",
                       help="further settings for deepspeed.initialize, in any section; flags it may only repeat")
    group.add_argument("--save", help="directory for checkpoints")
    group.add_argument("--save-interval", type=int)
    group.add_argument("--exit-interval", type=int, help="stop, with a checkpoint, after iterations divisible by this")
    group.add_argument("--load", help="directory to resume from; training starts afresh where it holds no checkpoint. "
                       "It is unpickled, so it must be trusted")
    group.add_argument("--universal-checkpoint", action="store_true", help="--load holds one that was made universal")
    group.add_argument("--distributed-timeout-minutes", type=float, default=10)
    group.add_argument("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; not used")


def _add_training_args(parser):
    group = parser.add_argument_group("model and training")
    for name in ("--num-layers", "--hidden-size", "--num-attention-heads", "--train-iters"):
        group.add_argument(name, type=int, required=True)
    group.add_argument("--num-query-groups", type=int, help="key/value heads; default: as many as heads")
    group.add_argument("--ffn-hidden-size", type=int, help="default: 8/3 of the hidden size, rounded up to 64 (SwiGLU)")
    group.add_argument("--rotary-base", type=float, default=10000)
    group.add_argument("--micro-batch-size", type=int, default=1)
    group.add_argument("--global-batch-size", type=int, help="default: one micro batch a group of ranks")
    group.add_argument("--lr", type=float, required=True)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--lr-warmup-iters", type=int, default=0)
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.95)
    group.add_argument("--bf16", action="store_true")
    group.add_argument("--seed", type=int, default=1234)


def _derive_and_validate(args):
    require_positive(args, "num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size",
                     "train_iters", "sequence_parallel_size", "log_interval", "num_query_groups", "ffn_hidden_size",
                     "global_batch_size", "save_interval", "exit_interval")
    require_in_range(args)
    args.num_query_groups = args.num_query_groups or args.num_attention_heads
    args.ffn_hidden_size = args.ffn_hidden_size or -(-args.hidden_size * 8 // (3 * 64)) * 64
    if args.hidden_size % (2 * args.num_attention_heads):
        raise ValueError(f"--hidden-size must be an even multiple of --num-attention-heads "
                         f"({args.num_attention_heads}), got {args.hidden_size}")
    if args.num_attention_heads % args.num_query_groups:
        raise ValueError(f"--num-query-groups must divide --num-attention-heads ({args.num_attention_heads}), "
                         f"got {args.num_query_groups}")
    if (args.sequence_parallel == "none") != (args.sequence_parallel_size == 1):
        raise ValueError("--sequence-parallel ulysses or zigzag goes with --sequence-parallel-size 2 or more, got "
                         f"{args.sequence_parallel} and {args.sequence_parallel_size}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world % args.sequence_parallel_size:
        raise ValueError(f"--sequence-parallel-size must divide the {world} processes, "
                         f"got {args.sequence_parallel_size}")
    pieces = args.sequence_parallel_size * (2 if args.sequence_parallel == "zigzag" else 1)
    if args.seq_length % pieces:
        raise ValueError(f"--seq-length must be a multiple of {pieces} for --sequence-parallel "
                         f"{args.sequence_parallel} over {args.sequence_parallel_size} ranks, got {args.seq_length}")
    args.data_parallel_size = world // args.sequence_parallel_size
    samples = args.micro_batch_size * args.data_parallel_size
    args.global_batch_size = args.global_batch_size or samples
    if args.global_batch_size % samples:
        raise ValueError(f"--global-batch-size must be a multiple of micro batch size x data parallel size "
                         f"({args.micro_batch_size} x {args.data_parallel_size}), got {args.global_batch_size}")
    if not 0 <= args.min_lr <= args.lr:
        raise ValueError(f"--min-lr must be between 0 and --lr ({args.lr}), got {args.min_lr}")
    if not 0 <= args.lr_warmup_iters < args.train_iters:
        raise ValueError(f"--lr-warmup-iters must be below --train-iters ({args.train_iters}), "
                         f"got {args.lr_warmup_iters}")
    if args.bf16 and args.zero_stage == 0:
        raise ValueError("--bf16 needs --zero-stage 1, 2 or 3, got 0: DeepSpeed keeps fp32 weights beside the bf16 "
                         "ones only under ZeRO")
    if args.save_interval and not args.save:
        raise ValueError("--save-interval needs --save, the directory for checkpoints")
    moba_deepspeed.check_config(args.moba_config, args.sequence_parallel)
    args.deepspeed_settings = deepspeed_config(args)
    args.eval_iters = 0  # the data set builder's name for "no validation samples"


def build_model(args, vocab_size: int, parallel: SequenceParallel | None = None) -> GPT:
    """The model with MoBA, its weights made from torch's generator as it stands; over ``parallel``'s ranks if given."""
    sizes = GPTConfig(vocab_size=vocab_size, **{name: getattr(args, name) for name in ARCHITECTURE})
    checkpoint = deepspeed.checkpointing.checkpoint if args.activation_checkpointing else None
    return GPT(sizes, partial(MoBAAttention, args.moba_config, num_layers=args.num_layers, parallel=parallel),
               checkpoint)


def optimizer_and_schedule(args, model, weights=lambda p: p, **options) -> tuple:
    """torch's AdamW with --weight-decay for all but the norms, and the learning rate's schedule.

    DeepSpeed's own Adam would be compiled at its first use.

    Args:
        weights: what to optimize in a parameter's place.
        options: further ones of AdamW.
    """
    groups = [{"params": [weights(p) for name, p in model.named_parameters() if ("norm" in name) == is_norm],
               "weight_decay": 0.0 if is_norm else args.weight_decay} for is_norm in (False, True)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.adam_beta1, args.adam_beta2), **options)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(args, step))


def build_engine(args, vocab_size: int, parallel: SequenceParallel, device: torch.device, in_parts: bool = True):
    """The model, its optimizer and schedule inside DeepSpeed's engine.

    Args:
        in_parts: under ZeRO 3 make the weights in the ranks' parts at once, on a GPU by its generator; else they are
            made whole by the CPU's, as under the other stages.
    """
    torch.manual_seed(args.seed)
    config = args.deepspeed_settings
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=args.zero_stage == 3 and in_parts):
        model = build_model(args, vocab_size, parallel)
    optimizer, schedule = optimizer_and_schedule(args, model, fused=device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    if args.activation_checkpointing:
        deepspeed.checkpointing.configure(None, deepspeed_config=engine.config)
    return engine


def describe(engine) -> dict:
    """What the engine has, whoever set it."""
    return {"ZeRO stage": int(engine.zero_optimization_stage()),
            "bf16": bool(engine.bfloat16_enabled()),
            "micro batch": engine.train_micro_batch_size_per_gpu(),
            "accumulation": engine.gradient_accumulation_steps(),
            "gradient clipping": engine.gradient_clipping(),
            "reduce bucket": engine.zero_reduce_bucket_size()}


def _lr_factor(args, step: int) -> float:
    """Linear warm-up, then a cosine down to --min-lr; step counts from 0."""
    if step < args.lr_warmup_iters:
        return (step + 1) / args.lr_warmup_iters
    done = (step - args.lr_warmup_iters) / max(args.train_iters - args.lr_warmup_iters, 1)
    floor = args.min_lr / (args.lr or 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def save_checkpoint(args, engine, iteration: int) -> Path:
    """Writes the state after `iteration` steps; called by all ranks.

    The file that names the last checkpoint is written when all others are, and the sizes of those, so that a run may
    end at any moment of it.

    Raises:
        RunError: it could not be written; earlier checkpoints are as they were.
    """
    state = {"iteration": iteration,
             # what DeepSpeed's converter to universal checkpoints asks for
             UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}
    tag = f"iter_{iteration:07d}"
    try:
        engine.save_checkpoint(args.save, tag=tag, client_state=state, save_latest=False)
    except (OSError, RuntimeError) as error:
        if lost_rank(error, args.distributed_timeout_minutes):
            raise
        raise RunError(f"the checkpoint of step {iteration} could not be saved in {args.save}: {error}. Checkpoints "
                       "before it are whole: resume with --load") from error
    dist.barrier()
    on_first_rank(_publish, args, tag)
    return Path(args.save) / tag


def _publish(args, tag: str) -> None:
    run = {name: getattr(args, name) for name in (*ARCHITECTURE, *FORMAT)} | {"ranks": dist.get_world_size()}
    (Path(args.save) / "architecture.json").write_text(json.dumps(run))
    checkpointing.write_sizes(Path(args.save) / tag)
    checkpointing.name_last(Path(args.save) / "latest", tag)


def is_saved(args, iteration: int) -> bool:
    """Whether there is a checkpoint after this many steps."""
    return bool(args.save) and (iteration == args.train_iters or any(
        interval and iteration % interval == 0 for interval in (args.exit_interval, args.save_interval)))


def load_checkpoint(args, engine, say) -> int:
    """Restores everything from the last whole checkpoint in --load, but for what flags say of the optimizer.

    Args:
        say: is called with the warning that a later checkpoint is damaged.

    Returns:
        its iteration, 0 where there is none.

    Raises:
        SharedError: the checkpoint is of another architecture or was written in a way that this run cannot read, or the
            ranks see different directories.
    """
    found = gather(on_all_ranks(_find_checkpoint, args))
    if len(set(found)) > 1:
        raise SharedError(f"--load {args.load}: the ranks see different checkpoints, {found}; every machine must see "
                          "the same directory")
    tag, warning = found[0]
    if tag is None:
        return 0
    if warning:
        say(f"warning: {warning}")
    saved = on_all_ranks(lambda: json.loads((Path(args.load) / "architecture.json").read_text()))
    saved = {"ranks": dist.get_world_size()} | saved
    for name in ARCHITECTURE:
        if saved[name] != getattr(args, name):
            raise SharedError(f"--load {args.load}: the checkpoint was written with {_flag(name, saved[name])}, this "
                              f"run has {getattr(args, name)}: give the checkpoint's value")
    _check_format(args, saved)
    iteration = moba_deepspeed.load_checkpoint(engine, args.load, tag)["iteration"]
    _set_hyper_parameters(args, engine)
    return iteration


def _find_checkpoint(args) -> tuple[str | None, str | None]:
    """The checkpoint's tag, None where there is none, and a warning where a later one is damaged."""
    if args.universal_checkpoint:
        latest = Path(args.load) / "latest_universal"
        if not latest.is_file():
            raise ValueError(f"--universal-checkpoint: there is no {latest}; make it with "
                             "python -m deepspeed.checkpoint.ds_to_universal")
        return latest.read_text().strip(), None
    iteration, warning = checkpointing.last_whole_checkpoint(args.load, "latest", part=".")
    return None if iteration is None else f"iter_{iteration:07d}", warning


def _check_format(args, saved: dict) -> None:
    """Raises SharedError where DeepSpeed cannot read this run's state from what was written."""
    world, stage = dist.get_world_size(), saved.get("zero_stage", args.zero_stage)
    how = "python -m deepspeed.checkpoint.ds_to_universal and --universal-checkpoint"
    if args.universal_checkpoint:
        if (stage == 3) != (args.zero_stage == 3):
            raise SharedError(f"--load {args.load}: the universal checkpoint is of --zero-stage {stage}, this run has "
                              f"{args.zero_stage}: DeepSpeed converts within ZeRO 3 and between ZeRO 1 and 2")
        return
    for name in FORMAT:
        found, wanted = saved.get(name, getattr(args, name)), getattr(args, name)
        if found != wanted and (name, {found, wanted}) != ("zero_stage", {1, 2}):  # which write the same files
            raise SharedError(f"--load {args.load}: the checkpoint was written with {_flag(name, saved[name])}, this "
                              f"run has {getattr(args, name)}: give the checkpoint's value, or convert it ({how})")
    if args.zero_stage and saved["ranks"] != world:
        raise SharedError(f"--load {args.load}: the checkpoint was written by {saved['ranks']} ranks, this run has "
                          f"{world}: start as many, or convert it ({how})")


def _flag(name: str, value) -> str:
    return f"--{name.replace('_', '-')} {value}"


def _set_hyper_parameters(args, engine) -> None:
    """The flags' learning rate, weight decay and betas in the place of the checkpoint's."""
    schedule = engine.lr_scheduler
    schedule.base_lrs = [args.lr] * len(schedule.base_lrs)
    lr = args.lr * _lr_factor(args, schedule.last_epoch)
    for group, weight_decay in zip(engine.optimizer.param_groups, (args.weight_decay, 0.0)):
        group.update(lr=lr, initial_lr=args.lr, weight_decay=weight_decay, betas=(args.adam_beta1, args.adam_beta2))
    schedule._last_lr = [lr] * len(schedule.base_lrs)


def batches(args, dataset, parallel: SequenceParallel, first: int, device: torch.device):
    """Micro batches of this rank's part of its sequences: tokens, labels, position_ids, loss_mask [b, s]."""
    samples = data.Samples(args, parallel.data_rank, first, args.train_iters)
    for batch in torch.utils.data.DataLoader(dataset, batch_sampler=samples, num_workers=args.num_workers,
                                             pin_memory=device.type == "cuda"):
        yield {name: parallel.part(x.to(device, non_blocking=True)) for name, x in batch.items()}


def steps(args, engine, iterator, first: int, device: torch.device):
    """Training steps after the first ones.

    Yields:
        (iteration, report): steps done, and the step's loss, grad_norm, lr and tokens_per_second, or None where
        --log-interval asks for none.
    """
    engine.train()
    clock, counted = time.perf_counter(), first
    for iteration in range(first + 1, args.train_iters + 1):
        moba_deepspeed.set_iteration(engine, iteration - 1)
        lr = engine.get_lr()[0]
        total = torch.zeros((), device=device)
        for _ in range(engine.gradient_accumulation_steps()):
            batch = next(iterator)
            losses = engine(batch["tokens"], batch["position_ids"], batch["labels"])
            loss = moba_deepspeed.mean_over_ranks(losses, batch["loss_mask"])
            total += loss.detach()
            engine.backward(loss)
            grad_norm = _norm_of_plain_gradients(engine)
            engine.step()
        report = None
        is_logged = iteration % args.log_interval == 0 or iteration == args.train_iters
        if is_logged or is_saved(args, iteration):
            dist.all_reduce(total)
            mean = total.item() / (dist.get_world_size() * engine.gradient_accumulation_steps())
            if not math.isfinite(mean):
                raise SharedError(f"step {iteration} has loss {mean}; nothing of it was saved: lower --lr, or resume "
                                  "from the last checkpoint")
        if is_logged:
            now = time.perf_counter()
            tokens = (iteration - counted) * args.global_batch_size * args.seq_length
            grad_norm = engine.get_global_grad_norm() if grad_norm is None else grad_norm
            report = {"loss": mean, "grad_norm": float(grad_norm), "lr": lr,
                      "tokens_per_second": tokens / (now - clock)}
            clock, counted = now, iteration
        yield iteration, report


def _norm_of_plain_gradients(engine) -> torch.Tensor | None:
    """The norm where DeepSpeed keeps none: without ZeRO in fp32 the gradients are the parameters' own."""
    if engine.zero_optimization() or engine.bfloat16_enabled() or not engine.is_gradient_accumulation_boundary():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None])


def pretrain(args, device: torch.device) -> None:
    """Builds everything, resumes where there is a checkpoint, trains, saves."""
    blend, tokenizer = on_all_ranks(data.read_tokenizer, args.data_path)
    parallel = SequenceParallel.over_ranks(args.sequence_parallel, args.sequence_parallel_size)
    dataset, _ = data.build_datasets(args, blend, tokenizer)
    engine = build_engine(args, tokenizer.vocab_size, parallel, device)
    warnings = []
    first = load_checkpoint(args, engine, warnings.append) if args.load else 0
    monitor = Monitor(args, dist.get_rank(), first)
    for warning in warnings:
        monitor.say(warning)
    monitor.say("DeepSpeed: " + ", ".join(f"{name} {value}" for name, value in describe(engine).items()))
    monitor.say(f"{args.moba_config.describe()}, sequences of {args.seq_length} tokens "
                f"over {parallel.size} rank(s) ({parallel.method}), {parallel.data_size} at a time; "
                + (f"resuming after step {first} from {args.load}" if first else "starting afresh"))
    monitor.record("start", iteration=first, engine=describe(engine), args={
        name: value for name, value in vars(args).items() if isinstance(value, (bool, int, float, str, list))})
    iterator = batches(args, dataset, parallel, first, device)
    for iteration, report in steps(args, engine, iterator, first, device):
        if report is not None:
            monitor.step(iteration, **report)
        if is_saved(args, iteration):
            monitor.say(f"saved {save_checkpoint(args, engine, iteration)}")
        if args.exit_interval and iteration % args.exit_interval == 0 and iteration < args.train_iters:
            monitor.say(f"stopped after step {iteration} (--exit-interval {args.exit_interval})")
            break
    monitor.close()
    engine.destroy()


def main(argv=None) -> int:
    """Trains; returns the exit status. Bad input ends all ranks with a message and status 2."""
    args = parse_args(argv)
    device = moba_deepspeed.init_distributed(args.distributed_timeout_minutes)
    try:
        pretrain(args, device)
    except SharedError as error:
        abort(f"error: {error}", 2, shared=True)
    except ValueError as error:
        abort(f"error: {error}", 2)
    except RunError as error:
        abort(f"error: {error}", 1)
    except Exception as error:
        lost = lost_rank(error, args.distributed_timeout_minutes)
        if lost:
            abort(f"error: {lost}", 1, patience=3)
        abort(traceback.format_exc(), 1)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
