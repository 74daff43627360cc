"""Attention backward: delta, then dk and dv by chunk, then dq. Deterministic: there are no atomics."""
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Routing, Segments
from . import sm90, tuning
from .attention_bwd_dkdv import _attention_bwd_dkdv_kernel, _attention_bwd_dkdv_sum_kernel
from .attention_bwd_dq import _attention_bwd_dq_diagonal_kernel, _attention_bwd_dq_kernel
from .attention_call import AttentionCall, check
from .bounds import clear_rows
from .host import cdiv, next_power_of_2, precision
from .jit_helpers import _offset
from .launcher import Buffer, empty, launch, record_event, rows, scratch_limit, stage
from .routing import TILES, Tiles, _make_tiles, route, tile_arguments
from .tuning_table import is_gluon
from .workspace import head_groups

MIN_PIECES = 32
"""At least so many extra pieces of cut lists are allowed, whatever memory their partial sums take."""


def attention_bwd(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                  selected: Tensor, segments: Segments, softmax_scale: float, *, deterministic: bool = False,
                  kv_grad_dtype: torch.dtype | None = None,
                  routing: Routing | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_fwd`; products of fp32 are :data:`.host.FP32_PRODUCTS`.

    The event of ``launcher.call`` is where dk and dv are complete.

    Args, Returns: as :func:`moba_megatron.reference.attention_bwd`; every sum has a fixed order, deterministic or not;
        routing: of ``selected``, as forward used it, None to make it again.

    Raises:
        TypeError: fp64. ValueError: a head dim above 256, or chunks below 16.
    """
    check(q, v, selected, segments)
    dlse, lse = (x if x is None else x.contiguous() for x in (dlse, lse))
    return _attention_bwd(*map(rows, (do, q, k, v, o)), dlse, lse, selected.contiguous(), segments, softmax_scale,
                          kv_grad_dtype, routing)


@stage
def _attention_bwd(do: Buffer, q: Buffer, k: Buffer, v: Buffer, o: Buffer, dlse: Buffer | None, lse: Buffer,
                   selected: Buffer, segments: Segments, softmax_scale: float, kv_grad_dtype: torch.dtype | None,
                   routing: Routing | None) -> tuple[Buffer, Buffer, Buffer]:
    dq = empty(q.shape, q.dtype, q.device)
    dk, dv = (empty(x.shape, kv_grad_dtype or x.dtype, x.device) for x in (k, v))
    if q.shape[0] == 0:
        selected = empty((*q.shape[:2], 0), torch.int32, q.device)  # no lists: dk and dv are written all the same
    if not segments.exact:
        if segments.packed:
            clear_rows(segments.cu_seqlens_k, (dq, 0), (dk, 0), (dv, 0))
        else:
            clear_rows(segments.cu_seqlens_q, (dq, 0))
            clear_rows(segments.cu_seqlens_k, (dk, 0), (dv, 0))
    terms = empty((q.shape[0] * q.shape[1] + 1, 4), torch.float32, q.device)
    call = AttentionCall(q, k, v, selected, segments, softmax_scale, precision(q.dtype), do, terms)
    everything = (0, call.kv_heads)
    if call.choices == 0:
        cuts = _cuts(call, None, call.kv_heads, 0)
        _preprocess(call, o, dlse, lse, None, cuts, None)
        _attention_bwd_dkdv(call, None, dk, dv, None, cuts, None, everything)
        record_event()
        _attention_bwd_dq_diagonal(call, None, dq, everything)
        return dq, dk, dv
    if routing is None:
        routing = route(call.selected, call.kv_heads, call.num_chunks, call.shared)
    partial_size = call.rows_per_kv_head * call.choices * q.shape[2]
    groups = head_groups(call.kv_heads, partial_size * q.dtype.itemsize, scratch_limit())
    together = groups[0][1] - groups[0][0]
    # one tile holds the chunk: its program writes the partial dq too, and traffic is what it saves
    options = call.config("attention_bwd_dkdv", gluon=call.gluon)
    fused = segments.chunk_size <= options["BLOCK_N"]
    # sums of pieces of lists lie where dq's partial results lie later, or beside those in a sixteenth of the limit
    room = scratch_limit() // 16 if fused else together * partial_size * q.dtype.itemsize
    cuts = _cuts(call, routing, together if fused else call.kv_heads, room)
    tiles = None
    if not fused:
        options = call.config("attention_bwd_dq", gluon=call.gluon)
        tiles = Tiles.empty(routing, options["BLOCK_M"] if not is_gluon(options) else
                            sm90.rows_per_program(options, routing.num_choices, call.shared))
    _preprocess(call, o, dlse, lse, routing, cuts, tiles)
    dkdv_partial = empty((cuts.partial_floats,), torch.float32, q.device)
    if not fused:
        _attention_bwd_dkdv(call, routing, dk, dv, None, cuts, dkdv_partial, everything)
        record_event()
    dq_partial = empty((together * partial_size,), q.dtype, q.device)
    for group in groups:
        if fused:
            _attention_bwd_dkdv(call, routing, dk, dv, dq_partial, cuts, dkdv_partial, group)
            if group == groups[-1]:
                record_event()
        else:
            _attention_bwd_dq(call, routing, tiles, dq_partial, group)
        _attention_bwd_dq_diagonal(call, dq_partial, dq, group)
    return dq, dk, dv


def _preprocess(call: AttentionCall, o: Buffer, dlse: Buffer | None, lse: Buffer, routing: Routing | None,
                cuts: "_Cuts", tiles: Tiles | None) -> None:
    """Fills the call's terms, and where they are wanted, ``cuts.extra_csr_rows`` and ``tiles``, for all kv heads.

    A (query, head) has the row ``lse`` in powers of two and ``delta = <do, o> - dlse``, twice in turn. The last row
    stands for no row: every weight is 0 there.
    """
    do, extra, (total, heads, dim) = call.do, cuts.extra_csr_rows, o.shape
    num_pieces = 0 if extra is None else extra.numel()
    tile_programs, *tile_tensors = tile_arguments(tiles)
    list_programs = max(cdiv(num_pieces, TILES), tile_programs)
    options = tuning.config("attention_bwd_delta", o.device, head_dim=dim, itemsize=o.dtype.itemsize)
    launch(_attention_bwd_delta_kernel, (list_programs + cdiv(total * heads + 1, options["BLOCK_M"]),),
           do, o, dlse, lse, call.terms, total * heads, do.stride(0), do.stride(1), o.stride(0), o.stride(1),
           routing and routing.indptr, routing.num_csr_rows if routing else 0, extra, num_pieces, cuts.split,
           list_programs, *tile_tensors, H=heads, DV=dim, BLOCK_DV=next_power_of_2(dim), TILES=TILES, **options)


@triton.jit(do_not_specialize=["num_csr_rows", "list_programs", "num_pieces", "split", "num_tiles", "block"])
def _attention_bwd_delta_kernel(
    do, o, dlse, lse, terms, num_rows, stride_dot, stride_doh, stride_ot, stride_oh,
    indptr, num_csr_rows, extra_csr_rows, num_pieces, split, list_programs,
    tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken, num_tiles, block,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """BLOCK_M (query, head) rows; the first ``list_programs`` programs cut lists, TILES pieces and tiles each."""
    if indptr is not None:
        if tl.program_id(0) < list_programs:
            if extra_csr_rows is not None:
                if tl.program_id(0) * TILES < num_pieces:
                    _extra_csr_rows(indptr, extra_csr_rows, num_csr_rows, num_pieces, split, TILES)
            if tile_csr_row is not None:
                _make_tiles(indptr, num_csr_rows, tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken,
                            num_tiles, block, TILES)
            return
    row = (tl.program_id(0) - list_programs).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
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
    indices_per_kv_head: int
    extra_csr_rows: Buffer | None
    partial_floats: int

    def num_extra(self, kv_heads: int) -> int:
        """The bound on pieces beyond each list's first, of so many kv heads."""
        return 0 if self.extra_csr_rows is None else cdiv(self.indices_per_kv_head * kv_heads, self.split)


def _cuts(call: AttentionCall, routing: Routing | None, kv_heads_together: int, room: int) -> _Cuts:
    split = call.config("attention_bwd_dkdv", gluon=call.gluon)["SPLIT"]
    if routing is None or call.rows_per_kv_head <= split:  # a row is in a list at most once
        return _Cuts(split, 0, None, 0)
    floats = 2 * call.segments.chunk_size * (call.q.shape[2] + call.v.shape[2])  # of a cut list's first piece too
    indices = call.rows_per_kv_head * call.choices
    allowed = max(MIN_PIECES, room // (4 * floats))
    split = cdiv(max(split, cdiv(indices * kv_heads_together, allowed)), call.shared) * call.shared
    extra_csr_rows = empty((routing.num_choices // split + 2,), torch.int32, call.q.device)
    return _Cuts(split, indices, extra_csr_rows, cdiv(indices * kv_heads_together, split) * floats)


@triton.jit
def _extra_csr_rows(indptr, extra_csr_rows, num_csr_rows, num_pieces, split, BLOCK: tl.constexpr):
    """For each ``split`` indices the number of CSR rows that start before their end."""
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = (piece + 1).to(tl.int64) * split
    count = piece * 0
    remaining = num_csr_rows + 1
    while remaining > 1:
        half = remaining // 2
        count = tl.where(tl.load(indptr + count + half - 1) < end, count + half, count)
        remaining -= half
    tl.store(extra_csr_rows + piece, count, mask=piece < num_pieces)


def _segments_by_sequence(segments: Segments) -> tuple[Buffer, ...]:
    """Sequence, first and last (exclusive) row, and offset of the segments, those of a sequence side by side."""
    cu_seqlens, seq_ids, number = segments.cu_seqlens_q, segments.seq_ids, segments.num_segments
    if segments.packed or number == 1:
        return seq_ids, cu_seqlens[:-1], cu_seqlens[1:], segments.offsets
    ordered = [empty((number,), torch.int32, seq_ids.device) for _ in range(4)]
    launch(_order_segments_kernel, (cdiv(number, 64),), cu_seqlens, seq_ids, segments.offsets, *ordered, number,
           BLOCK=64, num_warps=4)
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


def _attention_bwd_dkdv(call: AttentionCall, routing: Routing | None, dk: Buffer, dv: Buffer, dq_partial: Buffer | None,
                        cuts: _Cuts, dkdv_partial: Buffer | None, group: tuple[int, int]) -> None:
    """Writes dk and dv of one group of kv heads, and ``dq_partial`` where there is one."""
    options = call.config("attention_bwd_dkdv", gluon=call.gluon)
    del options["SPLIT"]
    size, gluon = call.segments.chunk_size, is_gluon(options)
    if dq_partial is not None and not gluon:
        options["BLOCK_N"] = max(16, next_power_of_2(size))
    block_n = options["BLOCK_N"]
    kv_heads = group[1] - group[0]
    num_extra, num_key_tiles = cuts.num_extra(kv_heads), cdiv(min(size, call.segments.max_seqlen_k), block_n)
    if num_key_tiles == 0:
        return
    seq_ids, segment_begin, segment_end, offsets = _segments_by_sequence(call.segments)
    lists = dict(indptr=routing and routing.indptr, extra_csr_rows=cuts.extra_csr_rows, num_extra=num_extra,
                 split=cuts.split, kv_head_begin=group[0], kv_head_end=group[1], dk=dk, dv=dv)
    arguments = dict(lists, indices=routing and routing.indices, seq_ids=seq_ids, segment_begin=segment_begin,
                     segment_end=segment_end, offsets=offsets, num_key_tiles=num_key_tiles,
                     PACKED=call.segments.packed, HAS_DQ=dq_partial is not None, RAGGED=size % block_n != 0, **options)
    grid = ((num_extra + call.num_chunks * kv_heads) * num_key_tiles,)
    if gluon:
        sm90.kernel_module("attention_bwd_dkdv").attention_bwd_dkdv(call, grid, dkdv_partial, dq_partial, arguments)
    else:
        launch(_attention_bwd_dkdv_kernel, grid, **call.arguments(
            _attention_bwd_dkdv_kernel, dkdv_partial=dkdv_partial, dq_partial=dq_partial, **arguments))
    if num_extra:
        launch(_attention_bwd_dkdv_sum_kernel, (num_extra, cdiv(size, 16)), **call.arguments(
            _attention_bwd_dkdv_sum_kernel, dkdv_partial=dkdv_partial, BLOCK_N=16, **lists))


def _attention_bwd_dq(call: AttentionCall, routing: Routing, tiles: Tiles, dq_partial: Buffer,
                      group: tuple[int, int]) -> None:
    """Fills the partial dq of one group of kv heads."""
    options = call.config("attention_bwd_dq", gluon=call.gluon)
    if is_gluon(options):
        del options["SPLIT"]
        sm90.kernel_module("attention_bwd_dq").attention_bwd_dq(call, routing, tiles, dq_partial, group, options)
        return
    grid, lists = call.over_lists(routing, tiles, group)
    launch(_attention_bwd_dq_kernel, grid, **call.arguments(
        _attention_bwd_dq_kernel, **call.key_tiles(options["BLOCK_N"]), **lists, dq_partial=dq_partial,
        RAGGED=call.segments.chunk_size % options["BLOCK_N"] != 0, **options))


def _attention_bwd_dq_diagonal(call: AttentionCall, dq_partial: Buffer | None, dq: Buffer,
                               group: tuple[int, int]) -> None:
    """Writes dq of one group of kv heads: the diagonal chunks' part and the sum of the partial dq."""
    options = call.config("attention_bwd_dq_diagonal", choices=call.choices, gluon=call.gluon_diagonal)
    if is_gluon(options):
        return sm90.kernel_module("attention_diagonal").attention_bwd_dq_diagonal(call, dq_partial, dq, group, options)
    grid, queries = call.over_queries(options["BLOCK_M"], group)
    dq_partial, use_tma = call.partial_tiles(dq_partial, dq.shape[2], options["BLOCK_M"], group)
    launch(_attention_bwd_dq_diagonal_kernel, grid, **call.arguments(
        _attention_bwd_dq_diagonal_kernel, **queries, dq_partial=dq_partial, dq=dq, USE_TMA=use_tma, **options))
