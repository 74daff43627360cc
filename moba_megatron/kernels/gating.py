"""Gate and top-k in one kernel: scores of a tile of queries against tiles of chunk means, and a streaming selection.

Nothing of the size queries x chunks is stored. Tiles of chunks are walked from the latest back, so that among equals
the later chunk is met first and stays. What makes it fast:
- the k-th best of column maxima over the latest WARM tiles is a lower bound of the k-th best score, so hardly anything
  that is not chosen in the end passes the comparison;
- what passes is packed into bits, and the most crowded row of a tile says how often the insertion runs: no thread waits
  for another in between;
- columns are dealt to LANES lists a row, as the matrix unit deals them to threads (8 columns: 0 0 1 1 2 2 3 3), so that
  neither packing nor insertion leaves a thread's registers; lists are merged once, at the end;
- many choices do not fit registers so: PASS of them at a time are chosen, among the chunks behind those of the pass
  before, whose scores are the same bits again.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..segments import Segments
from . import tuning
from .bounds import clear_rows
from .host import head_block, next_power_of_2
from .jit_helpers import _offset, _query_tile
from .launcher import Buffer, empty, launch, rows, stage


def gate(q: Tensor, means: Tensor, segments: Segments, topk: int) -> Tensor:
    """As :func:`moba_megatron.reference.gate`; products of fp32 are in fp32.

    A score depends on its query and its chunk alone, not on the other rows of the tile, so that parts of a sequence
    choose what the whole would. Raises ValueError for means of 2^31 elements or more.
    """
    if means.numel() >= 2 ** 31:  # offsets within them are 32 bits wide
        raise ValueError(f"chunk means must have fewer than 2^31 elements for the Triton kernels, got "
                         f"{tuple(means.shape)}: use larger chunks")
    return _gate(rows(q), means.contiguous(), segments, topk - 1)


@stage
def _gate(q: Buffer, means: Buffer, segments: Segments, choices: int) -> Buffer:
    total, num_heads, head_dim = q.shape
    selected = empty((total, num_heads, choices), torch.int32, q.device)
    if selected.numel() == 0:
        return selected
    if not segments.exact:
        clear_rows(segments.cu_seqlens_q, (selected, -1))
    options = tuning.config("gate", q.device, head_dim=head_dim, itemsize=q.dtype.itemsize, choices=choices)
    num_tiles = total // options["BLOCK_M"] + segments.num_segments
    most = options.pop("PASS", 8)
    last_score, last_chunk = (empty((total, num_heads), dtype, q.device) if choices > most else selected
                              for dtype in (torch.float32, torch.int32))
    for place in range(0, choices, most):
        number = min(most, choices - place)
        launch(_gate_kernel, (num_tiles * num_heads,), q, means, selected, last_score, last_chunk,
               segments.cu_seqlens_q, segments.cu_seqlens_k, segments.seq_ids, segments.offsets,
               segments.num_segments, num_tiles, segments.chunk_size, place, choices, q.stride(0), q.stride(1),
               H=num_heads, HK=means.shape[1], D=head_dim, KS=number, BLOCK_KS=next_power_of_2(number),
               BLOCK_D=head_block(head_dim), PRECISION="ieee", BEHIND=place > 0, GOES_ON=place + number < choices,
               **options)
    return selected


@triton.jit
def _mean_rows(means, first, limit, HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Means ``[BLOCK_N, BLOCK_D]`` of the chunks from ``first``; beyond ``limit`` the last one again (0 if none)."""
    chunk = tl.maximum(tl.minimum(first + tl.arange(0, BLOCK_N), limit - 1), 0)
    col = tl.arange(0, BLOCK_D)
    pointers = means + chunk[:, None] * (HK * D) + col[None, :]
    if D < BLOCK_D:
        rows = tl.load(pointers, mask=(col < D)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def _column_maxima(best, q_rows, means, earlier, last, limit, begin, end, MASKED: tl.constexpr, BEHIND: tl.constexpr,
                   HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
                   PRECISION: tl.constexpr):
    """Raises ``best`` ``[BLOCK_M, BLOCK_N]`` to the scores, BEHIND: those below ``last``, of the tiles from chunk
    ``begin`` to ``end``."""
    for first in range(begin, end, BLOCK_N):
        rows = _mean_rows(means, first, limit, HK, D, BLOCK_D, BLOCK_N)
        s = tl.dot(q_rows, tl.trans(rows), input_precision=PRECISION)
        if MASKED:
            s = tl.where((first + tl.arange(0, BLOCK_N))[None, :] < earlier[:, None], s, -float("inf"))
        if BEHIND:
            s = tl.where(s < last[:, None], s, -float("inf"))
        best = tl.maximum(best, s)
    return best


@triton.jit
def _warm_threshold(q_rows, means, earlier, last, every, limit, BEHIND: tl.constexpr, KS: tl.constexpr,
                    BLOCK_KS: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WARM: tl.constexpr):
    """A value below the KS-th best score (BEHIND: of those below ``last``) of each row: from the KS-th best maximum of
    the columns of some tiles.

    Each column's maximum over the tiles is the score of another chunk, so KS chunks reach the KS-th of them.
    """
    best = tl.full([BLOCK_M, BLOCK_N], -float("inf"), tl.float32)
    end = tl.cdiv(limit, BLOCK_N) * BLOCK_N
    begin = tl.maximum(end - WARM * BLOCK_N, 0)
    middle = tl.maximum(every // BLOCK_N * BLOCK_N, begin)  # up to here every row may choose every chunk
    best = _column_maxima(best, q_rows, means, earlier, last, limit, begin, middle, False, BEHIND, HK, D, BLOCK_D,
                          BLOCK_N, PRECISION)
    best = _column_maxima(best, q_rows, means, earlier, last, limit, middle, end, True, BEHIND, HK, D, BLOCK_D, BLOCK_N,
                          PRECISION)
    if BLOCK_N > 2 * BLOCK_KS:  # fewer columns: a slightly lower bound at half the work
        best = tl.max(tl.reshape(best, [BLOCK_M, 2, BLOCK_N // 2]), 1)
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
def _pack(hits, WIDTH: tl.constexpr):
    """Hits ``[BLOCK_M, LANES, WIDTH]`` as bits, the first column in the top one, and their number: ``[.., LANES]``."""
    bits = (tl.full([WIDTH], 1, tl.int32) << (WIDTH - 1 - tl.arange(0, WIDTH)))[None, None, :]
    if WIDTH <= 16:  # one sum yields both, exactly, on the units for fp32 products, which have nothing else to do
        both = tl.sum(hits.to(tl.float32) * (bits + 65536).to(tl.float32), 2).to(tl.int32)
        word, count = both & 65535, both >> 16
    else:
        word = tl.sum(tl.where(hits, bits, 0), 2)
        count = tl.sum(hits.to(tl.int32), 2)
    return word, count


@triton.jit
def _count_bits(word):
    """Number of bits that are set."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _allowed(count, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Bits ``[BLOCK_M, LANES]`` of dealt columns below ``count`` ``[BLOCK_M]``; the first column has the top bit."""
    count = tl.maximum(count, 0)[:, None]
    rest = count % (2 * LANES) - 2 * tl.arange(0, LANES)[None, :]
    below = tl.minimum(count // (2 * LANES) * 2 + tl.minimum(tl.maximum(rest, 0), 2), WIDTH)
    return tl.where(below > 0, tl.full(below.shape, -1, tl.int32) << (WIDTH - tl.maximum(below, 1)), 0)


@triton.jit
def _lowest_bit(word):
    """Number of the lowest set bit, from the exponent of that bit as a float; anything for 0."""
    bit = (word & -word).to(tl.float32)
    return ((bit.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _pick(x, index, WIDTH: tl.constexpr):
    """``x[..., index]``: halves are chosen from the lowest bit of the index up, so that no thread needs another's."""
    if WIDTH == 1:
        picked = tl.reshape(x, index.shape)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], WIDTH // 2, 2]))
        picked = _pick(tl.where(((index & 1) != 0)[:, :, None], odd, even), index >> 1, WIDTH // 2)
    return picked


@triton.jit
def _insert(values, chunks, value, chunk, KS: tl.constexpr):
    """Inserts into lists sorted from the best down, behind equals; the last falls out."""
    new_values = ()
    new_chunks = ()
    next_value = value
    next_chunk = chunk
    for j in tl.static_range(KS):
        behind = value > values[j]  # once true, true for all that follow: equals keep their order
        new_values = new_values + (tl.where(behind, next_value, values[j]),)
        new_chunks = new_chunks + (tl.where(behind, next_chunk, chunks[j]),)
        next_value = tl.where(behind, values[j], value)
        next_chunk = tl.where(behind, chunks[j], chunk)
    return new_values, new_chunks


@triton.jit
def _take_best(values, chunks, KS: tl.constexpr):
    """The best chunk of each row ``[BLOCK_M]`` (-1: none), and the lists ``[BLOCK_M, LANES]`` without it."""
    best = tl.max(values[0], 1)[:, None]
    chunk = tl.max(tl.where(values[0] == best, chunks[0], -1), 1)
    taken = (values[0] == best) & (chunks[0] == chunk[:, None])
    new_values = ()
    new_chunks = ()
    for j in tl.static_range(KS):
        if j + 1 < KS:
            new_values = new_values + (tl.where(taken, values[j + 1], values[j]),)
            new_chunks = new_chunks + (tl.where(taken, chunks[j + 1], chunks[j]),)
        else:
            new_values = new_values + (tl.where(taken, -float("inf"), values[j]),)
            new_chunks = new_chunks + (tl.where(taken, -1, chunks[j]),)
    return chunk, new_values, new_chunks


@triton.jit(do_not_specialize=["num_segments", "num_tiles", "place", "choices"])
def _gate_kernel(
    q, means, selected, last_score, last_chunk, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets,
    num_segments, num_tiles, chunk_size, place, choices, stride_qt, stride_qh,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, KS: tl.constexpr,
    BLOCK_KS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BEHIND: tl.constexpr,
    GOES_ON: tl.constexpr, WARM: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """BLOCK_M queries of one segment and head against the earlier chunks of their sequence.

    Of the ``choices`` KS from ``place`` on. BEHIND: among the chunks behind ``last_score`` and ``last_chunk``, those
    that the pass before chose last; GOES_ON: these two are stored.
    """
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

    WIDTH: tl.constexpr = BLOCK_N // LANES
    threshold = tl.full([BLOCK_M], -float("inf"), tl.float32)
    last = threshold
    until = tl.zeros([BLOCK_M], tl.int32)
    if BEHIND:
        last = tl.load(last_score + rows * H + head, mask=valid, other=-float("inf"))
        until = tl.load(last_chunk + rows * H + head, mask=valid, other=0)
    if WARM > 0:
        threshold = _warm_threshold(q_rows, means, earlier, last, every, limit, BEHIND, KS, BLOCK_KS, HK, D, BLOCK_D,
                                    BLOCK_M, BLOCK_N, PRECISION, WARM)
    values = (tl.full([BLOCK_M, LANES], -float("inf"), tl.float32),) * KS
    chunks = (tl.full([BLOCK_M, LANES], -1, tl.int32),) * KS
    num_steps = tl.cdiv(limit, BLOCK_N)
    first = (num_steps - 1) * BLOCK_N
    mean_rows = _mean_rows(means, first, limit, HK, D, BLOCK_D, BLOCK_N)
    for step in range(0, num_steps):
        s = tl.dot(q_rows, tl.trans(mean_rows), input_precision=PRECISION)
        mean_rows = _mean_rows(means, tl.maximum(first - BLOCK_N, 0), limit, HK, D, BLOCK_D, BLOCK_N)
        x = _deal(s, LANES)
        hits = x > threshold[:, None, None]
        if BEHIND:
            hits &= x <= last[:, None, None]
        word, count = _pack(hits, WIDTH)  # [BLOCK_M, LANES]
        if first + BLOCK_N > every:
            word &= _allowed(earlier - first, LANES, WIDTH)
            count = _count_bits(word)
        for _ in range(tl.max(tl.max(count, 1), 0)):
            index = WIDTH - 1 - _lowest_bit(word)
            value = tl.where(word != 0, _pick(x, index, WIDTH), -float("inf"))
            word = word & (word - 1)
            chunk = first_chunk + first + (index >> 1) * (2 * LANES) + 2 * tl.arange(0, LANES)[None, :] + (index & 1)
            if BEHIND:
                value = tl.where((value == last[:, None]) & (chunk >= until[:, None]), -float("inf"), value)
            values, chunks = _insert(values, chunks, value, chunk, KS)
        threshold = tl.maximum(threshold, tl.max(values[KS - 1], 1))
        first -= BLOCK_N

    to = selected + (rows * H + head) * choices + place
    for j in range(KS):
        last = tl.max(values[0], 1)
        until, values, chunks = _take_best(values, chunks, KS)
        tl.store(to + j, until, mask=valid)
    if GOES_ON:
        tl.store(last_score + rows * H + head, last, mask=valid)
        tl.store(last_chunk + rows * H + head, until, mask=valid)
