"""Attention over the selected chunks in plain torch: batches of products of rows of queries with keys.

A row is a query and head, ``token * H + head``, or a key and kv head. Scores are computed in batches small enough for a
processor's cache: of chunks with their own queries, then of chunks with the rows that chose them. Forward keeps a row's
largest score so far and sums relative to it; backward computes weights again from lse. Sums have a fixed order.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..reference.attention import in_own_precision
from ..reference.chunk_means import accumulate_dtype, block_rows
from ..segments import Routing, Segments

SCORE_ELEMENTS = 1 << 20  # attention scores held at once
KEYS = 512
"""Keys of a batch, at most: so many rows are there for each key, and a dense layer's scores stay in the cache."""


@dataclass(frozen=True)
class Batch:
    """Lists of rows, and for each the keys that they attend to."""

    rows: Tensor  # int64 `[n, M]`, rows of queries, of `T * H`
    keys: Tensor  # int64 `[n, N]`, rows of keys, of `S * HK`
    padded: Tensor | None  # bool `[n, M]`, True where a row of the same list stands in for none; None where none does
    distinct: bool  # no row and no key is there twice
    hidden: Tensor | None = None  # bool `[M, W]`, which of the last W keys a row does not see; None where it sees all

    def add(self, x: Tensor, places: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right`` at ``places``, which are ``rows`` or ``keys``, to a tensor that has them all."""
        if self.distinct:  # index_add_ sorts
            x.index_copy_(0, places.flatten(), torch.baddbmm(_taken(x, places), left, right).flatten(0, 1))
        else:
            x.index_add_(0, places.flatten(), torch.bmm(left, right).flatten(0, 1))

    def weights(self, score: Tensor, level: Tensor) -> Tensor:
        """``exp(score - level)``, in place, 0 for keys that are not seen and for rows that stand in."""
        if self.padded is not None:
            level = level.masked_fill(self.padded, torch.inf)
        score.sub_(level[..., None]).exp_()
        self.hide(score, 0)
        return score

    def hide(self, score: Tensor, value: float) -> None:
        if self.hidden is not None:
            score[..., -self.hidden.shape[1]:].masked_fill_(self.hidden, value)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """``[n, M, ...]`` of a tensor that has all rows, at ``places`` ``[n, M]``."""
    return x.index_select(0, places.flatten()).unflatten(0, places.shape)


@in_own_precision
def attention_fwd(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, segments: Segments, softmax_scale: float,
                  routing: Routing | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`moba_megatron.reference.attention_fwd`, which takes over where a value or product may not be finite."""
    if not _in_range(q, k, softmax_scale, _largest(v) * k.shape[0]):
        return reference.attention_fwd(q, k, v, selected, segments, softmax_scale, routing)
    dtype = accumulate_dtype(q.dtype)
    queries, keys = _rows(q, dtype) * softmax_scale, _rows(k, dtype)
    values = torch.cat((_rows(v, dtype), keys.new_ones(keys.shape[0], 1)), 1)  # the last column sums the weights
    sums = queries.new_zeros(queries.shape[0], values.shape[1])
    level = queries.new_full(queries.shape[:1], -torch.inf)  # largest score so far: sums are relative to its exp
    for batch in _batches(q, k, max(k.shape[2], v.shape[2]), selected, segments, routing):
        score = torch.bmm(_taken(queries, batch.rows), _taken(keys, batch.keys).mT)
        batch.hide(score, -torch.inf)
        rows, before, largest = batch.rows.flatten(), _taken(level, batch.rows), score.amax(2)
        if batch.padded is not None:  # a row that stands in may be given keys that are not its own
            largest.masked_fill_(batch.padded, -torch.inf)
        level.scatter_reduce_(0, rows, largest.flatten(), "amax")
        now = _taken(level, batch.rows)
        rescaled = _taken(sums, batch.rows).mul_((before - now).exp_()[..., None])
        sums.index_copy_(0, rows, rescaled.flatten(0, 1))  # a row that is there twice has the same value twice
        batch.add(sums, batch.rows, batch.weights(score, now), _taken(values, batch.keys))
    total = sums[:, -1:]
    o = sums[:, :-1] / total.clamp(min=torch.finfo(dtype).tiny)  # 0 for rows of no segment
    return o.view(*q.shape[:2], v.shape[2]).to(q.dtype), (level + total[:, 0].log()).view(q.shape[:2])


@in_own_precision
def attention_bwd(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                  selected: Tensor, segments: Segments, softmax_scale: float, *, deterministic: bool = False,
                  kv_grad_dtype: torch.dtype | None = None,
                  routing: Routing | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moba_megatron.reference.attention_bwd`, which takes over where a value or product may not be finite."""
    if not _in_range(q, k, softmax_scale, _largest(dlse),
                     (1 + _largest(do)) * (1 + _largest(v) + _largest(o)) * v.shape[2]):
        return reference.attention_bwd(do, dlse, q, k, v, o, lse, selected, segments, softmax_scale,
                                       kv_grad_dtype=kv_grad_dtype)
    dtype = accumulate_dtype(q.dtype)
    queries, keys, values, grads = _rows(q, dtype) * softmax_scale, *(_rows(x, dtype) for x in (k, v, do))
    delta, lse = (grads * _rows(o, dtype)).sum(1), lse.reshape(-1).to(dtype)
    if dlse is not None:
        delta -= dlse.reshape(-1).to(dtype)
    dq, dk, dv = map(torch.zeros_like, (queries, keys, values))
    for batch in _batches(q, k, max(k.shape[2], v.shape[2]), selected, segments, routing):
        rows, key = batch.rows, _taken(keys, batch.keys)
        query, grad, level, shift = (_taken(x, rows) for x in (queries, grads, lse, delta))
        weight = batch.weights(torch.bmm(query, key.mT), level)
        batch.add(dv, batch.keys, weight.mT, grad)
        dscore = torch.bmm(grad, _taken(values, batch.keys).mT).sub_(shift[..., None]).mul_(weight)
        batch.add(dq, rows, dscore, key)
        batch.add(dk, batch.keys, dscore.mT, query)
    return (dq.mul_(softmax_scale).view(q.shape).to(q.dtype), dk.view(k.shape).to(kv_grad_dtype or k.dtype),
            dv.view(v.shape).to(kv_grad_dtype or v.dtype))


def _in_range(q: Tensor, k: Tensor, scale: float, *bounds: float) -> bool:
    """Whether scores, and what has these bounds, are far from the dtype's end: 0 * inf would spread NaN."""
    bounds = _largest(q) * abs(scale) * (1 + _largest(k) * q.shape[2]), *bounds
    return all(bound < torch.finfo(accumulate_dtype(q.dtype)).max / 8 for bound in bounds)


def _largest(x: Tensor | None) -> float:
    """The largest absolute value; NaN where there is one."""
    return float(torch.stack(x.aminmax()).abs().max()) if x is not None and x.numel() else 0.0


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[tokens, heads, dim]`` as ``[tokens * heads, dim]``, contiguous."""
    return x.to(dtype).reshape(x.shape[0] * x.shape[1], x.shape[2]).contiguous()


def _batches(q: Tensor, k: Tensor, dim: int, selected: Tensor, segments: Segments,
             routing: Routing | None) -> Iterator[Batch]:
    """All that rows attend to: their own chunks first, where a row is in one list of one batch."""
    yield from _own_chunks(q.shape[1], dim, k, segments)
    if selected.numel():
        routing = routing or reference.route(selected, k.shape[1], segments.num_chunks(k.shape[0]),
                                             q.shape[1] // selected.shape[1])
        yield from _chosen_chunks(routing, selected.shape[2], dim, k, segments)


def _own_chunks(num_heads: int, dim: int, k: Tensor, segments: Segments) -> Iterator[Batch]:
    """Parts of runs of queries of one chunk, of about the same places, with the keys up to their end."""
    size, (total, kv_heads, _), group = segments.chunk_size, k.shape, num_heads // k.shape[1]
    kv_head = torch.arange(kv_heads, device=k.device)[:, None]
    head = torch.arange(num_heads, device=k.device).view(kv_heads, 1, group)
    for there in _runs(segments, max(64, min(-(-size // 8), 1024 // group))):
        begin, end = min(low for low, *_ in there), max(high for _, high, *_ in there)
        full = all(run[:2] == (begin, end) for run in there)
        place, runs = torch.arange(begin, end, device=k.device), torch.tensor(there, device=k.device)
        for low_key, high_key in _cuts(end, (end - begin) * group, dim):
            key, hidden = torch.arange(low_key, high_key, device=k.device), None
            if high_key > begin:
                hidden = (key[max(0, begin - low_key):] > place[:, None]).repeat_interleave(group, 0)
            for some in runs.split(max(1, _lists(len(place) * group, len(key), dim) // kv_heads)):
                low, high, token, first_key = some.T[..., None]
                within = torch.maximum(torch.minimum(place, high - 1), low)
                rows = (token + within - low)[:, None, :, None] * num_heads + head  # [runs, HK, places, group]
                keys = (first_key + key).clamp(max=total - 1)[:, None] * kv_heads + kv_head
                padded = (within != place)[:, None, :, None].expand_as(rows).flatten(2).flatten(0, 1)
                distinct = full and some[:, 3].unique().numel() == len(some)  # segments may share a chunk
                rows, keys = rows.flatten(2).flatten(0, 1), keys.flatten(0, 1)
                yield Batch(rows, keys, None if full else padded, distinct, hidden)


def _cuts(size: int, rows: int, dim: int) -> list[tuple[int, int]]:
    """Ranges of up to ``KEYS`` of so many keys, or more where there are few rows."""
    step = max(KEYS, SCORE_ELEMENTS // (2 * max(rows, dim)))
    return [(begin, min(begin + step, size)) for begin in range(0, size, step)]


def _lists(rows: int, keys: int, dim: int) -> int:
    """How many lists of so many rows and keys a batch has: scores in memory are bounded, and what is gathered."""
    return max(1, SCORE_ELEMENTS // max(rows * keys, rows * dim, keys * dim))


def _runs(segments: Segments, step: int) -> list[list[tuple[int, int, int, int]]]:
    """Of each run of queries in one chunk: its places in the chunk (from, to), its first token, the first key there.
    Cut at every ``step`` places; those are together that begin within 16 places and are about as long."""
    size, alike = segments.chunk_size, {}
    cu_q, cu_k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    for token, end, sequence, position in zip(cu_q, cu_q[1:], segments.seq_ids.tolist(), segments.offsets.tolist()):
        while token < end:
            low = position % size
            number = min(size - low, end - token, step - low % step)
            kind = low // step, low % step // 16, ((number - 1) // 16).bit_length()
            alike.setdefault(kind, []).append((low, low + number, token, cu_k[sequence] + position - low))
            token, position = token + number, position + number
    return list(alike.values())


def _chosen_chunks(routing: Routing, choices: int, dim: int, k: Tensor, segments: Segments) -> Iterator[Batch]:
    """Lists of the routing, of (kv head, chunk), the longest first; lists of about one length make a batch."""
    total, kv_heads, _ = k.shape
    size, num_chunks = segments.chunk_size, routing.num_csr_rows // kv_heads
    most = max(1, SCORE_ELEMENTS // max(min(size, KEYS), dim))
    bounds = routing.indptr.tolist()
    lists = [(min(most, end - at), at, row) for row, (begin, end) in enumerate(zip(bounds, bounds[1:]))
             for at in range(begin, end, most)]
    lists.sort(reverse=True)
    chunk_begin = block_rows(segments, total)[0][:, 0].long()
    at = 0
    while at < len(lists):
        cuts = _cuts(size, lists[at][0], dim)
        some = lists[at:at + _lists(lists[at][0], cuts[0][1], dim)]
        at += len(some)
        length, first, csr_row = torch.tensor(some, device=k.device).T[..., None]
        place = torch.arange(some[0][0], device=k.device)
        padded = place >= length if some[-1][0] < len(place) else None
        listed = first + torch.minimum(place, length - 1)
        row = routing.indices[listed // routing.shared].long() // choices + listed % routing.shared
        for low, high in cuts:
            key = chunk_begin[csr_row % num_chunks] + torch.arange(low, high, device=k.device)
            yield Batch(row, key * kv_heads + csr_row // num_chunks, padded, len(some) == 1)
