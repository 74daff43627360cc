"""Dispatch of queries on GPUs: flash attention of chunks against fp64, and the whole schedule against one GPU."""
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from benchmarks.planner.measure import forced
from moba_megatron.context_parallel import Sequences, context_parallel_attention, record_waits
from moba_megatron.experimental import chunk_attention, cost_model, dispatch
from moba_megatron.experimental.chunk_attention import (
    add_partials,
    chunk_attention_bwd,
    chunk_attention_fwd,
    merge_partials,
)
from moba_megatron.experimental.cost_model import DISPATCH, MIXED
from moba_megatron.ops import moba_attention
from moba_megatron.segments import Segments

pytestmark = pytest.mark.gpu
COUNTS = (0, 1, 300, 0, 64, 129)


@pytest.mark.parametrize("dtype, dim, longest", [
    (torch.bfloat16, 128, 1 << 14), (torch.float16, 64, 1 << 14), (torch.float32, 32, 1 << 14),
    (torch.bfloat16, 128, 100)])
def test_chunk_attention(dtype, dim, longest, monkeypatch):
    monkeypatch.setattr(chunk_attention, "LONGEST", longest)
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    cu_queries = torch.tensor([0, *torch.tensor(COUNTS).cumsum(0)], dtype=torch.int32, device="cuda")
    k, v = normal(len(COUNTS), 256, dim), normal(len(COUNTS), 256, dim)
    q, do, o_whole = (normal(sum(COUNTS), dim) for _ in range(3))
    wide = [x.double() for x in (q, k, v)]
    o, lse = chunk_attention_fwd(q, k, v, cu_queries, max(COUNTS), dim ** -0.5)
    expected = chunk_attention_fwd(*wide, cu_queries, max(COUNTS), dim ** -0.5)
    assert relative(o, expected[0]) < 6e-3 and relative(lse, expected[1]) < 1e-3
    lse = lse + 0.7  # the query's softmax goes over more than this chunk
    grads = chunk_attention_bwd(do, q, k, v, o_whole, lse, cu_queries, max(COUNTS), dim ** -0.5)
    expected = chunk_attention_bwd(do.double(), *wide, o_whole.double(), lse.double(), cu_queries, max(COUNTS),
                                   dim ** -0.5)
    for got, wanted in zip(grads, expected):
        assert relative(got, wanted) < 1e-2
    assert not grads[1][0].any() and not grads[2][3].any(), "a chunk without queries has no gradient"


@pytest.mark.parametrize("dtype, dim, share", [
    (torch.bfloat16, 128, 0.4), (torch.float16, 64, 1.0), (torch.float32, 80, 0.1), (torch.bfloat16, 128, 0.0)])
def test_merge(dtype, dim, share):
    tokens, heads, topk = 700, 6, 7
    generator = torch.Generator("cuda").manual_seed(2)
    there = torch.rand(tokens, heads, topk, device="cuda", generator=generator) < share
    number = int(there.sum())
    places = torch.full(there.shape, -1, dtype=torch.int32, device="cuda")
    places[there] = torch.randperm(number, device="cuda", generator=generator).int()
    o, parts, lse, lse_parts = (torch.randn(*shape, device="cuda", generator=generator)
                                for shape in ((tokens, heads, dim), (number, dim), (tokens, heads), (number,)))
    o, parts, lse, lse_parts = o.to(dtype), parts.to(dtype), 10 * lse, 10 * lse_parts
    outs = torch.full((2, tokens, heads + 1, dim), torch.nan, dtype=dtype, device="cuda")
    merged = merge_partials(o, lse, parts, lse_parts, places, outs[0, :, 1:], True)
    add_partials(o, parts, places, outs[1, :, 1:], True)
    expected = torch.empty(2, *o.shape, dtype=torch.float64, device="cuda")
    wide = [x.double() for x in (o, lse, parts, lse_parts)]
    assert relative(merged, merge_partials(*wide, places, expected[0], False)) < 1e-6
    add_partials(wide[0], wide[2], places, expected[1], False)
    for out, wanted in zip(outs, expected):
        assert relative(out[:, 1:], wanted) < {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 2e-6}[dtype]
        assert out[:, 0].isnan().all(), "another head"


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def parity(rank, size):
    """Relative errors of o, dq, dk, dv against one GPU, and bytes by stage, for MHA and GQA: dispatch; dispatch and
    copies; and the same with every copy through relays and queries in rounds."""
    found = {}
    for heads, kv_heads in ((16, 16), (32, 8)):
        tokens, chunk_size, topk, device = 8192, 256, 3, torch.device("cuda", rank)
        generator = torch.Generator("cuda").manual_seed(5)
        q, k, v, do = (torch.randn(tokens, h, 128, device=device, generator=generator).bfloat16()
                       for h in (heads, kv_heads, kv_heads, heads))
        q[..., 0] += 4  # everybody chooses the first chunk, a sink
        k[:chunk_size, :, 0] += 4
        leaves = [x.requires_grad_() for x in (q, k, v)]
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        o = moba_attention(*leaves, Segments.from_cu_seqlens(cu_seqlens, tokens, chunk_size), topk)
        sequences = Sequences.uniform(tokens, 1, device)
        rows = sequences.rows(size, rank).own_rows
        expected = [x[rows] for x in (o, *torch.autograd.grad(o, leaves, do))]
        for mode, relayed_from, limit in ((DISPATCH, 2, 1 << 30), (MIXED, 2, 1 << 30), (MIXED, 1, 1 << 20)):
            local = [x.detach()[rows].requires_grad_() for x in (q, k, v)]
            with forced(mode), mock.patch.object(cost_model, "RELAYED_FROM", relayed_from), \
                    mock.patch.object(dispatch, "DISPATCHED_BYTES", limit), record_waits() as record:
                got = context_parallel_attention(*local, sequences, chunk_size, topk, dist.group.WORLD,
                                                 comm_type="selective", head_groups=2)
                grads = torch.autograd.grad(got, local, do[rows])
            torch.cuda.synchronize()
            sent = {stage: entry["sent_bytes"] for stage, entry in record.summary().items()}
            found[mode, relayed_from, heads, kv_heads] = [relative(a, b) for a, b in zip((got, *grads), expected)], sent
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_against_one(tmp_path):
    first, second = run_ranks(parity, 2, tmp_path, backend="nccl")
    for (mode, *_), (errors, sent) in [*first.items(), *second.items()]:
        assert max(errors) < 1e-2, errors
        assert mode == MIXED or min(sent[f"{x} {y}"] for x in ("fwd", "bwd") for y in ("dispatch", "return")) > 0
    for (mode, relayed_from, *heads), (_, sent) in first.items():  # the sink's owner, to which others dispatch
        assert (sent["fwd gather"] > 0) == (sent["bwd gather"] > 0) == (mode == MIXED)
        assert mode == DISPATCH or sent["fwd return"] < first[(DISPATCH, 2, *heads)][1]["fwd return"]
    later = [sent.get("fwd dispatch later", 0) for (_, relayed_from, *_), (_, sent) in second.items()
             if relayed_from == 1]
    assert max(later) > 0, "rounds of 1 MiB"
