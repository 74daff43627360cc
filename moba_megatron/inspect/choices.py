"""What the queries of a layer choose, seen from inside a forward pass: watching core attention, redoing its gate."""
import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..context_parallel import gather_keys
from ..megatron.core_attention import MoBACoreAttention, get_iteration, set_observer
from ..ops import get_stages, select_for_segments
from ..segments import Segments

MOST_CHUNKS_FUSED = 1 << 14  # bound of the chunk ids for the kernels: a program holds a query's masses of all chunks


@contextlib.contextmanager
def watching(observer):
    """Has sparse layers call ``observer`` inside the block, besides one that watches already, with what
    :func:`moba_megatron.megatron.core_attention.set_observer` says."""
    if (before := set_observer(observer)) is not None:
        set_observer(lambda *args: (before(*args), observer(*args)))
    try:
        yield observer
    finally:
        set_observer(before)


@dataclass(frozen=True)
class Choices:
    """A layer's choices in one micro batch, for this rank's queries and heads."""

    q: Tensor  # `[T, H, D]`, the local queries
    k: Tensor  # `[S, HK, D]`, the keys of all context parallel ranks, sequence after sequence
    selected: Tensor  # int32 `[T, H, topk - 1]`, ids of the chosen earlier chunks, -1 for none
    segments: Segments  # places the queries among the keys
    topk: int  # chunks a query attends to, its own included
    softmax_scale: float  # of the attention scores
    fused: bool = False  # whether Triton kernels count and weigh them, as they chose them

    @property
    def num_chunks(self) -> int:
        """Bound of the chunk ids."""
        return self.segments.num_chunks(self.k.shape[0])

    def counts(self, rows: Tensor, num_rows: int) -> Tensor:
        """How often each chunk was chosen, by groups of queries: int64 ``[H, num_rows, num_chunks]``. ``rows``: int64
        ``[T]``, the group of each query, from 0; below 0 for queries that are not counted."""
        if self.fused:
            from . import kernels
            return kernels.counts(self.selected, rows, num_rows, self.num_chunks)
        heads = torch.arange(self.q.shape[1], device=self.q.device)
        first = (heads[None, :] * num_rows + rows[:, None]) * self.num_chunks
        spare = self.q.shape[1] * num_rows * self.num_chunks  # where that lands which is not counted
        table = torch.zeros(spare + 1, dtype=torch.int64, device=self.q.device)
        for chosen in self.selected.unbind(2):  # one by one, to bound the memory
            index = torch.where((chosen >= 0) & (rows >= 0)[:, None], first + chosen, spare).flatten()
            table.index_add_(0, index, table.new_ones(()).expand(index.numel()))
        return table[:-1].view(self.q.shape[1], num_rows, self.num_chunks)


def sum_over_ranks(x: Tensor) -> Tensor:
    """``x`` added up over all ranks of the world, on the CPU."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        x = x.to("cuda" if "nccl" in dist.get_backend() else "cpu")
        dist.all_reduce(x)
    return x.cpu()


@torch.no_grad()
def look(module: MoBACoreAttention, q: Tensor, k: Tensor, segments: Segments, group: dist.ProcessGroup | None = None,
         global_rows: Tensor | None = None) -> Choices | None:
    """The choices of a layer, from what it hands to an observer. The gate runs once more: its result depends on nothing
    but q and k, so it is what the layer chooses itself. Under context parallelism K is gathered once more for it, by
    all ranks of the group. The host does not wait. None where there is nothing to choose: ``topk`` is 1 or covers every
    sequence."""
    moba = module.moba_config.at_step(get_iteration())
    if moba.topk == 1 or segments.max_seqlen_k <= moba.topk * segments.chunk_size:
        return None
    q, k = q.detach(), k.detach()
    stages, view = get_stages(moba.backend, q.device), () if group is None else (group, global_rows)
    if module.selector is not None:
        selected = stages.keep_earlier(module.selector(q, k, segments, *view), segments)
    k = gather_keys(k, *view) if view else k
    if module.selector is None:
        selected = select_for_segments(q, k, segments, moba.topk, shared=moba.selection, backend=moba.backend)
    selected = selected.repeat_interleave(q.shape[1] // selected.shape[1], 1)
    scale = q.shape[2] ** -0.5 if module.softmax_scale is None else module.softmax_scale
    fused = hasattr(stages, "INTERPRETED") and segments.num_chunks(k.shape[0]) <= MOST_CHUNKS_FUSED
    return Choices(q, k, selected, segments, moba.topk, scale, fused)
