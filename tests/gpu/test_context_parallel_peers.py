"""Exchanges by copy engines on GPUs: against the library's, repeated, in two groups, recomputed; a rank that hangs."""
import gc
import logging
import os
import tempfile
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

from benchmarks.cp_compile import Job, compile_schedules
from moba_megatron import kernels
from moba_megatron.context_parallel import CollectiveCheck, Sequences, context_parallel_attention
from moba_megatron.context_parallel.transport import copy_engines, peers
from moba_megatron.context_parallel.transport.peer_memory import PeerMemory, peer_memory
from moba_megatron.context_parallel.transport.peers import peers_for
from moba_megatron.kernels import launcher
from moba_megatron.ops import pipeline
from moba_megatron.segments import Segments
from tests.context_parallel.test_context_parallel import RecordedGate

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


def group_without_copy_engines(rank, size):
    """A new group of all ranks that exchanges through NCCL: what the variable says at its first exchange decides."""
    group, device = dist.new_group(), torch.device("cuda", rank)
    with mock.patch.dict(os.environ, MOBA_CP_COPY_ENGINES="0"):
        assert peers_for(Sequences.uniform(TOKENS, 1, device).rows(size, rank), group, device) is None
    return group


class Layer:
    """A shape of attention on this rank."""

    def __init__(self, name, rank, size, tokens=TOKENS):
        self.heads, self.kv_heads, batch, self.head_groups, self.chunk_size = SHAPES[name]
        self.sequences = Sequences.uniform(tokens // batch, batch, torch.device("cuda", rank))
        self.rows, self.rank = tokens // size, rank

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
    results, groups = {}, [group_without_copy_engines(rank, size), dist.group.WORLD]
    for name in SHAPES:
        layer = Layer(name, rank, size)
        inputs = layer.inputs(0)
        for comm_type in TYPES:
            runs = []
            for group in groups:
                with RecordedGate(kernels) as recorded:
                    got = layer.step(inputs, comm_type, group)
                runs.append([torch.cat(recorded.selected, 1), *got])
            results[name, comm_type] = [torch.equal(a, b) for a, b in zip(*runs)]
    return results


def repeated(rank, size):
    """Rounds of fresh inputs in two groups, one rank late at random, some recomputed: wrong results by kind.

    Also the chunk sizes for which a2a's backward was prepared in the end, with dk and dv leaving before dq.
    """
    groups, wrong, chance = [dist.group.WORLD, dist.new_group()], {}, torch.Generator().manual_seed(rank)
    library = group_without_copy_engines(rank, size)
    layers = [Layer(name, rank, size) for name in ("mha", "batch", "long_chunks")]
    for i in range(60):
        layer, comm_type = layers[i % 3], TYPES[i // 3 % 2]
        inputs = layer.inputs(i)
        expected = layer.step(inputs, comm_type, library)
        if rank == i // 4 % size:
            time.sleep(0.02 * torch.rand(1, generator=chance).item())
        # nothing waits between the two: the second is under way while the first one's tensors are let go of
        results = [layer.step(inputs, comm_type, groups[j], recompute=i % 4 == 0) for j in (i % 2, 1 - i % 2)]
        if rank == i % size:
            torch.cuda._sleep(10_000_000)  # some milliseconds of the stream's time
        for got in results:
            for what, a, b in zip(("o", "dq", "dk", "dv"), got, expected):
                wrong[what] = wrong.get(what, 0) + (not torch.equal(a, b))
    prepared = [key[key.index(Segments):] for key, plan in launcher._plans.items()
                if plan.is_prepared and key[1] is pipeline._backward and plan.event_at < len(plan.launches)]
    # of Segments and what follows: the third number is the chunk size; all_gather adds up in fp32
    return wrong, {[x for x in key if type(x) is int][2] for key in prepared if torch.bfloat16 in key}


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
def compiled():
    compile_everything()


@pytest.fixture(scope="module")
def results(compiled, tmp_path_factory):
    return run_ranks(copy_engine_tests, 2, tmp_path_factory.mktemp("ranks"), backend="nccl")


@pytest.mark.parametrize("comm_type", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_same_bits_as_the_library(results, name, comm_type):
    for by_case, _ in results:
        assert by_case[name, comm_type] == [True] * 5, "selection, o, dq, dk, dv"


def test_fresh_inputs_again_and_again(results):
    for _, (wrong, prepared) in results:
        assert wrong == {"o": 0, "dq": 0, "dk": 0, "dv": 0}
        assert prepared == {128, 512}


def test_a_rank_that_hangs_is_reported(compiled, tmp_path):
    """The rank that waits for it raises an error, and not after minutes."""
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"context parallel exchange 'fwd exchange in', number \d+: rank 1 of 2 "
                                             "did not come within 4 s"):
        run_ranks(one_hangs, 2, tmp_path, backend="nccl", seconds=40)
    assert time.monotonic() - begin < 35


class Refusing:
    """The CUDA driver, but for one call."""

    def __init__(self, call):
        self._call, self._driver = call, copy_engines.cuda_driver()

    def __getattr__(self, name):
        return (lambda *_: 801) if name == self._call else getattr(self._driver, name)


def failing(error):
    return mock.Mock(side_effect=error)


def refusing(call):
    driver = Refusing(call)
    return mock.patch.object(copy_engines, "cuda_driver", lambda: driver)


# (the rank on which it fails, a patch, what the line must say)
FAILURES = {
    "memory operations": (1, lambda: refusing("cuStreamBatchMemOp_v2"), "cuStreamBatchMemOp failed"),
    "copies": (0, lambda: refusing("cuMemcpy3DBatchAsync_v2"), "cuMemcpy3DBatchAsync failed"),
    "mapping": (1, lambda: mock.patch.object(PeerMemory, "address", failing(OSError("cuIpcOpenMemHandle"))),
                "cuIpcOpenMemHandle"),
    "boot_id": (1, lambda: mock.patch.object(peers, "Path", failing(PermissionError(13, "denied"))), "denied"),
    "mmap": (0, lambda: mock.patch.object(peers, "mmap", SimpleNamespace(mmap=failing(OSError("no map")))), "no map"),
    "no file": (0, lambda: mock.patch.object(tempfile, "mkstemp", failing(OSError(2, "no /dev/shm"))), "/dev/shm"),
    "off": (1, lambda: mock.patch.dict(os.environ, MOBA_CP_COPY_ENGINES="0"), "MOBA_CP_COPY_ENGINES=0"),
}


def set_up_fails(layer, rank):
    """By failure: whether a new group does without copy engines, whether its o is the same bits, and rank 0's lines."""
    inputs, lines, results = layer.inputs(0), [], {}
    log = logging.getLogger(peers.__name__)
    log.addFilter(lambda record: lines.append(record.getMessage()))
    expected = layer.step(inputs, "a2a", dist.group.WORLD)
    for name, (where, patch, _) in FAILURES.items():
        lines.clear()
        group = dist.new_group()
        with patch() if rank == where else mock.MagicMock():
            got = layer.step(inputs, "a2a", group)
        results[name] = group not in peers._met or peers._met[group] is None, torch.equal(got[0], expected[0]), [*lines]
    return results


def group_is_let_go(layer):
    """Whether nothing knows a group that used copy engines and was destroyed; watches before, meanwhile, after."""
    def watches():
        return [thread.name for thread in threading.enumerate()].count("moba context parallel watch")

    group, before = dist.new_group(), watches()
    layer.step(layer.inputs(0), "a2a", group)
    torch.cuda.synchronize()
    dist.barrier()
    known, meanwhile = weakref.ref(group), watches()
    dist.destroy_process_group(group)
    del group
    gc.collect()
    time.sleep(2.5)
    return known() is None, before, meanwhile, watches()


def lengths_differ(layers, rank):
    """What this rank raised where lengths differ, without a check and with it; words of others' tensors overwritten.

    layers: of a long and of a short sequence; rank 0 gets the long one where they differ.
    """
    long, short = layers
    mine, texts = layers[rank], []
    expected = long.step(long.inputs(0), "a2a", dist.group.WORLD)
    memory = peer_memory(torch.device("cuda", rank))
    canaries = [memory.empty((1 << 18,), torch.int32).fill_(7) for _ in range(32)]  # what else lives in the pool
    aside = torch.cuda.Stream()

    def overwritten():
        with torch.cuda.stream(aside):
            return sum(int((x != 7).sum()) for x in canaries)

    torch.cuda.synchronize()
    overwritten()  # loads what it launches, which would wait for the device below
    dist.barrier()

    def call(layer, comm_type):
        with CollectiveCheck(dist.group.WORLD) as collective:
            collective.signature = f"{layer.rows} rows"
        layer.attend(*layer.inputs(0)[:3], comm_type, dist.group.WORLD)

    def attempt(function, *arguments):
        try:
            function(*arguments)
        except ValueError as error:
            texts.append(str(error))

    attempt(mine.step, mine.inputs(0), "a2a", dist.group.WORLD)
    again = long.step(long.inputs(0), "a2a", dist.group.WORLD)
    texts.append(all(torch.equal(a, b) for a, b in zip(again, expected)))
    for layer in (long, short, long, short):
        call(layer, "all_gather")
    torch.cuda.synchronize()
    dist.barrier()
    attempt(call, mine, "all_gather")  # long is foretold: rank 1 waits and raises, rank 0 while it waits for rank 1
    return texts, overwritten()  # rank 0's own stream has begun to gather what rank 1 never sends


def drills(rank, size, folder):
    layers = [Layer("gqa", rank, size, tokens) for tokens in (TOKENS, TOKENS // 2)]
    results = set_up_fails(layers[0], rank), group_is_let_go(layers[0]), lengths_differ(layers, rank)
    torch.save(results, Path(folder) / f"result{rank}.pt")
    time.sleep(2)  # the other rank may be about to raise; what it began never ends
    os._exit(0)


@pytest.fixture(scope="module")
def drilled(compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drills")
    return run_ranks(drills, 2, folder, str(folder), backend="nccl", seconds=120)


@pytest.mark.parametrize("name", FAILURES)
def test_set_up_fails_on_all_ranks_alike(drilled, name):
    for rank, (failures, *_) in enumerate(drilled):
        without, same, lines = failures[name]
        assert without and same
        assert len(lines) == (rank == 0) and all(FAILURES[name][2] in line for line in lines), lines


def test_groups_are_let_go(drilled):
    for _, group, _ in drilled:
        assert group == (True, 1, 2, 1), "forgotten; the watch of all ranks' group is left"


def test_lengths_that_differ_raise_everywhere(drilled):
    """In that call on both ranks, and nothing is written that is not a receiver's."""
    assert [overwritten for *_, (_, overwritten) in drilled] == [0, 0]
    (unchecked, same, checked), others = (texts for *_, (texts, _) in drilled)
    assert [unchecked, same, checked] == others and same is True
    assert "must exchange the same rows, got rank 0: fwd exchange in: 4096 rows a rank" in unchecked
    assert "rank 0: 4096 rows" in checked and "rank 1: 2048 rows" in checked
