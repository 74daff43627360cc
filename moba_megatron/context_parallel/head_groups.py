"""Groups of heads that travel and are computed one after the other: one hides the other, and memory is bounded."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .transport.comm import Pending

HeadGroups = list[tuple[slice, slice]]
"""Query heads and kv heads of each group."""
LEAST_BYTES = 64 << 20
"""Bytes of a rank's queries in a group, at least: a group costs the host a millisecond or two, there and back, and
below this the GPU (H200: 128K tokens on 2 ranks, 16 heads, chunks of 128) would wait for it. Reckoned from one run."""
MUCH_BYTES = 1 << 30
"""Bytes of a rank's queries from which on a group more is worth it, however few kv heads there are: 96.8 ms in 3
groups, 96.2 in 4 (98.9 in 2; 2 H200s, a2a, 512K tokens, 32:8 heads, chunks of 128)."""
MOST_BYTES = 1 << 30
"""Bytes that a rank holds of a group, at most, while groups have several kv heads."""


def number_of_groups(asked: int | None, kv_heads: int, queries: int, held: int) -> int:
    """How many groups to make of ``kv_heads``.

    Args:
        asked: the user's number, or None: 4 where there is enough work or heads for it, else 3, or fewer. More cost
            the kernels more than they hide: on 2 H200s, 128K tokens, 16 heads, chunks of 512, 19.6 ms of attention in
            3 groups, 20.6 in 5.
        queries: bytes of the rank's queries, a measure of its work.
        held: bytes of what has travelled, all heads together.
    """
    if asked is None:
        usual = 4 if kv_heads >= 8 or queries >= MUCH_BYTES else 3
        asked = max(min(queries // LEAST_BYTES, usual), -(-held // MOST_BYTES))
    return max(1, min(asked, kv_heads))


def split_heads(heads: int, kv_heads: int, number: int) -> HeadGroups:
    """The query heads and kv heads of each group; the first and the last have an eighth of the heads at most.

    What the first one waits for and what the last one leaves behind is all that nothing hides.
    """
    end = max(1, kv_heads // max(8, 2 * number - 2)) if number > 2 else -(-kv_heads // number)
    inner, rest = max(0, number - 2), kv_heads - 2 * end
    sizes = [end, *(rest // inner + (i < rest % inner) for i in range(inner)), end] if inner else [end, kv_heads - end]
    per_kv, groups, begin = heads // kv_heads, [], 0
    for size in sizes[:number]:
        groups.append((slice(begin * per_kv, (begin + size) * per_kv), slice(begin, begin + size)))
        begin += size
    return groups


class Prefetch:
    """Calls ``start(i)`` for each group i in order, as far ahead as memory for the two largest groups allows."""

    def __init__(self, start: Callable[[int], tuple[Pending, ...]], groups: HeadGroups):
        self._start, self._sizes = start, [kv_heads.stop - kv_heads.start for _, kv_heads in groups]
        self._limit = sum(sorted(self._sizes)[-2:])
        self._started, self._taken, self._waiting = 0, 0, deque()
        self._go_on()

    def take(self) -> tuple[Pending, ...]:
        """The next group's; the one taken before must have been let go of."""
        first, self._taken = self._waiting.popleft(), self._taken + 1
        self._go_on()
        return first

    def _go_on(self) -> None:
        using = max(0, self._taken - 1)
        while self._started < len(self._sizes) and sum(self._sizes[using:self._started + 1]) <= self._limit:
            self._waiting.append(self._start(self._started))
            self._started += 1
