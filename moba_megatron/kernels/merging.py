"""The merge of what a rank computed with parts that other ranks computed for some of its choices, a gather of each row.

Most rows have few parts or none: a table tells where each choice's part lies, so nothing is read that is not there.
"""
import triton
import triton.language as tl
from torch import Tensor

from .host import cdiv, next_power_of_2
from .jit_helpers import _offset
from .launcher import Buffer, launch, stage

_BLOCK, _WARPS = 2048, 4


def merge_parts(o: Tensor, lse: Tensor, o_parts: Tensor, lse_parts: Tensor, places: Tensor, out: Tensor,
                merged: Tensor) -> None:
    """Softmax-weighted sum of ``o`` and its parts, in fp32 and in the order of j.

    Args:
        o: ``[T, h, DV]``, contiguous.
        lse: fp32 ``[T, h]``, natural log, finite.
        o_parts: ``[n, DV]``, contiguous.
        lse_parts: fp32 ``[n]``.
        places: int32 ``[T, h, KS]``, the row of each choice's part, or -1.
        out: ``[T, h, DV]``, written; any strides but 1 for the last.
        merged: fp32 ``[T, h]``, written: the log-sum-exp of all.
    """
    _merge(o, o_parts, places, out, lse, lse_parts, merged)


def add_parts(x: Tensor, parts: Tensor, places: Tensor, out: Tensor) -> None:
    """``x`` and its parts added up in fp32, in the order of j: as :func:`merge_parts` without weights."""
    _merge(x, parts, places, out, None, None, None)


@stage
def _merge(x: Buffer, parts: Buffer, places: Buffer, out: Buffer, lse: Buffer | None, lse_parts: Buffer | None,
           merged: Buffer | None) -> None:
    tokens, heads, dim = x.shape
    block_d = next_power_of_2(dim)
    block_m = max(1, _BLOCK // block_d)
    launch(_merge_parts_kernel, (cdiv(tokens * heads, block_m),),
           x, parts, places, out, lse, lse_parts, merged, tokens * heads, out.stride(0), out.stride(1), H=heads,
           KS=places.shape[2], D=dim, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=_WARPS)


@triton.jit(do_not_specialize=["rows"])
def _merge_parts_kernel(x, parts, places, out, lse, lse_parts, merged, rows, stride_t, stride_h, H: tl.constexpr,
                        KS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_M rows (token, head)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    column = tl.arange(0, BLOCK_D)
    total = tl.load(x + row[:, None] * D + column, mask=inside[:, None] & (column < D), other=0.0).to(tl.float32)
    if lse is not None:
        own = tl.load(lse + row, mask=inside, other=0.0)
        top = own
        for j in range(KS):
            place = tl.load(places + row * KS + j, mask=inside, other=-1)
            top = tl.maximum(top, tl.load(lse_parts + place, mask=place >= 0, other=float("-inf")))
        weights = tl.exp(own - top)
        total *= weights[:, None]
    for j in range(KS):
        place = tl.load(places + row * KS + j, mask=inside, other=-1)
        there = (place >= 0)[:, None] & (column < D)
        part = tl.load(parts + place.to(tl.int64)[:, None] * D + column, mask=there, other=0.0).to(tl.float32)
        if lse is not None:
            weight = tl.exp(tl.load(lse_parts + place, mask=place >= 0, other=float("-inf")) - top)
            weights += weight
            part *= weight[:, None]
        total += part
    if lse is not None:
        total /= weights[:, None]
        tl.store(merged + row, top + tl.log(weights), mask=inside)
    at = (_offset(row // H, stride_t) + _offset(row % H, stride_h))[:, None] + column
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside[:, None] & (column < D))
