"""Copies of rows within a GPU by a few blocks, which leave the rest of it to kernels that run at the same time.

The driver's own copies within a GPU are kernels as well, and take all of it. Beside the attention kernels 128 MiB cost
those 88 us by the driver, 35 us by 32 blocks (H200; alone 1.5 and 1.0 TB/s).
"""
import contextlib
import os
from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCKS = 32
_BLOCK, _WARPS = 4096, 8
_UNIT = 8  # bytes of an element here
_MOST = 1 << 31
_compiled: dict[tuple, Callable] = {}


def copyable(rows: int, width: int, *places: int) -> bool:
    """Whether :func:`copy_rows` can: a row's bytes, the steps between rows and the addresses are multiples of 16."""
    return not any(x % 16 for x in (width, *places)) and rows * width < _UNIT * (_MOST - BLOCKS * _BLOCK)


def copy_rows(source: int, target: int, rows: int, width: int, source_pitch: int, target_pitch: int,
              stream: torch.cuda.Stream) -> None:
    """Copies ``rows`` of ``width`` bytes, ``pitch`` bytes apart, between two addresses of the stream's GPU."""
    if rows == 1:  # as rows of 4 KiB, if that divides it, so that few kernels are compiled
        part = min(width & -width, 4096)
        rows, width, source_pitch, target_pitch = width // part, part, part, part
    constants = (width // _UNIT, source_pitch // _UNIT, target_pitch // _UNIT, _BLOCK, BLOCKS)
    key = (stream.device, *constants)
    start = _compiled.get(key)
    if start is not None and os.environ.get("MOBA_PREPARED_LAUNCHES") != "0":
        here = stream.device_index == torch.cuda.current_device()
        with contextlib.nullcontext() if here else torch.cuda.device(stream.device):
            start(source, target, rows, *constants, stream=stream.cuda_stream)
        return
    with torch.cuda.stream(stream):
        compiled = _copy_rows_kernel[(BLOCKS,)](source, target, rows, *constants, num_warps=_WARPS)
    if hasattr(compiled, "__getitem__"):  # not interpreted
        _compiled[key] = compiled[BLOCKS, 1, 1]


@triton.jit(do_not_specialize=["source", "target", "rows"])
def _copy_rows_kernel(source, target, rows, WIDTH: tl.constexpr, SOURCE_PITCH: tl.constexpr,
                      TARGET_PITCH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    source = tl.multiple_of(source.to(tl.int64).to(tl.pointer_type(tl.int64)), 16)
    target = tl.multiple_of(target.to(tl.int64).to(tl.pointer_type(tl.int64)), 16)
    for first in range(tl.program_id(0) * BLOCK, rows * WIDTH, BLOCKS * BLOCK):
        i = first + tl.arange(0, BLOCK)
        row, column = (i // WIDTH).to(tl.int64), i % WIDTH
        x = tl.load(source + row * SOURCE_PITCH + column, mask=i < rows * WIDTH)
        tl.store(target + row * TARGET_PITCH + column, x, mask=i < rows * WIDTH)
