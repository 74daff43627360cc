"""KeyConvolution: the key convolution as a Megatron module, its filter sharded with the kv heads, halos exchanged."""
import dataclasses
import re

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from ..ops import key_convolution
from .host import layer_being_built, print_once
from .patching import hook_loading

_KEY = re.compile(r"key_convolution\.layer_(\d+)\.")


class KeyConvolution(MegatronModule):
    """``k'[t] = k[t] + silu(sum_l w[l] * k[t - l])``, each kv head and dimension with a filter of its own. The weight
    begins as zeros, where the module is the identity: a trained model can take it on without a jump. It is one flat
    vector of ``[HK, width, D]``: optimizers that spare one-dimensional parameters from weight decay spare it, and
    tensor parallel ranks hold consecutive parts. ``width``: taps, 3 or 5; ``head_dim``: of the keys, None for
    ``config.kv_channels``; ``tp_group``: tensor parallel group, None for Megatron's ``parallel_state``."""

    def __init__(self, config: TransformerConfig, width: int, head_dim: int | None = None, backend: str = "auto",
                 tp_group: dist.ProcessGroup | None = None):
        super().__init__(config=config)
        self.width, self.backend = width, backend
        self.head_dim = head_dim or config.kv_channels
        self.tp_group = tp_group or parallel_state.get_tensor_model_parallel_group()
        layer = layer_being_built(Attention)  # where kv heads are repeated, a core attention's config has more of them
        config = config if layer is None else layer.config
        heads = config.num_query_groups or config.num_attention_heads
        size = config.tensor_model_parallel_size
        if heads % size:
            raise ValueError(f"--moba-key-conv needs kv heads (--num-query-groups) that are a multiple of the tensor "
                             f"model parallel size, got {heads} and {size}: repeated heads' filters would differ")
        hook_loading()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.zeros(heads // size * width * self.head_dim, dtype=config.params_dtype,
                                                     device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, k: Tensor, cu_seqlens: Tensor, cp_group: dist.ProcessGroup | None = None) -> Tensor:
        """Convolves each sequence's keys ``[T, HK, D]``: this rank's, in zigzag order, of sequences that ``cp_group``
        shares, where ``cu_seqlens``, int32 ``[B + 1]``, are those of the whole ones."""
        weight = self.weight.view(-1, self.width, self.head_dim)
        if cp_group is None:
            return key_convolution(k, weight, cu_seqlens, backend=self.backend)
        lengths = (cu_seqlens.diff() // (2 * cp_group.size())).repeat_interleave(2, output_size=2 * len(cu_seqlens) - 2)
        bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
        return key_convolution(k, weight, bounds, _halo(k, bounds, self.width - 1, cp_group), backend=self.backend)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weight, cut along its only axis by tensor parallel rank, under each layer's own name. Megatron stacks
        what layers have under one name, where it takes them for alike; dense layers have no filter."""
        state = make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0})
        for _, layer, _ in sharded_offsets:
            for tensor in state.values():
                tensor.key = f"{prefix}layer_{layer}.weight"
        return state


def as_saved(sharded_state_dict: dict, checkpoint_dir) -> dict:
    """What to load of a distributed checkpoint, which may be a dense model's: filters then stay as they are."""
    saved = {t.key: t for t in dist_checkpointing.load_tensors_metadata(str(checkpoint_dir)).values()}

    def place(tensor):
        """A filter, or an optimizer's state of one, under the name that the checkpoint has; else for it to stay."""
        if not isinstance(tensor, ShardedTensor) or "key_convolution." not in tensor.key or tensor.key in saved:
            return tensor
        layer, stacked = _KEY.search(tensor.key), _KEY.sub("key_convolution.", tensor.key)
        if layer and stacked in saved:  # of a version that stacked the layers as Megatron does
            layers = saved[stacked].global_shape[0]
            return dataclasses.replace(
                tensor, key=stacked, global_shape=(layers, *tensor.global_shape), prepend_axis_num=1, global_offset=(
                    int(layer[1]), *tensor.global_offset), axis_fragmentations=(layers, *tensor.axis_fragmentations))
        if any("key_convolution." in key for key in saved):
            raise ValueError(f"the checkpoint has key convolutions, but no {tensor.key}: give it the "
                             "--moba-full-attention-layers with which it was saved")
        print_once("> the checkpoint has no key convolution: it begins as the identity")
        return LocalNonpersistentObject(tensor.data)

    return dict_list_map_outplace(place, sharded_state_dict)


def _halo(k: Tensor, bounds: Tensor, width: int, group: dist.ProcessGroup) -> Tensor:
    """The ``width`` keys before each zigzag piece of this rank, ``[pieces, width, HK, D]``; 0 before a sequence.
    Every rank sends the last keys of its pieces. A halo reaches into several pieces where those are shorter."""
    size, rank = group.size(), dist.get_rank(group)
    back = torch.arange(-width, 0, device=k.device)
    rows = bounds[1:, None] + back
    tails = torch.where((rows >= bounds[:-1, None])[..., None, None], k[rows.clamp(min=0)], 0)
    gathered = _GatherTails.apply(tails, group)  # [P * pieces, width, HK, D], rank after rank
    number = torch.arange(len(bounds) - 1, device=k.device)
    piece = torch.where(number % 2 == 0, rank, 2 * size - 1 - rank)[:, None]
    length = bounds.diff()[:, None].clamp(min=1)
    position = piece * length + back  # in the sequence
    piece = position.clamp(min=0) // length
    owner = torch.where(piece < size, piece, 2 * size - 1 - piece)
    tail = owner * len(number) + number[:, None] // 2 * 2 + (piece >= size)
    place = width - length + position % length
    return torch.where((position >= 0)[..., None, None], gathered[tail, place.clamp(min=0)], 0)


class _GatherTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, grad):
        out = torch.empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:], dtype=torch.promote_types(
            grad.dtype, torch.float32), device=grad.device)
        dist.reduce_scatter_tensor(out, grad.to(out.dtype).contiguous(), group=ctx.group)
        return out.to(grad.dtype), None
