"""RouterLog: the router's statistics of every N-th training step, joined over all parallel ranks."""
import argparse
import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..megatron.host import host_args, host_iteration
from .choices import look, sum_over_ranks, watching
from .report import Report, as_record, as_scalars, summary
from .statistics import NAMES, Places, layer_statistics, sums, tally


class RouterLog:
    """Watches the first micro batch of every ``interval``-th step; other steps run as if it did not exist.

    In a watched step every sparse layer runs its gate once more and computes the recall of a few queries; under context
    parallelism it gathers its keys once more, so that selection and recall are those of the whole sequence. The host
    waits for nothing until the step's end, and there once for all layers: the tallies of context parallel ranks are
    added, heads and layers of tensor and pipeline parallel ranks are put side by side, and data parallel ranks, which
    saw other sequences, are averaged. Recomputed layers are counted once. Steps that replay a CUDA graph run no Python
    and are not seen.

    Layers (multi-token-prediction ones included) and query heads are the whole model's; ``samples``: queries a layer
    and context parallel group whose recall is computed.
    """

    def __init__(self, interval: int, num_layers: int, num_heads: int, samples: int = 128):
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}")
        self.interval, self.num_layers, self.num_heads, self.samples = interval, num_layers, num_heads, samples
        self.report: Report | None = None  # of the last step, if it was watched; empty where no layer had a choice

    @contextlib.contextmanager
    def watch(self, iteration: int) -> Iterator[None]:
        """Surrounds a training step (counted from 1) on every rank of the world; then all have the same ``report``."""
        self.report = None
        if iteration % self.interval:
            yield
            return
        self._tallies, self._group, self._places = {}, None, None
        with watching(self._observe):
            yield
        self.report = self._join()

    def _observe(self, module, q, k, segments, group=None, global_rows=None) -> None:
        """Tallies a layer the first time it runs: the first micro batch, and not again when it is recomputed."""
        choices = None if module.layer_number in self._tallies else look(module, q, k, segments, group, global_rows)
        if choices is not None:
            samples = self.samples if group is None else -(-self.samples // group.size())
            if self._places is None or not self._places.serve(choices, samples):
                self._places = Places.of(choices, samples)
            self._tallies[module.layer_number] = tally(choices, self._places)
            self._group = group

    def _join(self) -> Report:
        size, rank = 1, 0
        if parallel_state.model_parallel_is_initialized():
            size = parallel_state.get_tensor_model_parallel_world_size()
            rank = parallel_state.get_tensor_model_parallel_rank()
        heads = slice(rank * self.num_heads // size, (rank + 1) * self.num_heads // size)
        # for each layer and head: the sums of the statistics over the ranks, and how many ranks there are
        joined = torch.zeros(self.num_layers, self.num_heads, len(NAMES) + 1, dtype=torch.float64)
        runs = [list(run) for _, run in itertools.groupby(  # the ranks of a context parallel group have the same layers
            sorted(self._tallies.items()), key=lambda item: (id(item[1].places), item[1].chosen.shape))]
        if runs:  # one message to the group and one transfer to the host, whatever the number of layers
            parts = [sums([seen for _, seen in run]) for run in runs]
            message = torch.cat(parts)
            if self._group is not None:
                dist.all_reduce(message, group=self._group)
            places = [run[0][1].places for run in runs]
            firsts = [x.first for x in places]
            values = torch.cat((message, *firsts)).cpu().split([x.numel() for x in (*parts, *firsts)])  # ids fit fp64
            for run, where, total, first in zip(runs, places, values, values[len(runs):]):
                found = layer_statistics(total, first.long(), where.topk, len(run), where.choosers.numel())
                valid = ~found.isnan().any(2, keepdim=True)
                joined[[layer - 1 for layer, _ in run], heads] = torch.cat((found.masked_fill(~valid, 0), valid), dim=2)
        joined = sum_over_ranks(joined)
        means, seen = (joined[..., :-1] / joined[..., -1:]).transpose(1, 2).tolist(), joined[..., -1].gt(0).all(1)
        return {layer: dict(zip(NAMES, means[layer - 1])) for layer in (seen.nonzero()[:, 0] + 1).tolist()}


def log_router(original):
    """``train_step`` of Megatron-LM's training loop, watched every ``--moba-log-router-interval`` steps (but once)."""
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
