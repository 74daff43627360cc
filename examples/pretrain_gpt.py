"""Pretrains a GPT with MoBA on megatron.core alone, without a Megatron-LM checkout.

    python examples/prepare_data.py --plays --output-prefix runs/data/plays
    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --num-layers 4 --hidden-size 128 --num-attention-heads 4 \\
        --seq-length 1024 --context-parallel-size 2 --train-iters 100 --lr 3e-3 --data-path runs/data/plays \\
        --moba-chunk-size 64 --moba-topk 3 --moba-full-attention-layers last:1

Flags are spelled as Megatron-LM spells them; `--attention full` trains the same model densely, for comparison. With a
GPU it runs on NCCL, without one on gloo. The parts lie in `examples/pretraining/`.
"""
import contextlib
import math
import os
import sys
import time
import traceback
from datetime import timedelta

import megatron_on_cpu
import pretraining  # noqa: F401  (first: it quietens Megatron-Core's import)
import torch

megatron_on_cpu.enable()  # before Megatron-Core is imported; does nothing where there is a GPU

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from pretraining import checkpointing, data  # noqa: E402
from pretraining.agreement import RunError, SharedError, abort, gather, lost_rank, on_all_ranks  # noqa: E402
from pretraining.arguments import parse_args  # noqa: E402
from pretraining.evaluation import evaluate  # noqa: E402
from pretraining.model import build_config, build_model, build_optimizer, describe_model  # noqa: E402
from pretraining.monitor import Monitor  # noqa: E402
from pretraining.selection import save_selection  # noqa: E402

from moba_megatron.inspect.router_log import RouterLog  # noqa: E402
from moba_megatron.megatron.core_attention import set_iteration  # noqa: E402
from moba_megatron.rendezvous import init_process_group  # noqa: E402


def main(argv=None) -> int:
    """Trains; returns the exit status. Bad input ends all ranks with a message and status 2, a broken run with 1."""
    args = parse_args(argv)
    initialize(args)
    try:
        pretrain(args)
    except SharedError as error:
        abort(f"error: {error}", 2, shared=True)
    except ValueError as error:
        abort(f"error: {error}", 2)
    except RunError as error:  # rank 0 knows the reasons of all ranks
        abort(f"error: {error}", 1, patience=3 if torch.distributed.get_rank() else 0)
    except Exception as error:
        lost = lost_rank(error, args.distributed_timeout_minutes)
        if lost:
            abort(f"error: {lost}", 1, patience=3)
        abort(traceback.format_exc(), 1)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def initialize(args) -> None:
    """Process groups, seeds, and this process's device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    init_process_group(megatron_on_cpu.distributed_backend(), timedelta(minutes=args.distributed_timeout_minutes))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    # As Megatron-LM does: pipeline stages start differently, everything else from the same seed.
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def pretrain(args) -> None:
    """Builds everything, resumes where there is a checkpoint, trains, validates, saves."""
    rank = torch.distributed.get_rank()
    blend, tokenizer = on_all_ranks(data.read_tokenizer, args.data_path)
    first = checkpointing.agreed_checkpoint(args.load) or 0 if args.load else 0
    args.model_description = describe_model(args, tokenizer)
    config = build_config(args)
    model = build_model(args, config)
    if args.pretrained_checkpoint and not first:
        checkpointing.load_weights(args, model)
    optimizer, scheduler = build_optimizer(args, config, model)  # copies the weights
    train_data, valid_data = data.build_datasets(args, blend, tokenizer)
    if first:
        checkpointing.load_checkpoint(args, first, model, optimizer, scheduler)
    monitor = Monitor(args, rank, first)
    describe(args, monitor, model, first)

    last_saved = first
    router = None
    if args.router_log_interval:
        router = RouterLog(args.router_log_interval, args.num_layers, args.num_attention_heads)
    for iteration, report in steps(args, config, model, optimizer, scheduler, train_data, first, router):
        if report is not None:
            monitor.step(iteration, **report)
        if router is not None and router.report is not None:
            monitor.router(iteration, router.report)
        stop = args.exit_interval and iteration % args.exit_interval == 0
        if is_saved(args, iteration):
            directory = checkpointing.save_checkpoint(args, iteration, model, optimizer, scheduler)
            monitor.say(f"saved {directory}")
            last_saved = iteration
        if args.eval_iters and iteration % args.eval_interval == 0:
            monitor.validation(iteration, evaluate(args, model, valid_data))
        if stop and iteration < args.train_iters:
            monitor.say(f"stopped after step {iteration} (--exit-interval {args.exit_interval})")
            monitor.close()
            return
    finish(args, monitor, model, optimizer, scheduler, valid_data, max(first, args.train_iters), last_saved)
    monitor.close()


def is_saved(args, iteration: int) -> bool:
    """Whether there is a checkpoint after this many steps, but for the last."""
    return bool(args.save) and any(interval and iteration % interval == 0
                                   for interval in (args.exit_interval, args.save_interval))


def finish(args, monitor, model, optimizer, scheduler, valid_data, iteration: int, last_saved: int) -> None:
    """The last checkpoint and validation, and the selection of a validation text."""
    if args.save and last_saved < iteration:
        monitor.say(f"saved {checkpointing.save_checkpoint(args, iteration, model, optimizer, scheduler)}")
    if args.eval_iters and iteration % args.eval_interval:
        monitor.validation(iteration, evaluate(args, model, valid_data))
    if args.save_selection and args.attention == "moba" and valid_data is not None:
        try:
            save_selection(args, model, valid_data, iteration)
            monitor.say(f"wrote {args.save_selection}")
        except ValueError as error:  # on every rank; the run itself is done and saved
            monitor.say(f"no {args.save_selection}: {error}")


def steps(args, config, model, optimizer, scheduler, dataset, first: int, router: RouterLog | None):
    """Training steps after the first ones; `router` watches those that it is due at.

    Yields:
        (iteration, report): steps done, and the step's loss (mean over the batch's tokens), grad_norm, lr and
        tokens_per_second, or None where --log-interval asks for none.
    """
    forward_backward = get_forward_backward_func()
    iterator = data.batches(args, dataset, first, args.train_iters)
    model.train()
    clock, counted = time.perf_counter(), first
    for iteration in range(first + 1, args.train_iters + 1):
        set_iteration(iteration - 1)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        with router.watch(iteration) if router else contextlib.nullcontext():
            losses = forward_backward(
                forward_step_func=forward_step,
                data_iterator=iterator,
                model=[model],
                num_microbatches=args.num_microbatches,
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=False,
            )
        lr = optimizer.param_groups[0]["lr"]
        updated, grad_norm, _ = optimizer.step()
        if updated:
            scheduler.step(increment=1)
        report = None
        is_logged = iteration % args.log_interval == 0 or iteration == args.train_iters
        loss = mean_loss(losses) if is_logged or is_saved(args, iteration) else None
        check_finite(iteration, loss, grad_norm, losses)
        if is_logged:
            report = {"loss": loss, "grad_norm": float(grad_norm), "lr": float(lr)}
            now = time.perf_counter()
            tokens = (iteration - counted) * args.global_batch_size * args.seq_length
            report["tokens_per_second"] = tokens / (now - clock)
            clock, counted = now, iteration
        yield iteration, report


def forward_step(iterator, model):
    """A micro batch's token losses [b, s] and how Megatron's schedule sums them."""
    batch = next(iterator)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def sum_losses(losses):
        mask = batch["loss_mask"].flatten()
        total, count = (losses.float().flatten() * mask).sum(), mask.sum()
        return total, count.int(), {"sums": torch.stack([total.detach(), count])}

    return losses, sum_losses


def mean_loss(losses: list[dict]) -> float:
    """The loss of a global batch, the same on all ranks; `losses` holds the sums of the last stage's micro batches."""
    if losses:
        sums = torch.stack([loss["sums"] for loss in losses]).sum(0)
    else:
        sums = torch.zeros(2, device=torch.cuda.current_device())
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(sums, parallel_state.get_pipeline_model_parallel_last_rank(),
                                group=parallel_state.get_pipeline_model_parallel_group())
    total, count = sums.tolist()
    return total / max(count, 1)


def check_finite(iteration: int, loss: float | None, grad_norm: float, losses: list[dict]) -> None:
    """Ends the run at the first step whose loss or gradient is not a number, before a checkpoint can hold it.

    Args:
        iteration: the step.
        loss: of the global batch, None where it is not known; like grad_norm the same on all ranks.
        grad_norm: of all gradients; 0 without clipping.
        losses: this rank's own micro batches.

    Raises:
        SharedError: on all ranks, with the ranks whose own loss is not a number.
    """
    if math.isfinite(grad_norm) and (loss is None or math.isfinite(loss)):
        return
    own = gather(all(bool(torch.isfinite(part["sums"]).all()) for part in losses))
    where = ", ".join(str(rank) for rank, finite in enumerate(own) if not finite) or "none"
    loss = mean_loss(losses) if loss is None else loss
    raise SharedError(f"step {iteration} has loss {loss} and gradient norm {float(grad_norm)} (ranks whose own loss is "
                      f"not finite: {where}). Nothing of it was saved. Resume from the last checkpoint; if it comes "
                      "again, look at the data of that step or lower --lr")


def describe(args, monitor, model, first: int) -> None:
    """Says what runs, and writes it to the JSON log."""
    parameters = torch.tensor(float(sum(p.numel() for p in model.parameters())), device=torch.cuda.current_device())
    torch.distributed.all_reduce(parameters)
    parameters = int(parameters) // (args.data_parallel_size * args.context_parallel_size)
    attention = args.moba_config.describe() if args.attention == "moba" else "full attention"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    monitor.say(f"{parameters / 1e6:.1f} million parameters, sequences of {args.seq_length} tokens, {attention}; "
                f"{args.world_size} process(es) on {device}: "
                f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size} x "
                f"CP {args.context_parallel_size} x DP {args.data_parallel_size}")
    if args.pretrained_checkpoint and not first:
        monitor.say(f"starting from the weights of {args.pretrained_checkpoint}")
    elif args.load:
        monitor.say(f"resuming after step {first} from {args.load}" if first
                    else f"no checkpoint in {args.load}: starting afresh")
    settings = {name: value for name, value in vars(args).items() if isinstance(value, (bool, int, float, str, list))}
    monitor.record("start", iteration=first, parameters=parameters, device=device, torch=torch.__version__,
                   args=settings)


if __name__ == "__main__":
    sys.exit(main())
