"""Bounds: lengths that only the device knows are made safe there, and rows that belong to no sequence are cleared.

The kernels address by cu_seqlens and write the rows of sequences alone. So lengths from outside pass through
:func:`bounded` first, and results through :func:`clear_rows`: a few microseconds each, and no wait for the host. Where
the maker of the segments vouches for them (``Segments.exact``) neither is needed.
"""
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Segments
from .host import cdiv
from .launcher import launch

PROGRAMS = 256
"""Programs that clear a tensor's last rows, of which there are mostly none."""


def bounded_lengths(cu_seqlens: Tensor, total: int) -> Tensor:
    """As :func:`moba_megatron.reference.bounded_lengths`."""
    cu_seqlens = cu_seqlens.contiguous()
    result = torch.empty(cu_seqlens.shape, dtype=torch.int32, device=cu_seqlens.device)
    launch(_bounded_lengths_kernel, (1,), cu_seqlens, result, cu_seqlens.numel(), total, BLOCK=1024, num_warps=4)
    return result


def bounded(segments: Segments, total_q: int, total_k: int) -> Segments:
    """As :func:`moba_megatron.reference.bounded`."""
    if segments.exact:
        return segments
    cu_k = bounded_lengths(segments.cu_seqlens_k, total_k)
    if segments.packed:
        return replace(segments, cu_seqlens_q=cu_k, cu_seqlens_k=cu_k)
    cu_q = bounded_lengths(segments.cu_seqlens_q, total_q)
    ids, offsets = (torch.empty(x.shape, dtype=torch.int32, device=x.device)
                    for x in (segments.seq_ids, segments.offsets))
    launch(_bounded_places_kernel, (1,), segments.seq_ids.contiguous(), segments.offsets.contiguous(), cu_q, cu_k, ids,
           offsets, segments.num_segments, segments.num_sequences, BLOCK=1024, num_warps=4)
    return replace(segments, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seq_ids=ids, offsets=offsets)


def clear_rows(cu_seqlens: Tensor, *filled: tuple[Tensor, float]) -> None:
    """As :func:`moba_megatron.reference.clear_rows`, for up to three contiguous tensors of so many rows."""
    filled = [(x, value) for x, value in filled if x.numel()]
    if not filled:
        return
    programs, rows = min(PROGRAMS, max(cdiv(x.numel(), 1024) for x, _ in filled)), filled[0][0].shape[0]
    (x, a), (y, b), (z, c) = *filled, *((None, 0),) * (3 - len(filled))
    wx, wy, wz = (0 if t is None else t.numel() // rows for t in (x, y, z))
    launch(_clear_rows_kernel, (programs,), cu_seqlens, x, y, z, cu_seqlens.numel() - 1, rows, programs, A=float(a),
           B=float(b), C=float(c), WX=wx, WY=wy, WZ=wz, BLOCK=1024, num_warps=4)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["number", "total"])
def _bounded_lengths_kernel(cu_seqlens, result, number, total, BLOCK: tl.constexpr):
    """One program: BLOCK values at a time, each at least all before it."""
    largest = total * 0
    for first in range(0, number, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = (i > 0) & (i < number)
        value = tl.load(cu_seqlens + i, mask=inside, other=0)
        value = tl.maximum(tl.minimum(tl.maximum(value, 0), total), largest)
        value = tl.associative_scan(value, 0, _larger)
        tl.store(result + i, tl.where(i > 0, value, 0), mask=i < number)
        largest = tl.max(value, 0)


@triton.jit(do_not_specialize=["number", "sequences"])
def _bounded_places_kernel(seq_ids, offsets, cu_q, cu_k, to_ids, to_offsets, number, sequences, BLOCK: tl.constexpr):
    """One program: sequences that exist, offsets that leave segments within them, or no segment at all."""
    too_long = number * 0
    for first in range(0, number, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < number
        sequence = tl.minimum(tl.maximum(tl.load(seq_ids + i, mask=inside, other=0), 0), sequences - 1)
        keys = tl.load(cu_k + sequence + 1) - tl.load(cu_k + sequence)
        queries = tl.load(cu_q + i + 1, mask=inside, other=0) - tl.load(cu_q + i, mask=inside, other=0)
        offset = tl.load(offsets + i, mask=inside, other=0)
        too_long = tl.maximum(too_long, tl.max((queries - keys).to(tl.int32), 0))
        tl.store(to_ids + i, sequence, mask=inside)
        tl.store(to_offsets + i, tl.maximum(tl.minimum(offset, keys - queries), 0), mask=inside)
    if too_long > 0:
        tl.debug_barrier()
        for first in range(0, number + 1, BLOCK):
            i = first + tl.arange(0, BLOCK)
            tl.store(cu_q + i, 0, mask=i <= number)


@triton.jit
def _fill(x, first_row, rows, programs, VALUE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    end = rows.to(tl.int64) * WIDTH
    for first in range(first_row.to(tl.int64) * WIDTH + tl.program_id(0) * BLOCK, end, programs * BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(x + i, tl.full([BLOCK], VALUE, tl.float32).to(x.dtype.element_ty), mask=i < end)


@triton.jit(do_not_specialize=["number", "rows", "programs"])
def _clear_rows_kernel(cu_seqlens, x, y, z, number, rows, programs, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
                       WX: tl.constexpr, WY: tl.constexpr, WZ: tl.constexpr, BLOCK: tl.constexpr):
    """Each program its share of the rows from the last sequence's end on; mostly none."""
    first_row = tl.load(cu_seqlens + number)
    _fill(x, first_row, rows, programs, A, WX, BLOCK)
    if y is not None:
        _fill(y, first_row, rows, programs, B, WY, BLOCK)
    if z is not None:
        _fill(z, first_row, rows, programs, C, WZ, BLOCK)
