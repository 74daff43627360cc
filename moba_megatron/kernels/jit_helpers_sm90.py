"""What the Gluon kernels for Hopper share on the device: rows of lists, gathers, and tiles of keys.

A loader group of warps copies, two groups multiply; they signal each other through barriers in shared memory, a
``full`` and an ``empty`` one for each buffer (each kernel has a table of its own):

- A write before its reads: copies by thread (``cp.async``) arrive at ``full`` with each of the 128 threads once that
  thread's copies have ended, a copy by descriptor (TMA) with its bytes. All threads of a reading group wait. Products
  read through the async proxy, which does not see what ``cp.async`` and stores wrote before a fence: readers fence
  after the wait for ``cp.async``; who stores for products fences before it arrives. TMA writes through that proxy.
- Reads before the next write: one thread of each reading group arrives at ``empty``, after the products that read
  have ended and all 128 threads have met (Triton puts that barrier before each arrival; tests/test_sm90_barriers.py).
- Use ``n`` of a buffer waits for parity ``n & 1`` of ``full`` and the other one of ``empty``: at once for ``n = 0``.
  No barrier gets two phases ahead of who waits: a buffer is filled again only after all of its readers have arrived.
- Every ``full`` is waited for, in lists of any length: no copy is under way when the program ends.

tests/gpu/test_sm90_delays.py looks for races.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from . import jit_helpers

LOADER_WARPS = gl.constexpr(4)
_offset = gluon.jit(jit_helpers._offset.fn)
_find_piece = gluon.jit(jit_helpers._find_piece.fn)
_piece_items = gluon.jit(jit_helpers._piece_items.fn)
_chunk_keys = gluon.jit(jit_helpers._chunk_keys.fn)
_choice_row = gluon.jit(jit_helpers._choice_row.fn)
_partial_row = gluon.jit(jit_helpers._partial_row.fn)
_extra_piece = gluon.jit(jit_helpers._extra_piece.fn)
_lower_bound = gluon.jit(jit_helpers._lower_bound.fn)


@gluon.jit
def _copy_rows(smem, pointer, token, head, stride_t, stride_h, ROWS: gl.constexpr):
    """Starts copies of whole rows of tokens and heads; strides in units of eight elements."""
    cols = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, ROWS))
    rows = pointer + (_offset(token, stride_t) + _offset(head, stride_h)) * 8
    async_copy.async_copy_global_to_shared(smem, rows[:, None] + cols[None, :])


@gluon.jit
def _copy_rows_where(smem, pointer, token, head, stride_t, stride_h, keep, ROWS: gl.constexpr):
    """As :func:`_copy_rows`, with zeros where not ``keep``."""
    cols = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, ROWS))
    rows = pointer + (_offset(token, stride_t) + _offset(head, stride_h)) * 8
    async_copy.async_copy_global_to_shared(smem, rows[:, None] + cols[None, :], mask=keep[:, None])


@gluon.jit
def _copy_keys(source, smem, full, row, end, kv_head, stride_t, stride_h, USE_TMA: gl.constexpr, ROWS: gl.constexpr):
    """Starts the copy of keys ``row .. row + BLOCK_N`` of one head, zeros from ``end`` on; ``full`` hears of it."""
    BLOCK_N: gl.constexpr = smem.shape[0]
    if USE_TMA:
        mbarrier.expect(full, 2 * BLOCK_N * smem.shape[1])
        tma.async_copy_global_to_shared(source, [row, (_offset(kv_head, stride_h) * 8).to(gl.int32)], full, smem)
    else:
        rows = row + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ROWS))
        _copy_rows_where(smem, source, rows.to(gl.int64), kv_head.to(gl.int64), stride_t, stride_h, rows < end, ROWS)
        async_copy.mbarrier_arrive(full, increment_count=False)
