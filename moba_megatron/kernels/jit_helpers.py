"""What several kernels share: finding the segment, sequence or CSR row that a program works on, without prefix sums.

Runs (segments, sequences, CSR rows) are packed: run ``b`` owns the items ``cu[b] .. cu[b + 1]``. Cutting every run into
pieces of ``size`` items gives piece ``i`` of run ``b`` the number ``cu[b] // size + b + i``: unique, in order, below
``cu[-1] // size + runs``, with at most one number unused per run. Chunks, tiles of queries and tiles of CSR rows are
numbered so; ``_find_piece`` inverts it.
"""
import triton
import triton.language as tl


@triton.jit
def _offset(index, stride):
    """Elements from the first to the one of an int32 index: the one way to multiply by a stride that came as argument.

    Triton passes a stride as int32 where its value fits, so that the product with an int32 index would wrap from 2^31
    elements on: with heads outermost, ``[heads, tokens, 128]`` of 1M tokens, that is head 16. Loops add bounded 32-bit
    offsets to a base made here. Where a launcher has proved that no offset of a tensor leaves int32 (``_wide`` in
    ``attention_fwd.py``), a kernel may multiply in 32 bits under ``not WIDE``. tests/test_addresses.py finds the rest.
    """
    return index.to(tl.int64) * stride


@triton.jit
def _find_piece(cu, num_runs, size, piece):
    """The run of a piece (a scalar or a tensor of numbers): the last ``b`` with ``cu[b] // size + b <= piece``."""
    run = piece * 0
    remaining = num_runs
    while remaining > 1:
        half = remaining // 2
        first = tl.load(cu + run + half) // size + run + half
        run = tl.where(first <= piece, run + half, run)
        remaining -= half
    return run


@triton.jit
def _piece_items(cu, run, size, piece):
    """First and last (exclusive) item of a piece of a run; first >= last where the number is not used."""
    begin = tl.load(cu + run)
    first = begin + (piece - begin // size - run) * size
    return first, tl.minimum(first + size, tl.load(cu + run + 1))


@triton.jit
def _query_tile(cu_q, cu_k, seq_ids, offsets, num_segments, chunk_size, tile, BLOCK_M: tl.constexpr):
    """Tile of BLOCK_M queries of one segment, by its number.

    Returns:
        row, row_end: rows of q, none where row >= row_end; position: of the first row, in its sequence;
        key_begin: row of the sequence's first key; first_chunk: id of the sequence's first chunk.
    """
    segment = _find_piece(cu_q, num_segments, BLOCK_M, tile)
    row, row_end = _piece_items(cu_q, segment, BLOCK_M, tile)
    sequence = tl.load(seq_ids + segment)
    position = tl.load(offsets + segment) + row - tl.load(cu_q + segment)
    key_begin = tl.load(cu_k + sequence)
    return row, row_end, position, key_begin, key_begin // chunk_size + sequence


@triton.jit
def _chunk_keys(cu_k, num_sequences, chunk_size, chunk):
    """First and last (exclusive) row of k of a chunk, by its id (a scalar or a tensor); first >= last if unused."""
    sequence = _find_piece(cu_k, num_sequences, chunk_size, chunk)
    return _piece_items(cu_k, sequence, chunk_size, chunk)
