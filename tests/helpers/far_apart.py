"""Tensors whose elements lie further apart than 32-bit offsets reach, in memory that is reserved and hardly touched."""
import mmap

import torch

HEAD = 2 ** 30 + 64
"""Elements between heads: passed to kernels in 32 bits; head 2 lies beyond them."""
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def far_apart(x, *strides):
    """A view with these strides that holds the values of x; on a GPU its memory is real."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides))
    assert elements >= 2 ** 31 and max(strides) < 2 ** 31
    if x.device.type == "cuda":
        memory = torch.empty(0, dtype=x.dtype, device=x.device)
        memory.untyped_storage().resize_(elements * x.element_size())  # not filled, whatever the settings are
    else:
        pages = mmap.mmap(-1, elements * x.element_size(),
                          flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        memory = torch.frombuffer(pages, dtype=x.dtype)
    view = memory.as_strided(x.shape, strides)
    view.copy_(x)
    return view
