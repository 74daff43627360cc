"""Where the ranks of a job find each other, also after torchrun has restarted them."""
from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist


def init_process_group(backend: str, timeout: timedelta) -> None:
    """``torch.distributed.init_process_group`` from the launcher's environment, with a store of its own for each start.

    ``torchrun --max-restarts`` lets all starts of a job share one key-value store (torch 2.13), where the ranks of the
    second would find the addresses of the first and fail to connect. A prefix with the number of the restart keeps them
    apart. Started without a launcher, the job is one process.

    Args:
        backend: ``nccl``, ``gloo``, ...
        timeout: after which a collective that a rank does not join fails.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
