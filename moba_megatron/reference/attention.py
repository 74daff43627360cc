"""Attention over the selected chunks, reference: a masked softmax and its gradient by blocks of queries."""
import functools
import math

import torch
from torch import Tensor

from ..segments import Routing, Segments
from .chunk_means import accumulate_dtype

SCORE_ELEMENTS = 1 << 24  # attention scores held at once: bounds the memory of a block of queries


def in_own_precision(stage):
    """A stage that computes in its inputs' precision under autocast, too."""
    @functools.wraps(stage)
    def outside_autocast(first, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return stage(first, *args, **kwargs)

    return outside_autocast


@in_own_precision
def attention_fwd(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, segments: Segments, softmax_scale: float,
                  routing: Routing | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the diagonal chunk and the selected ones, keys at or before the query.

    Args:
        q, k, v: ``[T, H, D]``, ``[S, HK, D]``, ``[S, HK, DV]``.
        selected: int32 ``[T, H, topk - 1]`` chunk ids, -1 for none; or ``[T, HK, topk - 1]``, for all heads of a group.
        segments: places the queries among the keys.
        softmax_scale: multiplies the scores.
        routing: of ``selected``; not needed here, the kernels gather by it.

    Returns:
        o ``[T, H, DV]`` in q's dtype; lse ``[T, H]``, natural log, fp32 (fp64 for fp64); 0 and -inf for rows of no
        segment.
    """
    o = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, dtype=accumulate_dtype(q.dtype), device=q.device)
    for rows, keys, mask in _blocks(q, k, selected, segments):
        score = _scores(_grouped(q[rows], k), k[keys].to(lse.dtype), mask, softmax_scale)
        lse_rows = torch.logsumexp(score, dim=3)
        weight = torch.exp(score - lse_rows[..., None]).masked_fill(~mask, 0)
        o[rows] = _product("tjgs,sjd->tjgd", weight, v[keys].to(lse.dtype), mask).flatten(1, 2).to(q.dtype)
        lse[rows] = lse_rows.flatten(1, 2)
    return o, lse


@in_own_precision
def attention_bwd(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                  selected: Tensor, segments: Segments, softmax_scale: float, *, deterministic: bool = False,
                  kv_grad_dtype: torch.dtype | None = None,
                  routing: Routing | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_fwd`, one block of queries at a time.

    With ``p`` the softmax weights and ``delta = <do, o> - dlse``: ``dv = p^T do``, ``ds = p * (do v^T - delta)``,
    ``dq = scale * ds k``, ``dk = scale * ds^T q`` (a query's lse has the gradient ``p`` with respect to its scores).

    Args:
        do: ``[T, H, DV]``, gradient of o.
        dlse: ``[T, H]``, gradient of lse, or None.
        q, k, v, selected, segments, softmax_scale: as forward.
        o, lse: forward's results; lse decides the weights.
        kv_grad_dtype: dtype of dk and dv; k's and v's own by default.
        deterministic, routing: no effect here, the reference always is, and needs no lists.

    Returns:
        dq ``[T, H, D]``, dk ``[S, HK, D]``, dv ``[S, HK, DV]``; 0 for rows of no segment or sequence.
    """
    dtype = accumulate_dtype(q.dtype)
    delta = (do.to(dtype) * o.to(dtype)).sum(2) - (0 if dlse is None else dlse.to(dtype))
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=dtype, device=v.device)
    for rows, keys, mask in _blocks(q, k, selected, segments):
        q_rows, do_rows = _grouped(q[rows], k), _grouped(do[rows], k)
        k_rows, v_rows = k[keys].to(dtype), v[keys].to(dtype)
        weight = torch.exp(_scores(q_rows, k_rows, mask, softmax_scale) - _grouped(lse[rows], k)[..., None])
        weight = weight.masked_fill(~mask, 0)
        dv[keys] += _product("tjgs,tjgd->sjd", weight, do_rows, mask)
        dscore = torch.einsum("tjgd,sjd->tjgs", do_rows, v_rows)
        dscore = (weight * (dscore - _grouped(delta[rows], k)[..., None]) * softmax_scale).masked_fill(~mask, 0)
        dq[rows] = _product("tjgs,sjd->tjgd", dscore, k_rows, mask).flatten(1, 2).to(q.dtype)
        dk[keys] += _product("tjgs,tjgd->sjd", dscore, q_rows, mask)
    return dq, dk.to(kv_grad_dtype or k.dtype), dv.to(kv_grad_dtype or v.dtype)


def _blocks(q: Tensor, k: Tensor, selected: Tensor, segments: Segments):
    """Yields (rows of q, rows of k, mask ``[rows, HK, H / HK, keys]``) for blocks of queries within one segment."""
    size = segments.chunk_size
    cu_q, cu_k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    for segment, (sequence, offset) in enumerate(zip(segments.seq_ids.tolist(), segments.offsets.tolist())):
        first_key, begin, end = cu_k[sequence], cu_q[segment], cu_q[segment + 1]
        first_chunk = first_key // size + sequence
        while begin < end:
            position = offset + begin - cu_q[segment]
            # at most SCORE_ELEMENTS scores: rows * (position + rows) * heads
            number = (math.isqrt(position * position + 4 * (SCORE_ELEMENTS // q.shape[1])) - position) // 2
            rows = slice(begin, min(begin + max(1, number), end))
            keys = slice(first_key, first_key + position + rows.stop - rows.start)
            query_position = position + torch.arange(rows.stop - rows.start, device=q.device)
            key_position = torch.arange(keys.stop - keys.start, device=q.device)
            # a table of the chunks up to the last query's own, and one for those that are none
            last_own = (position + rows.stop - rows.start - 1) // size
            chosen = torch.zeros(*selected[rows].shape[:2], last_own + 2, dtype=torch.bool, device=q.device)
            chosen.scatter_(2, torch.where(selected[rows] < 0, last_own + 1, selected[rows].long() - first_chunk), True)
            chosen = chosen.repeat_interleave(q.shape[1] // chosen.shape[1], 1)[:, :, key_position // size]
            own = query_position[:, None] // size == key_position[None] // size
            causal = key_position[None] <= query_position[:, None]
            yield rows, keys, ((chosen | own[:, None]) & causal[:, None]).unflatten(1, (k.shape[1], -1))
            begin = rows.stop


def _product(equation: str, weight: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """An einsum of weights, 0 outside the mask, with rows: a NaN or inf reaches only what the mask joins it to, and the
    result is NaN there. A plain product would spread it: 0 * NaN is NaN."""
    bad = ~x.isfinite()
    if not bad.any():
        return torch.einsum(equation, weight, x)
    reached = torch.einsum(equation, mask.to(x.dtype), bad.to(x.dtype)) > 0
    return torch.einsum(equation, weight, x.masked_fill(bad, 0)).masked_fill(reached, torch.nan)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """``[rows, H, ...]`` as ``[rows, HK, H / HK, ...]``, in the accumulation dtype."""
    return x.to(accumulate_dtype(x.dtype)).unflatten(1, (k.shape[1], -1))


def _scores(q: Tensor, k: Tensor, mask: Tensor, softmax_scale: float) -> Tensor:
    """Scaled scores ``[rows, HK, H / HK, keys]`` of grouped queries, -inf outside the mask of the same shape."""
    return (torch.einsum("tjgd,sjd->tjgs", q, k) * softmax_scale).masked_fill(~mask, -torch.inf)
