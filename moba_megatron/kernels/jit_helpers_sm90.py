"""What the Gluon kernels for Hopper share on the device: rows of lists, gathers, and tiles of keys.

A loader group of warps copies (the gate has none), two groups multiply; they signal each other through barriers, a
``full`` and an ``empty`` one for each buffer in shared memory (each kernel has a table of its own):

- A write before its reads: copies by thread (``cp.async``) arrive at ``full`` with each of the 128 threads once that
  thread's copies have ended, a copy by descriptor (TMA) with its bytes. All threads of a reading group wait. Products
  read through the async proxy, which does not see what ``cp.async`` and stores wrote before a fence: readers fence
  after the wait for ``cp.async``; who stores for products fences before it arrives. TMA writes through that proxy.
- Reads before the next write: one thread of each reading group arrives at ``empty``, after the products that read
  have ended and all 128 threads have met (Triton's barrier before each arrival: tests/kernels/test_sm90_barriers.py).
- Use ``n`` of a buffer waits for parity ``n & 1`` of ``full`` and the other one of ``empty``: at once for ``n = 0``.
  No barrier gets two phases ahead of who waits: a buffer is filled again only after all of its readers have arrived.
- Every ``full`` is waited for, in lists of any length: no copy is under way when the program ends.

tests/gpu/test_sm90_delays.py looks for races.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import jit_helpers, sm90

async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # until Triton 3.8
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
LOADER_WARPS = gl.constexpr(4)
_offset = gluon.jit(jit_helpers._offset.fn)
_find_piece = gluon.jit(jit_helpers._find_piece.fn)
_piece_items = gluon.jit(jit_helpers._piece_items.fn)
_chunk_keys = gluon.jit(jit_helpers._chunk_keys.fn)
_choice_row = gluon.jit(jit_helpers._choice_row.fn)
_partial_row = gluon.jit(jit_helpers._partial_row.fn)
_extra_piece = gluon.jit(jit_helpers._extra_piece.fn)
_piece_of_list = gluon.jit(jit_helpers._piece_of_list.fn)
_lower_bound = gluon.jit(jit_helpers._lower_bound.fn)


@gluon.constexpr_function
def _row_layout(D):
    """Threads of a group over rows of D columns, eight columns each, side by side in the narrower part of a row."""
    width = sm90.widths(D)[-1]
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def _allocate(dtype, number: gl.constexpr, rows: gl.constexpr, D: gl.constexpr):
    """``number`` tiles ``[rows, D]`` in shared memory, as a tuple of their parts."""
    WIDTHS: gl.constexpr = sm90.widths(D)
    smem = ()
    for i in gl.static_range(len(WIDTHS)):
        smem = smem + (gl.allocate_shared_memory(dtype, [number, rows, WIDTHS[i]],
                                                 gl.NVMMASharedLayout.get_default_for([rows, WIDTHS[i]], dtype)),)
    return smem


@gluon.jit
def _tile(smem, number):
    """The parts of one of the tiles."""
    return [part.index(number) for part in smem]


@gluon.jit
def _zeros(rows: gl.constexpr, smem):
    """Sums in registers for ``rows`` rows, as wide as the tiles of one part."""
    D: gl.constexpr = smem.shape[2]
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    return gl.zeros([rows, D], gl.float32, layout=ACC)


@gluon.jit
def _start_scores(a, b, zero):
    """Starts the products ``[64, number of b's rows]`` of rows with rows, one for each part."""
    s = zero
    for i in gl.static_range(len(a)):
        s = warpgroup_mma(a[i], b[i].permute((1, 0)), s, use_acc=i > 0, is_async=True)
    return s


@gluon.jit
def _start_sums(weights, tile, sums):
    """Starts adding the weighted rows of a tile to sums, one product for each part."""
    out = ()
    for i in gl.static_range(len(tile)):
        operand = gl.convert_layout(weights, gl.DotOperandLayout(0, sums[i].type.layout, 2))
        out = out + (warpgroup_mma(operand, tile[i], sums[i], is_async=True),)
    return out


@gluon.jit
def _wait(pending: gl.constexpr, values):
    """Values after all but so many products; what is computed before the wait may be among them."""
    if len(values) == 1:
        waited = (warpgroup_mma_wait(pending, deps=values),)
    else:
        waited = warpgroup_mma_wait(pending, deps=values)
    return waited


@gluon.jit
def _through_tile(tile, sums, OUT: gl.constexpr):
    """The parts of sums, rounded, by whole lines: through a tile whose rows have been used."""
    for i in gl.static_range(len(sums)):
        tile[i].store(sums[i].to(tile[i].dtype))
    return [part.load(OUT) for part in tile[:len(sums)]]


@gluon.jit
def _store_rows(pointer, row, parts, keep, D: gl.constexpr, OUT: gl.constexpr):
    """Writes parts of rows of D columns."""
    for i in gl.static_range(len(parts)):
        cols = i * parts[0].shape[1] + gl.arange(0, parts[i].shape[1], layout=gl.SliceLayout(0, OUT))
        gl.store(pointer + row[:, None] * D + cols[None, :], parts[i], mask=keep[:, None])


@gluon.jit
def _listed(indices, at, mask, KS: gl.constexpr, SHARED: gl.constexpr):
    """As of ``jit_helpers``; int32 places, whose divisions are shifts where they are unsigned."""
    listed = (at.to(gl.uint32) // SHARED).to(gl.int32)
    if mask is None:
        choice = gl.load(indices + listed)
    else:
        choice = gl.load(indices + listed, mask=mask, other=0)
    return choice + (at - listed * SHARED) * KS


@gluon.jit
def _copy_rows(smem, pointer, token, head, stride_t, stride_h, ROWS: gl.constexpr, keep=None):
    """Starts copies of whole rows of tokens and heads, zeros where not ``keep``; strides in units of eight elements."""
    rows = pointer + (_offset(token, stride_t) + _offset(head, stride_h)) * 8
    for i in gl.static_range(len(smem)):
        cols = i * smem[0].shape[1] + gl.arange(0, smem[i].shape[1], layout=gl.SliceLayout(0, ROWS))
        async_load(smem[i], rows[:, None] + cols[None, :], mask=None if keep is None else keep[:, None])


@gluon.jit
def _copy_listed(smem, pointer, choice, kv_head, stride_t, stride_h, H: gl.constexpr, G: gl.constexpr,
                 KS: gl.constexpr, D: gl.constexpr, EVEN: gl.constexpr, ROWS: gl.constexpr):
    """Starts copies of indices' rows. EVEN, one row behind the other, takes half of the instructions: at several heads
    a kv head the registers of a loader of dk and dv do not hold addresses by token and head."""
    row, token, head = _choice_row(choice, kv_head, H, G, KS)
    if EVEN:
        _copy_rows(smem, pointer, row.to(gl.int64), kv_head.to(gl.int64) * 0, D // 8, stride_h, ROWS)
    else:
        _copy_rows(smem, pointer, token, head, stride_t, stride_h, ROWS)


@gluon.jit
def _copy_keys(source, smem, full, row, end, kv_head, stride_t, stride_h, D: gl.constexpr, USE_TMA: gl.constexpr,
               ROWS: gl.constexpr):
    """Starts the copy of keys ``row .. row + BLOCK_N`` of one head, zeros from ``end`` on; ``full`` hears of it.

    ``source``: a pointer and None, or a descriptor for each part of a row."""
    if USE_TMA:
        first = (_offset(kv_head, stride_h) * 8).to(gl.int32)
        mbarrier.expect(full, 2 * smem[0].shape[0] * D)
        for i in gl.static_range(len(smem)):
            tma_load(source[i], [row, first + i * smem[0].shape[1]], full, smem[i])
    else:
        rows = row + gl.arange(0, smem[0].shape[0], layout=gl.SliceLayout(1, ROWS))
        _copy_rows(smem, source[0], rows.to(gl.int64), kv_head.to(gl.int64), stride_t, stride_h, ROWS, rows < end)
        async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """``number`` barriers in shared memory, each for so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def _gather(rows, row_smem, row_full, buffer, choices, kv_head, strides, H: gl.constexpr, G: gl.constexpr,
            KS: gl.constexpr, DIMS: gl.constexpr, EVEN: gl.constexpr, ROWS: gl.constexpr):
    """Starts copies of 128 rows of each of ``rows``, 64 for each group of warps."""
    for part in gl.static_range(2):
        for i in gl.static_range(len(rows)):
            _copy_listed(_tile(row_smem[i], buffer * 2 + part), rows[i], choices[part], kv_head, strides[2 * i],
                         strides[2 * i + 1], H, G, KS, DIMS[i], EVEN, ROWS)
    async_copy.mbarrier_arrive(row_full.index(buffer), increment_count=False)


@gluon.jit
def _load_tile(keys, smem, bars, step, row, end, kv_head, strides, DIMS: gl.constexpr, USE_TMA: gl.constexpr,
               ONE_EMPTY: gl.constexpr, ROWS: gl.constexpr):
    """Starts the copies of one tile of keys and values as soon as its buffers are free; ONE_EMPTY: of both at once."""
    k, v = keys
    row_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, k_empty, v_empty = bars
    stride_kt, stride_kh, stride_vt, stride_vh = strides
    STAGES: gl.constexpr = k_smem[0].shape[0]
    stage = step % STAGES
    phase = ((step // STAGES) & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), phase)
    _copy_keys(k, _tile(k_smem, stage), k_full.index(stage), row, end, kv_head, stride_kt, stride_kh, DIMS[0],
               USE_TMA, ROWS)
    if not ONE_EMPTY:
        mbarrier.wait(v_empty.index(stage), phase)
    _copy_keys(v, _tile(v_smem, stage), v_full.index(stage), row, end, kv_head, stride_vt, stride_vh, DIMS[1],
               USE_TMA, ROWS)
    return step + 1


@gluon.jit
def _kept(key, chunk_size, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr):
    """Whether the columns of the tile of keys from ``key`` on are the chunk's, and of no tile before.

    The last of several tiles begins earlier, so that it ends with the chunk: keys of another are never read.
    """
    early = gl.maximum(key - gl.maximum(chunk_size - BLOCK_N, 0), 0)
    index = gl.arange(0, BLOCK_N, layout=COLUMNS) - early
    return index.to(gl.uint32) < (chunk_size - key).to(gl.uint32)


@gluon.jit
def _work(NUMBER: gl.constexpr, READERS: gl.constexpr):
    """Where one group of warps hands over what comes next, NUMBER integers, two at a time; barriers full and empty."""
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    return gl.allocate_shared_memory(gl.int64, [2 * NUMBER, 1], ONE), _barriers(2, 1), _barriers(2, READERS)


@gluon.jit
def _hand(work, piece, values, WARPS: gl.constexpr):
    """Hands integers over, as soon as all have taken those of two pieces before; the first is 0 at the end."""
    smem, full, empty = work
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(empty.index(piece & 1), ((piece >> 1) & 1) ^ 1)
    for i in gl.static_range(len(values)):
        smem.index((piece & 1) * len(values) + i).store(gl.zeros([1], gl.int64, layout=ONE) + values[i])
    mbarrier.arrive(full.index(piece & 1), count=1)


@gluon.jit
def _take(work, piece):
    """The integers of the next piece, as soon as they were handed over."""
    smem, full, empty = work
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    NUMBER: gl.constexpr = smem.shape[0] // 2
    mbarrier.wait(full.index(piece & 1), (piece >> 1) & 1)
    values = ()
    for i in gl.static_range(NUMBER):
        values = values + (gl.sum(smem.index((piece & 1) * NUMBER + i).load(ONE), 0),)
    mbarrier.arrive(empty.index(piece & 1), count=1)
    return values


@gluon.jit
def _load_lists(rows, keys, indices, smem, bars, work, tiles, chunks, strides, H: gl.constexpr, G: gl.constexpr,
                KS: gl.constexpr, SHARED: gl.constexpr, DIMS: gl.constexpr, EVEN: gl.constexpr, BUFFERS: gl.constexpr,
                USE_TMA: gl.constexpr, ONE_EMPTY: gl.constexpr):
    """The loader of forward and dq: pieces of lists, one after the other, until all are taken. Of each its rows of q
    (and do), 128 at a time, and for each 128 the chunk's keys; forward (not ONE_EMPTY) keeps a chunk that is one tile.
    The next rows are gathered after the keys of those before: who waits for rows to be used up holds no keys back."""
    row_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, k_empty, v_empty = bars
    tile_csr_row, tile_begin, tile_end, tile_taken, first_number, end_number = tiles
    cu_seqlens_k, num_sequences, num_chunks, chunk_size = chunks
    row_strides, key_strides = strides
    BLOCK_N: gl.constexpr = k_smem[0].shape[1]
    ROWS: gl.constexpr = _row_layout(DIMS[0])
    gl.static_assert(BUFFERS > 1, "rows are gathered while those before are in use")
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    piece = 0
    step = 0
    tile = 0
    number = first_number + gl.program_id(0)
    while number < end_number:
        csr_row = gl.load(tile_csr_row + number)
        begin = gl.load(tile_begin + number)
        count = (gl.load(tile_end + number) - begin).to(gl.int32)
        if count > 0:  # else nothing of the list is here; its chunk may even reach beyond the keys
            kv_head = csr_row // num_chunks
            first_key, _ = _chunk_keys(cu_seqlens_k, num_sequences, chunk_size, csr_row % num_chunks)
            end = first_key + chunk_size
            listed = indices + begin // SHARED  # pieces begin with whole groups of heads
            _hand(work, piece, (count, kv_head, begin), LOADER_WARPS)
            piece += 1
            choice0 = _listed(listed, gl.minimum(lane, count - 1), None, KS, SHARED)  # the last choice fills up
            choice1 = _listed(listed, gl.minimum(64 + lane, count - 1), None, KS, SHARED)
            for first in range(0, count, 128):
                mbarrier.wait(row_empty.index(tile % BUFFERS), ((tile // BUFFERS) & 1) ^ 1)
                _gather(rows, row_smem, row_full, tile % BUFFERS, (choice0, choice1), kv_head, row_strides, H, G, KS,
                        DIMS, EVEN, ROWS)
                tile += 1
                choice0 = _listed(listed, gl.minimum(first + 128 + lane, count - 1), None, KS, SHARED)
                choice1 = _listed(listed, gl.minimum(first + 192 + lane, count - 1), None, KS, SHARED)
                if ONE_EMPTY | (first == 0) | (chunk_size > BLOCK_N):
                    for key in range(0, chunk_size, BLOCK_N):
                        row = first_key + gl.maximum(gl.minimum(key, chunk_size - BLOCK_N), 0)
                        step = _load_tile(keys, smem, bars, step, row, end, kv_head, key_strides, DIMS, USE_TMA,
                                          ONE_EMPTY, ROWS)
        taken = gl.atomic_add(tile_taken, 1)
        number = first_number + gl.num_programs(0) + taken
        if taken == end_number - first_number - 1:  # the last of all that take: the next launch begins at 0
            gl.store(tile_taken, 0)
    _hand(work, piece, (0, 0, 0), LOADER_WARPS)
