"""Gate and top-k in plain torch: by a product, and by the reference's fixed tree where that leaves a doubt."""
import torch
from torch import Tensor

from ..reference.attention import in_own_precision
from ..reference.chunk_means import accumulate_dtype
from ..reference.gating import best_chunks, earlier_chunks
from ..segments import Segments

SCORE_ELEMENTS = 1 << 22  # scores held at once


@in_own_precision
def gate(q: Tensor, means: Tensor, segments: Segments, topk: int) -> Tensor:
    """As :func:`moba_megatron.reference.gate`, the very same chunks. A query is left to the reference where two
    neighbours among the scores that are in, and the first that is out, are nearer to each other than roundings are sure
    to leave them in order, or where a sum might not be finite."""
    (total_q, num_heads, dim), (num_chunks, kv_heads, _), wanted = q.shape, means.shape, topk - 1
    selected = torch.full((total_q, num_heads, wanted), -1, dtype=torch.int32, device=q.device)
    if 0 in (total_q, wanted, num_chunks):
        return selected
    first, own = earlier_chunks(segments, total_q)
    found, narrow, wide = min(wanted, num_chunks), accumulate_dtype(q.dtype), product_dtype(q)
    limits, roundings = torch.finfo(narrow), dim.bit_length() + 3 + (dim if wide == narrow else 0)
    table, largest = means.to(wide).permute(1, 2, 0), means.abs().amax((0, 2)).to(wide)[:, None, None]
    chunk = torch.arange(num_chunks, device=q.device)
    doubtful = []
    for block in torch.arange(total_q, device=q.device).split(max(1, SCORE_ELEMENTS // (num_heads * num_chunks))):
        queries = q[block].to(wide).unflatten(1, (kv_heads, -1)).transpose(0, 1)  # [HK, rows, H / HK, D]
        score = torch.bmm(queries.flatten(1, 2), table).unflatten(1, queries.shape[1:3])
        earlier = (chunk >= first[block, None]) & (chunk < own[block, None])
        score.masked_fill_(~earlier[:, None], -torch.inf)
        value, index = score.topk(min(found + 1, num_chunks), 3)
        bound = queries.abs().sum(3) * largest  # of a sum's absolute values
        doubt = ~(bound < limits.max / 2)  # NaN, too
        error = 2 * (roundings * limits.eps * bound + dim * limits.tiny)[..., None]
        doubt |= ((value[..., 1:] > -torch.inf) & ~(value[..., :-1] - value[..., 1:] > error)).any(3)
        index.masked_fill_(value == -torch.inf, -1)
        selected[block, :, :found] = index[..., :found].transpose(0, 1).flatten(1, 2).int()
        doubtful.append(block[doubt.any(2).any(0)])
    rows = torch.cat(doubtful)
    selected[rows] = best_chunks(q[rows], means, first[rows], own[rows], wanted)
    return selected


def product_dtype(q: Tensor) -> torch.dtype:
    """fp64, whose roundings are nothing beside those of the tree, where the device is sure to have it."""
    return torch.float64 if q.device.type in ("cpu", "cuda") else accumulate_dtype(q.dtype)
