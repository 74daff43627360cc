"""What Transformers knows of a batch (padding masks, cache positions, packed rows) as MoBA's query segments.

A mask is never built. What the attention layers get in its place is a layout: int32 ``[B, 1, 1, 3]`` with the first
slot of each row's sequence, the slot after its last, and the slot of the first query; or None, where every slot counts
and the queries are the last ones. It has four dimensions so that Transformers hands it on as it is.
"""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..segments import Segments


def moba_mask(batch_size: int, q_length: int | None = None, kv_length: int | None = None, q_offset: int | Tensor = 0,
              kv_offset: int = 0, mask_function: Callable = causal_mask_function, attention_mask: Tensor | None = None,
              cache_position: Tensor | None = None, **kwargs) -> Tensor | None:
    """The layout of a batch: what a model calls once a forward, as an entry of ``AttentionMaskInterface``.

    Args:
        batch_size, q_length, kv_length: rows, queries a row, slots of keys a row.
        q_offset: slot of the first query; a tensor for static caches. Transformers 4 gives ``cache_position`` instead,
            the slots of all queries.
        kv_offset: slots that a sliding cache has dropped; must be 0.
        mask_function: must be plain causal, or causal within packed rows.
        attention_mask: bool ``[B, slots]``, False for padding; a row's True must be in one run.
        kwargs: ``local_size`` of sliding and chunked attention is refused.

    Raises:
        ValueError: the model attends in a way that MoBA does not; the message says which.
    """
    _refuse_patterns(mask_function, attention_mask, kv_offset, kwargs)
    free = not torch.compiler.is_compiling() and not _capturing()
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        if free and int(q_offset) + q_length == kv_length:
            q_offset = int(q_offset)
    at_end = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_length
    if attention_mask is None and at_end:
        return None
    places = (attention_mask, cache_position, q_offset)
    device = next((x.device for x in places if isinstance(x, Tensor)), kwargs.get("device"))
    offset = torch.as_tensor(q_offset, device=device).reshape(1)
    if attention_mask is None:
        start, end = torch.zeros_like(offset), offset + q_length
    else:
        start, end = _runs(attention_mask[:, :kv_length], offset + q_length, free)
        if free and at_end and attention_mask.shape[1] >= kv_length and bool((end - start == kv_length).all()):
            return None
    layout = torch.stack([x.expand(batch_size) for x in (start, end, offset)], 1)
    return layout.int()[:, None, None]


def is_layout(mask: Tensor) -> bool:
    """Whether this is what :func:`moba_mask` makes, and no mask of another kind."""
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1:] == (1, 1, 3)


def attended_slots(layout: Tensor | None, slots: int) -> Tensor | None:
    """For the last query of each row: bool ``[B, 1, 1, slots]``, the slots of its sequence; None for all."""
    if layout is None:
        return None
    slot = torch.arange(slots, device=layout.device)
    return (slot >= layout[..., :1]) & (slot < layout[..., 1:2])


def row_segments(layout: Tensor, queries: int, slots: int, chunk_size: int) -> Segments:
    """Segments of padded rows: what lies before a row's sequence, the sequence, and what lies behind it.

    Padding attends to itself alone, so that no length has to be known on the host; nobody reads the result. Chunks are
    counted from the sequence's own start.
    """
    def build() -> Segments:
        start, end, offset = layout[:, 0, 0].unbind(1)
        row = torch.arange(layout.shape[0], device=layout.device, dtype=torch.int32)
        bounds = torch.stack((torch.zeros_like(start), start, end), 1)  # first slot of each part
        first_query = torch.clamp(bounds - offset[:, None], 0, queries)
        total = layout.new_full((1,), layout.shape[0])
        return Segments(
            cu_seqlens_q=torch.cat(((first_query + row[:, None] * queries).flatten(), total * queries)),
            cu_seqlens_k=torch.cat(((bounds + row[:, None] * slots).flatten(), total * slots)),
            seq_ids=torch.arange(3 * layout.shape[0], device=layout.device, dtype=torch.int32),
            offsets=torch.clamp(offset[:, None] - bounds, min=0).flatten(),
            max_seqlen_q=queries, max_seqlen_k=slots, chunk_size=chunk_size)

    return _remembered(layout, ("segments", queries, slots, chunk_size), build)


def packed_rows(position_ids: Tensor, batch: int, length: int) -> tuple[Tensor, int] | None:
    """Sequences packed into rows, which begin where a position is not the one before plus 1.

    Returns:
        cu_seqlens int32 and the longest length; None where every row is one sequence.
    """
    def build() -> tuple[Tensor, int] | None:
        begins = torch.ones(position_ids.shape, dtype=torch.bool, device=position_ids.device)
        begins[:, 1:] = position_ids.diff(dim=1) != 1
        begins = begins.expand(batch, length).flatten().nonzero()[:, 0].tolist()
        if len(begins) == batch:
            return None
        bounds = [*begins, batch * length]
        longest = max(end - begin for begin, end in zip(bounds, bounds[1:]))
        return torch.tensor(bounds, dtype=torch.int32, device=position_ids.device), longest

    if position_ids.dim() != 2 or position_ids.shape[1] != length or torch.compiler.is_compiling() or _capturing():
        return None
    return _remembered(position_ids, ("packing", batch), build)


def _remembered(of: Tensor, key: tuple, build: Callable):
    """``build()``, or what an earlier layer of the same forward built from the same tensor."""
    if torch.compiler.is_compiling() or of.is_inference():
        return build()
    key = (*key, of._version)
    if getattr(of, "moba_remembered", (None,))[0] != key:
        of.moba_remembered = key, build()
    return of.moba_remembered[1]


def _runs(mask: Tensor, limit: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    """First slot of each row's True below ``limit``, and the slot after the last; both 0 where there is none."""
    slot = torch.arange(mask.shape[1], device=mask.device)
    valid = mask.bool() & (slot < limit[:, None])
    count = valid.sum(1)
    start = valid.int().argmax(1)
    end = torch.where(count > 0, mask.shape[1] - valid.flip(1).int().argmax(1), start)
    if check:
        holes = (end - start != count).tolist()
        if any(holes):
            raise ValueError("attention_mask must be 1 in one run of each row (left or right padding) for MoBA "
                             f"attention, got 0 in between in row {holes.index(True)}: to generate, pad on the left")
    return start, end


def _refuse_patterns(mask_function: Callable, attention_mask: Tensor | None, kv_offset: int, kwargs: dict) -> None:
    if kwargs.get("local_size") is not None or kv_offset:
        raise ValueError("sliding_window (or attention_chunk_size) is not supported by MoBA attention, got "
                         f"{kwargs.get('local_size') or kv_offset}: set config.sliding_window = None, or leave such a "
                         "model to another attention")
    if mask_function is causal_mask_function:
        return
    name = getattr(mask_function, "__qualname__", repr(mask_function))
    if attention_mask is not None or not name.startswith("and_masks") or kwargs.get("use_vmap"):
        raise ValueError(f"the model must attend causally for MoBA attention, got the mask function {name}: leave such "
                         "a model to another attention")


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
