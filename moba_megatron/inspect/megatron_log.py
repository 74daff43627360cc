"""The router's statistics in the logs of Megatron-LM's own training loop, with ``--moba-log-router-interval N``."""
from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import torch.distributed as dist

from ..megatron.host import host_args, host_iteration
from .report import as_record, as_scalars, summary
from .router_log import RouterLog


def log_router(original):
    """``train_step`` of Megatron-LM's training loop, watched; one that is watched already as it is."""
    if hasattr(original, "moba_router_log"):
        return original
    args = host_args()
    log = RouterLog(args.moba_log_router_interval, args.num_layers + (getattr(args, "mtp_num_layers", None) or 0),
                    args.num_attention_heads)

    @functools.wraps(original)
    def train_step(*positional, **named):
        iteration = (host_iteration() or 0) + 1  # as Megatron-LM counts in its logs
        with log.watch(iteration):
            result = original(*positional, **named)
        if log.report is not None and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1):
            _write(log.report, iteration, args)  # the last rank is the one that has Megatron-LM's TensorBoard writer
        return result

    train_step.moba_router_log = log
    return train_step


def _write(report, iteration: int, args: argparse.Namespace) -> None:
    print(f" iteration {iteration} | {summary(report)}", flush=True)
    writer = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_TENSORBOARD_WRITER", None)
    if writer is not None:
        for name, value in as_scalars(report).items():
            writer.add_scalar(name, value, iteration)
    if args.moba_log_router_file:
        path = Path(args.moba_log_router_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": "router", "iteration": iteration, "layers": as_record(report)}) + "\n")
