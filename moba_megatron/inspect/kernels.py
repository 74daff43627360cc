"""Triton kernels of the router's statistics: choices counted by chunk, attention mass by chunk, recall of queries. They
compute what ``choices.py`` and ``statistics.py`` say in torch, with no score in memory and few launches."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.host import cdiv, next_power_of_2
from ..kernels.jit_helpers import _chunk_keys, _offset
from ..kernels.launcher import Buffer, empty, launch, stage
from ..segments import Segments


def counts(selected: Tensor, rows: Tensor, num_rows: int, num_chunks: int) -> Tensor:
    """:meth:`.choices.Choices.counts` of int32 ``selected [T, H, topk - 1]``, contiguous."""
    table = torch.zeros(selected.shape[1], num_rows, num_chunks, dtype=torch.int64, device=selected.device)
    _counts(selected, rows, table)
    return table


@stage
def _counts(selected: Buffer, rows: Buffer, table: Buffer) -> None:
    num_heads, num_rows, num_chunks = table.shape
    launch(_count_kernel, (cdiv(selected.numel(), 1024),), selected, rows, table, selected.numel(), num_rows,
           num_chunks, H=num_heads, KS=selected.shape[2], BLOCK=1024, num_warps=4)


@stage
def recalls(q: Buffer, k: Buffer, selected: Buffer, segments: Segments, softmax_scale: float, rows: Buffer, own: Buffer,
            sequence: Buffer, position: Buffer) -> Buffer:
    """:func:`.statistics.recalls` of q, k in fp16, bf16 or fp32 and a contiguous selection, as fp32 ``[n, H, 2]``."""
    n, (_, num_heads, head_dim), num_kv_heads = rows.numel(), q.shape, k.shape[1]
    num_chunks, group = segments.num_chunks(k.shape[0]), num_heads // num_kv_heads
    # of each query, head and chunk: the largest score, and the sum of exp(score - largest)
    parts = empty((2, n, num_heads, num_chunks), torch.float32, q.device)
    recall = empty((n, num_heads, 2), torch.float32, q.device)
    block = 32 if q.dtype == torch.float32 else 64
    launch(_mass_kernel, (num_chunks, num_kv_heads, cdiv(n * group, block)),
           q, k, segments.cu_seqlens_k, rows, sequence, position, parts, n, segments.num_sequences,
           segments.chunk_size, num_chunks, softmax_scale, *q.stride(), *k.stride(), H=num_heads, G=group, D=head_dim,
           BLOCK_D=max(16, next_power_of_2(head_dim)), BLOCK_M=block, BLOCK_N=block, num_warps=4, num_stages=2)
    launch(_recall_kernel, (n * num_heads,), parts, selected, rows, own, recall, n, num_chunks, H=num_heads,
           KS=selected.shape[2], BLOCK=next_power_of_2(num_chunks), num_warps=4)
    return recall


@triton.jit(do_not_specialize=["num_items", "num_rows", "num_chunks"])
def _count_kernel(selected, rows, table, num_items, num_rows, num_chunks, H: tl.constexpr, KS: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Adds BLOCK choices to the table; integers, so that their order does not matter."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = item < num_items
    chunk = tl.load(selected + item, mask=inside, other=-1)
    row = tl.load(rows + item // (H * KS), mask=inside, other=-1)
    head = item // KS % H
    tl.atomic_add(table + (head * num_rows + row) * num_chunks + chunk, 1, mask=(chunk >= 0) & (row >= 0),
                  sem="relaxed")


@triton.jit(do_not_specialize=["n", "num_sequences", "num_chunks"])
def _mass_kernel(q, k, cu_seqlens_k, rows, sequences, positions, parts, n, num_sequences, chunk_size, num_chunks, scale,
                 stride_qt, stride_qh, stride_qd, stride_ks, stride_kh, stride_kd, H: tl.constexpr, G: tl.constexpr,
                 D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Largest score and sum of exponentials over one chunk's keys, for BLOCK_M pairs of a query and a head."""
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    begin, end = _chunk_keys(cu_seqlens_k, num_sequences, chunk_size, chunk)
    pair = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pair < n * G
    query, head = pair // G, kv_head * G + pair % G
    sequence = tl.load(sequences + query, mask=inside, other=0)
    # the last row of k that the query sees; none of this chunk where that belongs to another sequence
    first_key = tl.load(cu_seqlens_k + sequence)
    last = first_key + tl.load(positions + query, mask=inside, other=0)
    sees = inside & (first_key <= begin) & (last >= begin) & (begin < tl.load(cu_seqlens_k + sequence + 1))
    row = tl.load(rows + query, mask=inside, other=0)
    dim = tl.arange(0, BLOCK_D)
    tile = tl.load(q + (_offset(row, stride_qt) + _offset(head, stride_qh))[:, None] + _offset(dim, stride_qd)[None, :],
                   mask=sees[:, None] & (dim < D)[None, :], other=0.0)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    keys_end = tl.where(tl.max(sees.to(tl.int32), 0) > 0, end, begin)
    for first in range(begin, keys_end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        keys = tl.load(k + (_offset(key, stride_ks) + _offset(kv_head, stride_kh))[None, :]
                       + _offset(dim, stride_kd)[:, None], mask=(key < end)[None, :] & (dim < D)[:, None], other=0.0)
        score = tl.dot(tile, keys, input_precision="ieee") * scale
        score = tl.where(sees[:, None] & (key < end)[None, :] & (key[None, :] <= last[:, None]), score, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(score, 1))
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
    at = (query.to(tl.int64) * H + head) * num_chunks + chunk
    tl.store(parts + at, largest, mask=inside)
    tl.store(parts + n.to(tl.int64) * H * num_chunks + at, total, mask=inside)


@triton.jit(do_not_specialize=["n", "num_chunks"])
def _recall_kernel(parts, selected, rows, own, recall, n, num_chunks, H: tl.constexpr, KS: tl.constexpr,
                   BLOCK: tl.constexpr):
    """The two masses of one query and head."""
    pair = tl.program_id(0).to(tl.int64)
    query = pair // H
    chunk = tl.arange(0, BLOCK)
    inside = chunk < num_chunks
    at = parts + pair * num_chunks
    largest = tl.load(at + chunk, mask=inside, other=float("-inf"))
    total = tl.load(at + n.to(tl.int64) * H * num_chunks + chunk, mask=inside, other=0.0)
    mass = total * tl.exp(largest - tl.max(largest, 0))  # every query sees a key, itself
    mass = mass / tl.sum(mass, 0)
    mine = chunk == tl.load(own + query)
    own_mass = tl.sum(tl.where(mine, mass, 0.0), 0)
    others = tl.where(mine, 0.0, mass)
    choice = selected + (tl.load(rows + query) * H + pair % H) * KS
    taken, best = own_mass, own_mass
    for i in range(KS):
        taken += tl.sum(tl.where(chunk == tl.load(choice + i), mass, 0.0), 0)
        top, place = tl.max(others, 0, return_indices=True)
        best += top
        others = tl.where(chunk == place, 0.0, others)
    tl.store(recall + pair * 2, taken)
    tl.store(recall + pair * 2 + 1, best)
