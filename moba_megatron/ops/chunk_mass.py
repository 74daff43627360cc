"""The mass that dense attention puts on each chunk: what a router should find, and may be trained towards."""
import torch
from torch import Tensor

from ..segments import Segments
from . import validation

SCORE_ELEMENTS = 1 << 23
"""Attention scores held at once."""


@torch.no_grad()
def chunk_mass(q: Tensor, k: Tensor, segments: Segments, rows: Tensor | None = None, *,
               softmax_scale: float | None = None) -> Tensor:
    """Softmax weights of full causal attention, summed over each chunk; in blocks, never the whole matrix. No gradient.

    Args:
        q, k, segments, softmax_scale: as :func:`moba_attention`.
        rows: int64 ``[n]``, queries to look at; None for all.

    Returns:
        ``[n, H, chunks]``, fp32 (fp64 for fp64), rows that sum to 1; columns are ids of chunks.

    Raises:
        TypeError, ValueError: as :func:`moba_attention`.
    """
    validation.check_qkv(q, k, k)
    segments = validation.check_segments(segments, q.shape[0], k.shape[0], q.device)
    scale = validation.check_scale(softmax_scale, q.shape[2])
    rows = torch.arange(q.shape[0], device=q.device) if rows is None else rows
    place, block = segments.query_positions(q.shape[0]), max(1, SCORE_ELEMENTS // (q.shape[1] * segments.chunk_size))
    return torch.cat([_mass(q[part], k, segments, *(x[part] for x in place), scale) for part in rows.split(block)])


def _mass(q: Tensor, k: Tensor, segments: Segments, sequence: Tensor, position: Tensor, scale: float) -> Tensor:
    """Of queries ``[n, H, D]`` that stand at such positions of such sequences."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = (q.to(dtype) * scale).unflatten(1, (k.shape[1], -1))
    key_sequence, key_position = segments.key_positions(k.shape[0])
    chunk = segments.first_chunk()[key_sequence] + key_position // segments.chunk_size
    n, heads = q.shape[0], q.shape[1] * q.shape[2]
    mass = torch.zeros(n, heads, segments.num_chunks(k.shape[0]), dtype=dtype, device=q.device)
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
