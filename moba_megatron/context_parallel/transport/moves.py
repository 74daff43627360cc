"""Which bytes of a rank's tensors go where, as rectangles that a copy engine moves: plans of :mod:`.peers`."""
from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .rows import Rows

LONGEST_ROW = 1 << 30  # bytes of a row of a rectangle, at most: the driver's pitch is below 2 GiB


class Copy(NamedTuple):
    """``rows`` of ``width`` bytes between two tensors, which are named by numbers; offsets and pitches in bytes."""

    source: int
    source_offset: int
    source_pitch: int
    target: int
    target_offset: int
    target_pitch: int
    rows: int
    width: int


class Plan(NamedTuple):
    """An exchange of one rank: copies between its own tensors, and those that it pushes into other ranks' tensors.

    Of n pairs this rank's tensors have the numbers 0 to ``2 n - 1``; then follow those of each other rank that are
    written, n for a rank, in the order of :func:`other_ranks`.
    """

    own: tuple[Copy, ...]
    push: tuple[Copy, ...]


class Pair(NamedTuple):
    """A tensor ``[S, h, D]`` in global order and its rows where they are one rank's: ``[parts, T, h, D]``, in bytes."""

    width: int  # of a row [h, D], contiguous in both
    whole_pitch: int  # between rows of the former
    parts: int  # of the latter; bytes between parts, between rows
    part_step: int
    pitch: int


class Exchange(NamedTuple):
    """What plans depend on. Tensors that are written have the same steps on every rank."""

    size: int  # of Rows, as the next three
    rank: int
    local: int
    runs: tuple[tuple[int, ...], ...]
    pairs: tuple[Pair, ...]  # tensors that travel together; numbers 2 i and 2 i + 1 are pair i's
    back: bool  # from global order to the ranks' rows, not the other way
    others_only: bool  # parts are the other ranks', and what is this rank's own stays where it is


def pair_of(whole: Tensor, parts: Tensor) -> Pair:
    """Of ``[S, h, D]`` and ``[parts, T, h, D]``, rows of both whole."""
    item = whole.element_size()
    return Pair(whole.shape[1] * whole.shape[2] * item, whole.stride(0) * item, parts.shape[0], parts.stride(0) * item,
                parts.stride(1) * item)


def exchange_of(rows: Rows, pairs: list[Pair], back: bool = False, others_only: bool = False) -> Exchange:
    """An exchange of those rows."""
    return Exchange(rows.size, rows.rank, rows.local, rows.runs, tuple(pairs), back, others_only)


def what_ranks_expect(e: Exchange) -> str:
    """What decides where a rank writes into others' tensors, as text; sources may lie otherwise on each rank."""
    tensors = [f"{p.width} bytes a row in {p.parts} parts"
               + (f" {p.part_step} apart, rows {p.pitch} apart" if e.back else f", rows {p.whole_pitch} apart")
               for p in e.pairs]
    return (f"{e.local} rows a rank, runs at {e.runs}, {'; '.join(tensors)}" + ", to their rank" * e.back
            + ", but its own" * e.others_only)


def other_ranks(rank: int, size: int) -> list[int]:
    """All but this one, the next one first: no two ranks begin with the same."""
    return [(rank + i) % size for i in range(1, size)]


def plan_exchange(e: Exchange) -> Plan:
    """The copies of one rank."""
    push = [_copy(e, number, run, rank) for rank in other_ranks(e.rank, e.size) for number in range(len(e.pairs))
            for run in range(len(e.runs))]
    own = [] if e.others_only else [_copy(e, number, run, e.rank) for number in range(len(e.pairs))
                                    for run in range(len(e.runs))]
    return Plan(_simplify(own), _simplify(push))


def _copy(e: Exchange, number: int, run: int, receiver: int) -> Copy:
    """One run of rows of a pair, from this rank to another one or to itself."""
    pair, rows = e.pairs[number], e.local // len(e.runs)
    whole, part = (2 * number, pair.whole_pitch), (2 * number + 1, pair.pitch)
    inside = run * rows * pair.pitch
    if e.back:
        source = whole[0], e.runs[run][receiver] * pair.whole_pitch, whole[1]
        target = part[0], _part(e, pair, e.rank, receiver) * pair.part_step + inside, part[1]
    else:
        source = part[0], _part(e, pair, receiver, e.rank) * pair.part_step + inside, part[1]
        target = whole[0], e.runs[run][e.rank] * pair.whole_pitch, whole[1]
    if receiver != e.rank:
        theirs = 2 * len(e.pairs) + other_ranks(e.rank, e.size).index(receiver) * len(e.pairs) + number
        target = theirs, *target[1:]
    return Copy(*source, *target, rows, pair.width)


def _part(e: Exchange, pair: Pair, rank: int, owner: int) -> int:
    """Which of ``owner``'s parts is a rank's; neighbours share one where parts are fewer than ranks."""
    return rank - (rank > owner) if e.others_only else rank * pair.parts // e.size


def _simplify(copies: list[Copy]) -> tuple[Copy, ...]:
    """The same copies as few as they can be: neighbours joined, and rows that touch each other made one row."""
    joined = []
    for c in copies:
        last = joined[-1] if joined else None
        if last is not None and c == last._replace(source_offset=last.source_offset + last.rows * last.source_pitch,
                                                   target_offset=last.target_offset + last.rows * last.target_pitch,
                                                   rows=c.rows):
            joined[-1] = last._replace(rows=last.rows + c.rows)
        else:
            joined.append(c)
    for i, c in enumerate(joined):
        size = c.rows * c.width
        if c.width == c.source_pitch == c.target_pitch and size <= LONGEST_ROW:
            joined[i] = c._replace(source_pitch=size, target_pitch=size, rows=1, width=size)
    return tuple(joined)
