"""What several kernels share: finding the segment, sequence or list that a program works on, without prefix sums.

Runs (segments, sequences, lists) are packed: run ``b`` owns the items ``cu[b] .. cu[b + 1]``. Cutting every run into
units of ``size`` items gives unit ``i`` of run ``b`` the number ``cu[b] // size + b + i``: unique, ordered, in
``[0, cu[-1] // size + runs)``, with at most one number unused per run and more where a bound is used for ``cu[-1]``.
Chunks, tiles of queries and tiles of lists are all numbered so, and ``find_run`` inverts it.
"""
import triton
import triton.language as tl


@triton.jit
def find_run(cu, num_runs, size, unit):
    """The last run whose first unit is at or before ``unit`` (a scalar or a tensor of unit numbers); int32."""
    run = unit * 0
    remaining = num_runs
    while remaining > 1:
        half = remaining // 2
        first = (tl.load(cu + run + half) // size).to(tl.int32) + run + half
        run = tl.where(first <= unit, run + half, run)
        remaining -= half
    return run


@triton.jit
def unit_items(cu, run, size, unit):
    """First and last (exclusive) item of a unit of a run; first >= last where the unit's number is not used."""
    begin = tl.load(cu + run)
    end = tl.load(cu + run + 1)
    first = begin + (unit - (begin // size).to(tl.int32) - run) * size
    return first, tl.minimum(first + size, end)


@triton.jit
def query_tile(cu_q, cu_k, seq_ids, offsets, num_segments, chunk_size, tile, BLOCK_M: tl.constexpr):
    """Tile of BLOCK_M queries of one segment, by its unit number.

    Returns:
        row, row_end: rows of q, none where row >= row_end; position: of the first row, in its sequence;
        key_begin: row of the sequence's first key; first_chunk: id of the sequence's first chunk.
    """
    segment = find_run(cu_q, num_segments, BLOCK_M, tile)
    row, row_end = unit_items(cu_q, segment, BLOCK_M, tile)
    sequence = tl.load(seq_ids + segment)
    position = tl.load(offsets + segment) + row - tl.load(cu_q + segment)
    key_begin = tl.load(cu_k + sequence)
    return row, row_end, position, key_begin, key_begin // chunk_size + sequence


@triton.jit
def chunk_keys(cu_k, num_sequences, chunk_size, chunk):
    """Keys of a chunk, by its id (a scalar or a tensor).

    Returns:
        first and last (exclusive) row of k; first >= last where the id is not used.
    """
    sequence = find_run(cu_k, num_sequences, chunk_size, chunk)
    return unit_items(cu_k, sequence, chunk_size, chunk)


@triton.jit
def list_tile(list_offsets, tile_lists, tile, BLOCK: tl.constexpr):
    """Tile of BLOCK entries of one list of :class:`routing.Routes`, from the table that ``make_tiles`` wrote.

    Returns:
        the list's number (kv head * num_chunks + chunk), first and last (exclusive) entry; none where first >= last.
    """
    which = tl.load(tile_lists + tile)
    begin, end = unit_items(list_offsets, which, BLOCK, tile)
    return which, begin, end
