"""What the Gluon kernels for Hopper share on the device: rows of lists, gathers, and tiles of keys.

A loader group of warps copies, two groups multiply; they signal each other through barriers in shared memory, a
``full`` and an ``empty`` one for each buffer (each kernel has a table of its own):

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
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from . import jit_helpers

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
    cols = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, ROWS))
    rows = pointer + (_offset(token, stride_t) + _offset(head, stride_h)) * 8
    async_load(smem, rows[:, None] + cols[None, :], mask=None if keep is None else keep[:, None])


@gluon.jit
def _copy_listed(smem, pointer, choice, kv_head, stride_t, stride_h, H: gl.constexpr, G: gl.constexpr,
                 KS: gl.constexpr, EVEN: gl.constexpr, ROWS: gl.constexpr):
    """Starts copies of indices' rows. EVEN, one row behind the other, takes half of the instructions: at several heads
    a kv head the registers of a loader of dk and dv do not hold addresses by token and head."""
    row, token, head = _choice_row(choice, kv_head, H, G, KS)
    if EVEN:
        _copy_rows(smem, pointer, row.to(gl.int64), kv_head.to(gl.int64) * 0, smem.shape[1] // 8, stride_h, ROWS)
    else:
        _copy_rows(smem, pointer, token, head, stride_t, stride_h, ROWS)


@gluon.jit
def _copy_keys(source, smem, full, row, end, kv_head, stride_t, stride_h, USE_TMA: gl.constexpr, ROWS: gl.constexpr):
    """Starts the copy of keys ``row .. row + BLOCK_N`` of one head, zeros from ``end`` on; ``full`` hears of it."""
    BLOCK_N: gl.constexpr = smem.shape[0]
    if USE_TMA:
        mbarrier.expect(full, 2 * BLOCK_N * smem.shape[1])
        tma_load(source, [row, (_offset(kv_head, stride_h) * 8).to(gl.int32)], full, smem)
    else:
        rows = row + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ROWS))
        _copy_rows(smem, source, rows.to(gl.int64), kv_head.to(gl.int64), stride_t, stride_h, ROWS, rows < end)
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
            KS: gl.constexpr, EVEN: gl.constexpr, ROWS: gl.constexpr):
    """Starts copies of 128 rows of each of ``rows``, 64 for each group of warps."""
    for part in gl.static_range(2):
        for i in gl.static_range(len(rows)):
            _copy_listed(row_smem[i].index(buffer * 2 + part), rows[i], choices[part], kv_head, strides[2 * i],
                         strides[2 * i + 1], H, G, KS, EVEN, ROWS)
    async_copy.mbarrier_arrive(row_full.index(buffer), increment_count=False)


@gluon.jit
def _load_tile(keys, smem, bars, step, row, end, kv_head, strides, USE_TMA: gl.constexpr, ONE_EMPTY: gl.constexpr,
               ROWS: gl.constexpr):
    """Starts the copies of one tile of keys and values as soon as its buffers are free; ONE_EMPTY: of both at once."""
    k, v = keys
    row_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, k_empty, v_empty = bars
    stride_kt, stride_kh, stride_vt, stride_vh = strides
    STAGES: gl.constexpr = k_smem.shape[0]
    stage = step % STAGES
    phase = ((step // STAGES) & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), phase)
    _copy_keys(k, k_smem.index(stage), k_full.index(stage), row, end, kv_head, stride_kt, stride_kh, USE_TMA, ROWS)
    if not ONE_EMPTY:
        mbarrier.wait(v_empty.index(stage), phase)
    _copy_keys(v, v_smem.index(stage), v_full.index(stage), row, end, kv_head, stride_vt, stride_vh, USE_TMA, ROWS)
    return step + 1


@gluon.jit
def _load_list(rows, keys, indices, smem, bars, ints, strides, H: gl.constexpr, G: gl.constexpr, KS: gl.constexpr,
               SHARED: gl.constexpr, EVEN: gl.constexpr, BUFFERS: gl.constexpr, USE_TMA: gl.constexpr,
               ONE_EMPTY: gl.constexpr):
    """The loader of forward and dq: a list's rows of q (and do), 128 at a time, and for each 128 the chunk's keys."""
    row_smem, k_smem, v_smem = smem
    row_full, row_empty, k_full, v_full, k_empty, v_empty = bars
    count, kv_head, first_key, chunk_size = ints
    row_strides, key_strides = strides
    D: gl.constexpr = k_smem.shape[2]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [LOADER_WARPS, 1], [1, 0])
    gl.static_assert(BUFFERS > 1, "rows are gathered ahead, before the last keys of those that are in use")
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    end = first_key + chunk_size
    choice0 = _listed(indices, gl.minimum(lane, count - 1), None, KS, SHARED)  # the last choice fills up
    choice1 = _listed(indices, gl.minimum(64 + lane, count - 1), None, KS, SHARED)
    _gather(rows, row_smem, row_full, 0, (choice0, choice1), kv_head, row_strides, H, G, KS, EVEN,
            ROWS)
    step = 0
    tile = 1
    for first in range(0, count, 128):
        choice0 = _listed(indices, gl.minimum(first + 128 + lane, count - 1), None, KS, SHARED)
        choice1 = _listed(indices, gl.minimum(first + 192 + lane, count - 1), None, KS, SHARED)
        step = _load_tile(keys, smem, bars, step, first_key, end, kv_head, key_strides, USE_TMA, ONE_EMPTY, ROWS)
        if first + 128 < count:
            buffer = tile % BUFFERS
            mbarrier.wait(row_empty.index(buffer), ((tile // BUFFERS) & 1) ^ 1)
            _gather(rows, row_smem, row_full, buffer, (choice0, choice1), kv_head, row_strides, H, G, KS, EVEN,
                    ROWS)
            tile += 1
        for key in range(BLOCK_N, chunk_size, BLOCK_N):
            step = _load_tile(keys, smem, bars, step, first_key + key, end, kv_head, key_strides, USE_TMA, ONE_EMPTY,
                              ROWS)
