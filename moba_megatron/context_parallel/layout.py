"""Sequences that are spread over ranks: which rows a rank holds (zigzag), and how partial sums of keys travel.

Megatron cuts every sequence into ``2 P`` equal pieces and gives rank ``r`` the pieces ``r`` and ``2 P - 1 - r``, for
even causal work. Gathered tensors come "rank-major", rank after rank; stages want "global" order, by sequence.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..segments import SUM_BLOCK, Segments
from ..tensor_cache import cached_tensors, is_capturing
from .transport.comm import MAX_RUNS, Rows, all_gather


@dataclass(frozen=True)
class BlockExchange:
    """How the sums behind the chunk means travel, so that they are the same bits as on one rank. A chunk's sum is made
    of sums over blocks of SUM_BLOCK rows counted from the chunk's start. The rank that holds a whole block sends its
    sum. A block that a piece boundary cuts has its rows sent by the ranks that hold them, and every rank sums it by the
    same tree. What a rank sends is padded to the longest of all."""

    starts: Tensor  # int32, of this rank's whole blocks: first local row, rows
    counts: Tensor
    cut_rows: Tensor  # int64, local rows of this rank in cut blocks, sent after the sums
    send_rows: int  # of the padded message
    sum_source: Tensor  # int64, of all whole blocks: row of the gathered messages, row of the table of blocks
    sum_target: Tensor
    cut_source: Tensor  # int64, rows of the gathered messages that are rows of cut blocks, block after block
    cut_starts: Tensor  # int32, where each cut block begins in those; its rows; int64, its row in the table
    cut_counts: Tensor
    cut_target: Tensor
    table_shape: tuple[int, int]  # chunk ids, blocks in a chunk


@dataclass(frozen=True)
class ZigzagLayout:
    """A rank's place in the zigzag."""

    segments: Segments  # the rank's queries over the keys in global order: two segments a sequence
    rows: Rows  # the rank's among all
    blocks: BlockExchange | None  # None where piece boundaries are known only on the device


@dataclass(frozen=True)
class Sequences:
    """Whole sequences, the rows of all ranks together."""

    cu_seqlens: Tensor  # int32 [B + 1], from 0 to total, each length a multiple of 2 * size
    max_seqlen: int  # upper bound of a length
    total: int  # rows of all sequences
    batch: int | None  # number of sequences if they are all max_seqlen long, else None: lengths are on the device only

    @classmethod
    def uniform(cls, seqlen: int, batch: int, device: torch.device) -> "Sequences":
        """``batch`` sequences of ``seqlen`` tokens. Everything is known on the host: layouts are made once and kept."""
        return cls(_uniform(seqlen, batch, torch.device(device)), seqlen, batch * seqlen, batch)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, max_seqlen: int, total: int) -> "Sequences":
        """Sequences whose lengths are known on the device only; nothing is read back. Lengths that break the contract
        are for :meth:`CollectiveCheck.compare_lengths` to report, after the fact: until then nothing outside the
        ``total`` rows is touched."""
        return cls(cu_seqlens.int().clamp(0, total), max_seqlen, total, None)

    def part(self, size: int) -> "Sequences":
        """What one of ``size`` ranks holds, joined up: every sequence ``size`` times shorter."""
        if self.batch is not None:
            return Sequences.uniform(self.max_seqlen // size, self.batch, self.cu_seqlens.device)
        return Sequences(self.cu_seqlens // size, self.max_seqlen // size, self.total // size, None)

    def whole(self, chunk_size: int) -> Segments:
        """Every sequence as one segment: attention on a single rank."""
        return Segments.from_cu_seqlens(self.cu_seqlens, self.max_seqlen, chunk_size, exact=self.batch is not None)

    def rows(self, size: int, rank: int) -> Rows:
        """The rows of one of ``size`` ranks."""
        if self.batch is not None:
            return _rows_uniform(self.max_seqlen, self.batch, size, rank, self.cu_seqlens.device)
        return _rows(self.cu_seqlens, self.total, size, rank)

    def zigzag(self, size: int, rank: int, chunk_size: int) -> ZigzagLayout:
        """The layout of one of ``size`` ranks."""
        if self.batch is not None:
            return _zigzag_uniform(self.max_seqlen, self.batch, size, rank, chunk_size, self.cu_seqlens.device)
        segments = _segments(self.cu_seqlens, self.max_seqlen, size, rank, chunk_size, False)
        return ZigzagLayout(segments, self.rows(size, rank), None)


def check_zigzag(length: int, size: int, name: str) -> None:
    """Raises ValueError unless a sequence of ``length`` tokens has ``2 * size`` equal pieces."""
    if length % (2 * size):
        raise ValueError(f"{name} must be a multiple of 2 * context_parallel_size = {2 * size}, got {length}: change "
                         "--seq-length, or pad each packed sequence")


def gather_keys(k: Tensor, group: dist.ProcessGroup, global_rows: Tensor) -> Tensor:
    """The keys of all ranks in global order, ``[S, ...]``, from each rank's ``[T, ...]`` and ``Rows.global_rows``."""
    return all_gather(k, group, "fwd keys").wait()[global_rows]


@cached_tensors
def _uniform(seqlen: int, batch: int, device: torch.device) -> Tensor:
    """cu_seqlens."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen


@cached_tensors
def _rows_uniform(seqlen: int, batch: int, size: int, rank: int, device: torch.device) -> Rows:
    return _rows(_uniform(seqlen, batch, device), batch * seqlen, size, rank, seqlen)


@cached_tensors
def _zigzag_uniform(seqlen: int, batch: int, size: int, rank: int, chunk_size: int,
                    device: torch.device) -> ZigzagLayout:
    if is_capturing(device):
        raise RuntimeError("context parallel attention must run once with the same shapes before it is captured in a "
                           "CUDA graph")
    cu_seqlens = _uniform(seqlen, batch, device)
    segments = _segments(cu_seqlens, seqlen, size, rank, chunk_size, True)
    rows = _rows(cu_seqlens, batch * seqlen, size, rank, seqlen)
    return ZigzagLayout(segments, rows, _block_exchange(segments, rows, seqlen, batch))


def _segments(cu_seqlens: Tensor, max_seqlen: int, size: int, rank: int, chunk_size: int, exact: bool) -> Segments:
    cu = cu_seqlens.long()
    pieces, local = cu.diff() // (2 * size), cu // size
    starts = torch.stack((local[:-1], local[:-1] + pieces), dim=1).flatten()
    return Segments(cu_seqlens_q=torch.cat((starts, local[-1:])).int(), cu_seqlens_k=cu_seqlens, exact=exact,
                    seq_ids=torch.arange(pieces.numel(), device=cu.device, dtype=torch.int32).repeat_interleave(2),
                    offsets=torch.stack((rank * pieces, (2 * size - 1 - rank) * pieces), dim=1).flatten().int(),
                    max_seqlen_q=-(-max_seqlen // (2 * size)), max_seqlen_k=max_seqlen, chunk_size=chunk_size)


def _rows(cu_seqlens: Tensor, total: int, size: int, rank: int, seqlen: int | None = None) -> Rows:
    """``seqlen``: of all sequences; None where their lengths are on the device only."""
    cu = cu_seqlens.long()
    pieces, local = cu.diff() // (2 * size), cu // size
    row = torch.arange(total, device=cu.device)
    sequence = (torch.searchsorted(cu, row, right=True) - 1).clamp(0, pieces.numel() - 1)
    position, length = row - cu[sequence], pieces[sequence]
    piece = position // length
    owner = torch.where(piece < size, piece, 2 * size - 1 - piece)
    within = position - piece * length + (piece >= size) * length
    global_rows = (owner * (total // size) + local[sequence] + within).clamp(0, total - 1)
    runs = None
    if seqlen is not None and 2 * pieces.numel() <= MAX_RUNS:
        runs = tuple(tuple(i * seqlen + number * (seqlen // (2 * size)) for number in numbers)
                     for i in range(pieces.numel()) for numbers in (range(size), range(2 * size - 1, size - 1, -1)))
    return Rows(size, rank, global_rows, row.clone().scatter_(0, global_rows, row), runs)


def _block_exchange(segments: Segments, rows: Rows, seqlen: int, batch: int) -> BlockExchange:
    chunk, size, rank = segments.chunk_size, rows.size, rows.rank
    per_chunk = -(-chunk // SUM_BLOCK)
    local_total, piece = batch * seqlen // size, seqlen // (2 * size)
    device = segments.cu_seqlens_k.device
    # every block of every full chunk: its row in the table, its first global row, its rows
    chunks, blocks = torch.arange(seqlen // chunk, device=device), torch.arange(per_chunk, device=device)
    first = (chunks[:, None] * chunk + blocks * SUM_BLOCK).flatten()
    count = torch.clamp(chunk - blocks * SUM_BLOCK, max=SUM_BLOCK).repeat(chunks.numel())
    is_cut = first // piece != (first + count - 1) // piece
    sequence = torch.arange(batch, device=device)[:, None]
    target = ((segments.first_chunk()[:, None] + chunks)[:, :, None] * per_chunk + blocks).flatten()
    first, count, is_cut = (sequence * seqlen + first).flatten(), count.repeat(batch), is_cut.repeat(batch)

    whole_at = rows.global_rows[first[~is_cut]]
    cut_first, cut_count = first[is_cut], count[is_cut]
    cut_begin = torch.cumsum(cut_count, 0) - cut_count
    cut_global = torch.repeat_interleave(cut_first - cut_begin, cut_count)
    cut_at = rows.global_rows[cut_global + torch.arange(cut_global.numel(), device=device)]
    # a message holds a rank's whole blocks, then its rows of cut blocks, both in global order
    owner = torch.cat((whole_at, cut_at)) // local_total
    per_owner = torch.bincount(owner, minlength=size)
    longest, order = int(per_owner.max()), torch.argsort(owner, stable=True)
    number = torch.arange(owner.numel(), device=device) - (torch.cumsum(per_owner, 0) - per_owner)[owner[order]]
    source = owner * longest + torch.empty_like(number).scatter_(0, order, number)
    mine_whole, mine_cut = whole_at // local_total == rank, cut_at // local_total == rank
    return BlockExchange(
        starts=(whole_at[mine_whole] % local_total).int(), counts=count[~is_cut][mine_whole].int(),
        cut_rows=cut_at[mine_cut] % local_total, send_rows=longest, sum_source=source[:whole_at.numel()],
        sum_target=target[~is_cut], cut_source=source[whole_at.numel():], cut_starts=cut_begin.int(),
        cut_counts=cut_count.int(), cut_target=target[is_cut],
        table_shape=(segments.num_chunks(batch * seqlen), per_chunk))
