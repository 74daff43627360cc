"""Key convolution: a short causal filter over each run of keys, with its gradients; no temporary of the keys' size.

A run is a stretch of rows that follow one another in a sequence. What precedes it elsewhere (on another rank) comes as
its halo. Backward computes the activations again where it needs them: the neighbouring rows are in the cache.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .bounds import clear_rows
from .host import cdiv, next_power_of_2
from .jit_helpers import _find_piece, _offset, _piece_items
from .launcher import Buffer, call, empty, launch, rows

TILE = {"BLOCK_T": 32, "BLOCK_C": 128, "num_warps": 4}  # not tuned: the kernels read the keys once or twice
ROWS = 512  # of a run that one program of the backward adds up for the filter's gradient


def key_convolution_fwd(k: Tensor, weight: Tensor, cu_seqlens: Tensor, halo: Tensor | None) -> Tensor:
    """As :func:`moba_megatron.reference.key_convolution`, in fp32; k with any strides, weight and halo contiguous."""
    return call(_key_convolution_fwd, rows(k), weight, cu_seqlens, halo)


def _key_convolution_fwd(k: Buffer, weight: Buffer, cu_seqlens: Buffer, halo: Buffer | None) -> Buffer:
    out = empty(k.shape, k.dtype, k.device)
    total, kv_heads, head_dim = k.shape
    runs = cu_seqlens.numel() - 1
    if out.numel():
        clear_rows(cu_seqlens, (out, 0))
        pieces, columns = total // TILE["BLOCK_T"] + runs, cdiv(kv_heads * head_dim, TILE["BLOCK_C"])
        launch(_key_convolution_fwd_kernel, (pieces, columns), k, weight, cu_seqlens, halo, out, runs, *k.stride()[:2],
               HK=kv_heads, D=head_dim, W=weight.shape[1], **TILE)
    return out


def key_convolution_bwd(dout: Tensor, k: Tensor, weight: Tensor, cu_seqlens: Tensor,
                        halo: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`key_convolution_fwd`; every sum has a fixed order. Returns dk ``[S, HK, D]`` in k's dtype;
    dweight ``[HK, W, D]``, fp32; dhalo ``[N, W - 1, HK, D]`` in halo's dtype."""
    dk, partials, dhalo = call(_key_convolution_bwd, dout.contiguous(), rows(k), weight, cu_seqlens, halo)
    total_of_taps = partials.sum(0) if dk.numel() else partials.new_zeros(partials.shape[1:])
    return dk, total_of_taps.view(-1, *k.shape[1:]).transpose(0, 1).contiguous(), dhalo


def _key_convolution_bwd(dout: Buffer, k: Buffer, weight: Buffer, cu_seqlens: Buffer,
                         halo: Buffer | None) -> tuple[Buffer, Buffer, Buffer | None]:
    """dk, dhalo, and between them the sums for dweight of each piece of a run ``[pieces, W, HK * D]``."""
    total, kv_heads, head_dim = k.shape
    runs, columns, taps = cu_seqlens.numel() - 1, kv_heads * head_dim, weight.shape[1]
    dk = empty(k.shape, k.dtype, k.device)
    dhalo = None if halo is None else empty(halo.shape, halo.dtype, halo.device)
    pieces = total // ROWS + runs
    partials = empty((pieces, taps, columns), torch.float32, k.device)
    shape = dict(HK=kv_heads, D=head_dim, W=taps)
    tile = TILE if halo is None else {**TILE, "num_warps": 8}  # H200, 128K, 8 heads: 2.9 ms; 4 warps spill, 9.9
    grid = cdiv(columns, TILE["BLOCK_C"])
    if dk.numel():
        clear_rows(cu_seqlens, (dk, 0))
        launch(_key_convolution_bwd_kernel, (pieces, grid), dout, k, weight, cu_seqlens, halo, dk, partials, runs,
               k.stride(0), k.stride(1), ROWS=ROWS, BLOCK_W=next_power_of_2(taps), **shape, **tile)
    if dhalo is not None and dhalo.numel():
        launch(_key_convolution_bwd_halo_kernel, (runs, grid), dout, k, weight, cu_seqlens, halo, dhalo,
               k.stride(0), k.stride(1), **shape, **{**TILE, "BLOCK_T": next_power_of_2(taps - 1)})
    return dk, partials, dhalo


@triton.jit
def _key_rows(k, halo, run, begin, end, i, column, stride_t, stride_h, HK: tl.constexpr, D: tl.constexpr,
              W: tl.constexpr):
    """Keys ``[BLOCK_T, BLOCK_C]`` in fp32 at the places ``i`` of a run; its halo has -(W - 1) to -1, beyond it is 0."""
    inside = (column < HK * D)[None, :]
    row = begin + i
    own = (i >= 0) & (begin + i < end)
    x = tl.load(k + _offset(row, stride_t)[:, None] + (_offset(column // D, stride_h) + column % D)[None, :],
                mask=own[:, None] & inside, other=0.0).to(tl.float32)
    if halo is not None:
        row = run.to(tl.int64) * (W - 1) + (W - 1) + i
        before = (i < 0) & (i >= 1 - W)
        x += tl.load(halo + row[:, None] * (HK * D) + column[None, :], mask=before[:, None] & inside,
                     other=0.0).to(tl.float32)
    return x


@triton.jit
def _taps(weight, column, tap, HK: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """One tap of the filter, fp32 ``[BLOCK_C]``; weight is ``[HK, W, D]``."""
    at = column // D * (W * D) + tap * D + column % D
    return tl.load(weight + at, mask=column < HK * D, other=0.0).to(tl.float32)


@triton.jit
def _filtered(k, weight, halo, run, begin, end, i, column, stride_t, stride_h, HK: tl.constexpr, D: tl.constexpr,
              W: tl.constexpr):
    """The filter's output before the activation, at the places ``i`` of a run."""
    total = tl.zeros([i.shape[0], column.shape[0]], tl.float32)
    for tap in tl.static_range(W):
        x = _key_rows(k, halo, run, begin, end, i - tap, column, stride_t, stride_h, HK, D, W)
        total += _taps(weight, column, tap, HK, D, W)[None, :] * x
    return total


@triton.jit
def _filter_grad(dout, k, weight, halo, run, begin, end, i, column, stride_t, stride_h, HK: tl.constexpr,
                 D: tl.constexpr, W: tl.constexpr):
    """The gradient of the filter's output at the places ``i``; 0 outside of the run."""
    c = _filtered(k, weight, halo, run, begin, end, i, column, stride_t, stride_h, HK, D, W)
    keep = ((i >= 0) & (begin + i < end))[:, None] & (column < HK * D)[None, :]
    do = tl.load(dout + (begin + i).to(tl.int64)[:, None] * (HK * D) + column[None, :], mask=keep, other=0.0)
    gate = 1.0 / (1.0 + tl.exp(-c))
    return do.to(tl.float32) * gate * (1.0 + c * (1.0 - gate))


@triton.jit
def _input_grad(dout, k, weight, halo, run, begin, end, i, column, stride_t, stride_h, HK: tl.constexpr,
                D: tl.constexpr, W: tl.constexpr):
    """What the filter's later outputs give back to the places ``i``."""
    total = tl.zeros([i.shape[0], column.shape[0]], tl.float32)
    for tap in tl.static_range(W):
        g = _filter_grad(dout, k, weight, halo, run, begin, end, i + tap, column, stride_t, stride_h, HK, D, W)
        total += _taps(weight, column, tap, HK, D, W)[None, :] * g
    return total


@triton.jit(do_not_specialize=["runs"])
def _key_convolution_fwd_kernel(k, weight, cu_seqlens, halo, out, runs, stride_t, stride_h, HK: tl.constexpr,
                                D: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_T rows of one run, BLOCK_C columns (heads x dims)."""
    run = _find_piece(cu_seqlens, runs, BLOCK_T, tl.program_id(0))
    first, end = _piece_items(cu_seqlens, run, BLOCK_T, tl.program_id(0))
    if first >= end:
        return
    begin = tl.load(cu_seqlens + run)
    i = first - begin + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = _filtered(k, weight, halo, run, begin, end, i, column, stride_t, stride_h, HK, D, W)
    y = _key_rows(k, halo, run, begin, end, i, column, stride_t, stride_h, HK, D, W) + c / (1.0 + tl.exp(-c))
    tl.store(out + (begin + i).to(tl.int64)[:, None] * (HK * D) + column[None, :], y.to(out.dtype.element_ty),
             mask=(begin + i < end)[:, None] & (column < HK * D)[None, :])


@triton.jit(do_not_specialize=["runs"])
def _key_convolution_bwd_kernel(dout, k, weight, cu_seqlens, halo, dk, partials, runs, stride_t, stride_h,
                                HK: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
                                BLOCK_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """dk of ROWS rows of one run, BLOCK_C columns, and what they add to the gradient of each tap."""
    run = _find_piece(cu_seqlens, runs, ROWS, tl.program_id(0))
    first, piece_end = _piece_items(cu_seqlens, run, ROWS, tl.program_id(0))
    begin, end = tl.load(cu_seqlens + run), tl.load(cu_seqlens + run + 1)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < HK * D
    lane = tl.arange(0, BLOCK_W)
    dweight = tl.zeros([BLOCK_W, BLOCK_C], tl.float32)
    for row in range(first, piece_end, BLOCK_T):
        i = row - begin + tl.arange(0, BLOCK_T)
        keep = (begin + i < piece_end)[:, None] & inside[None, :]
        at = (begin + i).to(tl.int64)[:, None] * (HK * D) + column[None, :]
        dx = _input_grad(dout, k, weight, halo, run, begin, end, i, column, stride_t, stride_h, HK, D, W)
        dx += tl.load(dout + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(dk + at, dx.to(dk.dtype.element_ty), mask=keep)
        g = _filter_grad(dout, k, weight, halo, run, begin, end, i, column, stride_t, stride_h, HK, D, W)
        g = tl.where(keep, g, 0.0)
        for tap in tl.static_range(W):
            x = _key_rows(k, halo, run, begin, end, i - tap, column, stride_t, stride_h, HK, D, W)
            dweight += tl.where((lane == tap)[:, None], tl.sum(g * x, 0)[None, :], 0.0)
    at = (tl.program_id(0).to(tl.int64) * W + lane)[:, None] * (HK * D) + column[None, :]
    tl.store(partials + at, dweight, mask=(lane < W)[:, None] & inside[None, :])


@triton.jit
def _key_convolution_bwd_halo_kernel(dout, k, weight, cu_seqlens, halo, dhalo, stride_t, stride_h, HK: tl.constexpr,
                                     D: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The halo of one run, BLOCK_C columns."""
    run = tl.program_id(0)
    begin, end = tl.load(cu_seqlens + run), tl.load(cu_seqlens + run + 1)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_T)
    dx = _input_grad(dout, k, weight, halo, run, begin, end, row - (W - 1), column, stride_t, stride_h, HK, D, W)
    at = (run.to(tl.int64) * (W - 1) + row)[:, None] * (HK * D) + column[None, :]
    tl.store(dhalo + at, dx.to(dhalo.dtype.element_ty), mask=(row < W - 1)[:, None] & (column < HK * D)[None, :])
