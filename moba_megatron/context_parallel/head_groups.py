"""Groups of heads that travel and are computed one after the other: one hides the other, and memory is bounded."""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
HeadGroups = tuple[tuple[slice, slice], ...]
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
    return tuple(groups)


@functools.lru_cache(maxsize=256)
def head_groups(asked: int | None, heads: int, kv_heads: int, queries: int, held: int) -> HeadGroups:
    """:func:`split_heads` into :func:`number_of_groups`."""
    return split_heads(heads, kv_heads, number_of_groups(asked, kv_heads, queries, held))


def most_heads(groups: HeadGroups) -> tuple[int, int]:
    """Query heads and kv heads of the largest group."""
    return tuple(max(x.stop - x.start for x in which) for which in zip(*groups))


def prefetch(start: Callable[[int], T], number: int) -> Iterator[T]:
    """``start(i)`` for each i: of the first two at once, of another when the one before it is asked for.

    What was got from the one before that must have been let go of: memory for two is enough.
    """
    ahead = [start(i) for i in range(min(2, number))]

    def each() -> Iterator[T]:
        for i in range(number):
            if 1 <= i < number - 1:
                ahead.append(start(i + 1))
            yield ahead.pop(0)

    return each()
