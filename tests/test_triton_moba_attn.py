"""Correctness of `moba_attn_varlen_triton` on packed sequences, as a program or under pytest.

With a GPU the Triton kernels in bf16, as good as an eager computation; without one plain torch, against an oracle
that shares no code with it.
"""
import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).with_name("helpers"))]  # not installed, not pytest

import cases  # noqa: E402
import oracle  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import comparison  # noqa: E402
from moba_megatron import moba_attn_varlen_triton  # noqa: E402

GPU = torch.cuda.is_available()
SIZES = {"tokens": (512, 2048), "chunks": (128, 1024), "head_dim": 128} if GPU else {
    "tokens": (60, 120), "chunks": (8, 50), "head_dim": 8}


def _lengths(sequences, tokens):
    """Random lengths, the same in every run."""
    cuts = sorted(random.Random(tokens).sample(range(1, tokens - 1), sequences - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, tokens]))


@pytest.mark.parametrize("topk", [2, 3])
@pytest.mark.parametrize("chunk_size", SIZES["chunks"])
@pytest.mark.parametrize("tokens", SIZES["tokens"])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("sequences", [1, 4])
def test_attn_varlen_moba(sequences, heads, tokens, chunk_size, topk):
    case = cases.Case(_lengths(sequences, tokens), chunk_size, topk, heads, heads, SIZES["head_dim"], SIZES["head_dim"])
    arguments = case.cu_seqlens(), case.max_seqlen, chunk_size, topk
    if GPU:
        q, k, v, do, dlse = (x.cuda() for x in case.tensors(torch.bfloat16))
        comparison.check_operator(q, k, v, do, dlse, (arguments[0].cuda(), *arguments[1:]))
        return
    q, k, v, do, _ = case.tensors(torch.float64)
    chosen = oracle.select(q, k, case.lengths, chunk_size, topk)
    mask = oracle.mask_of(chosen, case.lengths, heads, chunk_size)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = moba_attn_varlen_triton(*leaves, *arguments)
    want, _ = oracle.attend(*leaves, mask, case.scale)
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(torch.autograd.grad(o, leaves, do), torch.autograd.grad(want, leaves, do))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
