"""An fp64 oracle by samples, for sizes at which the whole answer cannot be computed: some queries, some chunks.

For sampled queries it checks the selection and recomputes o, lse and dq; for sampled chunks it finds every query that
attends to them and recomputes dk and dv. All of it is dense masked attention in fp64 over all keys: slow, and plain.
The same in the inputs' precision, rounded where an eager implementation rounds, tells which error is to be expected.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 27
SAMPLED_ROWS = 128
SAMPLED_HEADS = 2


@dataclass(frozen=True)
class Problem:
    """Self-attention of one sequence: the inputs, the upstream gradient and the selection under test."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    selected: Tensor  # int32 [T, H, topk - 1], chunk numbers
    chunk_size: int
    scale: float

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


def check_selection(problem: Problem, topk: int, seed: int = 0) -> dict[str, float]:
    """Compares the selection of sampled (query, head) pairs with fp64 gate scores.

    A selection is wrong if it has the wrong number of chunks, a chunk twice, a chunk that is not earlier, or one whose
    score is below the k-th best by more than fp32 sums and the one rounding of the means can explain.

    Returns:
        ``checked`` and ``wrong`` pairs.
    """
    t, heads = _sample_rows(problem, seed)
    size, chunks = problem.chunk_size, problem.k.shape[0] // problem.chunk_size
    if not chunks:
        chosen = (problem.selected[t][:, heads] >= 0).any(2)
        return {"checked": chosen.numel(), "wrong": int(chosen.sum())}
    checked = wrong = 0
    for head in heads:
        keys = problem.k[:chunks * size, head // problem.group].double().view(chunks, size, -1)
        mean, slack = keys.mean(1), keys.abs().mean(1) * (8 + size / 64) * 2.0 ** -24  # [chunks, D]
        low, high = ((mean + s).to(problem.k.dtype).double() for s in (-slack, slack))
        q = problem.q[t, head].double()  # [R, D]
        score = q @ mean.to(problem.k.dtype).double().T
        tolerance = q.abs() @ (high - low).T + 2.0 ** -18 * (q.abs() @ mean.abs().T)
        earlier = torch.arange(chunks, device=t.device)[None] < (t // size)[:, None]
        score = score.masked_fill(~earlier, -torch.inf)
        wanted = torch.clamp(t // size, max=topk - 1)
        kth = score.sort(1, descending=True).values.gather(1, torch.clamp(wanted - 1, min=0)[:, None])
        table = _membership(problem.selected[t, head], chunks)
        duplicate_free = (problem.selected[t, head] >= 0).sum(1) == table.sum(1)
        good = (score + tolerance + tolerance.max(1, keepdim=True).values >= kth) & earlier
        right = duplicate_free & (table.sum(1) == wanted) & (good | ~table).all(1)
        checked += right.numel()
        wrong += int((~right).sum())
    return {"checked": checked, "wrong": wrong}


def check_values(problem: Problem, o: Tensor, lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
                 seed: int = 0, chunks: list[int] | None = None) -> dict[str, dict[str, float]]:
    """Relative errors ``|x - oracle| / |oracle|`` on the samples; dk and dv in the given chunks (first, middle, last).

    Returns:
        As :func:`errors`.
    """
    return errors([sampled_values(problem, o, lse, dq, dk, dv, seed, chunks)], problem.q.dtype)


def sampled_values(problem: Problem, o: Tensor, lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
                   seed: int = 0, chunks: list[int] | None = None) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """Name -> samples: the value, the exact one, and what the inputs' precision yields, each flat and fp64."""
    samples: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def note(name: str, *values: Tensor) -> None:
        samples.setdefault(name, []).append(tuple(x.double().flatten() for x in values))

    t, heads = _sample_rows(problem, seed)
    for head in heads:
        exact, rounded = (_rows(problem, t, head, low) for low in (False, True))
        note("o", o[t, head], exact["o"], rounded["o"])
        note("dq", dq[t, head], exact["dq"], rounded["dq"])
        if lse is not None:
            note("lse", lse[t, head], exact["lse"], rounded["lse"])
    for chunk in _sample_chunks(problem) if chunks is None else chunks:
        keys = slice(chunk * problem.chunk_size, (chunk + 1) * problem.chunk_size)
        kv_head = heads[-1] // problem.group
        exact, rounded = (_chunk(problem, chunk, kv_head, low) for low in (False, True))
        note("dk", dk[keys, kv_head], exact[0], rounded[0])
        note("dv", dv[keys, kv_head], exact[1], rounded[1])
    return samples


def errors(problems: list[dict[str, list[tuple[Tensor, Tensor, Tensor]]]], dtype: torch.dtype
           ) -> dict[str, dict[str, float]]:
    """Relative errors over the samples of several problems together: alone a sequence of one token has dq = 0.

    Returns:
        For each of o, lse, dq, dk, dv: ``error``; ``limit``, twice the error of the same computation in the inputs'
        precision plus one rounding (STYLE: derived, not guessed).
    """
    result = {}
    for name in problems[0]:
        x, exact, rounded = map(torch.cat, zip(*(sample for each in problems for sample in each[name])))
        error, of_rounding = (((y - exact).norm() / exact.norm()).item() for y in (x, rounded))
        result[name] = {"error": error, "limit": 2 * of_rounding + torch.finfo(dtype).eps}
    return result


def verdict(errors: dict[str, dict[str, float]], selection: dict[str, float]) -> dict:
    """``errors`` and ``selection``, and by them the ``status`` (``ok`` or ``wrong``) and ``reason`` of a row."""
    wrong = [f"{name} ({e['error']:.1e} > {e['limit']:.1e})" for name, e in errors.items()
             if not e["error"] <= e["limit"]]
    if selection["wrong"]:
        wrong.insert(0, f"selection ({selection['wrong']} of {selection['checked']})")
    status = {"status": "wrong", "reason": "error above its limit: " + ", ".join(wrong)} if wrong else {"status": "ok"}
    return {"errors": errors, "selection": selection, **status}


def _sample_rows(problem: Problem, seed: int) -> tuple[Tensor, list[int]]:
    """Query rows (the first, the last and random ones) and heads (the first and the last)."""
    total, device = problem.q.shape[0], problem.q.device
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(total, (min(SAMPLED_ROWS, total),), generator=generator)
    rows = torch.cat((rows, torch.tensor([0, problem.chunk_size - 1, total - 1]))).clamp(max=total - 1).unique()
    return rows.to(device), sorted({0, problem.q.shape[1] - 1})[:SAMPLED_HEADS]


def _sample_chunks(problem: Problem) -> list[int]:
    """The first chunk (the most visited when routing is skewed), a middle one and the last."""
    last = -(-problem.k.shape[0] // problem.chunk_size) - 1
    return sorted({0, last // 2, last})


def _membership(selected: Tensor, chunks: int) -> Tensor:
    table = torch.zeros(selected.shape[0], chunks + 1, dtype=torch.bool, device=selected.device)
    table.scatter_(1, torch.where(selected < 0, chunks, selected).long(), True)
    return table[:, :chunks]


def _softmax_rows(problem: Problem, t: Tensor, head: int, low: bool):
    """For query rows of a head: (number of keys, dtype, weights p, ds without the scale, lse), dense over the keys."""
    dtype = torch.float32 if low else torch.float64
    size, kv_head, end = problem.chunk_size, head // problem.group, int(t.max()) + 1
    chunk_of_key = torch.arange(end, device=t.device) // size
    chosen = _membership(problem.selected[t, head], -(-problem.k.shape[0] // size))
    chosen.scatter_(1, (t // size)[:, None], True)
    mask = chosen[:, chunk_of_key] & (torch.arange(end, device=t.device)[None] <= t[:, None])
    k, v = problem.k[:end, kv_head].to(dtype), problem.v[:end, kv_head].to(dtype)
    score = (problem.q[t, head].to(dtype) @ k.T).mul_(problem.scale).masked_fill_(~mask, -torch.inf)
    lse = torch.logsumexp(score, 1)
    p = score.sub_(lse[:, None]).exp_()
    do = problem.do[t, head].to(dtype)
    dp = do @ v.T
    if low:
        o = (p.to(problem.q.dtype).to(dtype) @ v).to(problem.q.dtype).to(dtype)
        ds = p * (dp - (o * do).sum(1)[:, None])
        p, ds = (x.to(problem.q.dtype).to(dtype) for x in (p, ds))
    else:
        ds = p * (dp - (p * dp).sum(1, keepdim=True))
    return k, v, p, ds, lse


def _rows(problem: Problem, t: Tensor, head: int, low: bool) -> dict[str, Tensor]:
    """o, lse and dq of some query rows of a head."""
    parts = []
    for rows in t.split(max(1, SCORES_AT_ONCE // problem.k.shape[0])):
        k, v, p, ds, lse = _softmax_rows(problem, rows, head, low)
        parts.append((p @ v, lse, (ds @ k) * problem.scale))
    o, lse, dq = (torch.cat(x) for x in zip(*parts))
    return {"o": o.to(problem.q.dtype) if low else o, "lse": lse, "dq": dq.to(problem.q.dtype) if low else dq}


def _chunk(problem: Problem, chunk: int, kv_head: int, low: bool) -> tuple[Tensor, Tensor]:
    """dk and dv of a chunk, from every query row that attends to it."""
    begin = chunk * problem.chunk_size
    end = min(begin + problem.chunk_size, problem.k.shape[0])
    dtype = torch.float32 if low else torch.float64
    dk = torch.zeros(end - begin, problem.k.shape[2], dtype=dtype, device=problem.k.device)
    dv = torch.zeros(end - begin, problem.v.shape[2], dtype=dtype, device=problem.k.device)
    for head in range(kv_head * problem.group, (kv_head + 1) * problem.group):
        picked = (problem.selected[:, head] == chunk).any(1)
        picked[begin:end] = True
        for t in picked.nonzero()[:, 0].split(max(1, SCORES_AT_ONCE // problem.k.shape[0])):
            _, _, p, ds, _ = _softmax_rows(problem, t, head, low)
            columns = slice(begin, min(end, p.shape[1]))
            dv[:columns.stop - begin] += p[:, columns].T @ problem.do[t, head].to(dtype)
            dk[:columns.stop - begin] += ds[:, columns].T @ problem.q[t, head].to(dtype) * problem.scale
    return (dk.to(problem.k.dtype), dv.to(problem.v.dtype)) if low else (dk, dv)
