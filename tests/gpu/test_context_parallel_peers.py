"""Exchanges by copy engines on GPUs: against the library's, repeated, in two groups, recomputed; a rank that hangs."""
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run_ranks
from test_context_parallel import RecordedGate

from moba_megatron import kernels
from moba_megatron.bench.cp_compile import Job, compile_schedules
from moba_megatron.context_parallel import Sequences, context_parallel_attention
from moba_megatron.context_parallel.transport.peers import peers_for
from moba_megatron.kernels import launcher

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

TOKENS, TOPK, D = 8192, 4, 128
# (heads, kv heads, sequences, head groups, chunk size): up to 128 the kernel of dk and dv writes parts of dq too
SHAPES = {"mha": (16, 16, 1, 2, 128), "gqa": (32, 8, 1, 3, 128), "one_kv_head": (8, 1, 1, None, 128),
          "batch": (16, 16, 2, 5, 128), "long_chunks": (16, 8, 1, 2, 512)}
TYPES = ("all_gather", "a2a")


def compile_everything():
    jobs = [Job(comm_type, 2, TOKENS, chunk_size, TOPK, heads, kv_heads, D, head_groups=groups)
            for heads, kv_heads, _, groups, chunk_size in SHAPES.values() for comm_type in TYPES]
    major, minor = torch.cuda.get_device_capability()
    compile_schedules(jobs, 10 * major + minor, min(12, os.cpu_count()))


def use(copy_engines):
    os.environ["MOBA_CP_COPY_ENGINES"] = "1" if copy_engines else "0"


class Layer:
    """A shape of attention on this rank."""

    def __init__(self, name, rank, size):
        self.heads, self.kv_heads, batch, self.head_groups, self.chunk_size = SHAPES[name]
        self.sequences = Sequences.uniform(TOKENS // batch, batch, torch.device("cuda", rank))
        self.rows, self.rank = TOKENS // size, rank

    def inputs(self, seed):
        """q, k, v and the gradient of o."""
        generator = torch.Generator("cuda").manual_seed(100 * seed + self.rank)
        return [torch.randn(self.rows, h, D, device="cuda", generator=generator).bfloat16()
                for h in (self.heads, self.kv_heads, self.kv_heads, self.heads)]

    def attend(self, q, k, v, comm_type, group):
        return context_parallel_attention(q, k, v, self.sequences, self.chunk_size, TOPK, group,
                                          comm_type=comm_type, head_groups=self.head_groups, deterministic=True)

    def step(self, inputs, comm_type, group, recompute=False):
        """o, dq, dk, dv."""
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        arguments = (*leaves, comm_type, group)
        o = checkpoint(self.attend, *arguments, use_reentrant=False) if recompute else self.attend(*arguments)
        return [o.detach(), *torch.autograd.grad(o, leaves, inputs[3])]


def against_the_library(rank, size):
    """Whether the selection, and o and gradients, are the same bits; by shape and communication type."""
    results = {}
    for name in SHAPES:
        layer = Layer(name, rank, size)
        inputs = layer.inputs(0)
        for comm_type in TYPES:
            runs = []
            for engines in (False, True):
                use(engines)
                with RecordedGate(kernels) as recorded:
                    got = layer.step(inputs, comm_type, dist.group.WORLD)
                runs.append([torch.cat(recorded.selected, 1), *got])
            results[name, comm_type] = [torch.equal(a, b) for a, b in zip(*runs)]
    return results


def repeated(rank, size):
    """Rounds of fresh inputs in two groups, one rank late at random, some recomputed: wrong results by kind.

    Also the chunk sizes for which a2a's backward was replayed in the end, and so let dk and dv leave before dq.
    """
    groups, wrong, chance = [dist.group.WORLD, dist.new_group()], {}, torch.Generator().manual_seed(rank)
    layers = [Layer(name, rank, size) for name in ("mha", "batch", "long_chunks")]
    for i in range(60):
        layer, comm_type = layers[i % 3], TYPES[i // 3 % 2]
        inputs = layer.inputs(i)
        use(False)
        expected = layer.step(inputs, comm_type, groups[0])
        use(True)
        if rank == i // 4 % size:
            time.sleep(0.02 * torch.rand(1, generator=chance).item())
        # nothing waits between the two: the second is under way while the first one's tensors are let go of
        results = [layer.step(inputs, comm_type, groups[j], recompute=i % 4 == 0) for j in (i % 2, 1 - i % 2)]
        if rank == i % size:
            torch.cuda._sleep(10_000_000)  # some milliseconds of the stream's time
        for got in results:
            for what, a, b in zip(("o", "dq", "dk", "dv"), got, expected):
                wrong[what] = wrong.get(what, 0) + (not torch.equal(a, b))
    options = [key[2] for key, record in launcher._records.items() if record.replay is not None]
    # all_gather adds up fp32
    return wrong, {x[2][2] for x in options if x[:2] == ("attend_bwd", torch.bfloat16)}


def copy_engine_tests(rank, size):
    rows = Sequences.uniform(TOKENS, 1, torch.device("cuda", rank)).rows(size, rank)
    assert peers_for(rows, dist.group.WORLD, torch.device("cuda", rank)) is not None, "no access to the other GPU"
    return against_the_library(rank, size), repeated(rank, size)


def one_hangs(rank, size):
    group = dist.new_group(timeout=timedelta(seconds=4))
    layer = Layer("mha", rank, size)
    for _ in range(2):
        layer.step(layer.inputs(0), "a2a", group)
    torch.cuda.synchronize()
    if rank == 1:
        time.sleep(60)
    layer.step(layer.inputs(0), "a2a", group)
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    compile_everything()
    return run_ranks(copy_engine_tests, 2, tmp_path_factory.mktemp("ranks"), backend="nccl")


@pytest.mark.parametrize("comm_type", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_same_bits_as_the_library(results, name, comm_type):
    for by_case, _ in results:
        assert by_case[name, comm_type] == [True] * 5, "selection, o, dq, dk, dv"


def test_fresh_inputs_again_and_again(results):
    for _, (wrong, replayed) in results:
        assert wrong == {"o": 0, "dq": 0, "dk": 0, "dv": 0}
        assert replayed == {128, 512}


def test_a_rank_that_hangs_is_reported(results, tmp_path):
    """The rank that waits for it raises an error, and not after minutes."""
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"context parallel exchange 'fwd exchange in', number \d+: rank 1 of 2 did "
                                             "not come within 4 s"):
        run_ranks(one_hangs, 2, tmp_path, backend="nccl", seconds=40)
    assert time.monotonic() - begin < 35
