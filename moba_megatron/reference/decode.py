"""Decoding, reference: the caches gathered into packed sequences, then the stages of training with one query each."""
import torch
from torch import Tensor

from ..segments import uniform_segments
from .attention import attention_fwd
from .chunk_means import chunk_means
from .gating import gate


def cache_means(k_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int, *,
                block_table: Tensor | None = None, cache_starts: Tensor | None = None) -> None:
    """Writes the mean of every full chunk, the same bits as ``chunk_means``; rows of other chunks stay as they are.
    Args: as :func:`moba_megatron.ops.decode.moba_decode`, like those of the other stages."""
    for b, keys in enumerate(_sequences(k_cache, cache_seqlens, block_table, cache_starts)):
        full = keys.shape[0] // chunk_size
        means_cache[b, :full] = _means(keys, chunk_size)[:full]


def decode_gate(q: Tensor, k_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int, topk: int, *,
                block_table: Tensor | None = None, cache_starts: Tensor | None = None) -> Tensor:
    """The ``topk - 1`` best earlier chunks of each sequence's last position; completes ``means_cache`` on the way. The
    query stands at the last key. Where it opens a chunk, the mean of the chunk before is computed and stored. Ties go
    to the later chunk. A chunk whose score is NaN or -inf is never selected. Returns int32 ``[B, H, topk - 1]``: chunk
    numbers within the sequence, best first, -1 where fewer exist."""
    selected = torch.full((*q.shape[:2], topk - 1), -1, dtype=torch.int32, device=q.device)
    for b, keys in enumerate(_sequences(k_cache, cache_seqlens, block_table, cache_starts)):
        own, offset = divmod(keys.shape[0] - 1, chunk_size)
        if own > 0:
            if offset == 0:
                means_cache[b, own - 1] = _means(keys[-1 - chunk_size:-1], chunk_size)[0]
            segments = uniform_segments(1, keys.shape[0], 1, chunk_size, q.device)
            selected[b] = gate(q[b:b + 1], means_cache[b, :own], segments, topk)[0]
    return selected


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, selected: Tensor, cache_seqlens: Tensor,
                     chunk_size: int, softmax_scale: float, *, block_table: Tensor | None = None,
                     cache_starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of each sequence's last position to its own chunk and the ``selected`` ones of :func:`decode_gate`.
    Returns o ``[B, H, DV]`` in q's dtype and lse ``[B, H]``, natural log, fp32 (fp64 for fp64): 0 and -inf where there
    is no key."""
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    o = q.new_zeros(*q.shape[:2], v_cache.shape[3])
    k, v = (_sequences(x, cache_seqlens, block_table, cache_starts) for x in (k_cache, v_cache))
    for b, (keys, values) in enumerate(zip(k, v)):
        if keys.shape[0]:
            segments = uniform_segments(1, keys.shape[0], 1, chunk_size, q.device)
            o[b:b + 1], lse[b:b + 1] = attention_fwd(q[b:b + 1], keys, values, selected[b:b + 1], segments,
                                                     softmax_scale)
    return o, lse


def _sequences(cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, cache_starts: Tensor | None):
    """Yields the rows ``[length, HK, D]`` of each sequence."""
    starts = [0] * cache_seqlens.numel() if cache_starts is None else cache_starts.tolist()
    for b, (start, length) in enumerate(zip(starts, cache_seqlens.tolist())):
        if block_table is None:
            yield cache[b, start:start + length]
        else:
            row = torch.arange(start, start + length, device=cache.device)
            yield cache[block_table[b, row // cache.shape[1]].long(), row % cache.shape[1]]


def _means(keys: Tensor, chunk_size: int) -> Tensor:
    """Means of the chunks of one sequence's keys ``[length, HK, D]``, one more than are full."""
    return chunk_means(keys, uniform_segments(1, keys.shape[0], 1, chunk_size, keys.device))
