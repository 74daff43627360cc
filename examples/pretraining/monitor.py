"""What a run says about itself, on rank 0: the live line, JSON lines (and how to read them back) and TensorBoard."""
import json
import os
import sys
import time
from pathlib import Path

from moba_megatron.inspect.report import as_record, as_scalars, summary


class Monitor:
    """Reports steps and validations; every method does nothing on ranks other than 0.

    Args:
        args: the flags `log_jsonl`, `tensorboard_dir`, `train_iters`, `log_interval`.
        rank: this process's rank.
        first_iteration: steps that are done already; records past them (of a run that was cut off) are dropped.
    """

    def __init__(self, args, rank: int, first_iteration: int):
        self.enabled = rank == 0
        self.log_interval = args.log_interval
        self.total = args.train_iters
        self.file = self.board = self.bar = None
        if not self.enabled:
            return
        if args.log_jsonl:
            self.file = _open_log(Path(args.log_jsonl), first_iteration)
        if args.tensorboard_dir:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.say("--tensorboard-dir is ignored: the package tensorboard is missing (pip install -e '.[plot]')")
            else:
                self.board = SummaryWriter(args.tensorboard_dir, purge_step=first_iteration + 1)
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0:
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self.bar = tqdm(total=args.train_iters, initial=first_iteration, unit="step", dynamic_ncols=True)
        self.first = first_iteration
        self.start = time.perf_counter()

    def say(self, text: str) -> None:
        """A line of its own, above the live line."""
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def record(self, kind: str, **values) -> None:
        """A line of the JSON log; not shown."""
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, **values}) + "\n")
            self.file.flush()

    def step(self, iteration: int, loss: float, grad_norm: float, lr: float, tokens_per_second: float) -> None:
        """A training step: `iteration` counts from 1."""
        if not self.enabled:
            return
        self.record("step", iteration=iteration, loss=loss, grad_norm=grad_norm, lr=lr,
                    tokens_per_second=tokens_per_second)
        if self.board is not None:
            for name, value in (("loss/train", loss), ("grad-norm", grad_norm), ("learning-rate", lr),
                                ("tokens-per-second", tokens_per_second)):
                self.board.add_scalar(name, value, iteration)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self.bar.update(iteration - self.bar.n)
        elif self._is_due(iteration):
            left = (time.perf_counter() - self.start) / (iteration - self.first) * (self.total - iteration)
            self.say(f"step {iteration}/{self.total} | loss {loss:.4f} | grad norm {grad_norm:.3f} | lr {lr:.3g} | "
                     f"{tokens_per_second:,.0f} tokens/s | ETA {_clock(left)}")

    def validation(self, iteration: int, result) -> None:
        """A validation after `iteration` steps."""
        if not self.enabled:
            return
        self.record("validation", iteration=iteration, loss=result.loss, trailing_loss=result.trailing_loss,
                    by_position=result.by_position, standard_errors=result.standard_errors)
        if self.board is not None:
            self.board.add_scalar("loss/validation", result.loss, iteration)
            self.board.add_scalar("loss/validation-trailing", result.trailing_loss, iteration)
        first, last, _ = result.by_position[-1]
        self.say(f"validation after step {iteration}: loss {result.loss:.4f}, at positions {first}-{last - 1} "
                 f"(trailing) {result.trailing_loss:.4f}")

    def router(self, iteration: int, report) -> None:
        """The router's statistics of a step: a RouterLog's report."""
        if not self.enabled:
            return
        self.record("router", iteration=iteration, layers=as_record(report))
        if self.board is not None:
            for name, value in as_scalars(report).items():
                self.board.add_scalar(name, value, iteration)
        self.say(f"step {iteration} | {summary(report)}")

    def close(self) -> None:
        """Flushes and closes what is open."""
        for thing in (self.bar, self.board, self.file):
            if thing is not None:
                thing.close()

    def _is_due(self, iteration: int) -> bool:
        # Without a terminal a line a step would fill the log: twenty a run are enough to see that it lives.
        every = max(self.log_interval, self.total // 20)
        return iteration == self.first + 1 or iteration % every == 0 or iteration == self.total


def _open_log(path: Path, first_iteration: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if first_iteration > 0 and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line).get("iteration", 0) <= first_iteration:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                continue  # a line that a crash cut off
    path.write_text("".join(kept), encoding="utf-8")
    return open(path, "a", encoding="utf-8")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def read_log(path: Path) -> dict[str, list[dict]]:
    """The records of a JSON log by kind: "start", "step", "validation", "router", each in the order of the run.

    Raises:
        ValueError: there is no such file, or it holds no training step.
    """
    if not path.is_file():
        raise ValueError(f"there is no log {path}; train with --log-jsonl {path}")
    records = {"start": [], "step": [], "validation": [], "router": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        records[record["kind"]].append(record)
    if not records["step"]:
        raise ValueError(f"{path} holds no training step")
    return records
