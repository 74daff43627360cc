"""Which bytes of a rank's tensors go where, as rectangles that a copy engine moves: plans of :mod:`.peers`.

Rows that leave are written to the receiver's staging memory, contiguous, and moved from there to their place. Staging
is small: an exchange is cut into pieces, each of which fits into a share of it. All ranks cut alike.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .rows import Rows

ALIGNMENT = 128
"""Rectangles begin at multiples of so many bytes of staging."""
LONGEST_ROW = 1 << 30
"""Bytes of a row of a rectangle, at most: the driver's pitch is below 2 GiB."""


class Copy(NamedTuple):
    """``rows`` of ``width`` bytes between two tensors, or a tensor and staging memory; offsets and pitches in bytes.

    Tensors are named by their numbers, rank r's staging memory is ``-1 - r``.
    """

    source: int
    source_offset: int
    source_pitch: int
    target: int
    target_offset: int
    target_pitch: int
    rows: int
    width: int


class Piece(NamedTuple):
    """What is staged at a time: what goes to other ranks' staging memory, and what leaves this one's for its place."""

    push: tuple[Copy, ...]
    place: tuple[Copy, ...]


class Plan(NamedTuple):
    """An exchange of one rank: copies between its own tensors, and pieces."""

    own: tuple[Copy, ...]
    pieces: tuple[Piece, ...]


class Pair(NamedTuple):
    """A tensor ``[S, h, D]`` in global order and its rows where they are one rank's: ``[parts, T, h, D]``, in bytes.

    Args:
        width: of a row of ``[h, D]``, contiguous in both.
        whole_pitch: between rows of the former.
        parts, part_step, pitch: of the latter: parts, bytes between parts, between rows.
    """

    width: int
    whole_pitch: int
    parts: int
    part_step: int
    pitch: int


class Exchange(NamedTuple):
    """What plans depend on.

    Args:
        size, rank, local, runs: of :class:`~.rows.Rows`.
        pairs: tensors that travel together; parts ``2 i`` and ``2 i + 1`` of the exchange's tensors are pair i's.
        back: from global order to the ranks' rows, not the other way.
        others_only: parts are the other ranks', and what is this rank's own stays where it is.
        share: bytes of staging memory for what one rank sends another in a piece.
    """

    size: int
    rank: int
    local: int
    runs: tuple[tuple[int, ...], ...]
    pairs: tuple[Pair, ...]
    back: bool
    others_only: bool
    share: int


class _End(NamedTuple):
    """Where the first row of some is, in a tensor."""

    tensor: int
    offset: int
    pitch: int

    def skip(self, rows: int) -> "_End":
        return self._replace(offset=self.offset + rows * self.pitch)


class _Transfer(NamedTuple):
    """Rows that go from ``sends[r]`` to rank r and that come from it to ``receives[r]``."""

    rows: int
    width: int
    sends: tuple[_End, ...]
    receives: tuple[_End, ...]


def rows_are_whole(x: Tensor) -> bool:
    """Whether each ``[h, D]`` of ``[..., h, D]`` is contiguous, so that a rectangle is made of such rows."""
    return x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]


def pair_of(whole: Tensor, parts: Tensor) -> Pair:
    """Of ``[S, h, D]`` and ``[parts, T, h, D]``, rows of both whole."""
    item = whole.element_size()
    return Pair(whole.shape[1] * whole.shape[2] * item, whole.stride(0) * item, parts.shape[0], parts.stride(0) * item,
                parts.stride(1) * item)


def exchange_of(rows: Rows, pairs: list[Pair], share: int, back: bool = False, others_only: bool = False) -> Exchange:
    """An exchange of those rows."""
    return Exchange(rows.size, rows.rank, rows.local, rows.runs, tuple(pairs), back, others_only, share)


def plan_exchange(e: Exchange) -> Plan:
    """The copies of one rank."""
    others = [rank for rank in range(e.size) if rank != e.rank]
    transfers, own = [], []
    for number, pair in enumerate(e.pairs):
        rows = e.local // len(e.runs)
        for run, firsts in enumerate(e.runs):
            whole = tuple(_End(2 * number, first * pair.whole_pitch, pair.whole_pitch) for first in firsts)
            parts = tuple(_End(2 * number + 1, _part(e, pair, rank) * pair.part_step + run * rows * pair.pitch,
                               pair.pitch) for rank in range(e.size))
            sends, receives = (whole, parts) if e.back else (parts, whole)
            transfers.append(_Transfer(rows, pair.width, sends, receives))
            own.append(Copy(*sends[e.rank], *receives[e.rank], rows, pair.width))
    pieces = []
    for staged in _cut(transfers, e.share):
        push = [Copy(*t.sends[rank], -1 - rank, _place_among_others(e.rank, rank) * e.share + at, t.width, t.rows,
                     t.width) for rank in others for at, t in staged]
        place = [Copy(-1 - e.rank, _place_among_others(rank, e.rank) * e.share + at, t.width, *t.receives[rank], t.rows,
                      t.width) for rank in others for at, t in staged]
        pieces.append(Piece(_simplify(push), _simplify(place)))
    return Plan(() if e.others_only else _simplify(own), tuple(pieces))


def _part(e: Exchange, pair: Pair, rank: int) -> int:
    """Which part is a rank's; neighbours share one where parts are fewer than ranks."""
    return _place_among_others(rank, e.rank) if e.others_only else rank * pair.parts // e.size


def _place_among_others(rank: int, me: int) -> int:
    """A rank's number among all but ``me``."""
    return rank - (rank > me)


def _cut(transfers: list[_Transfer], share: int) -> list[list[tuple[int, _Transfer]]]:
    """Transfers in pieces, with offsets in the share of staging memory; long ones are cut between rows."""
    pieces, at = [[]], 0
    for t in transfers:
        done = 0
        while done < t.rows:
            fitting = min(t.rows - done, (share - at) // t.width)
            if not fitting:
                if not at:
                    raise ValueError(f"a row of {t.width} bytes does not fit into staging memory of {share} bytes")
                pieces.append([])
                at = 0
                continue
            pieces[-1].append((at, _Transfer(fitting, t.width, tuple(x.skip(done) for x in t.sends),
                                             tuple(x.skip(done) for x in t.receives))))
            done += fitting
            at = min(share, -(-(at + fitting * t.width) // ALIGNMENT) * ALIGNMENT)
    return [piece for piece in pieces if piece]


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
    return tuple(map(_one_row, joined))


def _one_row(c: Copy) -> Copy:
    """The same copy, as one row where rows touch each other."""
    size = c.rows * c.width
    if not c.width == c.source_pitch == c.target_pitch or size > LONGEST_ROW:
        return c
    return c._replace(source_pitch=size, target_pitch=size, rows=1, width=size)
