"""Attention of dispatched queries, each to all keys of the one chunk that it chose, and the merge of what comes back.

On CUDA the attention is torch's flash attention 2, with a chunk as a sequence, and the merge a kernel; elsewhere, and
for what these cannot take, plain torch.
"""
import torch
from torch import Tensor

from ..context_parallel.transport.comm import sum_dtype

FLASH_MAX_DIM = 256
LONGEST = 16384  # queries of a chunk in a sequence of flash attention: its backward walks through each in one line


def chunk_attention_fwd(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, most: int,
                        softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention, chunk after chunk.

    Args:
        q: ``[n, D]``, the queries of chunk 0, then of chunk 1, ...
        k, v: ``[B, chunk_size, D]``, ``[B, chunk_size, DV]``.
        cu_queries: int32 ``[B + 1]``, where each chunk's queries begin.
        most: queries of one chunk, upper bound.

    Returns:
        o ``[n, DV]`` in q's dtype; lse ``[n]``, natural log, fp32 (fp64 for fp64).
    """
    if q.shape[0] and _is_flash(q, v):
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            q[:, None], k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None], cu_queries, _key_starts(k), most,
            k.shape[1], 0.0, False, False, scale=softmax_scale)
        return o[:, 0], lse[0]
    o, lse = q.new_empty(q.shape[0], v.shape[2]), q.new_empty(q.shape[0], dtype=sum_dtype(q.dtype))
    for chunk, rows in _rows_by_chunk(cu_queries) if q.shape[0] else ():
        score = _scores(q[rows], k[chunk], softmax_scale)
        lse[rows] = score.logsumexp(1)
        o[rows] = (torch.exp(score - lse[rows, None]) @ v[chunk].to(score.dtype)).to(q.dtype)
    return o, lse


def chunk_attention_bwd(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_queries: Tensor,
                        most: int, softmax_scale: float, deterministic: bool = False
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through :func:`chunk_attention_fwd` of queries whose softmax goes over more than this chunk.

    Args:
        do, o, lse: ``[n, DV]``, ``[n, DV]``, ``[n]`` of the queries' whole attention: they decide the weights.
        deterministic: not by flash attention, which adds up dq in any order.

    Returns:
        dq ``[n, D]`` in q's dtype; dk ``[B, chunk_size, D]``, dv ``[B, chunk_size, DV]``: fp32 (fp64 for fp64).
    """
    wide = sum_dtype(q.dtype)
    if not q.shape[0]:
        return torch.empty_like(q), *(x.new_zeros((), dtype=wide).expand(x.shape) for x in (k, v))
    if _is_flash(q, v) and not deterministic:
        if most > LONGEST:
            cu_parts, chunk = cut(cu_queries, q.shape[0], LONGEST)
            dq, *grads = _flash_bwd(do, q, k[chunk], v[chunk], o, lse, cu_parts, LONGEST, softmax_scale)
            sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v)]
            return dq, *(total.index_add_(0, chunk, x.to(wide)) for total, x in zip(sums, grads))
        dq, *grads = _flash_bwd(do, q, k, v, o, lse, cu_queries, most, softmax_scale)
        return dq, *(x.to(wide) for x in grads)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    delta = (do.to(wide) * o.to(wide)).sum(1)
    for chunk, rows in _rows_by_chunk(cu_queries):
        weight = torch.exp(_scores(q[rows], k[chunk], softmax_scale) - lse[rows, None])
        dv[chunk] = weight.T @ do[rows].to(wide)
        dscore = weight * (do[rows].to(wide) @ v[chunk].to(wide).T - delta[rows, None]) * softmax_scale
        dq[rows] = (dscore @ k[chunk].to(wide)).to(q.dtype)
        dk[chunk] = dscore.T @ q[rows].to(wide)
    return dq, dk, dv


def _flash_bwd(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_queries: Tensor, most: int,
               softmax_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the inputs' dtype."""
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        do[:, None], q[:, None], k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None], o[:, None], lse[None],
        cu_queries, _key_starts(k), most, k.shape[1], 0.0, False, state, state[0], scale=softmax_scale)
    return dq[:, 0], dk.view(k.shape), dv.view(v.shape)


def cut(starts: Tensor, rows: int, longest: int) -> tuple[Tensor, Tensor]:
    """Lists cut into parts of at most ``longest`` rows, without asking the device how many there are.

    ``starts``: int32 ``[B + 1]``, where each list begins, the last ends; ``rows``: in all lists. Returns int32
    ``[N + 1]``, where each part begins, N = B + rows // longest, empty ones last; int64 ``[N]``, its list.
    """
    parts = (starts.diff() + longest - 1) // longest
    ends = parts.cumsum(0)
    number = torch.arange(len(parts) + rows // longest, device=starts.device)
    of = torch.searchsorted(ends, number, right=True).clamp(max=len(parts) - 1)
    begin = torch.minimum(starts[of] + (number - (ends - parts)[of]) * longest, starts[of + 1])
    return torch.cat((begin, starts[-1:])).int(), of


def merge_partials(o: Tensor, lse: Tensor, o_parts: Tensor, lse_parts: Tensor, places: Tensor, out: Tensor,
                   kernel: bool) -> Tensor:
    """Merges o and lse of queries with what came back for some of their choices, in the order of j.

    Args:
        o, lse: ``[T, h, DV]``, contiguous, ``[T, h]``: computed here.
        o_parts, lse_parts: ``[n, DV]``, ``[n]``: what came back.
        places: int32 ``[T, h, KS]``, the row of each choice's part, or -1.
        out: ``[T, h, DV]``, written.
        kernel: by the Triton kernel, where it can.

    Returns:
        The log-sum-exp of all, ``[T, h]``.
    """
    if kernel and o.is_cuda and o.dtype != torch.float64:
        from ..kernels import merging
        merged = torch.empty_like(lse)
        merging.merge_parts(o, lse, o_parts, lse_parts, places, out, merged)
        return merged
    partial_lse = torch.cat((lse_parts, lse_parts.new_full((1,), -torch.inf)))[places.long()]
    merged = torch.logsumexp(torch.cat((lse[:, :, None], partial_lse), 2), 2)
    total = torch.exp(lse - merged)[:, :, None] * o
    for place, part in zip(places.unbind(2), partial_lse.unbind(2)):
        there = place >= 0
        total[there] += torch.exp(part - merged)[there][:, None] * o_parts[place[there].long()]
    out.copy_(total)
    return merged


def add_partials(x: Tensor, parts: Tensor, places: Tensor, out: Tensor, kernel: bool) -> None:
    """Writes ``x`` ``[T, h, D]`` and what came back added up to ``out``: as :func:`merge_partials` without weights."""
    if kernel and x.is_cuda and x.dtype != torch.float64:
        from ..kernels import merging
        merging.add_parts(x, parts, places, out)
        return
    total = x.to(sum_dtype(x.dtype), copy=True)
    for place in places.unbind(2):
        there = place >= 0
        total[there] += parts[place[there].long()]
    out.copy_(total)


def _is_flash(q: Tensor, v: Tensor) -> bool:
    dim = q.shape[1]
    return (q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and dim == v.shape[2]
            and dim % 8 == 0 and dim <= FLASH_MAX_DIM)


def _key_starts(k: Tensor) -> Tensor:
    return torch.arange(k.shape[0] + 1, dtype=torch.int32, device=k.device) * k.shape[1]


def _rows_by_chunk(cu_queries: Tensor):
    """(chunk, its queries' rows) of chunks that have any; the host reads where they begin."""
    starts = cu_queries.tolist()
    return [(chunk, slice(begin, end)) for chunk, (begin, end) in enumerate(zip(starts, starts[1:])) if end > begin]


def _scores(q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    wide = sum_dtype(q.dtype)
    return q.to(wide) @ k.to(wide).T * softmax_scale
