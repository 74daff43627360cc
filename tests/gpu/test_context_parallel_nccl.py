"""Context parallel attention on NCCL and the Triton kernels: two GPUs against one, and bad input on one of them."""
import itertools
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run_ranks
from test_context_parallel import zigzag_rows

from moba_megatron import kernels
from moba_megatron.context_parallel import Agreement, context_parallel_attention
from moba_megatron.context_parallel import attention as schedule
from moba_megatron.ops import moba_attention
from moba_megatron.segments import Segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

# (lengths, uniform, chunk size, topk, heads, kv heads, D, dtype)
CASES = {
    "aligned": ([8192], True, 128, 8, 16, 16, 128, torch.bfloat16),
    "cut": ([4 * 1501], True, 200, 4, 8, 2, 64, torch.bfloat16),
    "batch_fp32": ([4 * 333] * 2, True, 96, 3, 4, 2, 64, torch.float32),
    "packed": ([4 * 300, 4, 4 * 1000], False, 128, 4, 8, 8, 128, torch.bfloat16),
    "dense": ([4096], True, 4096, 1, 8, 8, 128, torch.bfloat16),
}


def parity(rank, size):
    results = {}
    for name, (lengths, uniform, chunk_size, topk, heads, kv_heads, d, dtype) in CASES.items():
        generator = torch.Generator(device="cuda").manual_seed(5)
        total = sum(lengths)
        q, k, v, do = (torch.randn(total, h, d, device="cuda", generator=generator).to(dtype)
                       for h in (heads, kv_heads, kv_heads, heads))
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        segments = Segments.from_cu_seqlens(cu_seqlens, max(lengths), chunk_size)
        rows = zigzag_rows(lengths, size, rank).cuda()
        layout = on_cuda(lengths, uniform, size, rank, chunk_size)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = moba_attention(*leaves, segments, topk)
        expected = [x[rows] for x in (o, *torch.autograd.grad(o, leaves, do))]
        local = [x[rows].requires_grad_() for x in (q, k, v)]
        got = context_parallel_attention(*local, layout, topk, dist.group.WORLD)
        got = [got, *torch.autograd.grad(got, local, do[rows])]
        earlier = min(topk - 1, (max(lengths) - 1) // chunk_size)
        same = True
        if earlier:
            selected = kernels.gate(q, kernels.chunk_means(k, segments), segments, earlier + 1)[rows]
            chosen = schedule._forward(kernels, *(x.detach() for x in local), layout, topk, dist.group.WORLD, 0.1)[2]
            same = torch.equal(selected.sort(2)[0], chosen.sort(2)[0])
        results[name] = same, [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(got, expected)]
    return results, bad_input(rank)


def on_cuda(lengths, uniform, size, rank, chunk_size):
    from moba_megatron.context_parallel import zigzag_packed, zigzag_uniform
    if uniform:
        return zigzag_uniform(lengths[0], len(lengths), size, rank, chunk_size, torch.device("cuda", rank))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    return zigzag_packed(cu_seqlens, max(lengths), sum(lengths), size, rank, chunk_size)


def bad_input(rank):
    """After two agreed calls rank 1 alone changes: it raises at once, rank 0 at its next call."""
    for _ in range(2):
        with Agreement(dist.group.WORLD) as agreement:
            agreement.signature = "agreed"
    texts = []
    for call in range(2):
        try:
            with Agreement(dist.group.WORLD) as agreement:
                agreement.signature = "changed" if rank == 1 else "agreed"
        except ValueError as error:
            texts.append(str(error))
            break
        time.sleep(1)
    return texts


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(parity, 2, tmp_path_factory.mktemp("ranks"), backend="nccl")


@pytest.mark.parametrize("name", CASES)
def test_equals_one_gpu(results, name):
    bound = 1e-5 if CASES[name][-1] == torch.float32 else 5e-3  # bf16 results are rounded once more, or differently
    for result, _ in results:
        same, errors = result[name]
        assert same, "a rank selected other chunks"
        assert max(errors) <= bound, errors


def test_bad_input_raises_on_both(results):
    texts = [texts for _, texts in results]
    assert texts[0] == texts[1] and "rank 0: agreed; rank 1: changed" in texts[0][0]
