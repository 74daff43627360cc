"""Routing: from each query's chunks to each chunk's queries, by a counting sort on the device."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """One list for each (kv head, chunk): the choices of all queries of the group's heads that fell on the chunk.

    A choice is known by its slot ``(token * H + head) * (topk - 1) + j``, the position in ``selected`` flattened.

    Args:
        entries: int32 ``[T * H * (topk - 1)]`` (int64 where slots need it): slots, list after list; what lies behind
            the last list is not written.
        list_offsets: same dtype, ``[HK * num_chunks + 1]``: where list ``kv_head * num_chunks + chunk`` begins.
        num_chunks: bound of the chunk ids.
    """

    entries: Tensor
    list_offsets: Tensor
    num_chunks: int

    @property
    def num_lists(self) -> int:
        return self.list_offsets.numel() - 1


@dataclass(frozen=True)
class Tiles:
    """Lists cut into tiles of ``block`` entries, a tile never crossing lists.

    Tile ``i`` of list ``l`` has the number ``list_offsets[l] // block + l + i``; a number may be unused (a program
    finds ``first >= last`` through ``jit_helpers.list_tile`` and leaves).

    Args:
        lists: int32 ``[num_tiles]``, the list of each tile.
        block: entries in a tile.
    """

    lists: Tensor
    block: int

    @property
    def num_tiles(self) -> int:
        """Bound on the tile numbers, known on the host: the size of a grid."""
        return self.lists.numel()
