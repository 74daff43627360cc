"""What the selective schedule chooses from, by the choices of all ranks: queries travel, or chunks, or everything.

The seconds are reckoned from constants, not measured: the busiest rank's bytes over a link and products over a rate.
"""
from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import crowds_the_network

VISITS_FROM = 16
"""Below so many ranks queries do not travel: a gather inside a machine hides behind attention."""
LINK, NETWORK = 280e9, 30e9
"""Bytes a second between GPUs of a node (measured on H200s: 255 to 320), and between nodes (assumed)."""
RATE = 300e12
"""Operations a second of sparse attention."""
PASSES = 3.5
"""Forward and backward over forward."""
VISIT, FETCH, GATHER = "visit", "fetch", "gather"


@dataclass(frozen=True)
class RowSizes:
    """Bytes and sizes of the layer: bytes of an element of q, k, v, o; head dims; keys in a chunk."""

    item: int
    dim: int
    v_dim: int
    chunk_size: int


def cheapest_way(table: Tensor, homes: Tensor, sizes: RowSizes, group: dist.ProcessGroup) -> str:
    """VISIT, FETCH or GATHER, the same on every rank; the host waits for three numbers.

    Args:
        table: int32 ``[P, HK, chunk ids]``, how often each rank's queries chose each chunk.
        homes: int64 ``[P, M]``, ids of every rank's chunks.
        sizes: of the layer.
        group: the ranks.
    """
    between_nodes = _members_a_node(group) < group.size()
    seconds = seconds_of_ways(table, homes, sizes, NETWORK if between_nodes else LINK,
                              _members_a_node(group) if crowds_the_network(group) else 1).tolist()
    return (VISIT, FETCH, GATHER)[seconds.index(min(seconds))]


def seconds_of_ways(table: Tensor, homes: Tensor, sizes: RowSizes, link: float, members_a_node: int = 1) -> Tensor:
    """Seconds of VISIT, FETCH and GATHER, forward and backward: fp64 ``[3]``.

    Args:
        table, homes, sizes: as :func:`cheapest_way`.
        link: bytes a second.
        members_a_node: ranks of a node that share what a gather brings into it.
    """
    size, kv_heads, _ = table.shape
    away = table.scatter(2, homes[:, None].expand(size, kv_heads, homes.shape[1]), 0)
    leaving, coming = away.sum((1, 2)).double(), _at_home(away.sum(0), homes)
    fetched, given = (away > 0).sum((1, 2)).double(), _at_home((away > 0).sum(0), homes)
    row, wide = (sizes.dim + sizes.v_dim) * sizes.item, 4
    out, back = 2 * row + wide, row + wide  # q, then q, do, o, lse; o, lse, then dq
    chunk, sums = 2 * sizes.chunk_size * row, sizes.chunk_size * (sizes.dim + sizes.v_dim) * wide
    whole = (size - 1) * homes.shape[1] * kv_heads * (chunk + sums) / members_a_node
    moved = torch.stack((_busiest(leaving, coming, out, back), _busiest(fetched, given, sums, chunk),
                         leaving.new_tensor(whole)))
    every = table.sum((1, 2)).double()
    work = torch.stack(((every - leaving + coming).max(), every.max(), every.max()))
    return moved / link + work * (2 * (sizes.dim + sizes.v_dim) * sizes.chunk_size * PASSES / RATE)


def _at_home(per_chunk: Tensor, homes: Tensor) -> Tensor:
    """``[HK, chunk ids]`` added up over the heads and each rank's chunks: ``[P]``."""
    return per_chunk[:, homes].sum((0, 2)).double()


def _busiest(a: Tensor, b: Tensor, sent_a: int, sent_b: int) -> Tensor:
    """Most bytes that a rank sends or receives: one of ``a`` sends ``sent_a``, brings ``sent_b``; ``b`` reversed."""
    return torch.maximum(a * sent_a + b * sent_b, a * sent_b + b * sent_a).max()


def _members_a_node(group: dist.ProcessGroup) -> int:
    """Ranks of the group on the fullest node."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    nodes = [rank // per_node for rank in dist.get_process_group_ranks(group)]
    return max(nodes.count(node) for node in set(nodes))
