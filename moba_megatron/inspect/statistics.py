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
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .choices import Choices

NAMES = ("first_chunk", "imbalance", "entropy", "recall", "best_recall")
SCORE_ELEMENTS = 1 << 23
"""Attention scores held at once: bounds the memory of the recall."""


@dataclass(frozen=True)
class Tally:
    """What a rank has seen of a layer, in sums: tallies of context parallel ranks may be added.

    Args:
        chosen: fp64 ``[H, num_chunks]``, queries that chose the chunk.
        choosers: fp64 ``[num_chunks]``, queries with a choice, by their own chunk.
        recalled: fp64 ``[H, 2]``, recall and best recall, times this rank's queries with a choice.
        first: int64 ``[B]``, the first chunk of each sequence.
        topk: chunks a query attends to, its own included.
    """

    chosen: Tensor
    choosers: Tensor
    recalled: Tensor
    first: Tensor
    topk: int


@torch.no_grad()
def tally(choices: Choices, samples: int) -> Tally:
    """Counts a layer's choices and samples its recall, without a wait for the device.

    Args:
        choices: of this rank.
        samples: queries whose recall is computed; evenly spaced among those with a choice, all where there are no more.
    """
    own, earlier = choices.own_chunks()
    has_choice = earlier >= choices.topk
    chosen = choices.counts(torch.zeros_like(own), has_choice, 1)[:, 0]
    choosers = torch.zeros(choices.num_chunks, dtype=torch.float64, device=own.device)
    choosers.index_add_(0, own, has_choice.double())
    rows, weight = _sample(has_choice, samples)
    recall = torch.stack(recalls(choices, rows, own[rows]), dim=-1).double()  # [n, H, 2]
    mean = (recall * weight[:, None, None]).sum(0) / weight.sum().clamp(min=1)
    return Tally(chosen.double(), choosers, mean * choosers.sum(), choices.segments.first_chunk(), choices.topk)


def layer_statistics(tally: Tally) -> Tensor:
    """The statistics of a layer from the tally of all its queries: fp64 ``[H, len(NAMES)]``, on the CPU.

    NaN where no query has a choice. The host waits for the tally: sums along small tables are quicker here, and CUDA's
    cumulative ones refuse to run where a program asks for deterministic algorithms.
    """
    chosen, choosers, recalled, first = (x.cpu() for x in (tally.chosen, tally.choosers, tally.recalled, tally.first))
    even, choosable = _even_shares(choosers, first, tally.topk)
    number = choosers.sum()
    load = torch.where(choosable, chosen / torch.where(choosable, even, 1), 0)
    mean_load = chosen.sum(1) / even.sum()
    part = load / load.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(part, part).sum(1) / choosable.double().sum().log()
    first_chunk = chosen[:, first].sum(1) / number
    return torch.stack((first_chunk, load.amax(1) / mean_load, entropy, *(recalled / number).unbind(1)), dim=1)


def recalls(choices: Choices, rows: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Attention mass on the chosen chunks, and on the best possible ones, for some queries.

    Args:
        choices: of this rank.
        rows: int64 ``[n]``, rows of the queries.
        own: int64 ``[n]``, their own chunks' ids.

    Returns:
        two ``[n, H]``, in fp32 (fp64 for fp64 queries).
    """
    mass = attention_mass(choices, rows)
    own = own[:, None, None].expand(-1, mass.shape[1], 1)
    selected = choices.selected[rows].long()
    taken = torch.cat((mass, torch.zeros_like(mass[..., :1])), dim=2).gather(
        2, torch.where(selected < 0, mass.shape[2], selected))
    own_mass = mass.gather(2, own)[..., 0]
    others = mass.scatter(2, own, 0)
    best = others.topk(min(choices.topk - 1, others.shape[2]), dim=2).values
    return own_mass + taken.sum(2), own_mass + best.sum(2)


def attention_mass(choices: Choices, rows: Tensor) -> Tensor:
    """Softmax weights of full causal attention, summed over each chunk, for some queries.

    Args:
        choices: of this rank.
        rows: int64 ``[n]``, rows of the queries.

    Returns:
        ``[n, H, num_chunks]``, rows that sum to 1; fp32 (fp64 for fp64 queries).
    """
    q, k, segments = choices.q[rows], choices.k, choices.segments
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = (q.to(dtype) * choices.softmax_scale).unflatten(1, (k.shape[1], -1))
    sequence, position = (x[rows] for x in segments.query_positions(choices.q.shape[0]))
    key_sequence, key_position = segments.key_positions(k.shape[0])
    chunk = segments.first_chunk()[key_sequence] + key_position // segments.chunk_size
    n, heads = q.shape[0], choices.q.shape[1]
    mass = torch.zeros(n, heads, choices.num_chunks, dtype=dtype, device=q.device)
    largest = torch.full((n, heads, 1), -torch.inf, dtype=dtype, device=q.device)
    step = max(1, SCORE_ELEMENTS // max(1, n * heads))
    for begin in range(0, k.shape[0], step):
        keys = slice(begin, begin + step)
        seen = (key_sequence[keys] == sequence[:, None]) & (key_position[keys] <= position[:, None])
        score = torch.einsum("nkgd,skd->nkgs", q, k[keys].to(dtype)).flatten(1, 2)
        score = score.masked_fill(~seen[:, None], -torch.inf)
        before, largest = largest, torch.maximum(largest, score.amax(2, keepdim=True))
        safe = torch.where(largest == -torch.inf, 0, largest)  # no key of this sequence so far
        mass *= torch.exp(before - safe)
        mass.index_add_(2, chunk[keys], torch.exp(score - safe))
    return mass / mass.sum(2, keepdim=True)


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
    """How many choices each chunk would get if all queries spread them evenly, and whether any query may choose it.

    Args:
        choosers: fp64 ``[num_chunks]``, queries with a choice by their own chunk.
        first: int64 ``[B]``, the first chunk of each sequence.
        topk: chunks a query attends to, its own included.

    Returns:
        fp64 and bool ``[num_chunks]``.
    """
    ids = torch.arange(choosers.shape[0], device=choosers.device)
    sequence = torch.searchsorted(first, ids, right=True) - 1
    last = torch.cat((first[1:], first.new_full((1,), choosers.shape[0])))[sequence] - 1
    spread = choosers * (topk - 1) / (ids - first[sequence]).clamp(min=1)

    def later(x: Tensor) -> Tensor:
        total = x.cumsum(0)
        return total[last] - total

    choosable = later(choosers) > 0
    return torch.where(choosable, later(spread), 0), choosable
