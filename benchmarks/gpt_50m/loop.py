"""Training: the schedule, gradient accumulation, saving, times of every step, and validation by position."""
from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import sdpa_kernel

from .attention import Attention
from .tasks import Mixed
from .text import Windows

WARMUP_STEPS = 3
"""Steps that are not timed: the first ones compile."""
POSITION_BINS = 16


@dataclass(frozen=True)
class Plan:
    """How a run goes.

    Args:
        steps: optimizer steps; the learning rate warms up over 5% of them and falls along a cosine to a tenth.
        sequences: sequences of a micro batch.
        micro_batches: micro batches of a step.
        seq_length: tokens of a sequence.
        peak_lr, weight_decay, clip: of AdamW with betas 0.9 and 0.95.
        log_interval: steps between looks at the device.
    """

    steps: int
    sequences: int
    micro_batches: int
    seq_length: int
    peak_lr: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    log_interval: int = 10

    @property
    def tokens_per_step(self) -> int:
        return self.sequences * self.micro_batches * self.seq_length

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = max(1, round(0.05 * self.steps))
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.peak_lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Step:
    """What is known of a step once the device has done it: number from 1, nats a token, gradient norm, lr, ms."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    ms: float


class Trainer:
    """A model, its optimizer and the way it is run: bf16 autocast and a forced dense kernel on CUDA, fp32 elsewhere.

    The model is called as :class:`~.model.GPT` is, and has its ``predict``.
    """

    def __init__(self, model: torch.nn.Module, attention: Attention, plan: Plan, device: torch.device):
        self.model, self.attention, self.plan, self.device = model, attention, plan, device
        decayed = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() != 2]
        self.parameters = decayed + others
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=plan.peak_lr, betas=(0.9, 0.95), fused=True)
        self.cu_seqlens = torch.arange(0, plan.sequences + 1, device=device, dtype=torch.int32) * plan.seq_length

    @contextmanager
    def _as_trained(self):
        backend = self.attention.dense_backend
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                yield

    def losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Every token's loss ``[T]``."""
        with self._as_trained():
            return self.model(tokens, targets, self.cu_seqlens)

    def predict(self, tokens: torch.Tensor) -> torch.Tensor:
        """The likeliest next token at each place ``[T]``."""
        with self._as_trained():
            return self.model.predict(tokens, self.cu_seqlens)

    def save(self, path: Path, **more) -> None:
        """Weights, the optimizer's state and ``more``, so that training goes on as if it had not stopped.

        The file is there whole or not at all; batches are found by the number of their step.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **more}, unfinished)
        unfinished.replace(path)

    def restore(self, saved: dict) -> None:
        """Takes over what :meth:`save` wrote, read by ``torch.load``."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def train(self, text: Windows | Mixed, until: Callable[[], bool] = lambda: False, first: int = 0) -> Iterator[Step]:
        """Yields the steps from number ``first`` (0-based) on, in groups of the log interval; stops early where
        ``until`` says so after one. At the last step of a group the model is as that step left it."""
        waiting: list[tuple] = []
        clock = _Clock(self.device)
        for step in range(first, self.plan.steps):
            lr = self.plan.lr(step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=self.device)
            for micro in range(self.plan.micro_batches):
                number = (step * self.plan.micro_batches + micro) * self.plan.sequences
                part = self.losses(*text.batch(number, self.plan.sequences)).mean() / self.plan.micro_batches
                part.backward()
                loss += part.detach()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.clip, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad()
            clock.tick()
            waiting.append((step + 1, loss, norm, lr))
            if (step + 1) % self.plan.log_interval == 0 or step + 1 == self.plan.steps:
                for (number, loss, norm, lr), ms in zip(waiting, clock.intervals()):
                    yield Step(number, loss.item(), norm.item(), lr, ms)
                waiting.clear()
                if until():
                    return
                clock.restart()  # a validation may have come between

    def validate(self, text: Windows, sequences: int) -> dict:
        """The loss on the first sequences of a text (a whole number of micro batches, at least one).

        Returns:
            ``loss`` and its standard error over sequences, ``tokens``, and ``by_position``: (first, last + 1, loss) of
            each of 16 parts of a sequence. Nats a token.
        """
        batches = max(1, min(sequences, text.count) // self.plan.sequences)
        rows = []
        for i in range(batches):
            # With gradients enabled, though none is taken: without them the blocks would be compiled once more.
            losses = self.losses(*text.batch(i * self.plan.sequences, self.plan.sequences)).detach()
            rows.append(losses.view(self.plan.sequences, -1).double().unflatten(1, (POSITION_BINS, -1)).mean(2))
        table = torch.cat(rows)  # [sequences, bins]
        means = table.mean(1)
        width = self.plan.seq_length // POSITION_BINS
        by_position = [[i * width, (i + 1) * width, loss] for i, loss in enumerate(table.mean(0).tolist())]
        error = (means.std() / len(means) ** 0.5).item() if len(means) > 1 else None
        return {"loss": means.mean().item(), "standard_error": error, "by_position": by_position,
                "tokens": len(means) * self.plan.seq_length}


class _Clock:
    """Times between ticks in ms; on CUDA measured by the device, without waiting for it until they are read."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forgets the ticks and makes a first one."""
        self.ticks: list = []
        self.tick()

    def tick(self) -> None:
        if self.device.type != "cuda":
            self.ticks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.ticks.append(event)

    def intervals(self) -> list[float]:
        """Every interval since the start."""
        pairs = zip(self.ticks, self.ticks[1:])
        if self.device.type != "cuda":
            return [1e3 * (b - a) for a, b in pairs]
        self.ticks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def timing(steps: list[Step]) -> dict[str, float]:
    """Median, 20th and 80th percentile of the steps' ms, without the first ones."""
    times = sorted(step.ms for step in (steps[WARMUP_STEPS:] or steps))
    return {"median": statistics.median(times), "p20": times[round(0.2 * (len(times) - 1))],
            "p80": times[round(0.8 * (len(times) - 1))], "steps": len(times)}
