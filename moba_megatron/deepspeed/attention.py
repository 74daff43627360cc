"""Attention for a model of one's own, and the ranks that share its sequences."""
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import replay
from ..config import MoBAConfig
from ..context_parallel import CollectiveCheck, Sequences, check_zigzag, context_parallel_attention
from ..ops import moba_attention
from ..ops.dense import dense_kernels
from ..ops.validation import check_qkv, same_dtype
from ..segments import uniform_segments

METHODS = ("none", "ulysses", "zigzag")


@dataclass(frozen=True)
class SequenceParallel:
    """The ranks that share each sequence. Make it with :meth:`over_ranks`, on all ranks.

    ``ulysses`` is DeepSpeed's: a rank holds one run of positions, and an all-to-all gives it whole sequences for a part
    of the heads. ``zigzag`` is the package's context parallelism: rank r of P holds pieces r and 2P-1-r of 2P with all
    heads, and gathers keys and values, so heads need not divide by the ranks.
    """

    method: str = "none"  # one of METHODS
    size: int = 1  # ranks that share a sequence
    rank: int = 0  # this one's number among them
    group: dist.ProcessGroup | None = None  # theirs; None for a size of 1

    @classmethod
    def over_ranks(cls, method: str, size: int) -> "SequenceParallel":
        """Groups of ``size`` consecutive ranks of the default process group."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        world = dist.get_world_size()
        if size < 1 or world % size:
            raise ValueError(f"size must divide the {world} ranks, got {size}")
        if method == "none" and size > 1:
            raise ValueError(f"method must be ulysses or zigzag for sequences over {size} ranks, got 'none'")
        if size == 1:
            return cls()
        group, _ = dist.new_subgroups(size)
        return cls(method, size, dist.get_rank() % size, group)

    @property
    def data_rank(self) -> int:
        """Which of the groups this rank is in: the number that chooses its samples."""
        return dist.get_rank() // self.size

    @property
    def data_size(self) -> int:
        """Groups: how many samples are read at a time."""
        return dist.get_world_size() // self.size

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of whole sequences, which every rank of the group has: of tokens, labels, masks and position
        ids alike. ValueError where ``dim``, of positions, is not divisible by ``size`` (``2 * size`` for zigzag)."""
        if self.method == "zigzag":
            check_zigzag(x.shape[dim], self.size, "the sequence length")
            pieces = x.chunk(2 * self.size, dim)
            return torch.cat((pieces[self.rank], pieces[-1 - self.rank]), dim)
        if x.shape[dim] % self.size:
            raise ValueError(f"the sequence length must be a multiple of the {self.size} ranks that share it, "
                             f"got {x.shape[dim]}")
        return x.chunk(self.size, dim)[self.rank]


def check_config(config: MoBAConfig, method: str) -> None:
    """Raises ValueError where a field of the config cannot be honoured under this way of sharing sequences."""
    reasons = {"key_conv": "MoBAAttention has no parameters, Megatron-Core's layers have the convolution",
               "decode": "MoBAAttention keeps no cache, Megatron-Core and Transformers generate"}
    if method != "zigzag":
        reasons["cp_head_groups"] = f"only zigzag sends keys in groups, the method is {method}"
    config.refuse("under DeepSpeed", reasons)


class MoBAAttention(nn.Module):
    """Causal MoBA (or dense attention, by layer and iteration) on this rank's part of the sequences.

    Args:
        config: chunk size, topk, dense layers and the rest.
        layer_number: 1-based.
        num_layers: of the model.
        parallel: who shares a sequence; None for whole sequences.
        softmax_scale: None for ``1/sqrt(head_dim)``.

    Raises:
        ValueError: ``layer_number`` is out of range, or the config has a field that cannot be honoured here.
    """

    def __init__(self, config: MoBAConfig, layer_number: int, num_layers: int,
                 parallel: SequenceParallel | None = None, softmax_scale: float | None = None):
        super().__init__()
        self.config = config.for_layer(layer_number, num_layers)
        self.parallel = parallel or SequenceParallel()
        check_config(config, self.parallel.method)
        self.softmax_scale = softmax_scale
        self.full_attention = config.is_full_attention(layer_number, num_layers)
        self.iteration, self.ulysses = 0, None
        if self.parallel.method == "ulysses":
            from deepspeed.sequence.layer import DistributedAttention
            self.ulysses = DistributedAttention(self._whole_sequences, self.parallel.group, scatter_idx=2, gather_idx=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention after rotary embedding: ``[b, s, h, dv]`` for the s positions of this rank.

        Args:
            q, k, v: ``[b, s, h, d]``, ``[b, s, hk, d]``, ``[b, s, hk, dv]``, h a multiple of hk.

        Raises:
            ValueError: shapes that do not fit each other, heads or lengths that the method cannot split.
        """
        q, k, v = same_dtype(q, k, v)
        if replay.is_active():
            raise ValueError("record_selection and replay_selection are not for MoBAAttention, under DeepSpeed: "
                             "Megatron-Core and Transformers have them")
        if self.parallel.method == "zigzag":
            return self._zigzag(q, k, v)
        if self.ulysses is None:
            return self._whole_sequences(q, k, v)
        size, heads, kv_heads = self.parallel.size, q.shape[2], k.shape[2]
        if heads % size or kv_heads % size and size % kv_heads:
            raise ValueError(f"Ulysses over {size} ranks needs query heads that are a multiple of them and key/value "
                             f"heads that are a multiple or a divisor, got {heads} and {kv_heads}: use zigzag")
        if kv_heads < size and self.config.selection == "group" and not self._is_dense():
            raise ValueError(f"MoBAConfig.selection must be 'head' for Ulysses over {size} ranks with {kv_heads} "
                             "key/value heads, got 'group': no rank has a whole group's queries. Use zigzag")
        if kv_heads < size:
            k, v = (x.repeat_interleave(size // kv_heads, dim=2) for x in (k, v))
        return self.ulysses(q, k, v, 0)

    def _is_dense(self) -> bool:
        return self.full_attention or self.config.is_full_step(self.iteration)

    def _whole_sequences(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length = q.shape[:2]
        chunk_size, topk = self.config.at_step(self.iteration).chunks(self._is_dense(), length)
        segments = uniform_segments(length, length, batch, chunk_size, q.device)  # of one length: cuDNN may take them
        o = moba_attention(*_packed(q, k, v), segments, topk, softmax_scale=self.softmax_scale,
                           backend=self.config.backend, deterministic=self.config.deterministic,
                           workspace_mib=self.config.workspace_mib, shared=self.config.selection)
        return o.unflatten(0, (batch, length))

    def _zigzag(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parallel, config = self.parallel, self.config
        batch, length = q.shape[0], q.shape[1] * parallel.size
        chunk_size, topk = config.at_step(self.iteration).chunks(self._is_dense(), length)
        with CollectiveCheck(parallel.group) as collective:  # a rank with bad input ends all of them, with one message
            packed = _packed(q, k, v)
            check_qkv(*packed)
            check_zigzag(length, parallel.size, "the sequence length")
            collective.signature = (f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {q.dtype}, "
                                   f"chunk_size {chunk_size}, topk {topk}, selection {config.selection}, "
                                   f"cp_head_groups {config.cp_head_groups}" + ", deterministic" * config.deterministic
                                   + (f", {dense_kernels()}" if length <= topk * chunk_size else ""))
        o = context_parallel_attention(
            *packed, Sequences.uniform(length, batch, q.device), chunk_size, topk, parallel.group,
            head_groups=config.cp_head_groups, softmax_scale=self.softmax_scale, deterministic=config.deterministic,
            backend=config.backend, workspace_mib=config.workspace_mib, shared=config.selection)
        return o.unflatten(0, q.shape[:2])

    def extra_repr(self) -> str:
        what = "dense" if self.full_attention else self.config.describe()
        return f"{what}, sequence parallel: {self.parallel.method} over {self.parallel.size}"


def _packed(*qkv: Tensor) -> list[Tensor]:
    """``[b, s, ...]`` as ``[b * s, ...]``; ValueError where k or v has other b or s than q."""
    for name, x in zip("qkv", qkv):
        if x.shape[:2] != qkv[0].shape[:2]:
            raise ValueError(f"{name} must have q's batch and sequence {tuple(qkv[0].shape[:2])}, got "
                             f"{tuple(x.shape[:2])}")
    return [x.flatten(0, 1) for x in qkv]


def set_iteration(model: nn.Module, iteration: int) -> None:
    """Tells every MoBAAttention of a model the iteration (0-based), before each step."""
    for module in model.modules():
        if isinstance(module, MoBAAttention):
            module.iteration = iteration
