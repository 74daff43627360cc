"""Kernels for Hopper, written in Gluon: when an operator's call can use them, and what their launchers share.

They hold HEAD_DIMS in 16 bits, on sm_90 alone. The tuning table chooses them, by the key ``gluon``; everything else
runs the Triton kernels. Rows that are no power of two wide lie in two parts that are (:func:`widths`).
"""
import functools
import importlib
import logging
import math
from types import ModuleType

import torch
import triton

from .host import INTERPRETED, next_power_of_2
from .launcher import Buffer, Descriptor

logger = logging.getLogger("moba_megatron")

HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
"""D and DV that the kernels take, where the tuning table has rows for them."""
ROWS = 128
"""Gathered rows of a step: 64 for each of the two groups of warps that multiply."""
PROGRAMS = 1056
"""Lists are cut into pieces until there are so many, eight for each processor of an H200."""


def takes(*tensors: Buffer | torch.Tensor) -> bool:
    """Whether the kernels can take q, k, v (and do): same 16-bit dtype, of HEAD_DIMS, rows aligned."""
    q = tensors[0]
    return (q.dtype.itemsize == 2 and (q.shape[2], tensors[-1].shape[2]) in HEAD_DIMS
            and all(x.dtype == q.dtype and x.data_ptr() % 16 == 0
                    and all(s % 8 == 0 for s in _strides(x)) for x in tensors)
            and not INTERPRETED and torch.cuda.get_device_capability(q.device) == (9, 0) and _importable())


def _strides(x: Buffer) -> tuple[int, int]:
    """Elements between the tokens and between the heads of ``[tokens, heads, dim]``; 0 where there is only one head."""
    return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


def strides_of_eight(**tensors: Buffer) -> dict[str, int]:
    """Strides as the kernels take them: in units of 16 bytes, which tells the compiler that rows are aligned.

    And EVEN: whether the rows of q and do, all heads of a token and the next token's, lie one behind the other.
    """
    rows = [x for name, x in tensors.items() if name in ("q", "do")]
    return {"EVEN": all(tuple(x.stride()) == (x.shape[1] * x.shape[2], x.shape[2], 1) for x in rows),
            **{f"stride_{name}{dim}": s // 8 for name, x in tensors.items() for dim, s in zip("th", _strides(x))}}


def rows_per_program(options: dict[str, int], rows: int, shared: int) -> int:
    """How long a piece of a list is: SPLIT, or less where ``rows`` listed rows would not occupy the card; whole steps,
    and whole groups of ``shared`` heads."""
    step = math.lcm(ROWS, shared)
    return max(step, min(options["SPLIT"], rows // PROGRAMS) // step * step)


def processors(device: torch.device) -> int:
    """How many programs that take one piece of work after the other there are."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def key_tiles(k: Buffer, v: Buffer, chunk_size: int, options: dict[str, int]) -> dict[str, object]:
    """The options, and k and v for a kernel that streams the keys of whole chunks: through descriptors if possible.

    A tile has BLOCK_N keys, or the whole of a smaller chunk, or 64 where that alone divides the chunk.
    """
    block_n = min(options["BLOCK_N"], max(16, next_power_of_2(chunk_size)))
    if chunk_size % options["BLOCK_N"] and chunk_size % 64 == 0:
        block_n = 64
    ragged = chunk_size % block_n != 0
    use_tma = chunk_size >= block_n and describable(k) and describable(v)
    sources = {}
    for name, x in (("k", k), ("v", v)):
        parts = [described(x, block_n, width) for width in widths(x.shape[2])] if use_tma else [x]
        sources |= {name: parts[0], f"{name}_rest": parts[1] if len(parts) > 1 else None}
    return {**options, **sources, "BLOCK_N": block_n, "USE_TMA": use_tma, "RAGGED": ragged}


@triton.constexpr_function
def widths(dim: int) -> tuple[int, ...]:
    """Columns of the tiles that rows of a head are kept in: the largest power of two within D, and the rest."""
    first = 1 << dim.bit_length() - 1
    return (first, dim - first) if first < dim else (first,)


def describable(x: Buffer) -> bool:
    """Whether :func:`described` can: the heads of a token side by side, at coordinates of 32 bits."""
    row, head = _strides(x)
    width = (x.shape[1] - 1) * head + x.shape[2]
    return 0 < width < 2 ** 31 and (width <= row or x.shape[0] == 1) and x.shape[0] > 0


def described(x: Buffer, block: int, width: int) -> Descriptor:
    """A descriptor of ``[tokens, heads * dim]`` with tiles of ``block`` rows and ``width`` columns of one head."""
    from triton.experimental.gluon import language
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    total, heads, dim = x.shape
    row, head = _strides(x)
    element = {torch.bfloat16: language.bfloat16, torch.float16: language.float16}[x.dtype]
    layout = language.NVMMASharedLayout.get_default_for([block, width], element)
    return Descriptor(TensorDescriptor, x, ([total, (heads - 1) * head + dim], [row, 1], [block, width], layout))


def kernel_module(name: str) -> ModuleType:
    """``<name>_sm90``; where :func:`takes` said so."""
    return importlib.import_module(f".{name}_sm90", __package__)


@functools.lru_cache(maxsize=None)
def _importable() -> bool:
    """Whether this Triton is one that the kernels are written for; says so once where it is not."""
    problem = unusable()
    if problem:
        logger.warning("moba_megatron: portable Triton kernels in place of those for Hopper: %s", problem)
    return not problem


def unusable() -> str | None:
    """Why this Triton cannot have the kernels, None where it can."""
    if not triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")):
        return f"they are written for Triton 3.6 to 3.9, this is {triton.__version__}"
    try:
        for name in ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv", "attention_diagonal", "gating"):
            kernel_module(name)
    except (ImportError, AttributeError) as error:  # Gluon is experimental: names come and go
        return f"{type(error).__name__}: {error}"
    return None
