"""What Transformers knows of a batch (padding masks, cache positions, packed rows) as MoBA's query segments.

A mask is never built. What the attention layers get in its place is a layout, int32 and of four dimensions, so that
Transformers hands it on as it is:

| layout | says |
|---|---|
| ``[B, 1, 1, 3]`` | padded rows, static caches: a row's first slot, the one after its last, that of the first query |
| ``[B, 1, T, 1]`` | packed rows: the first slot of each token's sequence |
| None | every slot counts, and the queries are the last ones |
| ``[B, 1, W, 0]`` | a window of W: refused in the layer that gets it |

Eagerly the host reads what it wants to know. Where it cannot (compiled, exported, captured into a CUDA graph) the same
answer comes from tensors of static size, and a refusal from :func:`_demand`.
"""
import dataclasses
from typing import Callable

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..segments import Segments, uniform_segments
from ..tensor_cache import is_readable, remembered

PROBED_QUERIES = 8
NOT_CAUSAL = ("the model must attend causally for MoBA attention, got the mask function {}: leave such a model to "
              "another attention")
OVER_A_CACHE = ("position_ids must not go back within a row (packed sequences) over a cache that holds other keys, got "
                "that in row {row}: train with use_cache=False")


def moba_mask(batch_size: int, q_length: int | None = None, kv_length: int | None = None, q_offset: int | Tensor = 0,
              kv_offset: int = 0, mask_function: Callable = causal_mask_function, attention_mask: Tensor | None = None,
              cache_position: Tensor | None = None, **kwargs) -> Tensor | None:
    """The layout of a batch: what a model calls once a forward, as an entry of ``AttentionMaskInterface``.

    Args:
        q_offset: slot of the first query; a tensor for static caches. In Transformers 4 ``cache_position``, all slots.
        kv_offset: slots that a sliding cache has dropped.
        mask_function: must be plain causal, or (without attention_mask and cache) causal within packed rows.
        attention_mask: bool ``[B, slots]``, False for padding; a row's True must be in one run.
        kwargs: ``local_size`` of sliding and chunked attention; ``config``, the model's.
    """
    if getattr(kwargs.get("config"), "index_topk", None) is not None:
        raise ValueError("index_topk (an indexer that chooses keys, as DeepSeek-V3.2 has) is not supported by MoBA "
                         f"attention, got {kwargs['config'].index_topk}: leave such a model to another attention")
    if kwargs.get("local_size") is not None or kv_offset:  # models make this mask whether or not a layer gets it
        return torch.empty(batch_size, 1, kwargs.get("local_size") or kv_offset, 0, dtype=torch.int32)
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        if is_readable(q_offset) and int(q_offset) + q_length == kv_length:
            q_offset = int(q_offset)
    places = (attention_mask, cache_position, q_offset)
    device = next((x.device for x in places if isinstance(x, Tensor)), kwargs.get("device"))
    if mask_function is not causal_mask_function:
        if attention_mask is not None or kwargs.get("use_vmap") or q_length != kv_length:
            raise ValueError(NOT_CAUSAL.format(getattr(mask_function, "__qualname__", type(mask_function).__name__)))
        return _packed_layout(mask_function, batch_size, q_length, device)
    at_end = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_length
    if attention_mask is None and at_end:
        return None
    offset = torch.as_tensor(q_offset, device=device).reshape(1)
    if attention_mask is None:
        start, end = torch.zeros_like(offset), offset + q_length
    else:
        start, end = _runs(attention_mask[:, :kv_length], offset + q_length)
        if is_readable(end) and at_end and attention_mask.shape[1] >= kv_length and (end - start == kv_length).all():
            return None
    return torch.stack([x.expand(batch_size) for x in (start, end, offset)], 1).int()[:, None, None]


def is_layout(mask: Tensor) -> bool:
    """Whether this is what :func:`moba_mask` makes, and no mask of another kind."""
    return (mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1] == 1
            and (mask.shape[3] == 1 or mask.shape[2:] == (1, 3)))


def attended_slots(layout: Tensor | None, slots: int) -> Tensor | None:
    """For the last query of each row: bool ``[B, 1, 1, slots]``, the slots of its sequence; None for all."""
    if layout is None:
        return None
    slot = torch.arange(slots, device=layout.device)
    return (slot >= layout[..., :1]) & (slot < layout[..., 1:2])


def row_segments(query: Tensor, key: Tensor, layout: Tensor | None, position_ids: Tensor | None,
                 chunk_size: int) -> Segments:
    """Where the queries ``[B, H, Q, D]`` of a batch stand among its keys ``[B, HK, S, D]``. Where ``position_ids``
    ``[B or 1, Q]`` go back within a row's sequence, another sequence begins, whatever the layout is: a mask of ones or
    a fresh cache does not make one of packed documents. Jumps forward, other shapes say nothing."""
    (batch, _, queries, _), slots = query.shape, key.shape[2]
    placed = None if layout is None else layout.to(query.device)  # layers on several GPUs may share one layout
    if layout is not None and layout.shape[3] == 1:
        first = placed[:, 0, :, 0]
        return remembered(layout, ("packed", chunk_size, query.device), lambda: _packed_segments(
            first == torch.arange(queries, device=first.device), chunk_size))
    segments = uniform_segments(queries, slots, batch, chunk_size, query.device) if layout is None else remembered(
        layout, ("padded", queries, slots, chunk_size, query.device),
        lambda: _padded_segments(placed, queries, slots, chunk_size))
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != queries:
        return segments

    def build() -> Segments | None:
        restarts = _restarts(position_ids.to(query.device), placed, batch)
        if is_readable(restarts) and not restarts.any():
            return None
        if queries != slots:
            none = ~restarts.any(1)
            return dataclasses.replace(segments, cu_seqlens_q=_demand(segments.cu_seqlens_q, none, OVER_A_CACHE))
        slot = torch.arange(slots, device=restarts.device)
        begins = restarts | (slot == 0)
        if layout is not None:
            begins |= (slot == placed[:, 0, 0, :1]) | (slot == placed[:, 0, 0, 1:2])
        return _packed_segments(begins, chunk_size)

    found = build() if not is_readable(query) else remembered(
        position_ids, ("restarts", batch, slots, chunk_size, query.device), build, (layout,))
    return segments if found is None else found


def packed_bounds(given: dict, query: Tensor, key: Tensor, layout: Tensor | None, chunk_size: int) -> Segments | None:
    """Segments of the sequences that ``cu_seq_lens_q`` names, over all rows one after the other; None without it.
    Wrong bounds on a GPU fail a device-side assertion, eagerly too, so that the host does not wait for them."""
    cu_q, cu_k, max_q, max_k = places = [given.get(f"{x}_{y}") for x in ("cu_seq_lens", "max_length") for y in "qk"]
    (batch, _, queries, _), slots = query.shape, key.shape[2]
    if all(x is None for x in places):
        return None
    if slots != queries:
        raise ValueError(f"cu_seq_lens_q must come without a cache, got {slots} keys for {queries} queries a row")
    q, k = (None if x is None else tuple(x.shape) for x in (cu_q, cu_k))
    if q is None or len(q) != 1 or k not in (None, q):
        raise ValueError("cu_seq_lens_q must have shape [sequences + 1] where it, cu_seq_lens_k, max_length_q or "
                         f"max_length_k is given, and cu_seq_lens_k must equal it, got shapes {q} and {k}")

    def build() -> Segments:
        known = [int(x) for x in (max_q, max_k) if x is not None and (not isinstance(x, Tensor) or is_readable(x))]
        longest, lengths = min(known) if known else batch * queries, cu_q.diff()
        both = torch.stack((cu_q, cu_q if cu_k is None else cu_k.to(cu_q.device)))
        ok = torch.cat((cu_q[:1] == 0, lengths >= 0, lengths <= longest, cu_q[-1:] == batch * queries, cu_q == both[1]))
        bounds = (_demand_op if cu_q.is_cuda else _demand)(both, ok, (
            "cu_seq_lens_q must begin with 0, not decrease, and end with the number of tokens in all rows, none longer "
            "than max_length_q and max_length_k, and cu_seq_lens_k must equal it, got {got}"))[0].to(query.device).int()
        if layout is not None and layout.shape[3] == 3:
            whole = (layout[:, 0, 0, 0] == 0) & (layout[:, 0, 0, 1] == slots)
            bounds = _demand(bounds, whole, "cu_seq_lens_q must come without attention_mask, or with ones alone, got 0 "
                                            "in row {row}")
        return Segments.from_cu_seqlens(bounds, longest, chunk_size)

    others = tuple(x for x in (cu_k, max_q, max_k, layout) if x is not cu_q)  # it would hold itself
    return remembered(cu_q, ("bounds", batch, queries, chunk_size, query.device), build, others)


def _padded_segments(layout: Tensor, queries: int, slots: int, chunk_size: int) -> Segments:
    """Segments of padded rows: what lies before a row's sequence, the sequence, and what lies behind it. Padding
    attends to itself alone, so that no length has to be known on the host; nobody reads the result."""
    start, end, offset = layout[:, 0, 0].unbind(1)
    row = torch.arange(layout.shape[0], device=layout.device, dtype=torch.int32)
    bounds = torch.stack((torch.zeros_like(start), start, end), 1)  # first slot of each part
    first_query = torch.clamp(bounds - offset[:, None], 0, queries)
    total = layout.new_full((1,), layout.shape[0])
    return Segments(cu_seqlens_q=torch.cat(((first_query + row[:, None] * queries).flatten(), total * queries)),
                    cu_seqlens_k=torch.cat(((bounds + row[:, None] * slots).flatten(), total * slots)),
                    seq_ids=torch.arange(3 * layout.shape[0], device=layout.device, dtype=torch.int32),
                    offsets=torch.clamp(offset[:, None] - bounds, min=0).flatten(),
                    max_seqlen_q=queries, max_seqlen_k=slots, chunk_size=chunk_size)


def _packed_segments(begins: Tensor, chunk_size: int) -> Segments:
    """Segments of the sequences that begin where ``begins`` ``[B, T]`` is True, as its first column is. Where the host
    cannot read, they are as many as a bound, since the kernels' grids grow with it; more sequences are refused."""
    (batch, length), total = begins.shape, begins.numel()
    begins = begins.flatten()
    if is_readable(begins):
        cu_seqlens = torch.cat((begins.nonzero()[:, 0], begins.new_full((1,), total, dtype=torch.long))).int()
        return Segments.from_cu_seqlens(cu_seqlens, int(cu_seqlens.diff().max()), chunk_size)
    # Dynamo traces max and min alone, of ints; of a length that torch.export leaves open they would be a guard.
    largest, smallest = (torch.sym_max, torch.sym_min) if isinstance(total, torch.SymInt) else (max, min)
    most = smallest(total, batch + largest(2048, total // 32))
    number = begins.cumsum(0)
    fits = begins & (number <= most)
    cu_seqlens = torch.full((most + 1,), total, device=begins.device).scatter(
        0, torch.where(fits, number - 1, most), torch.where(fits, torch.arange(total, device=begins.device), total))
    cu_seqlens = _demand(cu_seqlens.int(), number[-1:] <= most,
                         "position_ids must begin at most 2048 sequences a batch, or one every 32 tokens, where a "
                         "model is compiled, exported or captured: give cu_seq_lens_q, or do not compile")
    segments = Segments.from_cu_seqlens(cu_seqlens, length, chunk_size)
    return dataclasses.replace(segments, packed=False)  # the dense kernels' grids are sequences times the longest


def _packed_layout(mask_function: Callable, batch: int, length: int, device: torch.device) -> Tensor | None:
    """The layout of rows that a mask function cuts into sequences, in which it must be causal. Since Transformers'
    versions compose it differently, it is called: for every query's neighbours and first key, for all keys of a few."""
    row, slot = torch.arange(batch, device=device)[:, None], torch.arange(length, device=device)[None]

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return mask_function(row, torch.zeros_like(row), query, key).expand(batch, length)

    first = torch.where(sees(slot, (slot - 1).clamp(min=0)) & (slot > 0), 0, slot).cummax(1).values
    causal = (sees(slot, slot) & sees(slot, first) & ~(sees(slot, (first - 1).clamp(min=0)) & (first > 0))
              & ~(sees(slot, (slot + 1).clamp(max=length - 1)) & (slot < length - 1))).all(1)
    query = torch.arange(1, PROBED_QUERIES + 1, device=device)[None, :, None] * length // PROBED_QUERIES - 1
    query = query.clamp(min=0)
    row, key = row[:, :, None], slot[:, None]
    within = (key <= query) & (first[row, key] == first[row, query])
    causal &= (mask_function(row, torch.zeros_like(row), query, key) == within).flatten(1).all(1)
    layout = _demand(first.int()[:, None, :, None], causal,
                     NOT_CAUSAL.format(getattr(mask_function, "__qualname__", "of row {row}")))
    return None if is_readable(layout) and not first.any() else layout


def _restarts(position_ids: Tensor, layout: Tensor | None, batch: int) -> Tensor:
    """Where a row's sequence goes back to an earlier position, or begins anew after one token: bool ``[B, Q]``."""
    step = position_ids.diff(dim=1)
    back = torch.nn.functional.pad((step < 0) | (step == 0) & (position_ids[:, 1:] == 0), (1, 0))
    back = back.expand(batch, -1)
    if layout is None:
        return back
    start, end, offset = layout[:, 0, 0].split(1, 1)
    slot = offset + torch.arange(back.shape[1], device=layout.device)
    return back & (slot > start) & (slot < end)


def _runs(mask: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """First slot of each row's True below ``limit``, and the slot after the last; both 0 where there is none."""
    valid = mask.bool() & (torch.arange(mask.shape[1], device=mask.device) < limit[:, None])
    count = valid.sum(1)
    start = valid.int().argmax(1)
    end = torch.where(count > 0, mask.shape[1] - valid.flip(1).int().argmax(1), start)
    return start, _demand(end, end - start == count,
                          "attention_mask must be 1 in one run of each row (left or right padding) for MoBA attention, "
                          "got 0 in between in row {row}: to generate, pad on the left; PEFT's prefix and prompt "
                          "tuning put tokens before left padding, so pad on the right, or pass prompts of one length")


def _demand(x: Tensor, ok: Tensor, message: str) -> Tensor:
    """``x``, or ValueError with the first row whose ``ok`` ``[rows]`` is False for ``{row}`` in the message. Where the
    host cannot read, an operator of the graph does it, on CUDA by a device-side assertion."""
    if not is_readable(ok):
        return _demand_op(x, ok, message)
    if not ok.all():
        raise ValueError(message.replace("{row}", str(int(ok.int().argmin()))).replace("{got}", str(x.tolist())))
    return x


@torch.library.custom_op("moba_megatron::demand", mutates_args=())
def _demand_op(x: Tensor, ok: Tensor, message: str) -> Tensor:
    if ok.is_cuda:
        torch._assert_async(ok.all(), message.replace("{row}", "some").replace("{got}", "others"))
    else:
        _demand(x, ok, message)
    return x.clone()


@_demand_op.register_fake
def _(x: Tensor, ok: Tensor, message: str) -> Tensor:
    return torch.empty_like(x)
