"""Context parallel attention on NCCL and the Triton kernels: 2 and 4 GPUs against one, every communication type."""
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from benchmarks.cp_compile import Job, compile_schedules
from moba_megatron import kernels
from moba_megatron.context_parallel import (
    CollectiveCheck,
    Sequences,
    context_parallel_attention,
    record_waits,
    selective,
)
from moba_megatron.ops import moba_attention, select_for_segments
from moba_megatron.segments import Segments
from tests.context_parallel.test_context_parallel import (
    RecordedGate,
    cu_seqlens_of,
    selecting_rows_and_heads,
    zigzag_rows,
)
from tests.context_parallel.test_context_parallel_disagreement import CountedWaits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

# (lengths, uniform, chunk size, topk, heads, kv heads, D, head groups, dtype[, shared]); lengths are multiples of 8
CASES = {
    "mha": ([8192], True, 128, 4, 16, 16, 128, 2, torch.bfloat16),
    "packed_mha": ([8 * 150, 8, 8 * 500], False, 128, 4, 16, 16, 128, 2, torch.bfloat16),
    "gqa": ([8192], True, 512, 3, 32, 8, 128, 2, torch.bfloat16),
    "packed_gqa": ([8 * 300, 8, 8 * 500], False, 512, 3, 32, 8, 128, 2, torch.bfloat16),
    "one_kv_head_cut_chunks": ([8 * 751], True, 200, 4, 8, 1, 64, None, torch.float16),
    "batch_fp32": ([8 * 167] * 2, True, 96, 3, 8, 4, 64, None, torch.float32),
    "dense": ([4096], True, 4096, 1, 8, 8, 128, 2, torch.bfloat16),
    "groups": ([8192], True, 128, 4, 32, 8, 128, 2, torch.bfloat16, "group"),
    "packed_groups": ([8 * 300, 8, 8 * 500], False, 128, 4, 16, 4, 64, 2, torch.float32, "group"),
}


# ranks that exchange heads: where there are two GPUs, one level or the other is a rank alone
LEVELS = {2: {"a2a+all_gather": 2, "a2a+all_gather, inner 1": 1}, 4: {"a2a+all_gather": 2}}


def compile_everything(size):
    """Fills Triton's cache in parallel: the ranks would compile the same kernels one after the other."""
    jobs = []
    for lengths, uniform, chunk_size, topk, heads, kv_heads, d, head_groups, dtype, *_ in CASES.values():
        job = Job("a2a", 1, 8 * max(lengths), chunk_size, topk, heads, kv_heads, d, dtype, head_groups=1)
        jobs += [job, *(replace(job, comm_type=comm_type.split(",")[0], size=size, packed=not uniform,
                                head_groups=head_groups, inner=inner)
                        for comm_type, inner in (("all_gather", 2), ("a2a", 2), *LEVELS[size].items()))]
    major, minor = torch.cuda.get_device_capability()
    print(f"compiled in {compile_schedules(jobs, 10 * major + minor, min(12, os.cpu_count())):.0f} s")


def parity(rank, size):
    groups = {comm_type: dist.group.WORLD for comm_type in ("all_gather", "a2a", "selective")}
    selective.GATHER_SHARE = 2  # rows are picked out although nearly all are chosen
    for comm_type, inner in LEVELS[size].items():
        insides = [dist.new_group(list(range(i, i + inner))) for i in range(0, size, inner)]
        across = [dist.new_group(list(range(i, size, inner))) for i in range(inner)]
        groups[comm_type] = [insides[rank // inner], across[rank % inner]]
    results = {(name, comm_type): compare(comm_type, group, size, rank, *case)
               for name, case in CASES.items() for comm_type, group in groups.items() if takes(comm_type, case)}
    packed = {comm_type: packed_steps(rank, size, comm_type, dist.group.WORLD) for comm_type in ("all_gather", "a2a")}
    return results, bad_input(rank), sorted(groups), packed


def takes(comm_type, case):
    """``selective`` refuses packed sequences and choices shared by a group."""
    return comm_type != "selective" or (case[1] and "group" not in case)


def compare(comm_type, group, size, rank, lengths, uniform, chunk_size, topk, heads, kv_heads, d, head_groups, dtype,
            shared="head"):
    """Whether means and selection are the same, whether two runs are, and relative errors of o, dq, dk, dv."""
    comm_type = comm_type.split(",")[0]
    generator = torch.Generator(device="cuda").manual_seed(5)
    total = sum(lengths)
    q, k, v, do = (torch.randn(total, h, d, device="cuda", generator=generator).to(dtype)
                   for h in (heads, kv_heads, kv_heads, heads))
    cu_seqlens = cu_seqlens_of(lengths).cuda()
    segments = Segments.from_cu_seqlens(cu_seqlens, max(lengths), chunk_size)
    rows = zigzag_rows(lengths, size, rank).cuda()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = moba_attention(*leaves, segments, topk, shared=shared)
    expected = [x[rows] for x in (o, *torch.autograd.grad(o, leaves, do))]
    sequences = Sequences.packed(cu_seqlens, max(lengths), total)
    if uniform:
        sequences = Sequences.uniform(lengths[0], len(lengths), torch.device("cuda", rank))
    runs = []
    for _ in range(2):
        local = [x[rows].requires_grad_() for x in (q, k, v)]
        with RecordedGate(kernels) as recorded:
            got = context_parallel_attention(*local, sequences, chunk_size, topk, group, comm_type=comm_type,
                                             head_groups=head_groups, shared=shared,
                                             deterministic=dtype != torch.bfloat16)
        runs.append([got.detach(), *torch.autograd.grad(got, local, do[rows])])
    same = True
    if topk > 1:
        means = kernels.chunk_means(k, segments)
        lists = heads if shared == "head" else kv_heads
        queries = q if shared == "head" else kernels.group_queries(q, kv_heads)
        selected = kernels.gate(queries, means, segments, topk)
        chosen_rows, chosen_heads = selecting_rows_and_heads(lengths, comm_type, group, lists)
        same = torch.equal(torch.cat(recorded.selected, 1).sort(2)[0],
                           selected[chosen_rows.cuda()][:, chosen_heads].sort(2)[0])
        kv_part = sorted({h * kv_heads // lists for h in range(lists)[chosen_heads]})
        got_means = torch.cat(recorded.means, 1)  # without the row of no chunk, where means travel
        same = same and torch.equal(got_means, means[:got_means.shape[0], kv_part])
    if topk > 1:  # the same choices, given: what a selector or a replay does
        given = select_for_segments(q, k, segments, topk, shared=shared)[rows]
        with RecordedGate(kernels) as recorded:
            got = context_parallel_attention(*local, sequences, chunk_size, topk, group, comm_type=comm_type,
                                             head_groups=head_groups, deterministic=dtype != torch.bfloat16,
                                             selected=given)
        grads = torch.autograd.grad(got, local, do[rows]) if dtype != torch.bfloat16 else ()
        same = same and not recorded.selected and all(map(torch.equal, (got, *grads), runs[1]))
    reproducible = dtype == torch.bfloat16 or all(torch.equal(a, b) for a, b in zip(*runs))
    return same, reproducible, [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(runs[1], expected)]


def packed_steps(rank, size, comm_type, group):
    """Steps of three layers over packed sequences, from the second on with no wait of the host; then lengths differ.

    Returns how often the host waited in each step, and the text of the error that this rank's next call raised.
    """
    total, device = 8 * 1024, torch.device("cuda", rank)
    q, k, v = (torch.randn(total // size, h, 128, device=device).bfloat16().requires_grad_() for h in (16, 16, 16))

    def call(cu_seqlens):
        with CollectiveCheck(group) as collective:
            collective.signature = f"packed, {comm_type}"
            collective.compare_lengths(cu_seqlens, total, total)
        sequences = Sequences.packed(cu_seqlens, total, total)
        o = context_parallel_attention(q, k, v, sequences, 128, 4, group, comm_type=comm_type, head_groups=2)
        torch.autograd.grad(o, (q, k, v), torch.ones_like(o))

    waits, texts = [], []
    packings = [cu_seqlens_of(x).cuda() for x in ([total // 2] * 2, [8 * 300, 8 * 724], [8 * 24, 8 * 500, 8 * 500])]
    torch.cuda.synchronize()
    for step, cu_seqlens in enumerate(packings):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            with CountedWaits() as counted:
                for _ in range(3):
                    call(cu_seqlens)
            waits.append(counted.number)
        except RuntimeError as error:  # the host waited; the same on every rank
            waits.append(str(error))
        torch.cuda.set_sync_debug_mode("default")
    for call_number in range(2):
        try:
            call(packings[min(rank, 1) if call_number == 0 else 0])  # other lengths of one size: no collective differs
        except ValueError as error:
            texts.append(str(error))
        torch.cuda.synchronize()
        time.sleep(0.5)
    return waits, texts


def bad_input(rank):
    """After two agreed calls rank 1 alone changes: it raises at once, rank 0 at its next call."""
    for _ in range(2):
        with CollectiveCheck(dist.group.WORLD) as collective:
            collective.signature = "agreed"
    texts = []
    for call in range(2):
        try:
            with CollectiveCheck(dist.group.WORLD) as collective:
                collective.signature = "changed" if rank == 1 else "agreed"
        except ValueError as error:
            texts.append(str(error))
            break
        time.sleep(1)
    return texts


def captured(rank, size):
    """Forward and backward replayed from a CUDA graph against the same computed eagerly: equal or not, by type."""
    results = {}
    sequences = Sequences.uniform(4096, 1, torch.device("cuda", rank))
    local = [torch.randn(4096 // size, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def step(comm_type):
        leaves = [x.detach().requires_grad_() for x in local]  # on the capturing stream, as autograd wants it
        o = context_parallel_attention(*leaves, sequences, 128, 4, dist.group.WORLD, comm_type=comm_type, head_groups=2,
                                       deterministic=True)
        return [o, *torch.autograd.grad(o.float().square().sum(), leaves)]

    for comm_type in ("all_gather", "a2a"):
        with record_waits() as record:
            expected = step(comm_type)
        torch.cuda.synchronize()
        assert all(entry["exposed_ms"] >= 0 for entry in record.summary().values())
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(comm_type)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            got = step(comm_type)
        graph.replay()
        torch.cuda.synchronize()
        results[comm_type] = all(torch.equal(a, b) for a, b in zip(expected, got))
        del got, graph
    return results


@pytest.fixture(scope="module", params=[2, 4])
def results(tmp_path_factory, request):
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    compile_everything(request.param)
    return run_ranks(parity, request.param, tmp_path_factory.mktemp("ranks"), backend="nccl")


@pytest.mark.parametrize("comm_type", ["all_gather", "a2a", *LEVELS[2], "selective"])
@pytest.mark.parametrize("name", CASES)
def test_equals_one_gpu(results, name, comm_type):
    if comm_type not in results[0][2]:
        pytest.skip("of two GPUs")
    if not takes(comm_type, CASES[name]):
        pytest.skip("refused")
    # 16-bit results are rounded once more, or differently
    bound = 1e-5 if CASES[name][-1] == torch.float32 else 5e-3
    for result, *_ in results:
        same, reproducible, errors = result[name, comm_type]
        assert same, "a rank has other means, or selected other chunks"
        assert reproducible, "two runs in deterministic mode differ"
        assert max(errors) <= bound, errors


def test_bad_input_raises_everywhere(results):
    texts = [texts for _, texts, *_ in results]
    assert all(t == texts[0] for t in texts) and re.search("rank 0: agreed.*; rank 1: changed", texts[0][0])


@pytest.mark.parametrize("comm_type", ["all_gather", "a2a"])
def test_packed_layers_do_not_wait(results, comm_type):
    """After the first step, whatever is packed; where lengths differ all ranks' next calls raise."""
    for *_, packed in results:
        waits, texts = packed[comm_type]
        assert waits == [1, 0, 0]
        assert len(texts) == 1 and texts == results[0][-1][comm_type][1], texts
        assert re.search(r"rank 0: packed, .* 2 sequences, .*; rank 1: packed, .* 2 sequences", texts[0])


def lengths_differ(rank, size, folder):
    """By NCCL: after two agreed lengths rank 1 alone gets the other one. Collectives that never end are left behind."""
    os.environ["MOBA_CP_COPY_ENGINES"] = "0"
    device, group = torch.device("cuda", rank), dist.group.WORLD

    def attend(n):
        x = [torch.randn(n // size, h, 128, device=device).bfloat16() for h in (16, 16, 16)]
        with CollectiveCheck(group) as collective:
            collective.signature = f"length {n}"
        return context_parallel_attention(*x, Sequences.uniform(n, 1, device), 128, 4, group, head_groups=2)

    for n in (8192, 4096, 8192, 4096):
        attend(n)
    torch.cuda.synchronize()
    dist.barrier()
    raised = None
    for number in range(2):
        try:
            attend(8192 if rank == 0 else 4096)
        except ValueError as error:
            raised = number, str(error)
            break
        time.sleep(1)
    torch.save(raised, Path(folder) / f"result{rank}.pt")
    time.sleep(3)  # the other rank may still be about to raise
    os._exit(0)


def test_lengths_that_differ_raise_everywhere(tmp_path):
    """The rank whose length is not foretold raises in that call, the other one in its next."""
    raised = run_ranks(lengths_differ, 2, tmp_path, str(tmp_path), backend="nccl", seconds=90)
    assert [number for number, _ in raised] == [1, 0] and raised[0][1] == raised[1][1]
    assert re.search("rank 0: length 8192.*; rank 1: length 4096", raised[0][1])


def test_cuda_graph(tmp_path):
    for by_type in run_ranks(captured, 2, tmp_path, backend="nccl", seconds=120):
        assert by_type == {"all_gather": True, "a2a": True}
