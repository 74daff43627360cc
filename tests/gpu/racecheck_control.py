"""A Gluon kernel without a race, for compute-sanitizer's racecheck: what it reports of it, it cannot tell.

One group of warps copies lines through two buffers (``cp.async`` that arrives at ``full``), two add them up and give
them back (``empty``): the kernels of sm90.py, less their products. Run by launch/sanitize.sh on Hopper.
"""
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from moba_megatron.kernels.jit_helpers_sm90 import async_load

LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
SIZE = gl.constexpr(128)


@gluon.jit
def _load(source, lines, full, empty, steps):
    at = gl.arange(0, SIZE, layout=LINE)
    for step in range(steps):
        mbarrier.wait(empty.index(step % 2), ((step // 2) & 1) ^ 1)
        async_load(lines.index(step % 2), source + step * SIZE + at)
        async_copy.mbarrier_arrive(full.index(step % 2), increment_count=False)


@gluon.jit
def _add(result, lines, full, empty, steps):
    at = gl.arange(0, SIZE, layout=LINE)
    total = gl.zeros([SIZE], gl.float32, layout=LINE)
    for step in range(steps):
        mbarrier.wait(full.index(step % 2), (step // 2) & 1)
        total += lines.index(step % 2).load(LINE)
        mbarrier.arrive(empty.index(step % 2), count=1)
    gl.store(result + at, total)


@gluon.jit
def _control_sm90_kernel(source, result, steps, num_warps: gl.constexpr):
    lines = gl.allocate_shared_memory(gl.float32, [2, SIZE], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(empty.index(i), count=2)
    source += gl.program_id(0) * steps * SIZE
    result += gl.program_id(0) * 2 * SIZE
    gl.warp_specialize([
        (_add, (result, lines, full, empty, steps)),
        (_add, (result + SIZE, lines, full, empty, steps)),
        (_load, (source, lines, full, empty, steps)),
    ], [4, 4], [232, 40])


if __name__ == "__main__":
    source = torch.randint(-9, 9, (264, 20, SIZE.value), device="cuda").float()
    result = torch.empty(264, 2, SIZE.value, device="cuda")
    _control_sm90_kernel[(264,)](source, result, source.shape[1], num_warps=4)
    assert torch.equal(result, source.sum(1, keepdim=True).expand_as(result))
