"""How much scratch memory a stage may take: the byte limit, and the groups of kv heads that keep within it."""
from __future__ import annotations

import os
import threading

DEFAULT_MIB = 1024
"""At 128K tokens, 16 heads of 128, topk 8, bf16: four heads' partial results at a time in the forward."""

_given = threading.local()


def given_limit() -> float | None:
    """This thread's limit in MiB, which comes before the environment's; None for none."""
    return getattr(_given, "mib", None)


def give_limit(mib: float | None) -> None:
    """Sets :func:`given_limit`."""
    _given.mib = mib


def workspace_limit() -> int:
    """The limit in bytes: what :func:`give_limit` set, else MOBA_WORKSPACE_MIB, else 1024 MiB.

    Raises:
        ValueError: MOBA_WORKSPACE_MIB is not a positive number.
    """
    given = given_limit()
    if given is not None:
        return int(given * (1 << 20))
    text = os.environ.get("MOBA_WORKSPACE_MIB", "")
    if not text:
        return DEFAULT_MIB << 20
    try:
        mib = float(text)
    except ValueError:
        mib = -1.0
    if not 0 < mib < 1 << 40:
        raise ValueError(f"MOBA_WORKSPACE_MIB must be a positive number of MiB, got {text!r}: unset it for "
                         f"{DEFAULT_MIB}")
    return int(mib * (1 << 20))


def head_groups(num_kv_heads: int, bytes_per_kv_head: int, limit: int | None = None) -> list[tuple[int, int]]:
    """Ranges ``[begin, end)`` of kv heads to run one after the other, of nearly equal size.

    Args:
        num_kv_heads: heads to divide.
        bytes_per_kv_head: scratch memory that one of them needs.
        limit: bytes for a group; None for :func:`workspace_limit`. One head runs even where it needs more.

    Returns:
        Consecutive ranges that cover ``[0, num_kv_heads)``; the first is the largest.
    """
    limit = workspace_limit() if limit is None else limit
    together = max(1, min(num_kv_heads, limit // max(1, bytes_per_kv_head)))
    groups = -(-num_kv_heads // together)
    size, larger = divmod(num_kv_heads, groups)
    bounds = [i * size + min(i, larger) for i in range(groups + 1)]
    return list(zip(bounds, bounds[1:]))
