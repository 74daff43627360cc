"""Routing: from each query's chunks to each chunk's queries, by a stable counting sort on the device.

Three launches: count, for each group of consecutive tokens; add up, over groups and over CSR rows; place (and cut rows
into tiles). A program of one warp places the choices of its group, in order, with its own counters: always the same
result.
"""
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Routing, index_dtype
from . import tuning
from .host import INTERPRETED, cdiv
from .jit_helpers import _find_piece, _piece_items
from .launcher import Buffer, empty, launch, stage

PROGRAMS = 8192
"""Programs that count and place. More than a card holds at once: they then write to a few kv heads' CSR rows at a time,
which the second-level cache holds until its lines are full."""
MOST_GROUPS, GROUP_COUNTERS = 1024, 1 << 21
"""Groups of tokens of a kv head, at most, whose counters are added up one after the other, and their counters, of which
the second-level cache holds no more beside the ends of the lists."""
COUNTER_BYTES = 32 << 20
"""Bound of the counters' memory, or half of the indices' where that is more; fewer groups of tokens keep to it."""
TILES = 256
"""Tiles that a program writes."""
TAKE = tl.constexpr("""{ .reg .pred p; .reg .b32 same, number; bar.warp.sync -1; match.any.sync.b32 same, $4, -1;
popc.b32 number, same; mov.u32 $1, %lanemask_lt; and.b32 $1, same, $1; popc.b32 $1, $1; neg.s32 $2, same;
and.b32 $2, same, $2; bfind.u32 $2, $2; mov.b32 $0, 0; setp.eq.s32 p, $1, 0; setp.ge.and.s32 p, $4, 0, p;
@p atom.global.add.u32 $0, [$3], number; }""")
"""The first lane of a chunk, $4, adds to its counter, [$3]: what was there; how many lanes are before; the first's."""
SHARE = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 31, -1;")


@dataclass(frozen=True)
class Tiles:
    """CSR rows cut into tiles of ``block`` indices. The tiles of a row follow each other, rows are in order.

    Tile ``i`` of row ``b`` has the number ``indptr[b] // block + b + i`` (``indptr`` of the routing): a row may have
    one number too many: there begin >= end, and a program leaves.

    Args:
        csr_row: int32 ``[num_tiles]``.
        begin, end: ``[num_tiles]``, range of indices; in the dtype of the indices.
        indptr: int32 ``[num_csr_rows + 1]``, the first tile of each row, and the end of the last one's.
        taken: int32 ``[1]``, 0: how many tiles programs have taken that take one after the other; they leave 0.
        block: indices in a tile.
    """

    csr_row: Tensor
    begin: Tensor
    end: Tensor
    indptr: Tensor
    taken: Tensor
    block: int

    @classmethod
    def empty(cls, routing: Routing, block: int) -> "Tiles":
        """For a kernel to write; as many as there are at most, which the host knows."""
        rows, device, dtype = routing.num_csr_rows, routing.indptr.device, routing.indptr.dtype
        number = routing.num_choices // block + rows
        return cls(*(empty((size,), dtype, device) for size, dtype in (
            (number, torch.int32), (number, dtype), (number, dtype), (rows + 1, torch.int32), (1, torch.int32))), block)


def tile_arguments(tiles: Tiles | None) -> tuple[Tensor | int | None, ...]:
    """What a kernel takes from ``tile_programs`` to ``block``; no program writes tiles where there are none.

    A number more than there are tiles: ``indptr`` may have as many.
    """
    if tiles is None:
        return 0, None, None, None, None, None, 0, 1
    number = tiles.csr_row.numel()
    return number // TILES + 1, tiles.csr_row, tiles.begin, tiles.end, tiles.indptr, tiles.taken, number, tiles.block


def route(selected: Tensor, num_kv_heads: int, num_chunks: int, shared: int = 1) -> Routing:
    """As :func:`moba_megatron.reference.route`; nothing waits for the device, every size follows from the shapes."""
    return route_in_tiles(selected.contiguous(), num_kv_heads, num_chunks, None, shared)[0]


@stage
def route_in_tiles(selected: Buffer, num_kv_heads: int, num_chunks: int, block: int | None, shared: int = 1
                   ) -> tuple[Routing, Tiles | None]:
    """:func:`route` and :func:`make_tiles` in the launches of the former; no tiles where ``block`` is None."""
    total, num_heads, choices = selected.shape
    device, dtype = selected.device, index_dtype(selected.numel() * shared)
    indices = empty((selected.numel(),), dtype, device)
    indptr = empty((num_kv_heads * num_chunks + 1,), dtype, device)
    routing, group = Routing(indices, indptr, shared), num_heads // num_kv_heads
    if selected.numel() == 0:  # what is counted where nothing is, in one group, are the starts of empty CSR rows
        launch(_route_count_kernel, (num_kv_heads,), selected, indptr, 0, 0, num_chunks, 1, H=num_heads, G=group, KS=1,
               BLOCK=1024, num_warps=4)
        return routing, make_tiles(routing, block) if block else None
    tiles = Tiles.empty(routing, block) if block else None
    tile_programs, *tile_tensors = tile_arguments(tiles)
    warp = not INTERPRETED and dtype == torch.int32
    options = tuning.config("route", device) | ({"num_warps": 1} if warp else {"num_warps": 1, "BLOCK": 64})
    limit = max(COUNTER_BYTES // indices.dtype.itemsize, indices.numel() // 2) // (num_kv_heads * num_chunks)
    num_groups, tokens = token_groups(total, cdiv(options["BLOCK"], group * choices),
                                      max(1, selected.numel() >> 29,  # a group numbers its own in 32 bits
                                          min(PROGRAMS // num_kv_heads, MOST_GROUPS, limit,
                                              max(1, GROUP_COUNTERS // num_chunks))))
    counts = empty((num_kv_heads * num_groups * num_chunks + 1,), dtype, device)  # and a ticket
    sizes = (total, tokens, num_chunks, num_groups)
    shape = dict(H=num_heads, G=group, KS=choices)
    programs = num_groups * num_kv_heads
    warps = 4 if programs > 1000 else 16
    launch(_route_count_kernel, (programs,), selected, counts, *sizes, **shape, BLOCK=256 * warps, num_warps=warps)
    launch(_route_sum_kernel, (cdiv(num_chunks, 32) * num_kv_heads,), counts, indptr, num_chunks, num_groups,
           num_kv_heads, SHARED=shared, BLOCK_G=256, BLOCK_C=32, BLOCK=2048, num_warps=8)
    launch(_route_place_kernel, (tile_programs + programs,), selected, counts, indptr, indices, *sizes, tile_programs,
           *tile_tensors, **shape, SHARED=shared, TILES=TILES, WARP=warp, **options)
    return routing, tiles


@stage
def make_tiles(routing: Routing, block: int) -> Tiles:
    """Cuts the CSR rows into tiles of ``block`` indices: one launch."""
    tiles = Tiles.empty(routing, block)
    programs, *tensors = tile_arguments(tiles)
    launch(_make_tiles_kernel, (programs,), routing.indptr, routing.num_csr_rows, *tensors, TILES=TILES, num_warps=4)
    return tiles


def token_groups(total: int, least_tokens: int, most_groups: int) -> tuple[int, int]:
    """The number of groups of tokens, and the tokens in each (the last may have fewer)."""
    tokens = max(cdiv(total, most_groups), least_tokens)
    return cdiv(total, tokens), tokens


@triton.jit(do_not_specialize=["total", "tokens", "num_chunks", "num_groups"])
def _route_count_kernel(selected, counts, total, tokens, num_chunks, num_groups,
                        H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, BLOCK: tl.constexpr):
    """How many choices of one group of tokens and one kv head fell on each chunk: a row of ``counts``."""
    kv_head = tl.program_id(0) // num_groups
    first_token = tl.program_id(0) % num_groups * tokens
    row = counts + tl.program_id(0).to(tl.int64) * num_chunks
    lane = tl.arange(0, BLOCK)
    for first in range(0, num_chunks, BLOCK):
        tl.store(row + first + lane, 0, mask=first + lane < num_chunks)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(row + num_chunks, 0)  # the ticket of _route_sum_kernel
    tl.debug_barrier()
    num_choices = tl.minimum(tokens, total - first_token) * (G * KS)
    base = selected + (first_token.to(tl.int64) * H + kv_head * G) * KS
    for first in range(0, num_choices, BLOCK):
        choice = first + lane
        at = choice // (G * KS) * (H * KS) + choice % (G * KS)
        chunk = tl.load(base + at, mask=choice < num_choices, other=-1)
        tl.atomic_add(row + chunk, 1, mask=chunk >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_chunks", "num_groups", "num_kv_heads"])
def _route_sum_kernel(counts, indptr, num_chunks, num_groups, num_kv_heads, SHARED: tl.constexpr, BLOCK_G: tl.constexpr,
                      BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """Turns counts into the counts of earlier groups, in place, and totals into where each CSR row begins.

    The program that finishes last, by the ticket behind the counts, has all totals in sight and adds them up.
    """
    blocks = tl.cdiv(num_chunks, BLOCK_C)
    kv_head = tl.program_id(0) // blocks
    chunk = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    before = tl.zeros([BLOCK_C], counts.dtype.element_ty)
    for first in range(0, num_groups, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)
        at = (kv_head.to(tl.int64) * num_groups + group)[:, None] * num_chunks + chunk[None, :]
        keep = (group < num_groups)[:, None] & (chunk < num_chunks)[None, :]
        count = tl.load(counts + at, mask=keep, other=0)  # [BLOCK_G, BLOCK_C]
        tl.store(counts + at, tl.cumsum(count, 0) - count + before[None, :], mask=keep)
        before += tl.sum(count, 0)
    tl.store(indptr + kv_head.to(tl.int64) * num_chunks + chunk, before * SHARED, mask=chunk < num_chunks)

    tl.debug_barrier()
    num_csr_rows = num_kv_heads * num_chunks
    ticket = counts + num_csr_rows.to(tl.int64) * num_groups
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        start = tl.zeros([], indptr.dtype.element_ty)
        for first in range(0, num_csr_rows, BLOCK):
            csr_row = first + tl.arange(0, BLOCK)
            count = tl.load(indptr + csr_row, mask=csr_row < num_csr_rows, other=0, cache_modifier=".cg")
            tl.store(indptr + csr_row, start + tl.cumsum(count, 0) - count, mask=csr_row < num_csr_rows)
            start += tl.sum(count, 0)
        tl.store(indptr + num_csr_rows, start)


@triton.jit(do_not_specialize=["total", "tokens", "num_chunks", "num_groups", "tile_programs", "num_tiles", "block"])
def _route_place_kernel(selected, counts, indptr, indices, total, tokens, num_chunks, num_groups, tile_programs,
                        tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken, num_tiles, block,
                        H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr, SHARED: tl.constexpr, TILES: tl.constexpr,
                        BLOCK: tl.constexpr, WARP: tl.constexpr):
    """Writes the choices of one group of tokens and one kv head to their places, BLOCK at a time, in order.

    The first ``tile_programs`` write tiles instead: of ``indptr`` alone, which nothing writes here.
    """
    if tile_csr_row is not None:
        if tl.program_id(0) < tile_programs:
            _make_tiles(indptr, H // G * num_chunks, tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken,
                        num_tiles, block, TILES)
            return
    program = tl.program_id(0) - tile_programs
    kv_head = program // num_groups
    first_token = program % num_groups * tokens
    row = counts + program.to(tl.int64) * num_chunks
    wide = tl.arange(0, 512)
    for first in range(0, num_chunks, 512):  # the program's counters become the places of its next indices
        keep = first + wide < num_chunks
        start = tl.load(indptr + kv_head.to(tl.int64) * num_chunks + first + wide, mask=keep, other=0)
        tl.store(row + first + wide, start // SHARED + tl.load(row + first + wide, mask=keep, other=0), mask=keep)
    tl.debug_barrier()
    num_choices = tl.minimum(tokens, total - first_token) * (G * KS)
    base = (first_token.to(tl.int64) * H + kv_head * G) * KS
    tl.static_assert(BLOCK % 32 == 0)
    lane = tl.arange(0, 32)
    for first in range(0, num_choices, BLOCK):
        chunks = ()
        for i in tl.static_range(BLOCK // 32):
            choice = first + 32 * i + lane
            at = choice // (G * KS) * (H * KS) + choice % (G * KS)
            chunks = chunks + (tl.load(selected + base + at, mask=choice < num_choices, other=-1),)
        places = _places(row, chunks, lane, WARP)
        for i in tl.static_range(BLOCK // 32):
            choice = first + 32 * i + lane
            at = choice // (G * KS) * (H * KS) + choice % (G * KS)
            number = (base + at) * SHARED - at % KS * (SHARED - 1)  # of the first head that shares it
            tl.store(indices + places[i], number.to(indices.dtype.element_ty), mask=chunks[i] >= 0)


@triton.jit
def _places(counters, chunks, lane, WARP: tl.constexpr):
    """Takes places from chunks' counters, for vector after vector of 32 lanes; the first lane of a chunk adds for all.

    WARP: by instructions of a warp, which waits for no addition before all are started. Lanes meet between additions.
    """
    taken = ()
    for i in tl.static_range(len(chunks)):
        if WARP:
            it = tl.inline_asm_elementwise(TAKE, "=&r,=&r,=&r,l,r", (counters + chunks[i], chunks[i]),
                                           (tl.int32,) * 3, is_pure=False, pack=1)
        else:
            same = chunks[i][:, None] == chunks[i][None, :]
            first = tl.min(tl.where(same, lane[None, :], 32), 1)
            number = tl.sum(same.to(counters.dtype.element_ty), 1)
            start = tl.atomic_add(counters + chunks[i], number, mask=(lane == first) & (chunks[i] >= 0))
            it = (start, tl.sum((same & (lane[None, :] < lane[:, None])).to(tl.int32), 1), first)
            tl.debug_barrier()
        taken = taken + (it,)
    places = ()
    for it in tl.static_range(len(chunks)):
        start, rank, first = taken[it]
        if WARP:
            start = tl.inline_asm_elementwise(SHARE, "=r,r,r", (start, first), tl.int32, is_pure=False, pack=1)
        else:
            start = tl.sum(tl.where(first[:, None] == lane[None, :], start[None, :], 0), 1)
        places = places + (start + rank,)
    return places


@triton.jit(do_not_specialize=["num_csr_rows", "num_tiles", "block"])
def _make_tiles_kernel(indptr, num_csr_rows, tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken, num_tiles,
                       block, TILES: tl.constexpr):
    _make_tiles(indptr, num_csr_rows, tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken, num_tiles, block,
                TILES)


@triton.jit
def _make_tiles(indptr, num_csr_rows, tile_csr_row, tile_begin, tile_end, tile_indptr, tile_taken, num_tiles, block,
                TILES: tl.constexpr):
    """TILES tiles, and where the tiles of as many CSR rows begin, by one program; the first sets ``tile_taken``."""
    if tl.program_id(0) == 0:
        tl.store(tile_taken, 0)
    item = tl.program_id(0) * TILES + tl.arange(0, TILES)
    csr_row = _find_piece(indptr, num_csr_rows, block, item)
    begin, end = _piece_items(indptr, csr_row, block, item)
    keep = item < num_tiles
    tl.store(tile_csr_row + item, csr_row, mask=keep)
    tl.store(tile_begin + item, begin, mask=keep)
    tl.store(tile_end + item, end, mask=keep)
    first = tl.load(indptr + item, mask=item <= num_csr_rows, other=0) // block + item
    tl.store(tile_indptr + item, first, mask=item <= num_csr_rows)
