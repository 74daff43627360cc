"""What a training loop asks of DeepSpeed: joining ranks, the loss that its averaging needs, checkpoints."""
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..rendezvous import init_process_group


def init_distributed(timeout_minutes: float = 10) -> torch.device:
    """Joins the processes that torchrun or the deepspeed launcher started; call it before ``deepspeed.initialize``.

    NCCL with a GPU, gloo without one. On the CPU DeepSpeed would compile an operator for shared memory at its first
    start (a minute, and a lock that an ended run leaves behind hangs the next one); gloo serves without it.

    A collective that a rank does not join fails after ``timeout_minutes``. Returns this rank's device.
    """
    import deepspeed.comm
    import deepspeed.ops
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        init_process_group(backend, timedelta(minutes=timeout_minutes))
    deepspeed.comm.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


def mean_over_ranks(losses: Tensor, mask: Tensor) -> Tensor:
    """This rank's share of the mean loss of a micro batch, for ``engine.backward``.

    The sum of this rank's losses, times the number of ranks, over the number of tokens of all ranks: DeepSpeed averages
    gradients over all ranks, which makes it the mean over tokens, however many each rank has.

    ``losses``: ``[b, s]`` or any shape, of this rank's tokens; ``mask``: the same shape, 1 where a token counts. The
    result is a scalar in fp32 whose average over the ranks is the mean loss.
    """
    count = mask.sum().float()
    dist.all_reduce(count)
    return (losses.float() * mask).sum() * dist.get_world_size() / count.clamp(min=1)


def load_checkpoint(engine, directory: str, tag: str | None = None) -> dict | None:
    """``engine.load_checkpoint``, and what it leaves wrong with a universal checkpoint under ZeRO-3 (DeepSpeed 0.19.8).

    There all parts of the model get one tensor for Adam's count of steps, which each of them then advances, and the
    first parameter group's settings, its weight decay among them.

    ``directory``: that ``engine.save_checkpoint`` or DeepSpeed's converter wrote to; ``tag``: of the checkpoint, None
    for the last. Returns the client state, or None where the directory holds no checkpoint.
    """
    universal = engine.load_universal_checkpoint() and engine.zero_optimization_stage() == 3
    settings = [dict(group) for group in engine.optimizer.param_groups] if universal else []
    path, client_state = engine.load_checkpoint(directory, tag=tag)
    if path is None:
        return None
    if universal:
        for group, before in zip(engine.optimizer.param_groups, settings):
            group.update({name: value for name, value in before.items() if name not in ("params", "lr", "initial_lr")})
        for state in engine.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
    return client_state
