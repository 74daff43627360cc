"""Problems for the stage tests: packed sequences of every awkward shape, their tensors, and the oracle's answer."""
from dataclasses import dataclass

import oracle
import torch

from moba_megatron.segments import Segments


@dataclass(frozen=True)
class Case:
    """One problem. ``data``: ``normal``, ``ties`` (integers, exact means and scores) or ``twins`` (equal chunks)."""

    lengths: tuple[int, ...]
    chunk_size: int
    topk: int
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 4
    v_dim: int = 4
    data: str = "normal"
    fused: bool = False
    seed: int = 0

    @property
    def total(self):
        return sum(self.lengths)

    @property
    def max_seqlen(self):
        return max(self.lengths)

    @property
    def scale(self):
        """Integer keys are multiples of the chunk size; without it the softmax would be one-hot."""
        return self.head_dim ** -0.5 / (self.chunk_size if self.data == "ties" else 1)

    def cu_seqlens(self):
        return torch.tensor((0, *self.lengths)).cumsum(0).int()

    def segments(self):
        return Segments.from_cu_seqlens(self.cu_seqlens(), self.max_seqlen, self.chunk_size)

    def tensors(self, dtype=torch.float64):
        """q, k, v, do, dlse. Fused: q, k and v are strided views of one projection."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.v_dim
        if self.data == "ties":
            qkv = torch.randint(-1, 2, (self.total, sum(sizes)), generator=generator).double()
            qkv[:, sizes[0]:] *= self.chunk_size
        else:
            qkv = torch.randn(self.total, sum(sizes), generator=generator, dtype=torch.float64)
        if self.data == "twins":
            pool = torch.randn(2, self.chunk_size, sum(sizes[1:]), generator=generator, dtype=torch.float64)
            start = 0
            for length in self.lengths:
                count = length // self.chunk_size
                which = torch.randint(0, 2, (count,), generator=generator)
                qkv[start:start + count * self.chunk_size, sizes[0]:] = pool[which].flatten(0, 1)
                start += length
        q, k, v = (x.unflatten(1, (h, -1)) for x, h in zip(qkv.to(dtype).split(sizes, 1), self._head_counts()))
        if not self.fused:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        do = torch.randn(self.total, self.heads, self.v_dim, generator=generator, dtype=torch.float64).to(dtype)
        lse_dtype = torch.promote_types(dtype, torch.float32)
        dlse = torch.randn(self.total, self.heads, generator=generator, dtype=torch.float64).to(lse_dtype)
        return q, k, v, do, dlse

    def _head_counts(self):
        return self.heads, self.kv_heads, self.kv_heads

    def chunk_numbers(self, selected, own=True):
        """Chunk ids ``[T, H, topk - 1]`` as the oracle has them: sets of chunk numbers; checks the ids on the way."""
        ids = selected.tolist()
        result, start = [], 0
        for sequence, length in enumerate(self.lengths):
            first = start // self.chunk_size + sequence
            rows = []
            for t in range(length):
                row = []
                for h in range(self.heads):
                    numbers = [i - first for i in ids[start + t][h] if i != -1]
                    assert len(set(numbers)) == len(numbers), f"a chunk chosen twice: {numbers}"
                    assert all(0 <= i < t // self.chunk_size for i in numbers), f"not an earlier chunk: {numbers}"
                    row.append(set(numbers) | ({t // self.chunk_size} if own else set()))
                rows.append(row)
            result.append(rows)
            start += length
        return result


def oracle_results(case, q, k, v, do, dlse, mask):
    """o, lse, dq, dk, dv by the dense oracle in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    o, lse = oracle.attend(q, k, v, mask, case.scale)
    loss = (o * do.double()).sum() + (lse * dlse.double()).sum()
    return (o.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v)))
