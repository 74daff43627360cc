"""Whether rows travel through symmetric memory or by the group's library: the same answer on every rank."""
from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .collective_check import CollectiveCheck
from .comm import Library
from .copy_engines import CopyEngines, addresses_of_all, new_arena
from .rows import MAX_RUNS, Rows
from .symmetric_memory import Peers, SymmetricMemory, aligned, first_slot, met

GRAIN = 32 << 20  # an arena is a multiple of this, bytes


def transport_for(rows: Rows, group: dist.ProcessGroup, x: Tensor, lanes: Sequence[Sequence[int]]) -> Library:
    """How these rows travel: through arenas with room for such lanes, or by the group's library.

    The latter for rows at places that the host does not know, in a CUDA graph under capture; among several hosts,
    without access to each other's memory, and as MOBA_CP_COPY_ENGINES says: 0 never, 1 wherever it can be, unset groups
    of two ranks. Where arenas must be made or grow the call is collective.

    Args:
        x: a tensor on their device.
        lanes: for each kind of exchange the bytes of its tensors ``[S, h, D]``, at most; two of a kind may be under way
            or in use.
    """
    if not x.is_cuda or rows.runs is None or rows.size == 1 or not rows.local or (
            torch.cuda.is_current_stream_capturing()):
        return Library(rows, group)
    sizes = [sum(aligned(x) + MAX_RUNS * aligned(1) for x in lane) for lane in lanes]  # a message each run
    nbytes, peers = first_slot(rows.size) + 2 * sum(sizes), met.get(group)
    if group not in met or peers is not None and peers.arena.nbytes < nbytes:
        CollectiveCheck.look(group, wait=True)  # a rank that has raised would not come
        torch.cuda.synchronize(x.device)  # then the arena before is free everywhere
        peers = met[group] = meet(group, x.device, -(-nbytes // GRAIN) * GRAIN)
    return Library(rows, group) if peers is None else SymmetricMemory(rows, group, peers, sizes)


def meet(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> Peers | None:
    """Makes arenas and maps everybody's; None on all ranks if that fails on one, whatever the failure."""
    rank, size, peers, host, problem = dist.get_rank(group), group.size(), None, "", _choice(group.size())
    for step in (0, 1):
        try:
            if problem is None and step == 0:
                engines = CopyEngines(device, group._get_backend(device).options._timeout.total_seconds())
                arena = new_arena(nbytes, device)
                arena[:first_slot(size)] = 0
                host = socket.gethostname() + Path("/proc/sys/kernel/random/boot_id").read_text()
            elif problem is None:
                arenas, keep = addresses_of_all(arena, group)
                engines.attempt(arenas, rank, first_slot(size) - 32)
                peers = Peers(rank, arena, arenas, engines, keep)
        except Exception as error:  # whatever it is, the others wait to hear of it
            problem = f"{type(error).__name__}: {error}"
        everyone = [None] * size
        dist.all_gather_object(everyone, (problem, host), group)
        problems = [f"rank {r}: {x}" for r, (x, _) in enumerate(everyone) if x]
        if not problems and len(set(everyone)) > 1:
            problems = ["its ranks are on several hosts"]
        if problems and rank == 0 and {x for x, _ in everyone} not in ({OFF}, {NOT_CHOSEN}):
            logging.getLogger(__name__).warning("context parallel group of %d exchanges through its library: %s", size,
                                                "; ".join(problems))
        if problems:
            return None
    return peers


OFF, NOT_CHOSEN = ("MOBA_CP_COPY_ENGINES=0",
                   "copy engines among more than two ranks are chosen by MOBA_CP_COPY_ENGINES=1")


def _choice(size: int) -> str | None:
    """Why this rank does not want copy engines; None where it does. Never seen on hardware beyond two ranks."""
    value = os.environ.get("MOBA_CP_COPY_ENGINES", "")
    if value not in ("", "0", "1"):
        return f"MOBA_CP_COPY_ENGINES must be 0 or 1, got {value!r}"
    return OFF if value == "0" else NOT_CHOSEN if not value and size > 2 else None
