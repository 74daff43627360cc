"""The router's statistics and their definitions, computed on the device from a layer's choices.

All are over the queries that have a choice: those with more earlier chunks than the ``topk - 1`` they may take. Chunks
of different sequences are different chunks. Each is a number a head.

first_chunk     share of the queries that choose the first chunk of their sequence (the "sink")
imbalance       the largest load of a chunk over the mean load, 1 where all are equal. A chunk's load is the number of
                queries that choose it over its even share, the number that would if each query spread its ``topk - 1``
                choices evenly over the chunks it may choose: early chunks may be chosen by more queries, and this does
                not count as imbalance. The mean load is all choices over all even shares.
entropy         ``-sum(p log p) / log n`` over the n chunks that some query may choose, ``p`` a chunk's part of the sum
                of loads: 1 where all loads are equal, 0 where one chunk takes all
recall          the attention mass that full causal attention puts on the chosen chunks, the own chunk included: mean
                over a sample of the queries, exact for each of them
best_recall     the same for the best possible choice, the ``topk - 1`` earlier chunks with the largest mass
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import chunk_mass
from ..segments import Segments
from .choices import Choices

NAMES = ("first_chunk", "imbalance", "entropy", "recall", "best_recall")


@dataclass(frozen=True)
class Places:
    """Where the queries lie, and which of them are sampled: the same for every layer with these segments."""

    segments: Segments  # of the queries
    topk: int  # chunks a query attends to, its own included
    samples: int  # queries whose recall was asked for
    counted: Tensor  # int64 `[T]`, 0 for queries with a choice and -1 for the others
    choosers: Tensor  # fp64 `[num_chunks]`, queries with a choice, by their own chunk
    first: Tensor  # int64 `[B]`, the first chunk of each sequence
    # of the sampled queries int64 `[n]` each: row, own chunk's id, sequence, position in it
    sampled: tuple[Tensor, Tensor, Tensor, Tensor]
    weight: Tensor  # fp64 `[n]`, 1 for sampled queries that have a choice, else 0

    @classmethod
    @torch.no_grad()
    def of(cls, choices: Choices, samples: int) -> "Places":
        """The places of a layer's queries; ``samples`` of those with a choice, evenly spaced (all of fewer)."""
        segments = choices.segments
        sequence, position = segments.query_positions(choices.q.shape[0])
        earlier, first = position // segments.chunk_size, segments.first_chunk()
        own, has_choice = first[sequence] + earlier, earlier >= choices.topk
        choosers = has_choice.new_zeros(choices.num_chunks, dtype=torch.float64).index_add_(0, own, has_choice.double())
        rows, weight = _sample(has_choice, samples)
        return cls(segments, choices.topk, samples, has_choice.long() - 1, choosers, first,
                   (rows, own[rows], sequence[rows], position[rows]), weight)

    def serve(self, choices: Choices, samples: int) -> bool:
        """Whether these are the places of this layer's queries too."""
        mine, other = self.segments, choices.segments
        same = mine is other or (mine.packed and other.packed and mine.cu_seqlens_k is other.cu_seqlens_k
                                 and mine.chunk_size == other.chunk_size)
        return (same and self.topk == choices.topk and self.samples == samples
                and self.counted.shape[0] == choices.q.shape[0] and self.choosers.shape[0] == choices.num_chunks)


@dataclass(frozen=True)
class Tally:
    """What a rank has seen of a layer."""

    chosen: Tensor  # int64 `[H, num_chunks]`, queries that chose the chunk, of those with a choice
    recall: Tensor  # `[n, H, 2]`, recall and best recall of the sampled queries
    places: Places  # of the queries


@torch.no_grad()
def tally(choices: Choices, places: Places) -> Tally:
    """Counts a layer's choices and computes the recall of the sampled queries, without a wait for the device."""
    if choices.fused:
        from . import kernels
        recall = kernels.recalls(choices.q, choices.k, choices.selected, choices.segments, choices.softmax_scale,
                                 *places.sampled)
    else:
        recall = torch.stack(recalls(choices, *places.sampled), dim=-1)
    return Tally(choices.counts(places.counted, 1)[:, 0], recall, places)


@torch.no_grad()
def sums(tallies: list[Tally]) -> Tensor:
    """Tallies of layers with the same places as fp64 sums in one tensor, which context parallel ranks may add up:
    choosers, for each layer the choices (flattened), for each layer recall and best recall of each head times this
    rank's queries with a choice."""
    places = tallies[0].places
    chosen = torch.stack([seen.chosen for seen in tallies]).double()
    recall = torch.stack([seen.recall for seen in tallies]).double()  # [L, n, H, 2]
    mean = (recall * places.weight[:, None, None]).sum(1) / places.weight.sum().clamp(min=1)
    return torch.cat((places.choosers, chosen.flatten(), (mean * places.choosers.sum()).flatten()))


def layer_statistics(total: Tensor, first: Tensor, topk: int, layers: int, num_chunks: int) -> Tensor:
    """The statistics of so many layers from ``total``, :func:`sums` over all context parallel ranks: fp64
    ``[L, H, len(NAMES)]``, NaN where no query has a choice. On the CPU, where sums along small tables are quicker, and
    which has cumulative ones where a program asks for deterministic algorithms."""
    heads = (total.numel() - num_chunks) // (layers * (num_chunks + 2))
    choosers, chosen, recalled = total.split((num_chunks, layers * heads * num_chunks, layers * heads * 2))
    chosen, recalled = chosen.view(layers, heads, num_chunks), recalled.view(layers, heads, 2)
    even, choosable = _even_shares(choosers, first, topk)
    number = choosers.sum()
    load = torch.where(choosable, chosen / torch.where(choosable, even, 1), 0)
    mean_load = chosen.sum(2) / even.sum()
    part = load / load.sum(2, keepdim=True)
    entropy = -torch.special.xlogy(part, part).sum(2) / choosable.double().sum().log()
    first_chunk = chosen[..., first].sum(2) / number
    return torch.stack((first_chunk, load.amax(2) / mean_load, entropy, *(recalled / number).unbind(2)), dim=2)


def recalls(choices: Choices, rows: Tensor, own: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mass on the chosen chunks, and on the best possible ones, for n queries, given their rows and own
    chunks' ids: two ``[n, H]``, in fp32 (fp64 for fp64 queries)."""
    mass = chunk_mass(choices.q, choices.k, choices.segments, rows, softmax_scale=choices.softmax_scale)
    own = own[:, None, None].expand(-1, mass.shape[1], 1)
    selected = choices.selected[rows].long()
    taken = torch.cat((mass, torch.zeros_like(mass[..., :1])), dim=2).gather(
        2, torch.where(selected < 0, mass.shape[2], selected))
    own_mass = mass.gather(2, own)[..., 0]
    others = mass.scatter(2, own, 0)
    return own_mass + taken.sum(2), own_mass + others.topk(min(choices.topk - 1, others.shape[2]), dim=2).values.sum(2)


def _sample(has_choice: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Rows of at most ``samples`` queries, evenly spaced among those with a choice, and 1 for each that is one."""
    total = has_choice.shape[0]
    if total <= samples:
        return torch.arange(total, device=has_choice.device), has_choice.double()
    upto = has_choice.cumsum(0)
    wanted = (torch.arange(samples, device=has_choice.device) + 0.5) * upto[-1] / samples
    rows = torch.searchsorted(upto, wanted.long() + 1).clamp(max=total - 1)
    return rows, has_choice[rows].double()


def _even_shares(choosers: Tensor, first: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """How many choices each chunk would get if all queries spread them evenly, and whether any query may choose it:
    fp64 and bool ``[num_chunks]``. ``choosers`` and ``first`` as in :class:`Places`."""
    ids = torch.arange(choosers.shape[0], device=choosers.device)
    sequence = torch.searchsorted(first, ids, right=True) - 1
    last = torch.cat((first[1:], first.new_full((1,), choosers.shape[0])))[sequence] - 1
    spread = choosers * (topk - 1) / (ids - first[sequence]).clamp(min=1)
    total = torch.stack((choosers, spread)).cumsum(1)
    later, later_shares = total[:, last] - total
    return torch.where(later > 0, later_shares, 0), later > 0
