"""An independent oracle for MoBA, written from the definition (DESIGN: arXiv 2502.13189, section 2.2), sharing no code.

One query and head at a time, in Python loops over chunks; attention and its gradients through a dense masked softmax
and autograd. Slow on purpose: nothing here is clever.
"""
import torch


def select(q, k, lengths, chunk_size, topk):
    """Chosen chunks, per sequence, per query, per head: a list of sets of chunk numbers (0-based in the sequence)."""
    group = q.shape[1] // k.shape[1]
    chosen, start = [], 0
    for length in lengths:
        rows = []
        for t in range(length):
            row = []
            for h in range(q.shape[1]):
                own = t // chunk_size
                scored = []
                for i in range(own):
                    mean = k[start + i * chunk_size:start + (i + 1) * chunk_size, h // group].mean(0)
                    scored.append(((q[start + t, h] * mean).sum().item(), i))
                scored = sorted((s for s in scored if s[0] == s[0] and s[0] != float("-inf")), reverse=True)
                row.append({i for _, i in scored[:topk - 1]} | {own})
            rows.append(row)
        chosen.append(rows)
        start += length
    return chosen


def mask_of(chosen, lengths, num_heads, chunk_size):
    """The boolean mask ``[H, T, T]`` that the chosen chunks amount to, causal and within each sequence."""
    total = sum(lengths)
    mask = torch.zeros(num_heads, total, total, dtype=torch.bool)
    start = 0
    for rows, length in zip(chosen, lengths):
        for t, row in enumerate(rows):
            for h, chunks in enumerate(row):
                for i in chunks:
                    first = start + i * chunk_size
                    mask[h, start + t, first:min(first + chunk_size, start + t + 1)] = True
        start += length
    return mask


def attend(q, k, v, mask, scale):
    """Dense masked softmax attention in the inputs' dtype: o ``[T, H, DV]``, lse ``[T, H]``; autograd follows."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("thd,shd->hts", q, k) * scale
    score = score.masked_fill(~mask, float("-inf"))
    o = torch.einsum("hts,shd->thd", torch.softmax(score, -1), v)
    return o, torch.logsumexp(score, -1).T
