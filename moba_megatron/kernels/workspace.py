"""Scratch memory: how much a call may take, the groups of kv heads that keep within it, and where each tensor lies."""
import os

DEFAULT_MIB = 1024
"""At 128K tokens, 16 heads of 128, topk 8, bf16: four heads' partial results at a time in the forward."""
ALIGNMENT = 512  # of scratch tensors within the workspace, bytes: that of torch's own allocations


def workspace_limit() -> int:
    """The environment's limit in bytes: MOBA_WORKSPACE_MIB, else 1024 MiB; ValueError for no positive number."""
    text = os.environ.get("MOBA_WORKSPACE_MIB") or str(DEFAULT_MIB)
    try:
        mib = float(text)
    except ValueError:
        mib = -1.0
    if not 0 < mib < 1 << 40:
        raise ValueError(f"MOBA_WORKSPACE_MIB must be a positive number of MiB, got {text!r}: unset it for "
                         f"{DEFAULT_MIB}")
    return int(mib * (1 << 20))


def head_groups(num_kv_heads: int, bytes_per_kv_head: int, limit: int | None = None) -> list[tuple[int, int]]:
    """Ranges ``[begin, end)`` of kv heads to run one after the other, of nearly equal size, the first the largest; of
    ``limit`` bytes, None for the environment's. One head runs even where it needs more."""
    limit = workspace_limit() if limit is None else limit
    together = max(1, min(num_kv_heads, limit // max(1, bytes_per_kv_head)))
    groups = -(-num_kv_heads // together)
    size, larger = divmod(num_kv_heads, groups)
    bounds = [i * size + min(i, larger) for i in range(groups + 1)]
    return list(zip(bounds, bounds[1:]))


def plan_workspace(sizes: dict[int, int], spans: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Offsets of tensors in one block of memory, and its size: those in use at the same time do not overlap. ``sizes``:
    bytes of each; ``spans``: first and last step that uses each."""
    offsets: dict[int, int] = {}
    for number in sorted(sizes, key=sizes.get, reverse=True):
        first, last = spans[number]
        taken = sorted((offsets[n], offsets[n] + sizes[n]) for n in offsets
                       if spans[n][0] <= last and first <= spans[n][1])
        offset = 0
        for begin, end in taken:
            if offset + sizes[number] <= begin:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[number] = offset
    return offsets, max((offsets[n] + sizes[n] for n in sizes), default=0)
