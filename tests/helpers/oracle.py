"""An independent oracle for MoBA, written from the definition (arXiv 2502.13189, section 2.2), sharing no code.

The selection is made one query, head and chunk at a time on Python numbers; attention and its gradients are a dense
masked softmax and autograd.
"""
import torch


def select(q, k, lengths, chunk_size, topk, together=False):
    """Chosen chunks, per sequence, per query, per head: a list of sets of chunk numbers (0-based in the sequence).

    ``together``: the heads of a group choose by the sum of their scores.
    """
    group = q.shape[1] // k.shape[1]
    queries, keys = q.tolist(), k.tolist()
    chosen, start = [], 0
    for length in lengths:
        means = [[_mean([keys[start + i * chunk_size + j][h] for j in range(chunk_size)]) for h in range(k.shape[1])]
                 for i in range(length // chunk_size)]
        rows = []
        for t in range(length):
            row = []
            for h in range(q.shape[1]):
                own = t // chunk_size
                choosing = range(h // group * group, h // group * group + group) if together else [h]
                scored = [(sum(_dot(queries[start + t][i], means[c][h // group]) for i in choosing), c)
                          for c in range(own)]
                scored = sorted((s for s in scored if s[0] == s[0] and s[0] != float("-inf")), reverse=True)
                row.append({i for _, i in scored[:topk - 1]} | {own})
            rows.append(row)
        chosen.append(rows)
        start += length
    return chosen


def _mean(vectors):
    return [sum(components) / len(vectors) for components in zip(*vectors)]


def _dot(x, y):
    return sum(a * b for a, b in zip(x, y))


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
