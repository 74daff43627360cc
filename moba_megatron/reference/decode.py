"""Decoding, reference: the caches gathered into packed sequences, then the stages of training with one query each."""
import torch
from torch import Tensor

from ..segments import Segments
from .attention import attention_fwd
from .chunk_means import chunk_means
from .gating import gate


def cache_means(k_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int, *,
                block_table: Tensor | None = None, cache_starts: Tensor | None = None) -> None:
    """Writes the mean of every full chunk, the same bits as ``chunk_means``; rows of other chunks stay as they are.

    Args: as :func:`moba_megatron.ops.decode.moba_decode`, like those of the other stages.
    """
    for b, keys in enumerate(_sequences(k_cache, cache_seqlens, block_table, cache_starts)):
        _write_means(means_cache[b], keys, range(keys.shape[0] // chunk_size), chunk_size)


def decode_gate(q: Tensor, k_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int, topk: int, *,
                block_table: Tensor | None = None, cache_starts: Tensor | None = None) -> Tensor:
    """The ``topk - 1`` best earlier chunks of each sequence's last position; completes ``means_cache`` on the way.

    The query stands at the last key. Where it opens a chunk, the mean of the chunk before is computed and stored.
    Ties go to the later chunk. A chunk whose score is NaN or -inf is never selected.

    Returns:
        int32 ``[B, H, topk - 1]``: chunk numbers within the sequence, best first, -1 where fewer exist.
    """
    selected = torch.full((*q.shape[:2], topk - 1), -1, dtype=torch.int32, device=q.device)
    for b, keys in enumerate(_sequences(k_cache, cache_seqlens, block_table, cache_starts)):
        own, offset = divmod(keys.shape[0] - 1, chunk_size)
        if own < 1:
            continue
        if offset == 0:
            _write_means(means_cache[b], keys, range(own - 1, own), chunk_size)
        selected[b] = gate(q[b:b + 1], means_cache[b, :own], _last_position(keys.shape[0], chunk_size, q), topk)[0]
    return selected


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, selected: Tensor, cache_seqlens: Tensor,
                     chunk_size: int, softmax_scale: float, *, block_table: Tensor | None = None,
                     cache_starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of each sequence's last position to its own chunk and the ``selected`` ones of :func:`decode_gate`.

    Returns:
        o ``[B, H, DV]`` in q's dtype; lse ``[B, H]``, natural log, fp32 (fp64 for fp64); o is 0 and lse -inf where
        there is no key.
    """
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    o = q.new_zeros(*q.shape[:2], v_cache.shape[3])
    k, v = (_sequences(x, cache_seqlens, block_table, cache_starts) for x in (k_cache, v_cache))
    for b, (keys, values) in enumerate(zip(k, v)):
        if keys.shape[0]:
            segments = _last_position(keys.shape[0], chunk_size, q)
            o[b:b + 1], lse[b:b + 1] = attention_fwd(q[b:b + 1], keys, values, selected[b:b + 1], segments,
                                                     softmax_scale)
    return o, lse


def _last_position(length: int, chunk_size: int, like: Tensor) -> Segments:
    """One query at the end of one sequence."""
    def whole(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=like.device)

    return Segments(whole(0, 1), whole(0, length), whole(0), whole(length - 1), 1, length, chunk_size)


def _sequences(cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, cache_starts: Tensor | None):
    """Yields the rows ``[length, HK, D]`` of each sequence."""
    starts = [0] * cache_seqlens.numel() if cache_starts is None else cache_starts.tolist()
    for b, (start, length) in enumerate(zip(starts, cache_seqlens.tolist())):
        if block_table is None:
            yield cache[b, start:start + length]
        else:
            row = torch.arange(start, start + length, device=cache.device)
            yield cache[block_table[b, row // cache.shape[1]].long(), row % cache.shape[1]]


def _write_means(means: Tensor, keys: Tensor, chunks: range, chunk_size: int) -> None:
    """Means ``[chunks, HK, D]`` of some chunks of one sequence's keys, in place."""
    keys = keys[chunks.start * chunk_size:chunks.stop * chunk_size]
    if chunks:
        means[chunks.start:chunks.stop] = chunk_means(keys, _last_position(len(keys), chunk_size, keys))[:len(chunks)]
