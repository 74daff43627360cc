"""The PTX that takes places for the choices of 32 lanes, run on a CPU, against counting one after the other."""
import re

import numpy as np
import pytest
import triton
from ptx import execute

from benchmarks import compile_report
from moba_megatron.kernels import tuning
from moba_megatron.kernels.routing import SHARE, TAKE, _route_place_kernel


@pytest.mark.parametrize("num_chunks", [1, 2, 7, 31, 4096])
@pytest.mark.parametrize("seed", range(4))
def test_places_are_those_of_a_count(num_chunks, seed):
    generator = np.random.default_rng(seed)
    counters = generator.integers(0, 100, num_chunks + 1).astype(np.int32)
    expected = counters.copy()
    for _ in range(5):
        chunks = generator.integers(-1, num_chunks, 32).astype(np.int32)
        registers = {"$3": np.where(chunks < 0, num_chunks, chunks), "$4": chunks, "memory": counters,
                     "%lanemask_lt": (1 << np.arange(32, dtype=np.uint64)).astype(np.uint32) - 1}
        registers |= {f"${i}": np.full(32, -77, np.int32) for i in range(3)}
        execute(TAKE.value, registers)
        start, rank, first = (registers[f"${i}"].view(np.int32) for i in range(3))
        shared = {"$0": start, "$1": start, "$2": first}
        execute("{ " + SHARE.value + " }", shared)
        places = shared["$0"].view(np.int32) + rank
        for lane in np.flatnonzero(chunks >= 0):
            assert places[lane] == expected[chunks[lane]]
            expected[chunks[lane]] += 1
        np.testing.assert_array_equal(counters, expected)


def test_additions_to_a_counter_are_in_order():
    """What one warp's threads do before ``bar.warp.sync`` is before what any of them does after it."""
    steps = [step.split()[0] for step in TAKE.value.replace("@p ", "").strip("{ }").split(";") if step.strip()]
    assert steps.index("bar.warp.sync") < steps.index("atom.global.add.u32") == len(steps) - 1


def test_a_block_that_is_not_whole_vectors_is_refused():
    _route_place_kernel.device_caches.clear()
    with (tuning.forced(configs={"route": {"BLOCK": 48}}), pytest.raises(triton.CompilationError),
          compile_report.compiling(90, only=lambda kernel: "route_place" in kernel)):
        compile_report.run_stages(compile_report.Problem(64, 128, 4, 2, 2))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("heads, kv_heads, topk", [(1, 1, 2), (4, 1, 9), (16, 2, 33), (6, 2, 4)])
def test_lane_i_has_choice_i(heads, kv_heads, topk, capability):
    """A vector of 32 is one element a lane, in order, however well its loads would coalesce; whatever a tuning file
    says, a program is one warp."""
    problem = compile_report.Problem(64, 128, topk, heads, kv_heads)
    _route_place_kernel.device_caches.clear()  # other tests put stand-ins there
    with (tuning.forced(configs={"route": {"BLOCK": 256, "num_warps": 4}}),
          compile_report.compiling(capability, only=lambda kernel: "route_place" in kernel) as compiled):
        compile_report.run_stages(problem)
    assert compiled
    for _, kernel in compiled:
        text = kernel.asm["ttgir"]
        assert '"=&r,=&r,=&r,l,r"' in text and "pure = true" not in text  # results are written before operands are read
        used = set(re.findall(r"tensor<32x(?:!tt\.ptr<)?\w+>?, (#\w+)>", text))
        layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(sizePerThread = [^}]*)\}>", text, re.M))
        assert used and {layouts[name] for name in used} == {
            "sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [1], order = [0]"}
