"""The faults that `faulty_job.py` makes in examples/pretrain_gpt.py, from FAULTS in the environment.

FAULTS is a list, `kind:rank:step kind:rank:step ...`. The first start of the job suffers the first, the second start
(torchrun's --max-restarts, or a later launch with the same FAULTS_DONE file) the second, and so on; then none.
"""
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pretrain_gpt as job
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

RANK = int(os.environ["RANK"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def every_forward(action):
    """Calls action(model) as this rank's forward step of the step with the fault begins."""
    def install(step):
        forward_step, set_iteration = job.forward_step, job.set_iteration
        now = {}

        def at(iteration):
            now["step"] = iteration + 1
            set_iteration(iteration)

        def forward(iterator, model):
            if now["step"] == step:
                action(model)
            return forward_step(iterator, model)

        job.set_iteration, job.forward_step = at, forward
    return install


def kill_in_backward(model):
    first = next(p for p in model.parameters() if p.requires_grad)  # its gradient comes last
    first.register_hook(lambda grad: die())


def nan_in_input(model):
    embedding = next(m for m in model.modules() if type(m).__name__ == "LanguageModelEmbedding")

    def poison(module, args, output):
        output = output.clone()
        output[0] = float("nan")
        return output

    embedding.register_forward_hook(poison)


def when_saving(action):
    """Calls action(save, *args) instead of the example's save_checkpoint after the step with the fault."""
    def install(step):
        save = job.checkpointing.save_checkpoint

        def saving(args, iteration, *rest):
            if iteration == step:
                return action(save, args, iteration, *rest)
            return save(args, iteration, *rest)

        job.checkpointing.save_checkpoint = saving
    return install


def kill_while_writing(save, *args):
    """The rank ends when a part of its file is written and the rest is not; its writer, a child, ends with it."""
    rank = os.getpid()

    def half(transforms, number, bucket, *more, **named):
        name, *_ = bucket if bucket else named["write_bucket"]
        Path(name).write_bytes(b"half of a checkpoint")
        os.kill(rank, signal.SIGKILL)
        die()

    FileSystemWriterAsync.write_preloaded_data = staticmethod(
        lambda transforms, local_proc_idx=0, write_bucket=None, *a, **b: half(transforms, local_proc_idx, write_bucket))
    return save(*args)


def fill_disk(save, *args):
    """No file of this process and its children may grow beyond a limit: write() fails as on a full disk.

    Its stderr is on that disk, so that what happened is for rank 0 to say.
    """
    os.dup2(os.open("/dev/full", os.O_WRONLY), sys.stderr.fileno())
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return save(*args)


KINDS = {
    "kill-forward": every_forward(lambda model: die()),
    "kill-backward": every_forward(kill_in_backward),
    "kill-save": when_saving(kill_while_writing),
    "full-disk": when_saving(fill_disk),
    "nan": every_forward(nan_in_input),
    "stall": every_forward(lambda model: time.sleep(600)),
}


def next_fault() -> tuple[str, int, int] | None:
    """The fault of this start; all ranks count starts alike, since every rank's line is written before training."""
    done = Path(os.environ["FAULTS_DONE"] + f".{RANK}")
    number = len(done.read_text().splitlines()) if done.exists() else 0
    with open(done, "a") as file:
        file.write("started\n")
    faults = os.environ["FAULTS"].split()
    if number >= len(faults):
        return None
    kind, rank, step = faults[number].split(":")
    return kind, int(rank), int(step)


def main() -> int:
    """The job, with this start's fault where it is this rank's.

    Only a start in which a rank stalls has a short timeout: on a busy machine saving takes long, and its processes
    are not ready at once.
    """
    fault = next_fault()
    if fault is not None and fault[0] == "stall":
        sys.argv += ["--distributed-timeout-minutes", "0.3"]
    if fault is not None and fault[1] == RANK:
        KINDS[fault[0]](fault[2])
    return job.main()
