"""How much scratch memory a stage may take: the byte limit, and the groups of kv heads that keep within it."""
from __future__ import annotations

import os
import threading

DEFAULT_MIB = 1024
"""At 128K tokens, 16 heads of 128, topk 8, bf16: four heads' partial results at a time in the forward."""



class _Given(threading.local):
    mib: float | None = None


given = _Given()
"""This thread's limit in MiB, which comes before the environment's; None for none."""


def workspace_limit() -> int:
    """The limit in bytes: what is ``given``, else MOBA_WORKSPACE_MIB, else 1024 MiB.

    Raises:
        ValueError: MOBA_WORKSPACE_MIB is not a positive number.
    """
    if given.mib is not None:
        return int(given.mib * (1 << 20))
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
    """Ranges ``[begin, end)`` of kv heads to run one after the other, of nearly equal size, the first the largest.

    ``limit``: bytes for a group; None for :func:`workspace_limit`. One head runs even where it needs more.
    """
    limit = workspace_limit() if limit is None else limit
    together = max(1, min(num_kv_heads, limit // max(1, bytes_per_kv_head)))
    groups = -(-num_kv_heads // together)
    size, larger = divmod(num_kv_heads, groups)
    bounds = [i * size + min(i, larger) for i in range(groups + 1)]
    return list(zip(bounds, bounds[1:]))
