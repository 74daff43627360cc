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


@triton.jit
def _listed(indices, at, mask, KS: tl.constexpr, SHARED: tl.constexpr):
    """The choices at places of lists, one place for each of SHARED heads of a listed choice; 0 or so where masked."""
    if mask is None:
        choice = tl.load(indices + at // SHARED)
    else:
        choice = tl.load(indices + at // SHARED, mask=mask, other=0)
    return choice + at % SHARED * KS


@triton.jit
def _choice_row(choice, kv_head, H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr):
    """Row (token * H + head) of indices, int32; token and head, int64; head is a scalar where it can only be one.

    Divisions are unsigned (shifts, where they can be), and what is multiplied by a stride is a signed 32-bit number
    until then: one instruction each.
    """
    if choice.dtype == tl.int64:
        row = (choice.to(tl.uint64) // KS).to(tl.uint32)
    else:
        row = choice.to(tl.uint32) // KS
    token = (row // H).to(tl.int32).to(tl.int64)
    if G == 1:
        head = kv_head.to(tl.int64)
    else:
        head = (row % H).to(tl.int32).to(tl.int64)
    return row.to(tl.int32), token, head


@triton.jit
def _partial_row(choice, kv_head, first_head, group_heads, H: tl.constexpr, G: tl.constexpr, KS: tl.constexpr):
    """Where a choice's partial result is, among those of a group of heads."""
    _, token, head = _choice_row(choice, kv_head, H, G, KS)
    return (token * group_heads + head - first_head) * KS + (choice % KS).to(tl.int64)


@triton.jit
def _extra_piece(extra_csr_rows, indptr, first_csr_row, end_csr_row, extra, split):
    """Extra piece number ``extra`` of the CSR rows ``first_csr_row .. end_csr_row``: its row, and its number there.

    A row's first ``split`` indices are piece 0. Piece i > 0 of row b has the number ``indptr[b] // split + i - 1``,
    here counted from the first row's; rows of up to ``split`` indices have none, so numbers are unique. Piece 0 where
    the number is not used.
    """
    number = extra + (tl.load(indptr + first_csr_row) // split).to(tl.int32)
    csr_row = tl.load(extra_csr_rows + number) - 1
    begin = tl.load(indptr + csr_row)
    end = tl.load(indptr + csr_row + 1)
    piece = number - (begin // split).to(tl.int32) + 1
    used = (csr_row < end_csr_row) & (begin + piece.to(tl.int64) * split < end)
    return csr_row, tl.where(used, piece, 0)


@triton.jit
def _lower_bound(values, count, wanted):
    """The first index whose value is at least ``wanted`` in a non-decreasing array."""
    low = wanted * 0
    high = low + count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(values + middle) < wanted
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _piece_of_list(indptr, csr_row, first_csr_row, piece, item, num_extra, split, HAS_EXTRA: tl.constexpr):
    """Where a piece of a CSR row begins, how many indices it has, and the number of its partial sums, -1 for none."""
    csr_begin = tl.load(indptr + csr_row)
    csr_end = tl.load(indptr + csr_row + 1)
    begin = csr_begin + piece.to(tl.int64) * split
    end = tl.minimum(csr_end, begin + split)
    partial_index = piece.to(tl.int64) * 0 - 1
    if HAS_EXTRA:
        if piece > 0:
            partial_index = item.to(tl.int64)
        elif end < csr_end:
            first_extra = csr_begin // split - tl.load(indptr + first_csr_row) // split
            partial_index = num_extra + first_extra.to(tl.int64)
    return begin, (end - begin).to(tl.int32), partial_index
