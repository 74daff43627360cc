"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: products, a multiply and an add each."""
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..flops import MULTIPLY_AND_ADD, attended_pairs, scored_pairs


@register_flop_formula(torch.ops.moba_megatron.attention_fwd, get_raw=True)
def forward_flops(q, k, v, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, max_seqlen_q, max_seqlen_k, chunk_size,
                  packed, exact, topk, *options, out_val=None, **kwargs) -> int:
    """Two products over the attended pairs of query and key, and the gate's over the scored pairs of query and chunk.
    Exact where the places of segments can be read (the device is waited for); of fake tensors it is what packed
    sequences of the longest's length would need, and others with every query at the end of one."""
    attended, scored = _segment_pairs(q, cu_seqlens_q, offsets, max_seqlen_k, chunk_size, packed, topk)
    dim, dim_v, (shared, selected) = q.shape[2], v.shape[2], options[-2:]
    scoring = 0 if selected is not None else k.shape[1] if shared == "group" else q.shape[1]
    return round(MULTIPLY_AND_ADD * (q.shape[1] * attended * (dim + dim_v) + scoring * scored * dim))


@register_flop_formula(torch.ops.moba_megatron.select_chunks, get_raw=True)
def selection_flops(q, k, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, max_seqlen_q, max_seqlen_k, chunk_size, packed,
                    exact, topk, backend, shared, out_val=None, **kwargs) -> int:
    """The gate's product alone."""
    _, scored = _segment_pairs(q, cu_seqlens_q, offsets, max_seqlen_k, chunk_size, packed, topk)
    return round(MULTIPLY_AND_ADD * (k if shared == "group" else q).shape[1] * scored * q.shape[2])


@register_flop_formula(torch.ops.moba_megatron.attention_bwd, get_raw=True)
def backward_flops(do, dlse, q, k, v, o, lse, selected, indices, indptr, cu_seqlens_q, cu_seqlens_k, seq_ids,
                   offsets, max_seqlen_q, max_seqlen_k, chunk_size, packed, *args, out_val=None, **kwargs) -> int:
    """Five products over the attended pairs; the scores are computed again."""
    attended, _ = _segment_pairs(q, cu_seqlens_q, offsets, max_seqlen_k, chunk_size, packed, selected.shape[2] + 1)
    return round(MULTIPLY_AND_ADD * q.shape[1] * attended * (3 * q.shape[2] + 2 * v.shape[2]))


def _segment_pairs(q, cu_seqlens_q, offsets, max_seqlen_k: int, chunk_size: int, packed: bool,
                   topk: int) -> tuple[float, float]:
    """Attended and scored pairs of all segments, a head."""
    def up_to(end):  # of the queries at positions 0..end-1; attended_pairs counts own chunks as half squares
        return attended_pairs(end, chunk_size, topk) + end / 2, scored_pairs(end, chunk_size, topk) if topk > 1 else 0

    if type(cu_seqlens_q) is type(offsets) is Tensor and not cu_seqlens_q.is_meta:
        bounds, firsts = cu_seqlens_q.tolist(), offsets.tolist()
        segments = [(1, first, first + end - begin) for begin, end, first in zip(bounds, bounds[1:], firsts)]
    elif packed or not max_seqlen_k:
        segments = [(q.shape[0] / max(1, max_seqlen_k), 0, max_seqlen_k)]
    else:  # every query at the end of a sequence
        segments = [(q.shape[0], max_seqlen_k - 1, max_seqlen_k)]
    pairs = [[times * (b - a) for a, b in zip(up_to(begin), up_to(end))] for times, begin, end in segments]
    return tuple(map(sum, zip(*pairs)))
