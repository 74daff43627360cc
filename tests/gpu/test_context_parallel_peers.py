"""Exchanges in symmetric memory on GPUs: against one rank and the library, repeated, recomputed; drills.

With one GPU two ranks share it, over gloo: everything but speed, the library's exchanges and CUDA's late messages. Two
processes walk over all cases and say which one they are at (``pytest -s``); no case may take longer than a minute, no
exchange longer than 15 seconds.
"""
import faulthandler
import gc
import logging
import os
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed._symmetric_memory import _SymmetricMemory
from torch.utils.checkpoint import checkpoint

from benchmarks.cp_compile import Job, compile_schedules
from moba_megatron.context_parallel import CollectiveCheck, Sequences, context_parallel_attention
from moba_megatron.context_parallel.all_gather import transport_for
from moba_megatron.context_parallel.transport import symmetric_memory
from moba_megatron.kernels import launcher
from moba_megatron.ops import moba_attention, pipeline
from moba_megatron.segments import Segments
from tests.context_parallel.test_context_parallel import zigzag_rows

CARDS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CARDS, reason="needs a GPU")]

TOKENS, TOPK, D = 4096, 3, 128
# (heads, kv heads, sequences, head groups, chunk size): up to 128 the kernel of dk and dv writes parts of dq too
SHAPES = {"mha": (8, 8, 1, 2, 128), "batch": (8, 8, 2, 3, 128), "long_chunks": (16, 4, 1, 2, 512),
          "one_kv_head": (8, 1, 1, None, 128)}
TYPES = ("all_gather", "a2a", "selective", "a2a+all_gather")


def compile_everything():
    jobs = [Job(comm_type, size, TOKENS, chunk_size, TOPK, heads, kv_heads, D, head_groups=size > 1 and groups or 1,
                deterministic=size > 1)
            for heads, kv_heads, _, groups, chunk_size in SHAPES.values()
            for comm_type, size in (("all_gather", 2), ("a2a", 2), ("a2a", 1))]
    major, minor = torch.cuda.get_device_capability()
    compile_schedules(jobs, 10 * major + minor, min(12, os.cpu_count()))


def on_two_ranks(function, folder, *args, seconds=150):
    one_card = {"MOBA_CP_COPY_ENGINES": "1", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    with mock.patch.dict(os.environ, one_card if CARDS == 1 else {}):
        return run_ranks(_on_its_device, 2, folder, function, *args, seconds=seconds,
                         backend="nccl" if CARDS > 1 else "gloo")


def _on_its_device(rank, size, function, *args):
    torch.cuda.set_device(rank % CARDS)
    peers = symmetric_memory.Peers
    with mock.patch.object(symmetric_memory, "Peers", lambda *arguments: peers(*arguments[:2], min(arguments[2], 15))):
        return function(rank, size, *args)


def begin(case):
    """Says what this process does now, and ends it, with the lines that it is at, after a minute."""
    print(f"[{time.strftime('%X')}] rank {dist.get_rank()}: {case}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)


def group_without_copy_engines():
    """A new group of all ranks that exchanges through the library: what the variable says at first decides."""
    group = dist.new_group()
    symmetric_memory.met[group] = None
    return group


class Layer:
    """A shape of attention on this rank."""

    def __init__(self, name, rank, size, tokens=TOKENS):
        self.heads, self.kv_heads, batch, self.head_groups, self.chunk_size = SHAPES[name]
        self.lengths = [tokens // batch] * batch
        self.sequences = Sequences.uniform(tokens // batch, batch, torch.device("cuda", torch.cuda.current_device()))
        self.rows, self.mine = tokens // size, zigzag_rows(self.lengths, size, rank).cuda()

    def inputs(self, seed):
        """q, k, v and the gradient of o."""
        generator = torch.Generator("cuda").manual_seed(seed)
        return [torch.randn(2 * self.rows, h, D, device="cuda", generator=generator).bfloat16()[self.mine]
                for h in (self.heads, self.kv_heads, self.kv_heads, self.heads)]

    def attend(self, q, k, v, comm_type, group):
        levels = [group, alone()] if comm_type == "a2a+all_gather" else group
        return context_parallel_attention(q, k, v, self.sequences, self.chunk_size, TOPK, levels,
                                          comm_type=comm_type, head_groups=self.head_groups, deterministic=True)

    def step(self, inputs, comm_type, group, recompute=False):
        """o, dq, dk, dv."""
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        arguments = (*leaves, comm_type, group)
        o = checkpoint(self.attend, *arguments, use_reentrant=False) if recompute else self.attend(*arguments)
        return [o.detach(), *torch.autograd.grad(o, leaves, inputs[3])]

    def on_one_rank(self, seed):
        """What :meth:`step` yields, by the operator for one rank."""
        generator = torch.Generator("cuda").manual_seed(seed)
        leaves = [torch.randn(2 * self.rows, h, D, device="cuda", generator=generator).bfloat16().requires_grad_()
                  for h in (self.heads, self.kv_heads, self.kv_heads, self.heads)]
        cu = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0)], dtype=torch.int32, device="cuda")
        o = moba_attention(*leaves[:3], Segments.from_cu_seqlens(cu, self.lengths[0], self.chunk_size), TOPK)
        return [x[self.mine] for x in (o.detach(), *torch.autograd.grad(o, leaves[:3], leaves[3]))]


_alone = []


def alone():
    """A group of this rank only."""
    if not _alone:
        _alone.extend([dist.new_group([r]) for r in range(dist.get_world_size())])
    return _alone[dist.get_rank()]


def parity(rank, size):
    """By shape and communication type: relative errors against one rank; with two GPUs whether bits are the library's.

    Also how many exchanges there were.
    """
    results, library = {}, group_without_copy_engines()
    for name in SHAPES:
        begin(f"one rank, {name}")
        layer = Layer(name, rank, size)
        inputs, expected = layer.inputs(0), layer.on_one_rank(0)
        for comm_type in TYPES:
            begin(f"{comm_type}, {name}")
            got = layer.step(inputs, comm_type, dist.group.WORLD)
            errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(got, expected)]
            same = CARDS == 1 or all(map(torch.equal, got, layer.step(inputs, comm_type, library)))
            results[name, comm_type] = errors, same
    return results, symmetric_memory.met[dist.group.WORLD].exchanges


def repeated(rank, size):
    """Rounds of fresh inputs in two groups, one rank late at random, some recomputed or on two streams: what was wrong.

    Also the chunk sizes for which a2a's backward was prepared in the end, with dk and dv leaving before dq.
    """
    groups, wrong, chance = [dist.group.WORLD, dist.new_group()], {}, torch.Generator().manual_seed(rank)
    library = group_without_copy_engines() if CARDS > 1 else dist.new_group()
    layers = [Layer(name, rank, size) for name in ("mha", "batch", "long_chunks")]
    rounds, side = 60 if CARDS > 1 else 24, torch.cuda.Stream()
    for i in range(rounds):
        if not i % 12:
            begin(f"fresh inputs, round {i} of {rounds}")
        layer, comm_type = layers[i % 3], TYPES[i // 3 % 2]
        inputs = layer.inputs(i)
        expected = layer.step(inputs, comm_type, library)
        torch.cuda.synchronize()
        if rank == i // 4 % size:
            time.sleep(0.02 * torch.rand(1, generator=chance).item())
        # nothing waits between the two: the second is under way while the first one's tensors are let go of
        results = [layer.step(inputs, comm_type, groups[j], recompute=i % 4 == 0) for j in (i % 2, 1 - i % 2)]
        if i % 4 == 1:  # two streams, which do not wait for each other, through the same arenas
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                results.append(layer.step(inputs, comm_type, groups[0]))
            results.append(layer.step(inputs, comm_type, groups[0]))
            torch.cuda.current_stream().wait_stream(side)
        if rank == i % size:
            torch.cuda._sleep(10_000_000)  # some milliseconds of the stream's time
        for got in results:
            for what, a, b in zip(("o", "dq", "dk", "dv"), got, expected):
                wrong[what] = wrong.get(what, 0) + (not torch.equal(a, b))
    prepared = [key[key.index(Segments):] for key, plan in launcher._plans.items()
                if plan.is_prepared and key[1] is pipeline._backward and plan.event_at < len(plan.launches)]
    # of Segments and what follows: the third number is the chunk size; all_gather adds up in fp32
    return wrong, {[x for x in key if type(x) is int][2] for key in prepared if torch.bfloat16 in key}


def failing(error):
    return mock.Mock(side_effect=error)


def refusing(call):
    """CUDA, but for one call."""
    run = symmetric_memory._call

    def refuse(function, *args):
        if function.__name__ == call:
            raise RuntimeError(f"{call} failed with error 801")
        run(function, *args)

    return mock.patch.object(symmetric_memory, "_call", refuse)


# (the rank on which it fails, a patch, what the line must say)
FAILURES = {
    "signals": (1, lambda: refusing("cuStreamWriteValue32"), "cuStreamWriteValue32 failed"),
    "copies": (0, lambda: refusing("cudaMemcpy2DAsync"), "cudaMemcpy2DAsync failed"),
    "no memory": (1, lambda: mock.patch.object(_SymmetricMemory, "empty_strided_p2p", failing(MemoryError("full"))),
                  "full"),
    "boot_id": (1, lambda: mock.patch.object(symmetric_memory, "Path", failing(PermissionError(13, "denied"))),
                "denied"),
    "off": (1, lambda: mock.patch.dict(os.environ, MOBA_CP_COPY_ENGINES="0"), "MOBA_CP_COPY_ENGINES=0"),
}


def set_up_fails(layer, rank):
    """By failure: whether a new group does without copy engines, whether its o is the same bits, and rank 0's lines."""
    inputs, lines, results = layer.inputs(0), [], {}
    log = logging.getLogger(symmetric_memory.__name__)
    log.addFilter(lambda record: lines.append(record.getMessage()))
    expected = layer.step(inputs, "a2a", dist.group.WORLD)
    device = torch.device("cuda", torch.cuda.current_device())
    for name, (where, patch, _) in FAILURES.items():
        lines.clear()
        group = dist.new_group()
        with patch() if rank == where else mock.MagicMock():
            symmetric_memory.met[group] = symmetric_memory.meet(group, device, 1 << 20)
        same = CARDS == 1 or torch.equal(layer.step(inputs, "a2a", group)[0], expected[0])
        results[name] = symmetric_memory.met[group] is None, same, [*lines]
    return results


def group_is_let_go(layer, rank):
    """Whether nothing knows a group that was used and destroyed, nor its peers; GPU memory that is free more then.

    The last is None beside other workers, whose tests take and free memory of the same GPU.
    """
    group = dist.new_group()
    layer.step(layer.inputs(0), "a2a", group)
    torch.cuda.synchronize()
    dist.barrier()
    known, its_peers = weakref.ref(group), weakref.ref(symmetric_memory.met[group])
    arena, free = its_peers().arena.nbytes, torch.cuda.mem_get_info()[0]
    dist.barrier()
    dist.destroy_process_group(group)
    del group
    time.sleep(1)  # the watch forgets exchanges that are done
    gc.collect()
    dist.barrier()
    torch.cuda.synchronize()
    freed = (torch.cuda.mem_get_info()[0] - free) / arena
    return known() is None, its_peers() is None, None if "PYTEST_XDIST_WORKER" in os.environ else freed


def call(layer, inputs, comm_type):
    """A step as hosts make it."""
    with CollectiveCheck(dist.group.WORLD) as collective:
        collective.signature = f"{layer.rows} rows"
    return layer.step(inputs, comm_type, dist.group.WORLD)


def raised(function, *arguments, error=ValueError):
    try:
        function(*arguments)
    except error as caught:
        return str(caught)


def first_raised(function, *arguments):
    """In a list, what one of two calls raised first."""
    for _ in range(2):
        if text := raised(function, *arguments):
            return [text]
        time.sleep(1)
    return []


def one_fails(layer, rank):
    """Rank 1 fails in the middle of a call; what each rank raised, and whether calls are right again."""
    inputs = layer.inputs(0)
    expected, texts = call(layer, inputs, "a2a"), []
    attend, calls = pipeline.Pipeline.forward, []

    def fail(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no good")
        return attend(*args)

    for comm_type, name in (("a2a", "choose"), ("all_gather", "attend"))[:1 if CARDS > 1 else 2]:  # as below
        attend, calls = getattr(pipeline.Pipeline, name), []
        with mock.patch.object(pipeline.Pipeline, name, fail) if rank == 1 else mock.MagicMock():
            first = raised(call, layer, inputs, comm_type, error=RuntimeError)
        assert first == ("no good" if rank == 1 else None)
        texts.append(first_raised(call, layer, inputs, comm_type))
        torch.cuda.synchronize()
        dist.barrier()
        got = [call(layer, inputs, "a2a") for _ in range(2)]
        texts[-1].append(all(torch.equal(a, b) for x in got for a, b in zip(x, expected)))
    return texts


def lengths_differ(layers, rank):
    """What this rank raised where lengths differ, and whether calls are right again.

    layers: of a long and of a short sequence; rank 0 gets the long one where they differ.
    """
    long, short = layers
    inputs = [x.inputs(0) for x in layers]
    expected = call(long, inputs[0], "all_gather")
    for i in (1, 0, 1):
        call(layers[i], inputs[i], "all_gather")
    torch.cuda.synchronize()
    dist.barrier()
    # long is foretold: rank 1 raises in this call, rank 0, whose streams wait for nobody then, by its next
    texts = first_raised(call, layers[rank], inputs[rank], "all_gather")
    if CARDS == 1:  # NCCL's collectives that rank 0 began never end
        texts.append(all(map(torch.equal, call(long, inputs[0], "all_gather"), expected)))
    return texts


def walk(rank, size, folder):
    """All cases: results are stored at once, since what a rank began in the last of them may never end."""
    results = {"parity": parity(rank, size), "repeated": repeated(rank, size)}
    layers = [Layer("mha", rank, size, tokens) for tokens in (TOKENS, TOKENS // 2)]
    for case in (set_up_fails, group_is_let_go, one_fails):
        begin(case.__name__)
        results[case.__name__] = case(layers[0], rank)
    begin("lengths_differ")
    results["lengths_differ"] = lengths_differ(layers, rank)
    torch.save(results, Path(folder) / f"result{rank}.pt")
    time.sleep(2)  # the other rank may be about to raise
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    compile_everything()
    folder = tmp_path_factory.mktemp("ranks")
    return on_two_ranks(walk, folder, str(folder), seconds=240)


@pytest.mark.parametrize("comm_type", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_one_rank_and_the_library(results, name, comm_type):
    for result in results:
        by_case, number = result["parity"]
        errors, same = by_case[name, comm_type]
        assert max(errors) <= 5e-3 and same, errors
        assert number >= 4 * len(by_case), "the exchanges went another way"  # in and out, there and back


def test_fresh_inputs_again_and_again(results):
    for result in results:
        wrong, prepared = result["repeated"]
        assert wrong == {"o": 0, "dq": 0, "dk": 0, "dv": 0}
        assert prepared == {128, 512}


@pytest.mark.parametrize("name", FAILURES)
def test_set_up_fails_on_all_ranks_alike(results, name):
    for rank, result in enumerate(results):
        without, same, lines = result["set_up_fails"][name]
        assert without and same
        assert len(lines) == (rank == 0) and all(FAILURES[name][2] in line for line in lines), lines


def test_groups_are_let_go(results):
    for result in results:
        group, peers, freed = result["group_is_let_go"]
        assert group and peers and (freed is None or freed > 0.9), "forgotten, and its memory free"


def test_a_rank_that_fails_in_the_middle_of_a_call(results):
    """All raise the same by their next call but one, and then all is well again."""
    first, second = (result["one_fails"] for result in results)
    assert first == second
    for *texts, right in first:
        assert texts == ["context parallel rank 1: attention failed before, in the middle of a call: RuntimeError: no "
                         "good"] and right is True


def test_lengths_that_differ_raise_everywhere(results):
    (text, *right), other = (result["lengths_differ"] for result in results)
    assert [text, *right] == other and right == [True] * (CARDS == 1)
    assert f"rank 0: {TOKENS // 2} rows" in text and f"rank 1: {TOKENS // 4} rows" in text


def one_hangs(rank, size):
    """Exchanges of a group with a timeout of four seconds, in the third of which rank 1 does not take part."""
    begin("one_hangs")
    group, device = dist.new_group(timeout=timedelta(seconds=4)), torch.device("cuda", torch.cuda.current_device())
    rows, x = Sequences.uniform(64, 1, device).rows(size, rank), torch.ones(1, 32, 2, 64, device=device)
    for i in range(3):
        if i == 2 and rank == 1:
            time.sleep(40)
        transport = transport_for(rows, group, x, [[2 * x.nbytes]])
        transport.fetch([x], "fwd gather", (0, i)).wait()
        torch.cuda.synchronize()


def test_a_rank_that_hangs_is_reported(tmp_path, capfd):
    """The process of the one that waits for it ends, and not after minutes."""
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[1\] did not finish"):
        on_two_ranks(one_hangs, tmp_path, seconds=60)
    assert time.monotonic() - start < 40
    assert "context parallel exchange 'fwd gather', number 3 was not done in time" in capfd.readouterr().err
