"""What every stage shares: segments of queries over packed keys, the numbering of chunks, lists of routed choices."""
from dataclasses import dataclass

import torch
from torch import Tensor

from .tensor_cache import cached_tensors, is_unobserved

SUM_BLOCK = 64  # rows in one partial sum of keys, from the chunk's start on: a leaf of the tree of sums behind its mean


@dataclass(frozen=True)
class Segments:
    """Contiguous local queries ("segments") and the packed key sequences that they belong to.

    One segment a sequence is ordinary self-attention; two a sequence is a zigzag context-parallel rank; one with an
    offset is prefill over a cache. A query at position ``p`` of its sequence sees that sequence's keys ``0..p``.

    The chunk ``i`` of sequence ``b`` has the id ``cu_seqlens_k[b] // chunk_size + b + i``. This closed form needs no
    prefix sum and no look at the lengths on the host; ids have gaps (a sequence leaves at most one unused).

    Args:
        cu_seqlens_q: int32 ``[N + 1]``, rows of the local queries at which segments begin, and their number last.
        cu_seqlens_k: int32 ``[B + 1]``, rows of the keys at which sequences begin, and their number last.
        seq_ids: int32 ``[N]``, the sequence of each segment.
        offsets: int32 ``[N]``, the position in its sequence of each segment's first query.
        max_seqlen_q: upper bound of a segment's length, tokens, known on the host.
        max_seqlen_k: upper bound of a sequence's length, tokens, known on the host.
        chunk_size: keys in a chunk.
        packed: True where segments are the sequences themselves (``cu_seqlens_q`` is ``cu_seqlens_k``, offsets 0).
        exact: True where the maker vouches, without looking, for all of this and that every row of q and k belongs to a
            sequence. False lets the device bound lengths and clear what belongs to none: a few microseconds a call, and
            no cuDNN, which can take sequences of one length only.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seq_ids: Tensor
    offsets: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    chunk_size: int
    packed: bool = False
    exact: bool = False

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int, chunk_size: int, exact: bool = False) -> "Segments":
        """Self-attention over packed sequences: segment ``b`` is the whole of sequence ``b``. ``cu_seqlens``: int32
        ``[B + 1]``, non-decreasing, from 0 to the number of tokens; or to less, where not exact."""
        if is_unobserved(cu_seqlens):
            seq_ids, offsets = _counted(cu_seqlens.numel() - 1, cu_seqlens.device)
        else:  # of the same kind of tensor as cu_seqlens
            offsets = cu_seqlens.new_zeros(cu_seqlens.numel() - 1)
            seq_ids = torch.ones_like(offsets).cumsum(0).int() - 1  # with a dtype inductor 2.11 makes it int64
        return cls(cu_seqlens, cu_seqlens, seq_ids, offsets, max_seqlen, max_seqlen, chunk_size, True, exact)

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens_q.numel() - 1

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens_k.numel() - 1

    def num_chunks(self, total_k: int) -> int:
        """Bound of the chunk ids for ``total_k`` packed keys, known on the host: ids are below it."""
        return total_k // self.chunk_size + self.num_sequences

    def first_chunk(self) -> Tensor:
        """The id of each sequence's first chunk, int64 ``[B]``."""
        starts = self.cu_seqlens_k[:-1].long()
        return starts // self.chunk_size + torch.arange(self.num_sequences, device=starts.device)

    def query_positions(self, total_q: int) -> tuple[Tensor, Tensor]:
        """The sequence and the position in it of each local query: two int64 ``[total_q]``; any for those of none."""
        cu = self.cu_seqlens_q.long()
        row = torch.arange(total_q, device=cu.device)
        segment = (torch.searchsorted(cu, row, right=True) - 1).clamp(max=self.num_segments - 1)
        return self.seq_ids.long()[segment], self.offsets.long()[segment] + row - cu[segment]

    def key_positions(self, total_k: int) -> tuple[Tensor, Tensor]:
        """The sequence and the position in it of each key: two int64 ``[total_k]``."""
        cu = self.cu_seqlens_k.long()
        row = torch.arange(total_k, device=cu.device)
        sequence = torch.searchsorted(cu, row, right=True) - 1
        return sequence, row - cu[sequence]


@cached_tensors
def uniform_segments(queries: int, keys: int, batch: int, chunk_size: int, device: torch.device) -> Segments:
    """Sequences of one length: the last ``queries`` positions of each of ``batch`` sequences of ``keys`` keys."""
    count = torch.arange(batch + 1, dtype=torch.int32, device=device)
    if queries == keys:
        return Segments.from_cu_seqlens(count * keys, keys, chunk_size, exact=True)
    offsets = torch.full_like(count[:-1], keys - queries)
    return Segments(count * queries, count * keys, count[:-1], offsets, queries, keys, chunk_size, exact=True)


@cached_tensors
def _counted(number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0, 1, 2, ... and as many zeros."""
    return (torch.arange(number, dtype=torch.int32, device=device),
            torch.zeros(number, dtype=torch.int32, device=device))


def index_dtype(num_choices: int) -> torch.dtype:
    """int32 while it holds every choice's number (up to 1M tokens with 32 heads and topk 64), and a tile beyond it."""
    return torch.int32 if num_choices < 2 ** 31 - 2 ** 16 else torch.int64


@dataclass(frozen=True)
class Routing:
    """The choices that fell on each (kv head, chunk), as a CSR matrix with a row ``kv_head * num_chunks + chunk``. A
    choice has the number ``(token * H + head) * (topk - 1) + j``: its place in ``selected``, flattened. Of ``shared``
    heads that choose together the first one's number is listed; the i-th one's is ``i * (topk - 1)`` more. Both tensors
    are int32, or int64 where the numbers of choices need it."""

    # `[T * H / shared * (topk - 1)]`, numbers, row after row, ascending; not written from `indptr[-1] / shared` on
    indices: Tensor
    indptr: Tensor  # `[HK * num_chunks + 1]`, where each row begins among all heads' choices, and the last ends
    shared: int = 1  # query heads that share a choice: 1, or those of a kv head

    @property
    def num_choices(self) -> int:
        """Of all heads."""
        return self.indices.numel() * self.shared

    @property
    def num_csr_rows(self) -> int:
        return self.indptr.numel() - 1
