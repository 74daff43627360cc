"""One call of an attention stage: its tensors, what follows from their sizes, and the arguments that kernels share."""
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..segments import Routing, Segments
from . import sm90, tuning
from .host import INTERPRETED, head_block, next_power_of_2
from .launcher import Buffer, Descriptor
from .routing import Tiles

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionCall:
    """What every kernel of a stage reads; q, k, v and do are contiguous in their last dimension."""

    q: Buffer  # `[T, H, D]`
    k: Buffer  # `[S, HK, D]`
    v: Buffer  # `[S, HK, DV]`
    selected: Buffer  # int32 `[T, H or HK, topk - 1]`, contiguous
    segments: Segments  # places the queries among the keys
    softmax_scale: float  # multiplies the scores
    precision: str  # of products in fp32
    do: Buffer | None = None  # in backward the gradient of o
    terms: Buffer | None = None  # in backward fp32 `[T * H + 1, 4]`

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def heads_per_kv(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def rows_per_kv_head(self) -> int:
        return self.q.shape[0] * self.heads_per_kv

    @property
    def shared(self) -> int:
        """Query heads that share a choice."""
        return self.q.shape[1] // self.selected.shape[1]

    @property
    def choices(self) -> int:
        return self.selected.shape[2]

    @functools.cached_property
    def num_chunks(self) -> int:
        return self.segments.num_chunks(self.k.shape[0])

    @functools.cached_property
    def gluon(self) -> bool:
        return sm90.takes(self.q, self.k, self.v, *([] if self.do is None else [self.do]))

    @functools.cached_property
    def gluon_diagonal(self) -> bool:
        """Whether the Gluon kernels can take diagonal chunks too, of which they copy all by descriptor."""
        tensors = self.q, self.k, self.v, self.do or self.q
        return self.gluon and self.choices > 0 and all(map(sm90.describable, tensors))

    def config(self, stage: str, **key: int) -> dict[str, int]:
        return tuning.config(stage, self.q.device, head_dim=max(self.q.shape[2], self.v.shape[2]),
                             chunk_size=self.segments.chunk_size, itemsize=self.q.dtype.itemsize, **key)

    def arguments(self, kernel, **own) -> dict[str, object]:
        """A launch's arguments by name: the kernel's own, and of those that a call has in common the ones it takes."""
        common = self._common
        return {**{name: common[name] for name in kernel.arg_names if name in common}, **own}

    @functools.cached_property
    def _common(self) -> dict[str, object]:
        q, k, v, s = self.q, self.k, self.v, self.segments
        strides = {"q": q, "k": k, "v": v, "do": q if self.do is None else self.do}
        return {
            "q": q, "k": k, "v": v, "do": self.do, "terms": self.terms, "selected": self.selected,
            "cu_seqlens_q": s.cu_seqlens_q, "cu_seqlens_k": s.cu_seqlens_k, "seq_ids": s.seq_ids, "offsets": s.offsets,
            "qk_scale": self.softmax_scale * math.log2(math.e), "softmax_scale": self.softmax_scale,
            "num_rows": q.shape[0] * q.shape[1], "num_segments": s.num_segments, "num_sequences": s.num_sequences,
            "num_chunks": self.num_chunks, "chunk_size": s.chunk_size,
            **{f"stride_{name}{dim}": x.stride(i) for name, x in strides.items() for i, dim in enumerate("th")},
            "H": q.shape[1], "HK": k.shape[1], "G": self.heads_per_kv, "KS": self.choices, "SHARED": self.shared,
            "BLOCK_KS": next_power_of_2(max(1, self.choices)), "D": q.shape[2], "DV": v.shape[2],
            "BLOCK_D": head_block(q.shape[2]), "BLOCK_DV": head_block(v.shape[2]), "PRECISION": self.precision}

    def over_lists(self, routing: Routing, tiles: Tiles, group: tuple[int, int]) -> tuple[tuple[int], dict]:
        """The grid over the lists of a group of kv heads, cut into tiles, and where programs find theirs."""
        kv_heads = group[1] - group[0]
        bound = self.rows_per_kv_head * kv_heads * self.choices // tiles.block + self.num_chunks * kv_heads + 1
        return (bound,), {"indices": routing.indices, "tile_csr_row": tiles.csr_row, "tile_begin": tiles.begin,
                          "tile_end": tiles.end, "tile_indptr": tiles.indptr, "kv_head_begin": group[0],
                          "kv_head_end": group[1]}

    def over_queries(self, block_m: int, group: tuple[int, int]) -> tuple[tuple[int], dict]:
        """The grid over tiles of queries and the query heads of a group of kv heads, and what programs know of it."""
        num_tiles = self.q.shape[0] // block_m + self.segments.num_segments
        heads = (group[1] - group[0]) * self.heads_per_kv
        return (num_tiles * heads,), {"num_tiles": num_tiles, "first_head": group[0] * self.heads_per_kv,
                                      "group_heads": heads}

    def key_tiles(self, block_n: int) -> dict[str, object]:
        """k and v for a kernel that streams the keys of whole chunks: through descriptors where these are faster."""
        use_tma = (self.segments.chunk_size % block_n == 0 and tma_available(self.q.device)
                   and all(map(_describable, (self.k, self.v))))
        k, v = (_described(x, block_n) if use_tma else x for x in (self.k, self.v))
        return {"k": k, "v": v, "USE_TMA": use_tma}

    def partial_tiles(self, partial: Buffer | None, dim: int, block_m: int, group: tuple[int, int]
                      ) -> tuple[Buffer | Descriptor | None, bool]:
        """The partial results of a group for a kernel that reads them in order, and whether through a descriptor."""
        if partial is None or dim % 8 or partial.dtype.itemsize != 2 or not tma_available(partial.device):
            return partial, False
        heads, width = (group[1] - group[0]) * self.heads_per_kv, self.choices * dim
        return Descriptor(TensorDescriptor, partial, ([self.q.shape[0], heads, width], [heads * width, width, 1],
                                                      [block_m, 1, head_block(dim)])), True


def check(q: Tensor, v: Tensor, selected: Tensor, segments: Segments) -> None:
    """Raises where the kernels cannot take it."""
    if q.dtype == torch.float64:
        raise TypeError("q must be bfloat16, float16 or float32 for the Triton kernels, got float64: "
                        "use backend='torch'")
    if max(q.shape[2], v.shape[2]) > MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM} for the Triton kernels, got {q.shape[2]} for q and "
                         f"k, {v.shape[2]} for v: use backend='torch'")
    rows = max(q.shape[0] * q.shape[1], (v.shape[0] + segments.num_sequences) * v.shape[1])
    if rows >= 2 ** 31:  # numbers of rows (token, head) and of CSR rows (kv head, chunk) are 32 bits wide
        raise ValueError(f"tokens times heads must be below 2^31 for the Triton kernels, got {rows}: use fewer tokens")
    if segments.chunk_size < 16 and selected.shape[2]:
        raise ValueError(f"chunk_size must be at least 16 for the Triton kernels, got {segments.chunk_size}: "
                         "use backend='torch'")


def tma_available(device: torch.device) -> bool:
    """Whether tensor descriptors are faster than pointers here: from Hopper on."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def _describable(x: Buffer) -> bool:
    """Whether the hardware takes a descriptor of it; the stride of a single head does not matter."""
    strides = x.stride()[:2] if x.shape[1] > 1 else x.stride()[:1]
    return (x.dtype.itemsize == 2 and x.data_ptr() % 16 == 0 and x.stride(0) > 0 and x.shape[0] > 0
            and all(s * x.dtype.itemsize % 16 == 0 for s in strides))


def _described(x: Buffer, block_n: int) -> Descriptor:
    """A descriptor of ``[HK, S, D]`` whose tiles are padded with zeros beyond D."""
    total, heads, dim = x.shape
    stride_head = x.stride(1) if heads > 1 else total * x.stride(0)
    return Descriptor(TensorDescriptor, x, ([heads, total, dim], [stride_head, x.stride(0), 1],
                                            [1, block_n, head_block(dim)]))
