"""Gate and top-k in one kernel: scores of a tile of queries against tiles of chunk means, and a streaming selection.

Nothing of the size queries x chunks is stored. Tiles of chunks are walked from the latest back, so that among equals
the later chunk is met first and stays. What makes it fast:
- the k-th best of column maxima over the latest WARM tiles is a lower bound of the k-th best score, so hardly anything
  that is not chosen in the end passes the comparison;
- columns are dealt to LANES lists a row, as the matrix unit deals them to threads (8 columns: 0 0 1 1 2 2 3 3), so that
  no insertion leaves a thread's registers; lists are merged once, at the end;
- the comparison and the insertion are PTX, in which each warp branches for itself, once a round: what passes are bits
  of a register, and of it one a list waits, until a second one comes to one of the warp's lists, so that an insertion
  serves many of them;
- many choices do not fit registers so: PASS of them at a time are chosen, among the chunks behind those of the pass
  before, whose scores are the same bits again.
Beside it: the sum of a group's queries, and given choices made harmless.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Segments
from . import sm90, tuning
from .bounds import clear_rows
from .host import INTERPRETED, cdiv, head_block, next_power_of_2
from .jit_helpers import _offset, _query_tile
from .launcher import Buffer, call, empty, launch, rows
from .tuning_table import is_gluon


def gate(q: Tensor, means: Tensor, segments: Segments, topk: int) -> Tensor:
    """As :func:`moba_megatron.reference.gate`; products of fp32 are in fp32. A score depends on its query and its chunk
    alone, not on the other rows of the tile, so that parts of a sequence choose what the whole would. Raises ValueError
    for means of 2^31 elements or more."""
    if means.numel() >= 2 ** 31:  # offsets within them are 32 bits wide
        raise ValueError(f"chunk means must have fewer than 2^31 elements for the Triton kernels, got "
                         f"{tuple(means.shape)}: use larger chunks")
    return call(_gate, rows(q), means.contiguous(), segments, topk - 1)


def _gate(q: Buffer, means: Buffer, segments: Segments, choices: int) -> Buffer:
    total, num_heads, head_dim = q.shape
    selected = empty((total, num_heads, choices), torch.int32, q.device)
    if selected.numel() == 0:
        return selected
    if not segments.exact:
        clear_rows(segments.cu_seqlens_q, (selected, -1))
    options = tuning.config("gate", q.device, head_dim=head_dim, itemsize=q.dtype.itemsize, choices=choices,
                            gluon=int(means.shape[0] > 0 and sm90.takes(q, means)))
    if is_gluon(options):
        sm90.kernel_module("gating").gate(q, means, segments, selected, options)
        return selected
    num_tiles = total // options["BLOCK_M"] + segments.num_segments
    most = options.pop("PASS", 8)
    last_score, last_chunk = (empty((total, num_heads), dtype, q.device) if choices > most else selected
                              for dtype in (torch.float32, torch.int32))
    for place in range(0, choices, most):
        number = min(most, choices - place)
        ptx = ("", "") if INTERPRETED or q.dtype.itemsize == 4 else insertion(
            options["BLOCK_N"] // options["LANES"], number, options["LANES"], place > 0)
        launch(_gate_kernel, (num_tiles * num_heads,), q, means, selected, last_score, last_chunk,
               segments.cu_seqlens_q, segments.cu_seqlens_k, segments.seq_ids, segments.offsets,
               segments.num_segments, num_tiles, segments.chunk_size, place, choices, q.stride(0), q.stride(1),
               H=num_heads, HK=means.shape[1], D=head_dim, KS=number, BLOCK_D=head_block(head_dim), PRECISION="ieee",
               BEHIND=place > 0, GOES_ON=place + number < choices, PTX=ptx[0], CONSTRAINTS=ptx[1], **options)
    return selected


def group_queries(q: Tensor, num_kv_heads: int) -> Tensor:
    """As :func:`moba_megatron.reference.group_queries`: the same bits."""
    return call(_group_queries, rows(q), num_kv_heads)


def _group_queries(q: Buffer, num_kv_heads: int) -> Buffer:
    total, num_heads, head_dim = q.shape
    sums, group = empty((total, num_kv_heads, head_dim), q.dtype, q.device), num_heads // num_kv_heads
    if total:
        launch(_group_queries_kernel, (cdiv(total * num_kv_heads, 16),), q, sums, total * num_kv_heads, *q.stride()[:2],
               HK=num_kv_heads, G=group, D=head_dim, BLOCK_D=head_block(head_dim), SCALE=1 / next_power_of_2(group),
               BLOCK_M=16, num_warps=4)
    return sums


def keep_earlier(selected: Tensor, segments: Segments) -> Tensor:
    """As :func:`moba_megatron.reference.keep_earlier`; nothing waits for the device."""
    return call(_keep_earlier, selected.contiguous(), segments)


def _keep_earlier(selected: Buffer, segments: Segments) -> Buffer:
    total, lists, choices = selected.shape
    kept = empty(selected.shape, torch.int32, selected.device)
    if selected.numel():
        if not segments.exact:
            clear_rows(segments.cu_seqlens_q, (kept, -1))
        block_m = max(16, 1024 // next_power_of_2(choices))
        num_tiles = total // block_m + segments.num_segments
        launch(_keep_earlier_kernel, (num_tiles * lists,), selected, kept, segments.cu_seqlens_q, segments.cu_seqlens_k,
               segments.seq_ids, segments.offsets, segments.num_segments, segments.chunk_size, LISTS=lists, KS=choices,
               BLOCK_KS=next_power_of_2(choices), BLOCK_M=block_m, num_warps=4)
    return kept


@functools.cache
def insertion(width: int, number: int, lanes: int, behind: bool) -> tuple[str, str]:
    """PTX that offers a tile's scores of a (row, lane) to its list, and the constraints of its operands. Its
    arguments: ``number`` values ``v``, from the best down, and the one that waits (-inf: none); their chunks ``c``;
    ``width`` scores ``x``, a power of two, the last is offered first; a score ``t`` that what is chosen surpasses; the
    ``first`` chunk of the tile and lane; score and chunk ``last`` and ``until``: if ``behind``, only what comes behind
    these. Results: the first ``2 * number + 2``. Votes keep a warp together. What passes is a bit each, by the sign of
    a difference; each round every list takes its next one, which waits, until one comes to a list in which one waits:
    all that wait are inserted then, behind equals, as far as what moves reaches ``t``. Nothing where ``width`` is not 2
    to 16: the bits are added up in a float."""
    if not 2 <= width <= 16:
        return "", ""
    state = [f"{x}{k}" for x in "vc" for k in (*range(number), "")]
    names = state + [f"x{j}" for j in range(width)] + ["t", "first", "last", "until"]
    lines = [f".reg .pred p, q, has; .reg .b32 bar, low, new, bits, taken, j, d, y, z, s<{width}>, {', '.join(names)};"]
    lines += [f"mov.b32 {name}, ${len(state) + i};" for i, name in enumerate(names)]
    raised = f"max.f32 bar, t, v{number - 1}; add.f32 bar, bar, 0f00000000;"  # 0 for -0: differences are never -0
    lines.append(f"max.f32 low, t, 0fFF7FFFFF; {raised}")
    # (score - bar) * 2^64, between 0 and 1; near 0 and beyond 2^60 the bar is lower, so that no difference is lost
    lines.append("abs.f32 d, bar; mul.f32 y, bar, 0fDF800000; setp.lt.f32 p, d, 0f2C000000; "
                 "selp.b32 y, 0f4C000000, y, p; setp.le.f32 p, d, 0f5D800000; selp.b32 y, y, 0f7F800000, p; "
                 "mov.b32 s0, 0f4B000000; mov.b32 s1, 0;")
    for j in range(width):
        lines.append(f"fma.rn.sat.f32 d, x{j}, 0f5F800000, y; fma.rn.f32 s{j % 2}, d, 0f{127 + j << 23:08X}, s{j % 2};")
    lines.append(f"add.f32 s0, s0, s1; and.b32 bits, s0, {(1 << width) - 1};")
    if behind:
        lines.append("mov.b32 taken, 0; add.f32 y, last, 0f00000000;")
        lines += [f"sub.f32 d, y, x{j}; shf.l.wrap.b32 taken, d, taken, 1;" for j in reversed(range(width))]
        lines.append("not.b32 taken, taken; and.b32 bits, bits, taken;")
    lines.append("NEXT: setp.ne.s32 has, bits, 0; vote.sync.any.pred q, has, -1; @!q bra.uni DONE; bfind.u32 j, bits;")
    scores = [f"x{i}" for i in range(width)]
    for level in range(width.bit_length() - 1):
        lines.append(f"and.b32 y, j, {1 << level}; setp.ne.s32 q, y, 0;")
        picked = [f"s{i}" for i in range(len(scores) // 2)]
        lines += [f"selp.b32 {to}, {odd}, {even}, q;" for to, even, odd in zip(picked, scores[::2], scores[1::2])]
        scores = picked
    lines.append(f"mov.b32 y, {scores[0]}; shr.s32 z, j, 1; mad.lo.s32 z, z, {2 * lanes - 2}, j; add.s32 z, z, first; "
                 "shl.b32 d, 1, j; xor.b32 bits, bits, d;")
    if behind:
        lines.append("setp.neu.f32 q, y, last; setp.lt.or.s32 q, z, until, q; and.pred has, has, q;")
    lines.append("setp.gt.and.f32 has, y, bar, has; setp.gt.and.f32 q, v, 0fFF800000, has; "
                 "vote.sync.any.pred q, q, -1; @!q bra.uni WAIT; mov.b32 new, v;")
    for k in range(number):
        if k % 4 == 0 < k:
            lines.append("setp.ge.f32 p, v, low; vote.sync.any.pred p, p, -1; @!p bra.uni INSERTED;")
        lines.append(f"setp.gt.f32 p, new, v{k};")
        lines += [f"selp.b32 d, {x}{k}, {x}, p; selp.b32 {x}{k}, {x}, {x}{k}, p; mov.b32 {x}, d;" for x in "vc"]
    lines.append(f"INSERTED: mov.b32 v, 0fFF800000; {raised} setp.gt.and.f32 has, y, bar, has; "
                 "WAIT: @has mov.b32 v, y; @has mov.b32 c, z; bra.uni NEXT; DONE:")
    lines += [f"mov.b32 ${i}, {name};" for i, name in enumerate(state)]
    kinds = ["r" if name[0] in "cu" or name == "first" else "f" for name in names]
    return "{ " + "\n".join(lines) + " }", ",".join(["=" + kind for kind in kinds[:len(state)]] + kinds)


@triton.constexpr_function
def _kinds(number):
    return (tl.float32,) * number + (tl.int32,) * number


@triton.jit
def _scores(q_rows, means, tile, limit, earlier, MASKED: tl.constexpr, HK: tl.constexpr, D: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """Scores ``[BLOCK_M, BLOCK_N]`` of a tile of chunks. MASKED: -inf from ``earlier`` on, which is up to ``limit``."""
    chunk = tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    if MASKED:
        chunk += tile * BLOCK_N
        pointers = means + tl.minimum(chunk, limit - 1)[:, None] * (HK * D) + col[None, :]
    else:
        pointers = means + tile * BLOCK_N * (HK * D) + chunk[:, None] * (HK * D) + col[None, :]
    rows = tl.load(pointers) if D == BLOCK_D else tl.load(pointers, mask=(col < D)[None, :], other=0.0)
    s = tl.dot(q_rows, tl.trans(rows), input_precision=PRECISION)
    if MASKED:
        s = tl.where(chunk[None, :] < earlier[:, None], s, -float("inf"))
    return s


@triton.jit
def _warm_threshold(q_rows, means, earlier, last, every, limit, BEHIND: tl.constexpr, KS: tl.constexpr,
                    HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WARM: tl.constexpr):
    """A value below the KS-th best score (BEHIND: of those below ``last``) of each row: from the KS-th best maximum of
    the columns of some tiles. Each of these is the score of another chunk, so KS chunks reach the KS-th of them."""
    best = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
    end = tl.cdiv(limit, BLOCK_N)
    begin = tl.maximum(end - WARM, 0)
    middle = tl.maximum(every // BLOCK_N, begin)  # up to here every row may choose every chunk
    for masked in tl.static_range(2):
        for tile in range(middle if masked else begin, end if masked else middle):
            s = _scores(q_rows, means, tile, limit, earlier, masked, HK, D, BLOCK_D, BLOCK_N, PRECISION)
            if BEHIND:
                s = tl.where(s < last[:, None], s, -float("inf"))
            best = tl.maximum(best, s)
    return _below_best(best, KS)


@triton.jit
def _below_best(best, KS: tl.constexpr):
    """A value below the KS-th best of each row, or a little lower."""
    if best.shape[1] > 2 * KS:  # fewer columns: a slightly lower bound at half the work
        best = tl.max(tl.reshape(best, [best.shape[0], 2, best.shape[1] // 2]), 1)
    bound = tl.max(best, 1)
    for _ in range(KS - 1):
        best = tl.where(best == bound[:, None], -float("inf"), best)
        bound = tl.max(best, 1)
    bound = tl.minimum(bound, 3.0e38)
    return bound - tl.abs(bound) * 2.4e-7 - 1e-30  # strictly below, also after rounding; -inf stays


@triton.jit
def _deal(s, LANES: tl.constexpr):
    """Scores ``[BLOCK_M, BLOCK_N]`` as ``[BLOCK_M, LANES, BLOCK_N // LANES]``: columns dealt out two at a time."""
    x = tl.reshape(s, [s.shape[0], s.shape[1] // (2 * LANES), LANES, 2])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), [s.shape[0], LANES, s.shape[1] // LANES])


@triton.jit
def _columns(x, WIDTH: tl.constexpr):
    """The columns of ``x`` ``[.., LANES, WIDTH]``, each ``[.., LANES]``; split from the lowest bit of their number up,
    so that no thread needs another's."""
    if WIDTH == 1:
        columns = (tl.reshape(x, [x.shape[0], x.shape[1]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], WIDTH // 2, 2]))
        evens = _columns(even, WIDTH // 2)
        odds = _columns(odd, WIDTH // 2)
        columns = ()
        for i in tl.static_range(WIDTH // 2):
            columns = columns + (evens[i], odds[i])
    return columns


@triton.jit
def _insert(state, value, chunk, KS: tl.constexpr):
    """Inserts behind equals into lists of KS values from the best down and their chunks; what falls out waits."""
    values = ()
    chunks = ()
    moved = value
    for j in tl.static_range(KS):
        better = value > state[j]  # once true, true for all that follow: equals keep their order
        values = values + (tl.where(better, moved, state[j]),)
        chunks = chunks + (tl.where(better, chunk, state[KS + 1 + j]),)
        moved = tl.where(better, state[j], moved)
        chunk = tl.where(better, state[KS + 1 + j], chunk)
    return values + (moved,) + chunks + (chunk,)


@triton.jit
def _take_best(state, KS: tl.constexpr):
    """The best chunk of each row ``[BLOCK_M]`` (-1: none), and the lists ``[BLOCK_M, LANES]`` without it."""
    best = tl.max(state[0], 1)[:, None]
    chunk = tl.max(tl.where(state[0] == best, state[KS + 1], -1), 1)
    taken = (state[0] == best) & (state[KS + 1] == chunk[:, None])
    values = ()
    chunks = ()
    for j in tl.static_range(KS):
        values = values + (tl.where(taken, state[j + 1], state[j]),)
        chunks = chunks + (tl.where(taken, state[KS + 2 + j], state[KS + 1 + j]),)
    return chunk, values + (state[KS],) + chunks + (state[2 * KS + 1],)


@triton.jit(do_not_specialize=["num_segments", "num_tiles", "place", "choices"])
def _gate_kernel(
    q, means, selected, last_score, last_chunk, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets,
    num_segments, num_tiles, chunk_size, place, choices, stride_qt, stride_qh,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, KS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BEHIND: tl.constexpr, GOES_ON: tl.constexpr, WARM: tl.constexpr, LANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr,
    REFRESH: tl.constexpr = 4,
):
    """BLOCK_M queries of one segment and head against the earlier chunks of their sequence. Of the ``choices`` KS from
    ``place`` on. BEHIND: among the chunks behind ``last_score`` and ``last_chunk``, those that the pass before chose
    last; GOES_ON: these two are stored."""
    tile = num_tiles - 1 - tl.program_id(0) // H  # later queries have more chunks: they start first
    head = tl.program_id(0) % H
    row, row_end, position, _, first_chunk = _query_tile(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments,
                                                         chunk_size, tile, BLOCK_M)
    if row >= row_end:
        return
    row_in_tile = tl.arange(0, BLOCK_M)
    rows = (row + row_in_tile).to(tl.int64)
    valid = row + row_in_tile < row_end
    earlier = tl.where(valid, (position + row_in_tile) // chunk_size, 0)  # chunks that the query may choose
    limit = (position + tl.minimum(BLOCK_M, row_end - row) - 1) // chunk_size  # the most that a row has
    every = position // chunk_size  # the fewest
    col = tl.arange(0, BLOCK_D)
    q_rows = tl.load(q + _offset(head, stride_qh) + _offset(rows, stride_qt)[:, None] + col[None, :],
                     mask=valid[:, None] & (col < D)[None, :], other=0.0)
    means += (first_chunk.to(tl.int64) * HK + head // (H // HK)) * D

    threshold = tl.full([BLOCK_M], -float("inf"), tl.float32)
    last = threshold
    until = tl.zeros([BLOCK_M], tl.int32)
    WIDTH: tl.constexpr = BLOCK_N // LANES
    if BEHIND:
        last = tl.load(last_score + rows * H + head, mask=valid, other=-float("inf"))
        until = tl.load(last_chunk + rows * H + head, mask=valid, other=0)
    if WARM > 0:
        if limit > BLOCK_N // 4:  # of fewer chunks the lists take as many rounds as they have columns, a few
            threshold = _warm_threshold(q_rows, means, earlier, last, every, limit, BEHIND, KS, HK, D,
                                        BLOCK_D, BLOCK_M, BLOCK_N, PRECISION, WARM)
    state = (tl.full([BLOCK_M, LANES], -float("inf"), tl.float32),) * (KS + 1) + (
        tl.full([BLOCK_M, LANES], -1, tl.int32),) * (KS + 1)
    for unmasked in tl.static_range(2):
        begin = 0 if unmasked else every // BLOCK_N  # up to here every row may choose every chunk
        end = every // BLOCK_N if unmasked else tl.cdiv(limit, BLOCK_N)
        for step in range(begin, end):
            tile = begin + end - 1 - step
            s = _scores(q_rows, means, tile, limit, earlier, not unmasked, HK, D, BLOCK_D, BLOCK_N, PRECISION)
            x = _columns(_deal(s, LANES), WIDTH)
            lane_chunk = first_chunk + tile * BLOCK_N + 2 * tl.arange(0, LANES)[None, :]
            if PTX != "":
                operands = state + x + (threshold[:, None], lane_chunk, last[:, None], until[:, None])
                state = tl.inline_asm_elementwise(PTX, CONSTRAINTS, operands, _kinds(KS + 1), is_pure=False, pack=1)
            else:
                for i in tl.static_range(WIDTH - 1, -1, -1):
                    chunk = lane_chunk + (i // 2 * 2 * LANES + i % 2)
                    hit = x[i] > threshold[:, None]
                    if BEHIND:
                        hit &= (x[i] < last[:, None]) | ((x[i] == last[:, None]) & (chunk < until[:, None]))
                    state = _insert(state, tl.where(hit, x[i], -float("inf")), chunk, KS)
            if tile % REFRESH == 0 or not unmasked:  # KS chunks reach each of these
                threshold = tl.maximum(threshold, tl.max(state[KS - 1], 1))
                threshold = tl.maximum(threshold, tl.min(state[(KS - 1) // LANES], 1))
    state = _insert(state, state[KS], state[2 * KS + 1], KS)

    to = selected + (rows * H + head) * choices + place
    for j in range(KS):
        last = tl.max(state[0], 1)
        until, state = _take_best(state, KS)
        tl.store(to + j, until, mask=valid)
    if GOES_ON:
        tl.store(last_score + rows * H + head, last, mask=valid)
        tl.store(last_chunk + rows * H + head, until, mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def _group_queries_kernel(q, sums, num_rows, stride_qt, stride_qh, HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                          BLOCK_D: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M sums of G heads each, which are added in order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    keep = (row < num_rows)[:, None] & (cols < D)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.static_range(G):
        at = _offset(row // HK, stride_qt) + _offset(row % HK * G + i, stride_qh)
        total += tl.load(q + at[:, None] + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(sums + row[:, None] * D + cols[None, :], (total * SCALE).to(sums.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["num_segments", "chunk_size"])
def _keep_earlier_kernel(selected, kept, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments, chunk_size,
                         LISTS: tl.constexpr, KS: tl.constexpr, BLOCK_KS: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M queries of one segment and head, or group of heads."""
    row, row_end, position, _, first_chunk = _query_tile(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, num_segments,
                                                         chunk_size, tl.program_id(0) // LISTS, BLOCK_M)
    if row >= row_end:
        return
    lane = tl.arange(0, BLOCK_M)
    valid = row + lane < row_end
    own = first_chunk + (position + lane) // chunk_size
    at = ((row + lane).to(tl.int64) * LISTS + tl.program_id(0) % LISTS) * KS
    place = tl.arange(0, BLOCK_KS)[None, :]
    given = tl.load(selected + at[:, None] + place, mask=valid[:, None] & (place < KS), other=-1)
    for j in range(KS):
        chunk = tl.load(selected + at + j, mask=valid, other=-1)
        named = tl.sum(((given == chunk[:, None]) & (place < j)).to(tl.int32), 1)  # so often before
        keep = (chunk >= first_chunk) & (chunk < own) & (named == 0)
        tl.store(kept + at + j, tl.where(keep, chunk, -1), mask=valid)
