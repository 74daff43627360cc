"""Attention backward: delta, then dk and dv by chunk, then dq. Deterministic: there are no atomics."""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..segments import Routing, Segments
from . import sm90, tuning
from .attention_bwd_dkdv import _attention_bwd_dkdv_kernel, _attention_bwd_dkdv_sum_kernel
from .attention_bwd_dq import _attention_bwd_dq_diagonal_kernel, _attention_bwd_dq_kernel
from .attention_fwd import _check, _describable, _key_source, tma_available
from .bounds import clear_rows
from .host import cdiv, head_block, next_power_of_2
from .jit_helpers import _offset
from .launcher import launch, milestone_reached
from .routing import Tiles, make_tiles, route
from .tuning_table import is_gluon
from .workspace import head_groups, workspace_limit

PARTIALS_SHARE = 16
"""The partial sums of cut lists may take this fraction of the workspace: lists are cut later for that."""
MIN_PIECES = 32
"""At least so many extra pieces of cut lists are allowed, whatever memory their partial sums take."""


def attention_bwd(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                  selected: Tensor, segments: Segments, softmax_scale: float, *, deterministic: bool = False,
                  kv_grad_dtype: torch.dtype | None = None,
                  routing: Routing | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_fwd`.

    With ``p = exp(scale <q, k> - lse)`` and ``delta = <do, o> - dlse``: ``dv = p^T do``, ``ds = p * (do v^T - delta)``,
    ``dq = scale * ds k``, ``dk = scale * ds^T q``. A milestone of ``launcher.repeat``: dk and dv are complete.

    Args:
        do: ``[T, H, DV]``, gradient of o; any strides.
        dlse: ``[T, H]``, gradient of lse, or None.
        q, k, v, selected, segments, softmax_scale: as forward; fp32 products are IEEE here.
        o, lse: forward's results; lse decides the weights.
        deterministic: no effect: every sum has a fixed order.
        kv_grad_dtype: dtype of dk and dv; k's and v's own by default.
        routing: of ``selected``, as forward used it; None to make it again.

    Returns:
        dq ``[T, H, D]``, dk ``[S, HK, D]``, dv ``[S, HK, DV]``; 0 for rows of no segment or sequence.

    Raises:
        TypeError: fp64. ValueError: a head dim above 256, or chunks below 16.
    """
    _check(q, v, selected, segments)
    q, k, v, do, o = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v, do, o))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=kv_grad_dtype or k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=kv_grad_dtype or v.dtype, device=v.device)
    if q.shape[0] == 0:
        return dq, dk.zero_(), dv.zero_()
    if not segments.exact:
        if segments.packed:
            clear_rows(segments.cu_seqlens_k, (dq, 0), (dk, 0), (dv, 0))
        else:
            clear_rows(segments.cu_seqlens_q, (dq, 0))
            clear_rows(segments.cu_seqlens_k, (dk, 0), (dv, 0))
    x = _Inputs(q, k, v, do, _row_terms(do, o, dlse, lse), selected.contiguous(), segments, softmax_scale)
    everything = (0, x.kv_heads)
    if x.choices == 0:
        _dkdv(x, None, dk, dv, None, _cuts(x, None, x.kv_heads), None, everything)
        milestone_reached()
        _dq_diagonal(x, None, dq, everything)
        return dq, dk, dv
    if routing is None:
        routing = route(x.selected, x.kv_heads, x.num_chunks)
    partial_bytes = x.rows_per_kv_head * x.choices * q.shape[2] * q.element_size()
    groups = head_groups(x.kv_heads, partial_bytes)
    together = groups[0][1] - groups[0][0]
    # one tile holds the chunk: its program writes the partial dq too, and traffic is what it saves
    options = x.config("attention_bwd_dkdv")
    fused = segments.chunk_size <= (sm90.KEYS if is_gluon(options) else options["BLOCK_N"])
    cuts = _cuts(x, routing, together if fused else x.kv_heads)
    dkdv_partial = torch.empty(cuts.partial_floats, dtype=torch.float32, device=q.device)
    if not fused:
        _dkdv(x, routing, dk, dv, None, cuts, dkdv_partial, everything)
        milestone_reached()
        del dkdv_partial
        tiles = make_tiles(routing, x.dq_rows_per_program)
    dq_partial = torch.empty(together * partial_bytes // q.element_size(), dtype=q.dtype, device=q.device)
    for group in groups:
        if fused:
            _dkdv(x, routing, dk, dv, dq_partial, cuts, dkdv_partial, group)
            if group == groups[-1]:
                milestone_reached()
        else:
            _dq_sparse(x, routing, tiles, dq_partial, group)
        _dq_diagonal(x, dq_partial, dq, group)
    return dq, dk, dv


@dataclass(frozen=True)
class _Inputs:
    """What every kernel of the stage reads; all rows contiguous in their last dimension."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    terms: Tensor
    selected: Tensor
    segments: Segments
    softmax_scale: float

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def heads_per_kv(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def rows_per_kv_head(self) -> int:
        return self.q.shape[0] * self.heads_per_kv

    @property
    def choices(self) -> int:
        return self.selected.shape[2]

    @property
    def num_chunks(self) -> int:
        return self.segments.num_chunks(self.k.shape[0])

    @property
    def scales(self) -> tuple[float, float]:
        return self.softmax_scale * math.log2(math.e), self.softmax_scale

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(x.stride(i) for x in (self.q, self.k, self.v, self.do) for i in (0, 1))

    @property
    def constants(self) -> dict[str, int]:
        d, dv = self.q.shape[2], self.v.shape[2]
        return {"H": self.q.shape[1], "G": self.heads_per_kv, "KS": self.choices, "D": d, "DV": dv,
                "BLOCK_D": head_block(d), "BLOCK_DV": head_block(dv),
                "PRECISION": "ieee"}  # fp32: tf32x3 would cost a weight its last three bits

    @functools.cached_property
    def gluon(self) -> bool:
        return sm90.takes(self.q, self.k, self.v, self.do)

    def config(self, stage: str) -> dict[str, int]:
        return tuning.config(stage, self.q.device, head_dim=max(self.q.shape[2], self.v.shape[2]),
                             chunk_size=self.segments.chunk_size, itemsize=self.q.element_size(),
                             gluon=self.gluon)

    @property
    def dq_rows_per_program(self) -> int:
        options = self.config("attention_bwd_dq")
        if is_gluon(options):
            return sm90.rows_per_program(options, self.selected.numel())
        return options["BLOCK_M"]


def _row_terms(do: Tensor, o: Tensor, dlse: Tensor | None, lse: Tensor) -> Tensor:
    """lse in powers of two and ``delta = <do, o> - dlse``, twice in turn: fp32 ``[T * H + 1, 4]``.

    The last row stands for no row: every weight is 0 there.
    """
    total, heads, dim = o.shape
    terms = torch.empty(total * heads + 1, 4, dtype=torch.float32, device=o.device)
    options = tuning.config("attention_bwd_delta", o.device, head_dim=dim, itemsize=o.element_size())
    launch(_attention_bwd_delta_kernel, (cdiv(total * heads + 1, options["BLOCK_M"]),),
        do,
        o,
        dlse if dlse is None else dlse.contiguous(),
        lse.contiguous(),
        terms,
        total * heads,
        do.stride(0),
        do.stride(1),
        o.stride(0),
        o.stride(1),
        H=heads,
        DV=dim,
        BLOCK_DV=next_power_of_2(dim),
        **options,
    )
    return terms


@triton.jit
def _attention_bwd_delta_kernel(
    do, o, dlse, lse, terms, num_rows, stride_dot, stride_doh, stride_ot, stride_oh,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """BLOCK_M (query, head) rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_DV)
    valid = row < num_rows
    keep = valid[:, None] & (cols[None, :] < DV)
    token, head = row // H, row % H
    a = tl.load(do + (_offset(token, stride_dot) + _offset(head, stride_doh))[:, None] + cols[None, :], mask=keep,
                other=0.0)
    b = tl.load(o + (_offset(token, stride_ot) + _offset(head, stride_oh))[:, None] + cols[None, :], mask=keep,
                other=0.0)
    x = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)  # 0 beyond the last row
    if dlse is not None:
        x -= tl.load(dlse + row, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(lse + row, mask=valid, other=1e30) * 1.4426950408889634
    column = tl.arange(0, 4)
    tl.store(terms + row[:, None] * 4 + column[None, :], tl.where(column[None, :] % 2 == 0, y[:, None], x[:, None]),
             mask=row[:, None] <= num_rows)


@dataclass(frozen=True)
class _Cuts:
    """How lists are cut among programs: ``split`` indices in a piece.

    ``extra_csr_rows[n]`` is one more than the list of the extra piece number n (see ``_extra_piece``).
    """

    split: int
    entries_per_kv_head: int
    extra_csr_rows: Tensor | None
    partial_floats: int

    def num_extra(self, kv_heads: int) -> int:
        """The bound on pieces beyond each list's first, of so many kv heads."""
        return 0 if self.extra_csr_rows is None else cdiv(self.entries_per_kv_head * kv_heads, self.split)


def _cuts(x: _Inputs, routing: Routing | None, kv_heads_together: int) -> _Cuts:
    split = x.config("attention_bwd_dkdv")["SPLIT"]
    if routing is None or x.rows_per_kv_head <= split:  # a row is in a list at most once
        return _Cuts(split, 0, None, 0)
    floats = 2 * x.segments.chunk_size * (x.q.shape[2] + x.v.shape[2])  # a cut list's first piece has a partial too
    indices = x.rows_per_kv_head * x.choices
    allowed = max(MIN_PIECES, workspace_limit() // PARTIALS_SHARE // (4 * floats))
    split = max(split, cdiv(indices * kv_heads_together, allowed))
    return _Cuts(split, indices, _extra_csr_rows(routing, split), cdiv(indices * kv_heads_together, split) * floats)


def _extra_csr_rows(routing: Routing, split: int) -> Tensor:
    """int32: for each ``split`` indices the number of CSR rows that start before their end."""
    number = routing.indices.numel() // split + 2
    extra_csr_rows = torch.empty(number, dtype=torch.int32, device=routing.indices.device)
    launch(_extra_csr_rows_kernel, (cdiv(number, 256),),
        routing.indptr, extra_csr_rows, routing.num_csr_rows, number, split, BLOCK=256, num_warps=4)
    return extra_csr_rows


@triton.jit(do_not_specialize=["num_csr_rows", "num_pieces", "split"])
def _extra_csr_rows_kernel(indptr, extra_csr_rows, num_csr_rows, num_pieces, split, BLOCK: tl.constexpr):
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = (piece + 1).to(tl.int64) * split
    count = piece * 0
    remaining = num_csr_rows + 1
    while remaining > 1:
        half = remaining // 2
        count = tl.where(tl.load(indptr + count + half - 1) < end, count + half, count)
        remaining -= half
    tl.store(extra_csr_rows + piece, count, mask=piece < num_pieces)


def _segments_by_sequence(segments: Segments) -> tuple[Tensor, ...]:
    """Sequence, first and last (exclusive) row, and offset of the segments, those of a sequence side by side."""
    cu_seqlens, seq_ids, number = segments.cu_seqlens_q, segments.seq_ids, segments.num_segments
    if segments.packed or number == 1:
        return seq_ids, cu_seqlens[:-1], cu_seqlens[1:], segments.offsets
    ordered = [torch.empty(number, dtype=torch.int32, device=seq_ids.device) for _ in range(4)]
    launch(_order_segments_kernel, (cdiv(number, 64),),
        cu_seqlens, seq_ids, segments.offsets, *ordered, number, BLOCK=64, num_warps=4)
    return tuple(ordered)


@triton.jit(do_not_specialize=["number"])
def _order_segments_kernel(cu_seqlens, seq_ids, offsets, to_seq_ids, to_begin, to_end, to_offsets, number,
                           BLOCK: tl.constexpr):
    """Sorts BLOCK segments among all by their sequences, and by their own number within one."""
    segment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = segment < number
    sequence = tl.load(seq_ids + segment, mask=keep, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, number, BLOCK):
        other = first + tl.arange(0, BLOCK)
        its = tl.load(seq_ids + other, mask=other < number, other=2147483647)[None, :]
        before = (its < sequence[:, None]) | ((its == sequence[:, None]) & (other[None, :] < segment[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(to_seq_ids + place, sequence, mask=keep)
    tl.store(to_begin + place, tl.load(cu_seqlens + segment, mask=keep), mask=keep)
    tl.store(to_end + place, tl.load(cu_seqlens + segment + 1, mask=keep), mask=keep)
    tl.store(to_offsets + place, tl.load(offsets + segment, mask=keep), mask=keep)


def _dkdv(x: _Inputs, routing: Routing | None, dk: Tensor, dv: Tensor, dq_partial: Tensor | None, cuts: _Cuts,
         dkdv_partial: Tensor | None, group: tuple[int, int]) -> None:
    """Writes dk and dv of one group of kv heads, and ``dq_partial`` where there is one."""
    options = x.config("attention_bwd_dkdv")
    if is_gluon(options):
        sm90.kernel_module("attention_bwd_dkdv").dkdv(x, routing, dk, dv, dq_partial, cuts, dkdv_partial, group,
                                            _segments_by_sequence(x.segments), options)
        _dkdv_sum(x, routing, dk, dv, cuts, dkdv_partial, group)
        return
    del options["SPLIT"]
    size = x.segments.chunk_size
    if dq_partial is not None:
        options["BLOCK_N"] = max(16, next_power_of_2(size))
    kv_heads, constants = group[1] - group[0], x.constants
    num_extra = cuts.num_extra(kv_heads)
    num_key_tiles = cdiv(min(size, x.segments.max_seqlen_k), options["BLOCK_N"])
    if num_key_tiles == 0:
        return
    launch(_attention_bwd_dkdv_kernel, ((num_extra + x.num_chunks * kv_heads) * num_key_tiles,),
        x.q,
        x.k,
        x.v,
        x.do,
        x.terms,
        routing and routing.indices,
        routing and routing.indptr,
        cuts.extra_csr_rows,
        x.segments.cu_seqlens_k,
        *_segments_by_sequence(x.segments),
        dk,
        dv,
        dkdv_partial,
        dq_partial,
        *x.scales,
        x.q.shape[0] * x.q.shape[1],
        size,
        num_key_tiles,
        x.num_chunks,
        x.segments.num_sequences,
        x.segments.num_segments,
        num_extra,
        cuts.split,
        *group,
        *x.strides,
        HK=x.kv_heads,
        PACKED=x.segments.packed,
        HAS_DQ=dq_partial is not None,
        RAGGED=size % options["BLOCK_N"] != 0,
        **constants,
        **options,
    )
    _dkdv_sum(x, routing, dk, dv, cuts, dkdv_partial, group)


def _dkdv_sum(x: _Inputs, routing: Routing | None, dk: Tensor, dv: Tensor, cuts: _Cuts, dkdv_partial: Tensor | None,
             group: tuple[int, int]) -> None:
    """Adds the partial sums of cut lists, if there may be any."""
    num_extra = cuts.num_extra(group[1] - group[0])
    if num_extra == 0:
        return
    size, constants = x.segments.chunk_size, x.constants
    del constants["H"], constants["G"], constants["KS"], constants["PRECISION"]
    launch(_attention_bwd_dkdv_sum_kernel, (num_extra, cdiv(size, 16)),
        routing.indptr,
        cuts.extra_csr_rows,
        x.segments.cu_seqlens_k,
        dkdv_partial,
        dk,
        dv,
        size,
        x.num_chunks,
        x.segments.num_sequences,
        num_extra,
        cuts.split,
        *group,
        HK=x.kv_heads,
        BLOCK_N=16,
        **constants,
    )


def _dq_sparse(x: _Inputs, routing: Routing, tiles: Tiles, dq_partial: Tensor, group: tuple[int, int]) -> None:
    """Fills the partial dq of one group of kv heads."""
    options = x.config("attention_bwd_dq")
    if is_gluon(options):
        sm90.kernel_module("attention_bwd_dq").dq_sparse(x, routing, tiles, dq_partial, group, options)
        return
    block_n = options["BLOCK_N"]
    size, kv_heads = x.segments.chunk_size, group[1] - group[0]
    ragged = size % block_n != 0
    use_tma = not ragged and tma_available(x.q.device) and _describable(x.k) and _describable(x.v)
    bound = x.rows_per_kv_head * kv_heads * x.choices // tiles.block + x.num_chunks * kv_heads + 1
    launch(_attention_bwd_dq_kernel, (bound,),
        x.q,
        _key_source(x.k, block_n, use_tma),
        _key_source(x.v, block_n, use_tma),
        x.do,
        x.terms,
        routing.indices,
        tiles.csr_row,
        tiles.begin,
        tiles.end,
        tiles.indptr,
        x.segments.cu_seqlens_k,
        dq_partial,
        *x.scales,
        1.0,
        size,
        x.num_chunks,
        x.segments.num_sequences,
        *group,
        *x.strides,
        USE_TMA=use_tma,
        RAGGED=ragged,
        **x.constants,
        **options,
    )


def _dq_diagonal(x: _Inputs, dq_partial: Tensor | None, dq: Tensor, group: tuple[int, int]) -> None:
    """Writes dq of one group of kv heads: the diagonal chunks' part and the sum of the partial dq."""
    options = x.config("attention_bwd_dq_diagonal")
    num_tiles = x.q.shape[0] // options["BLOCK_M"] + x.segments.num_segments
    group_heads = (group[1] - group[0]) * x.heads_per_kv
    dim = x.q.shape[2]
    use_tma = dq_partial is not None and dim % 8 == 0 and dq_partial.element_size() == 2 and tma_available(x.q.device)
    if use_tma:
        width = x.choices * dim
        dq_partial = TensorDescriptor(dq_partial, [x.q.shape[0], group_heads, width], [group_heads * width, width, 1],
                                      [options["BLOCK_M"], 1, head_block(dim)])
    launch(_attention_bwd_dq_diagonal_kernel, (num_tiles * group_heads,),
        x.q,
        x.k,
        x.v,
        x.do,
        x.terms,
        x.selected,
        dq_partial,
        dq,
        x.segments.cu_seqlens_q,
        x.segments.cu_seqlens_k,
        x.segments.seq_ids,
        x.segments.offsets,
        *x.scales,
        num_tiles,
        x.segments.num_segments,
        x.segments.chunk_size,
        group[0] * x.heads_per_kv,
        group_heads,
        *x.strides,
        USE_TMA=use_tma,
        **x.constants,
        **options,
    )
