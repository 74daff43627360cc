"""RouterLog: the router's statistics of every N-th training step, joined over all parallel ranks."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from .choices import look, message_device, watching
from .report import Report
from .statistics import NAMES, Tally, layer_statistics, tally


class RouterLog:
    """Watches the first micro batch of every ``interval``-th step; other steps run as if it did not exist.

    In a watched step every sparse layer runs its gate once more and computes the recall of a few queries; under context
    parallelism it gathers its keys once more, so that selection and recall are those of the whole sequence. The host
    waits for nothing until the step's end. There the tallies of context parallel ranks are added, heads and layers of
    tensor and pipeline parallel ranks are put side by side, and data parallel ranks, which saw other sequences, are
    averaged. Recomputed layers are counted once. Steps that replay a CUDA graph run no Python and are not seen.

    Args:
        interval: steps from one watched step to the next, at least 1.
        num_layers: of the whole model, multi-token-prediction layers included.
        num_heads: query heads of the whole model.
        samples: queries a layer and context parallel group whose recall is computed.

    Raises:
        ValueError: interval is below 1.
    """

    def __init__(self, interval: int, num_layers: int, num_heads: int, samples: int = 128):
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}")
        self.interval, self.num_layers, self.num_heads, self.samples = interval, num_layers, num_heads, samples
        self.report: Report | None = None
        """Of the last step, if it was watched; empty where no layer had a choice."""

    @contextlib.contextmanager
    def watch(self, iteration: int) -> Iterator[None]:
        """Surrounds a training step on every rank of the world; afterwards ``report`` is set, the same on all ranks.

        Args:
            iteration: of the step, counted from 1.
        """
        self.report = None
        if iteration % self.interval:
            yield
            return
        observer = _Observer(self.samples)
        with watching(observer):
            yield
        self.report = self._join(observer)

    def _join(self, observer: _Observer) -> Report:
        _add_context_parallel(observer.tallies, observer.group)
        device = message_device()
        size, rank = _tensor_parallel()
        heads = slice(rank * self.num_heads // size, (rank + 1) * self.num_heads // size)
        # for each layer and head: the sums of the statistics over the ranks, and how many ranks there are
        sums = torch.zeros(self.num_layers, self.num_heads, len(NAMES) + 1, dtype=torch.float64, device=device)
        for layer, seen in observer.tallies.items():
            values = layer_statistics(seen)
            valid = ~values.isnan().any(1, keepdim=True)
            sums[layer - 1, heads] = torch.cat((values.masked_fill(~valid, 0), valid.double()), dim=1).to(device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        *totals, ranks = sums.unbind(2)
        means = [(total / ranks).tolist() for total in totals]
        return {layer: {name: mean[layer - 1] for name, mean in zip(NAMES, means)}
                for layer, seen in enumerate(ranks.gt(0).all(1).tolist(), 1) if seen}


class _Observer:
    """Tallies each layer the first time it runs: the first micro batch, and not again when it is recomputed."""

    def __init__(self, samples: int):
        self.samples = samples
        self.tallies: dict[int, Tally] = {}
        self.group: dist.ProcessGroup | None = None

    def __call__(self, module, q, k, segments, group=None, global_rows=None) -> None:
        if module.layer_number in self.tallies:
            return
        choices = look(module, q, k, segments, group, global_rows)
        if choices is not None:
            samples = self.samples if group is None else -(-self.samples // group.size())
            self.tallies[module.layer_number] = tally(choices, samples)
            self.group = group


def _add_context_parallel(tallies: dict[int, Tally], group: dist.ProcessGroup | None) -> None:
    """Adds the tallies of a context parallel group's ranks in place, in one message: they have the same layers."""
    if group is None:
        return
    parts = [x for layer in sorted(tallies) for x in (tallies[layer].chosen, tallies[layer].choosers,
                                                      tallies[layer].recalled)]
    message = torch.cat([x.flatten() for x in parts])
    dist.all_reduce(message, group=group)
    for x, total in zip(parts, message.split([x.numel() for x in parts])):
        x.copy_(total.view_as(x))


def _tensor_parallel() -> tuple[int, int]:
    """Size and rank of the tensor parallel group; one rank where Megatron has made none."""
    if not parallel_state.model_parallel_is_initialized():
        return 1, 0
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
