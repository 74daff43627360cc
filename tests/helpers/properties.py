"""Calls of the operators as Hypothesis draws them (lengths, strides, dtypes, entries) and what must hold for each.

Data in less than fp64 are small integers: chunk means and gate scores are exact then, ties abound, and the selection of
the fp64 oracle is the only right one. Values and gradients may be off by twice the error of the oracle's own arithmetic
in the inputs' dtype, plus a rounding of each factor of their products. ``MOBA_TEST_EXAMPLES`` multiplies the examples.
"""
import os
from dataclasses import dataclass

import oracle
import torch
from cases import Case
from hypothesis import settings
from hypothesis import strategies as st

import comparison
from moba_megatron import moba_attn_varlen
from moba_megatron.ops import causal_attn_varlen, moba_attention
from moba_megatron.segments import Segments

MORE = int(os.environ.get("MOBA_TEST_EXAMPLES", 1))


def examples(number):
    return settings(max_examples=number * MORE)


def operators_called(run):
    """(operator, its arguments) of each of the package's custom operators that ``run()`` enters, in order."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "moba_megatron":
                seen.append((function, args))
            return function(*args, **(kwargs or {}))

    with Watch():
        run()
    return seen


def _head_major(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _fused(x):
    wide = x.new_full((x.shape[0], x.shape[1] + 3, x.shape[2]), torch.nan)
    wide[:, 1:-2] = x
    return wide[:, 1:-2]


def _every_other_element(x):
    return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(2)[..., ::2]


def _offset_by_one_element(x):
    return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)


def _one_head_expanded(x):
    return x[:, :1].contiguous().expand(x.shape)


def _one_token_expanded(x):
    return x[:1].contiguous().expand(x.shape) if len(x) else x


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "head-major": _head_major, "fused": _fused,
           "every other element": _every_other_element, "offset by one element": _offset_by_one_element,
           "one head expanded": _one_head_expanded, "one token expanded": _one_token_expanded}
ENTRIES = ("moba_attn_varlen", "causal_attn_varlen", "moba_attention", "the ends of sequences")


@dataclass(frozen=True)
class Call:
    """One call: its problem, the layouts of q, k, v and do, and the entry."""

    case: Case
    dtype: torch.dtype
    layouts: tuple[str, str, str, str]
    entry: str
    tails: tuple[int, ...]
    """Queries at the end of each sequence, for the entry that takes some only."""
    with_lse: bool


@st.composite
def calls(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16), chunks=(1, 3, 4, 16),
          dims=((1, 1), (4, 4), (3, 6), (8, 2)), longest=24, entries=ENTRIES):
    lengths = tuple(draw(st.lists(st.one_of(st.sampled_from((0, 1)), st.integers(0, longest)), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from(dtypes))
    heads, kv_heads = draw(st.sampled_from(((1, 1), (2, 1), (4, 2), (3, 3))))
    dim, dim_v = draw(st.sampled_from(dims))
    case = Case(lengths, draw(st.sampled_from(chunks)), draw(st.integers(1, 4)), heads, kv_heads, dim, dim_v,
                draw(st.sampled_from(("normal", "ties"))) if dtype == torch.float64 else "ties",
                seed=draw(st.integers(0, 99)))
    layouts = tuple(draw(st.sampled_from(tuple(LAYOUTS))) for _ in range(4))
    tails = tuple(draw(st.integers(0, n)) for n in lengths)
    return Call(case, dtype, layouts, draw(st.sampled_from(entries)), tails, draw(st.booleans()))


class Problem:
    """A call's tensors on a device, the operator as a function of q, k and v, and what it must give."""

    def __init__(self, call, device="cpu", backend="auto"):
        case, self.call, self.dtype = call.case, call, call.dtype
        q, k, v, do, dlse = (x.to(device) for x in case.tensors(call.dtype))
        q, k, v, do = (LAYOUTS[name](x) for name, x in zip(call.layouts, (q, k, v, do)))
        topk = case.max_seqlen if call.entry == "causal_attn_varlen" else case.topk
        chosen = oracle.select(q.double().cpu(), k.double().cpu(), case.lengths, case.chunk_size, topk)
        self.mask = oracle.mask_of(chosen, case.lengths, case.heads, case.chunk_size).to(device)
        self.rows = torch.arange(case.total, device=device)
        segments = case.segments()
        if call.entry == "the ends of sequences":
            ends = segments.cu_seqlens_k[1:].tolist()
            self.rows = torch.tensor([row for n, end in zip(call.tails, ends) for row in range(end - n, end)],
                                     dtype=torch.long, device=device)
            cu_q = torch.tensor((0, *call.tails)).cumsum(0).int()
            offsets = torch.tensor([n - tail for n, tail in zip(case.lengths, call.tails)], dtype=torch.int32)
            segments = Segments(cu_q, segments.cu_seqlens_k, segments.seq_ids, offsets, max(call.tails),
                                case.max_seqlen, case.chunk_size)
        self.full = q, k, v, do, dlse
        take = [LAYOUTS[name](x[self.rows]) for name, x in zip(call.layouts[::3], (q, do))]
        self.q, self.do, self.k, self.v, self.dlse = *take, k, v, dlse[self.rows]
        if not call.with_lse:
            self.dlse = None
        cu_seqlens, options = segments.cu_seqlens_k.to(device), dict(softmax_scale=case.scale, return_lse=True,
                                                                     backend=backend)
        places = Segments(*(x.to(device) for x in (segments.cu_seqlens_q, segments.cu_seqlens_k, segments.seq_ids,
                                                   segments.offsets)), segments.max_seqlen_q, segments.max_seqlen_k,
                          segments.chunk_size, segments.packed)
        self.function = {
            "moba_attn_varlen": lambda q, k, v: moba_attn_varlen(q, k, v, cu_seqlens, case.max_seqlen, case.chunk_size,
                                                                 case.topk, **options),
            "causal_attn_varlen": lambda q, k, v: causal_attn_varlen(q, k, v, cu_seqlens, case.max_seqlen, **options),
        }.get(call.entry, lambda q, k, v: moba_attention(q, k, v, places, case.topk, **options))

    def leaves(self):
        return [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]

    def gradients(self, leaves, o, lse):
        given = [(o, self.do)] + ([(lse, self.dlse)] if self.dlse is not None else [])
        return torch.autograd.grad([x for x, _ in given], leaves, [d for _, d in given])

    def run(self, function=None):
        """o, lse, dq, dk, dv through a function of q, k, v."""
        leaves = self.leaves()
        o, lse = (function or self.function)(*leaves)
        return o.detach(), lse.detach(), *self.gradients(leaves, o, lse)

    def check(self, results):
        """Dtypes, contiguity, and values against the fp64 oracle; lists without gradients hold o and lse alone."""
        q, k, v, do, dlse = self.full
        names = ("o", "lse", "dq", "dk", "dv")[:len(results)]
        wide = torch.promote_types(self.dtype, torch.float32)
        for name, x in zip(names, results):
            assert x.is_contiguous() and x.dtype == (wide if name == "lse" else self.dtype), (name, x.stride(), x.dtype)
        if not len(self.rows):
            assert all(not x.any() for x in results)
            return
        kept = torch.zeros(len(q), 1, dtype=do.dtype, device=do.device)
        kept[self.rows] = 1
        do, dlse = do * kept[..., None], dlse * kept.to(dlse.dtype) if self.dlse is not None else None
        scale = self.call.case.scale
        exact, eager = (comparison.attend(q, k, v, do, dlse, self.mask, scale, x) for x in (torch.float64, self.dtype))
        sizes = _magnitudes(q, k, v, do, dlse, self.mask, scale)
        for name, x in zip(names, results):
            want, low, size = (each[name][self.rows] if name in ("o", "lse", "dq") else each[name]
                               for each in (exact, eager, sizes))
            error = (x.double() - want).norm()
            limit = 2 * (low - want).norm() + 2 * torch.finfo(self.dtype).eps * size.norm()
            assert error <= limit, f"{name} is off by {error:.2e}, limit {limit:.2e}"  # NaN is, too


def _magnitudes(q, k, v, do, dlse, mask, scale):
    """Sums of absolute values in place of the sums of products behind each result: roundings are relative to these."""
    group = q.shape[1] // k.shape[1]
    q, k, v, do = (x.double().transpose(0, 1) for x in (q, k, v, do))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    size = abs(scale) * q.abs() @ k.abs().mT
    p = (scale * q @ k.mT).masked_fill(~mask, -torch.inf).softmax(2)
    o = p @ v.abs()
    delta = (do.abs() * o).sum(2, keepdim=True)
    if dlse is not None:
        delta = delta + dlse.double().t().abs()[..., None]
    ds = p * (1 + size) * (do.abs() @ v.abs().mT + delta)
    dk, dv = (x.unflatten(0, (-1, group)).sum(1) for x in (abs(scale) * ds.mT @ q.abs(),
                                                           (p * (1 + size)).mT @ do.abs()))
    lse = 1 + (size * mask).amax(2)
    o, dq, dk, dv = (x.transpose(0, 1) for x in ((p * (1 + size)) @ v.abs(), abs(scale) * ds @ k.abs(), dk, dv))
    return {"o": o, "lse": lse.t(), "dq": dq, "dk": dk, "dv": dv}
