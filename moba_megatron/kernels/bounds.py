"""Bounds: lengths that only the device knows are made safe there, and rows that belong to no sequence are cleared.

The kernels address by cu_seqlens and write the rows of sequences alone. So lengths from outside pass through
:func:`bounded` first, and results through :func:`clear_rows`: a few microseconds each, and no wait for the host. Where
the maker of the segments vouches for them (``Segments.exact``) neither is needed.
"""
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Segments
from .host import cdiv
from .launcher import Buffer, call, empty, launch, planned

PROGRAMS = 256  # that clear a tensor's last rows, of which there are mostly none


def bounded_lengths(cu_seqlens: Tensor, total: int) -> Tensor:
    """As :func:`moba_megatron.reference.bounded_lengths`."""
    return call(_bounded_lengths, cu_seqlens.contiguous(), total)


def _bounded_lengths(cu_seqlens: Buffer, total: int) -> Buffer:
    result = empty(cu_seqlens.shape, torch.int32, cu_seqlens.device)
    _launch(cu_seqlens, total, result)
    return result


def bounded(segments: Segments, total_q: int, total_k: int) -> Segments:
    """As :func:`moba_megatron.reference.bounded`; of contiguous tensors."""
    return segments if segments.exact else call(_bounded, segments, total_q, total_k)


def _bounded(segments: Segments, total_q: int, total_k: int) -> Segments:
    cu_k = _bounded_lengths(segments.cu_seqlens_k, total_k)
    if segments.packed:
        return replace(segments, cu_seqlens_q=cu_k, cu_seqlens_k=cu_k)
    cu_q = _bounded_lengths(segments.cu_seqlens_q, total_q)
    cu, ids, offsets = (empty(x.shape, torch.int32, x.device) for x in (cu_q, segments.seq_ids, segments.offsets))
    launch(_bounded_places_kernel, (1,), segments.seq_ids, segments.offsets, cu_q, cu_k, ids, offsets, cu,
           segments.num_segments, segments.num_sequences, BLOCK=1024, num_warps=4)
    return replace(segments, cu_seqlens_q=cu, cu_seqlens_k=cu_k, seq_ids=ids, offsets=offsets)


def clear_rows(cu_seqlens: Tensor, *filled: tuple[Tensor, float]) -> None:
    """As :func:`moba_megatron.reference.clear_rows`, for up to three contiguous tensors of so many rows. Within a call
    they are fresh from :func:`launcher.empty`: what bounds the lengths, or clears others, may do it in the same launch,
    before anything is written to them."""
    filled = [(x, value) for x, value in filled if x.numel()]
    if filled:
        call(_clear_rows, cu_seqlens, tuple(float(value) for _, value in filled), *(x for x, _ in filled))


def _clear_rows(cu_seqlens: Buffer, values: tuple[float, ...], *tensors: Buffer) -> None:
    rows, number = tensors[0].shape[0], cu_seqlens.numel()
    if len(tensors) > 3 or any(x.shape[0] != rows for x in tensors):
        raise ValueError(f"up to three tensors of one length are cleared, got {[x.shape for x in tensors]}")
    at = next((x for x in planned(_bounds_kernel) if (x.named["rows"], x.named["number"]) == (rows, number)
               and cu_seqlens.source in (x.named["cu_seqlens"].source, x.named["result"] and x.named["result"].source)
               and len(tensors) <= sum(x.named[name] is None for name in "xyz")), None)
    at = at or _launch(cu_seqlens, rows, None)
    free = [name for name in "xyz" if at.named[name] is None]
    for name, x, value in zip(free, tensors, values):
        at.named.update({name: x, "V" + name: value, "W" + name: x.numel() // rows})
    at.named["programs"] = min(PROGRAMS, max(cdiv(at.named[name].numel(), 1024) for name in "xyz" if at.named[name]))
    at.grid = (at.named["programs"], 1, 1)


def _launch(cu_seqlens: Buffer, rows: int, result: Buffer | None):
    return launch(_bounds_kernel, (1,), cu_seqlens=cu_seqlens, result=result, x=None, y=None, z=None,
                  number=cu_seqlens.numel(), rows=rows, programs=1, Vx=0.0, Vy=0.0, Vz=0.0, Wx=0, Wy=0, Wz=0,
                  BLOCK=1024, num_warps=4)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["number", "sequences"])
def _bounded_places_kernel(seq_ids, offsets, cu_q, cu_k, to_ids, to_offsets, to_cu_q, number, sequences,
                           BLOCK: tl.constexpr):
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
    for first in range(0, number + 1, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = tl.load(cu_q + i, mask=i <= number, other=0)
        tl.store(to_cu_q + i, tl.where(too_long > 0, 0, row), mask=i <= number)


@triton.jit
def _fill(x, first_row, rows, programs, VALUE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if x is not None:
        end = rows.to(tl.int64) * WIDTH
        for first in range(first_row.to(tl.int64) * WIDTH + tl.program_id(0) * BLOCK, end, programs * BLOCK):
            i = first + tl.arange(0, BLOCK)
            tl.store(x + i, tl.full([BLOCK], VALUE, tl.float32).to(x.dtype.element_ty), mask=i < end)


@triton.jit(do_not_specialize=["number", "rows", "programs"])
def _bounds_kernel(cu_seqlens, result, x, y, z, number, rows, programs, Vx: tl.constexpr, Vy: tl.constexpr,
                   Vz: tl.constexpr, Wx: tl.constexpr, Wy: tl.constexpr, Wz: tl.constexpr, BLOCK: tl.constexpr):
    """Bounded lengths, by program 0, and each program's share of the rows behind the last; mostly there are none."""
    largest = rows * 0
    for first in range(0, number, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = tl.load(cu_seqlens + i, mask=(i > 0) & (i < number), other=0)
        value = tl.maximum(tl.minimum(tl.maximum(value, 0), rows), largest)  # at least all before it
        if result is not None:
            if tl.program_id(0) == 0:
                tl.store(result + i, tl.where(i > 0, tl.associative_scan(value, 0, _larger), 0), mask=i < number)
        largest = tl.max(value, 0)
    _fill(x, largest, rows, programs, Vx, Wx, BLOCK)
    _fill(y, largest, rows, programs, Vy, Wy, BLOCK)
    _fill(z, largest, rows, programs, Vz, Wz, BLOCK)
