"""The mass that dense attention puts on each chunk: what a router should find, and may be trained towards."""
import torch
from torch import Tensor

from ..reference.attention import in_own_precision
from ..segments import Segments
from . import validation

SCORE_ELEMENTS = 1 << 23  # attention scores held at once
_scores = in_own_precision(lambda q, k: torch.einsum("nkgd,skd->nkgs", q, k).flatten(1, 2))


@torch.no_grad()
def chunk_mass(q: Tensor, k: Tensor, segments: Segments, rows: Tensor | None = None, *,
               softmax_scale: float | None = None) -> Tensor:
    """Softmax weights of full causal attention, summed over each chunk; in blocks, never the whole matrix. No gradient.

    Args:
        q, k, segments, softmax_scale: as :func:`moba_attention`, and what it raises.
        rows: int64 ``[n]``, queries to look at; None for all.

    Returns:
        ``[n, H, chunks]`` by chunk id, fp32 (fp64 for fp64): rows sum to 1, or to 0 for rows of no sequence.
    """
    q, k = validation.cast_under_autocast(q, k)
    validation.check_qkv(q, k, k)
    segments = validation.check_segments(segments, q.shape[0], k.shape[0], q.device)
    scale = validation.check_scale(softmax_scale, q.shape[2])
    rows = torch.arange(q.shape[0], device=q.device) if rows is None else rows
    sequence, position = segments.query_positions(q.shape[0])
    key_sequence, key_position = segments.key_positions(k.shape[0])
    sequence.masked_fill_(torch.arange(q.shape[0], device=q.device) >= segments.cu_seqlens_q[-1], -1)
    chunk = segments.first_chunk()[key_sequence.clamp(max=segments.num_sequences - 1)]
    chunk, heads = chunk + key_position // segments.chunk_size, q.shape[1]
    dtype, masses = torch.promote_types(q.dtype, torch.float32), []
    for part in rows.split(max(1, SCORE_ELEMENTS // (heads * segments.chunk_size))):
        queries = (q[part].to(dtype) * scale).unflatten(1, (k.shape[1], -1))
        mass = torch.zeros(len(part), heads, segments.num_chunks(k.shape[0]), dtype=dtype, device=q.device)
        largest = torch.full((len(part), heads, 1), torch.finfo(dtype).min, dtype=dtype, device=q.device)
        step = max(1, SCORE_ELEMENTS // max(1, len(part) * heads))
        for begin in range(0, k.shape[0], step):
            keys = slice(begin, begin + step)
            seen = (key_sequence[keys] == sequence[part, None]) & (key_position[keys] <= position[part, None])
            score = _scores(queries, k[keys].to(dtype)).masked_fill(~seen[:, None], -torch.inf)
            before, largest = largest, torch.maximum(largest, score.amax(2, keepdim=True))
            mass *= torch.exp(before - largest)
            mass.index_add_(2, chunk[keys], torch.exp(score - largest))
        masses.append(mass / mass.sum(2, keepdim=True).clamp(min=torch.finfo(dtype).tiny))
    return torch.cat(masses)
