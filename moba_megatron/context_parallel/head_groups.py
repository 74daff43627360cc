"""Groups of heads that travel and are computed one after the other, so that one hides the other and memory is bounded."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .comm import Pending

HeadGroups = list[tuple[slice, slice]]
"""Query heads and kv heads of each group."""
LEAST_BYTES = 64 << 20
"""What a rank sends of a group, at least: below it launches cost more than overlap saves. Reckoned, not measured."""
MOST_BYTES = 1 << 30
"""What a rank holds of a group, at most, while groups have several kv heads."""


def number_of_groups(asked: int | None, kv_heads: int, sent: int, held: int, usual: int) -> int:
    """How many groups to make of ``kv_heads``.

    Args:
        asked: the user's number, or None.
        sent: bytes that a rank has to send in the forward pass, all heads together: its work grows with them.
        held: bytes that it then holds.
        usual: enough to hide most of it.
    """
    if asked is None:
        asked = max(min(usual, sent // LEAST_BYTES), -(-held // MOST_BYTES))
    return max(1, min(asked, kv_heads))


def split_heads(heads: int, kv_heads: int, number: int) -> HeadGroups:
    """The query heads and kv heads of each group; the first and the last group are the smallest.

    What the first one waits for and what the last one leaves behind is all that nothing hides.
    """
    if number > 2:
        end = max(1, kv_heads // (2 * number - 2))
        size, larger = divmod(kv_heads - 2 * end, number - 2)
        sizes = [end, *(size + (i < larger) for i in range(number - 2)), end]
    else:
        sizes = [kv_heads - kv_heads // number * (number - 1), *[kv_heads // number] * (number - 1)]
    per_kv, groups, begin = heads // kv_heads, [], 0
    for size in sizes:
        groups.append((slice(begin * per_kv, (begin + size) * per_kv), slice(begin, begin + size)))
        begin += size
    return groups


class Prefetch:
    """Starts the groups' communication in order, as far ahead as memory for the two largest groups allows.

    Args:
        start: starts the communication of group i.
        sizes: of the groups, in any unit.
    """

    def __init__(self, start: Callable[[int], tuple[Pending, ...]], sizes: list[int]):
        self._start, self._sizes = start, sizes
        self._limit = sum(sorted(sizes)[-2:])
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
