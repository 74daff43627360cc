"""MoBACoreAttention: MoBA as Megatron-Core's core attention. The one place where Megatron's layouts become THD.

Works with megatron-core 0.13 and later: process groups arrive as ``pg_collection``, ``model_comm_pgs`` or neither. The
module keeps no state between calls, so recompute may rerun it. Only the key convolution's parameters are saved.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from .. import context_parallel, replay
from ..config import MoBAConfig, get_default_config
from ..ops import moba_attention, sparse_attention
from ..ops.dense import dense_kernels
from ..ops.validation import cast_under_autocast, check_cu_seqlens, check_qkv
from ..segments import Segments, uniform_segments
from . import refusals
from .arguments import config_from_environment
from .host import host_config, host_iteration, layer_being_built, print_once
from .key_convolution import KeyConvolution
from .patching import guard_layers

HIERARCHICAL = "a2a+all_gather"
_iteration: int | None = None
_observer = None


def set_observer(observer):
    """Has layers that attend sparsely call ``observer(module, q, k, segments)`` before; returns the observer before.
    Under context parallelism there are two more arguments: the group, and for each key in global order its gathered
    row. It must not change q ``[T, H, D]`` and k ``[S, HK, D]``, this rank's, nor wait for the device. None ends that.
    """
    global _observer
    before, _observer = _observer, observer
    return before


def set_iteration(iteration: int | None) -> None:
    """Tells every MoBA layer the training iteration (0-based), for ``MoBAConfig.full_attention_from_step``. A training
    loop calls it before each step (and after loading a checkpoint). Without that option it has no effect. Megatron-LM's
    own training loop need not: its ``curr_iteration`` is read, unless another number was set here."""
    global _iteration
    _iteration = iteration


def get_iteration() -> int:
    """The iteration set last, else Megatron-LM's, else 0."""
    return _iteration if _iteration is not None else host_iteration() or 0


@dataclass
class MoBACoreAttentionSubmodules:
    """``selector``: chooses chunks in place of MoBA's gate; None for the gate. A module, built with ``config,
    layer_number, moba_config``, or a function. Called as ``selector(q, k, segments)`` with q ``[T, H, D]`` and
    k ``[S, HK, D]`` after rotary embedding and key convolution, it returns int32 ``[T, H or HK, n]``, ids as of
    :func:`~moba_megatron.sparse_attn_varlen`. Under context parallelism q and k are this rank's, and two more arguments
    those of :func:`.context_parallel.gather_keys`. Its gradients are its own affair."""

    selector: ModuleSpec | type | Callable | None = None


class MoBACoreAttention(MegatronModule):
    """Softmax attention over each query's own chunk and its best earlier chunks, or dense, by layer and iteration.

    Layers and iterations that :class:`~moba_megatron.MoBAConfig` names dense run causal attention through the same
    operator, so they need no Transformer Engine and work under context parallelism.

    Args:
        config: Megatron's; fields that MoBA cannot honour are refused, see Raises.
        layer_number: 1-based, global under pipeline parallelism. Layers of multi-token prediction are numbered behind
            ``config.num_layers``, however Megatron numbers them, and dense where the last layer is.
        attn_mask_type: ``causal``, or ``padding_causal`` for packed sequences.
        attention_type: ``"self"``.
        attention_dropout: None for ``config.attention_dropout``, which must be 0.
        softmax_scale: None for ``1/sqrt(head_dim)``.
        cp_comm_type: ``"all_gather"`` (or ``"allgather"``), ``"a2a"``, ``"a2a+all_gather"`` or ``"selective"``, or a
            list with one for each layer; None for ``config.cp_comm_type``, and where that is None all_gather.
        pg_collection: process groups (0.15 and later); ``tp`` is not used, ``cp`` is the context parallel group and
            ``hcp`` its two levels for ``"a2a+all_gather"`` (``--hierarchical-context-parallel-sizes``).
        model_comm_pgs: the same for 0.13 and 0.14. Without either, Megatron's ``parallel_state``.
        moba_config: None for the default set by :func:`~moba_megatron.config.set_default_config`, else Megatron-LM's
            ``--moba-*`` flags (where it was patched or launched for MoBA), else the ``MOBA_*`` environment variables.
        k_channels: head size of the keys where it is not ``config.kv_channels``, for the key convolution.
        v_channels: not used: head sizes are read off the tensors.
        submodules: of the spec: a selector of one's own.
        **kwargs: others that a Megatron release may pass: None, False or empty.

    Raises:
        TypeError: an argument in kwargs that says something.
        ValueError: an option that MoBA does not support; the message names Megatron's flag.
        RuntimeError: a Megatron whose inference MoBA cannot guard.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
                 attention_dropout: float | None = None, softmax_scale: float | None = None,
                 cp_comm_type: str | list[str] | None = None, pg_collection=None, model_comm_pgs=None,
                 moba_config: MoBAConfig | None = None, k_channels: int | None = None, v_channels: int | None = None,
                 submodules: MoBACoreAttentionSubmodules | None = None, **kwargs):
        super().__init__(config=config)
        refusals.refuse_arguments(kwargs, "")
        refusals.refuse_unsupported(config, attn_mask_type, attention_type, attention_dropout)
        self.layer_number, last = _global_layer_number(config, layer_number), config.num_layers
        self.moba_config = _resolve_config(moba_config).for_layer(min(self.layer_number, last), last)
        self.attn_mask_type, self.softmax_scale = attn_mask_type, softmax_scale
        self.deterministic = self.moba_config.deterministic or config.deterministic_mode
        self.full_attention = self.moba_config.is_full_attention(min(self.layer_number, last), last)
        if not self.full_attention:
            refusals.refuse_switch_in_graphs(config, self.moba_config)
            refusals.refuse_split_groups(config, self.moba_config)
        groups = pg_collection or model_comm_pgs
        self.tp_group = getattr(groups, "tp", None)
        self.cp_group, self.cp_comm_type, self.cp_levels = None, None, None
        if config.context_parallel_size > 1 or getattr(config, "hybrid_context_parallel", False):
            self.cp_comm_type = resolve_cp_comm_type(cp_comm_type, config, layer_number)
            self.cp_group = getattr(groups, "cp", None) or parallel_state.get_context_parallel_group()
            if self.cp_comm_type == HIERARCHICAL:
                levels = getattr(pg_collection, "hcp", None)
                if levels is None:
                    levels = parallel_state.get_hierarchical_context_parallel_groups(check_initialized=False)
                if len(levels or ()) != 2:
                    raise ValueError("--hierarchical-context-parallel-sizes must have two sizes for --cp-comm-type "
                                     f"{HIERARCHICAL} (layer {layer_number}), got {len(levels or ())}: ranks that "
                                     "exchange heads, such as a node's, and how many of those gather keys")
                self.cp_levels = list(levels)
        self.key_convolution = self.selector = None
        if self.moba_config.key_conv and not self.full_attention:
            self.key_convolution = KeyConvolution(config, self.moba_config.key_conv, k_channels,
                                                  self.moba_config.backend, getattr(groups, "tp", None))
        if submodules is not None and submodules.selector is not None and not self.full_attention:
            self.selector = build_module(submodules.selector, config=config, layer_number=self.layer_number,
                                         moba_config=self.moba_config)
        guard_layers()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
                attn_mask_type: AttnMaskType | None = None, attention_bias: Tensor | None = None,
                packed_seq_params: PackedSeqParams | None = None, **kwargs) -> Tensor:
        """Attention for one microbatch.

        With a key/value cache (static inference) there are more keys than queries; the queries are the last ones.
        Of packed sequences with ``cu_seqlens_q_padded`` the padding takes part: it follows the real tokens of its
        sequence, so causality keeps it from changing them.

        Args:
            query: ``[s, b, h, d]``, or packed ``[t, h, d]``; any strides.
            key: ``[s, b, hk, d]`` or ``[t, hk, d]``.
            value: ``[s, b, hk, dv]`` or ``[t, hk, dv]``.
            attention_mask: None, or bool ``[1 or b, 1 or h, s_q, s_k]`` that says "causal" again, True where a query
                must not look; under context parallelism ``[.., s_q, whole sequence]``. Its values are read at once on
                the CPU, on a GPU at a later call, which raises for it. Not read for packed sequences.
            attn_mask_type: overrides the constructor's; ``no_mask`` only for one query (decoding).
            attention_bias: must be None.
            packed_seq_params: THD format. ``cu_seqlens`` cover all tokens, all context parallel ranks; a ``cp_group``
                in it takes the place of the module's.
            **kwargs: others that a Megatron release may pass: None, False or empty.

        Returns:
            ``[s, b, h * dv]``, or packed ``[t, h * dv]``.

        Raises:
            TypeError, ValueError: unsupported arguments, or tensors that do not fit. Under context parallelism a
                ValueError with the same text on every rank of the group.
        """
        group, moba = self._group_for(packed_seq_params), self.moba_config.at_step(get_iteration())
        packed = packed_seq_params if packed_seq_params is not None and packed_seq_params.qkv_format == "thd" else None
        dense = self.full_attention or moba.is_full_step(get_iteration())
        check = functools.partial(self._check_call, attn_mask_type or self.attn_mask_type, attention_bias, packed,
                                  attention_mask, group, kwargs)
        if group is None:
            check(query, key, value)
            q, k, v = map(_to_thd, (query, key, value))
            v = _apart_from_projection(q, k, v)
            if moba.decode == "dense" and packed is None and query.shape[0] == 1 < key.shape[0]:
                replay.refuse_new_tokens(dense=True)
                dense = True
            segments, topk = self._segments(query, key, packed, dense, moba)
            if self.key_convolution is not None:
                k = self.key_convolution(k, segments.cu_seqlens_k)
            if _observer is not None and not dense:
                _observer(self, q, k, segments)
            selected = None
            if not dense and (self.selector is not None or replay.in_use and replay.is_active()):
                selected = self._choose(q, k, segments, moba, self._replayed(q, k, segments, moba))
            options = dict(softmax_scale=self.softmax_scale, deterministic=self.deterministic,
                           backend=moba.backend, workspace_mib=moba.workspace_mib)
            o = (moba_attention(q, k, v, segments, topk, shared=moba.selection, **options) if selected is None else
                 sparse_attention(q, k, v, selected, segments, **options))
        else:
            o = self._context_parallel(query, key, value, packed, dense, group, check, moba)
        if packed is not None:
            return o.flatten(1)
        seqlen, batch = query.shape[:2]
        return o.unflatten(0, (batch, seqlen)).transpose(0, 1).flatten(2)

    @staticmethod
    def _check_call(mask_type, attention_bias, packed, attention_mask, group, kwargs, query, key, value) -> None:
        refusals.raise_what_arrived()
        if kwargs:
            refusals.refuse_arguments(kwargs, ".forward")
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor) or x.dim() != (4 if packed is None else 3):
                expected = "[s, b, h, d]" if packed is None else "[t, h, d] for packed_seq_params with qkv_format 'thd'"
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"{name} must have shape {expected}, got {got}")
        if attention_bias is not None:
            raise ValueError("attention_bias must be None: MoBA selects chunks by unbiased scores and adds no bias")
        decoding = mask_type == AttnMaskType.no_mask and query.shape[0] == 1  # the last position may see everything
        if not decoding and mask_type not in (AttnMaskType.causal, *([AttnMaskType.padding_causal] if packed else [])):
            raise ValueError("attn_mask_type must be causal (or padding_causal with packed_seq_params), got "
                             f"{mask_type}: for padded batches use packed sequences")
        if packed is not None:
            refusals.check_packed(packed, group)
        elif attention_mask is not None:
            refusals.check_attention_mask(attention_mask, query, key, group)

    def _group_for(self, packed_seq_params) -> dist.ProcessGroup | None:
        """The context parallel group of this call (dynamic context parallelism brings its own), None for one rank."""
        size, group = getattr(packed_seq_params, "local_cp_size", None), getattr(packed_seq_params, "cp_group", None)
        if group is None and size not in (None, 1):
            raise ValueError(f"packed_seq_params.cp_group must be given with local_cp_size {size}, got None")
        group = group or (None if size == 1 else self.cp_group)
        return group if group is not None and group.size() > 1 else None

    def _segments(self, query: Tensor, key: Tensor, packed: PackedSeqParams | None, dense: bool,
                  moba: MoBAConfig) -> tuple[Segments, int]:
        """Where the queries stand among the keys, and topk."""
        if packed is None:
            seqlen_q, batch, seqlen_k = query.shape[0], query.shape[1], key.shape[0]
            if seqlen_q > seqlen_k:
                raise ValueError(f"key must have at least query's {seqlen_q} tokens, got {seqlen_k}")
            chunk_size, topk = moba.chunks(dense, seqlen_k)
            return uniform_segments(seqlen_q, seqlen_k, batch, chunk_size, query.device), topk
        cu_seqlens, max_seqlen = _packed_lengths(packed, query.shape[0], query.device)
        chunk_size, topk = moba.chunks(dense, max_seqlen)
        return Segments.from_cu_seqlens(cu_seqlens, max_seqlen, chunk_size), topk

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams | None, dense: bool,
                          group: dist.ProcessGroup, check, moba: MoBAConfig) -> Tensor:
        size, comm_type, levels = group.size(), self.cp_comm_type or "all_gather", group
        if comm_type == HIERARCHICAL:  # a group that came with the batch has no levels
            comm_type, levels = (HIERARCHICAL, self.cp_levels) if group is self.cp_group else ("all_gather", group)
        with context_parallel.CollectiveCheck(group) as collective:
            check(query, key, value)
            q, k, v = cast_under_autocast(*map(_to_thd, (query, key, value)))
            check_qkv(q, k, v)
            v = _apart_from_projection(q, k, v)
            if q.shape[0] != k.shape[0]:
                raise ValueError(f"key must have query's {query.shape[0]} tokens under context parallelism, got "
                                 f"{key.shape[0]}: a key/value cache is not supported with --context-parallel-size > 1")
            context_parallel.check_groups(levels, comm_type, q.shape[1], k.shape[1],
                                          "head" if dense else moba.selection)
            what = "dense" if dense else f"chunk_size {moba.chunk_size}, topk {moba.topk}, selection {moba.selection}"
            collective.signature = (
                f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, {q.dtype}, "
                f"{comm_type}, {what}, cp_head_groups {moba.cp_head_groups}" + ", deterministic" * self.deterministic
                + (f", key_conv {moba.key_conv}" if self.key_convolution is not None else ""))
            if packed is None:
                seqlen = query.shape[0] * size
                context_parallel.check_zigzag(seqlen, size, "the sequence length")
                sequences = context_parallel.Sequences.uniform(seqlen, query.shape[1], q.device)
            else:
                cu_seqlens, seqlen = _packed_lengths(packed, q.shape[0] * size, q.device)
                collective.signature += ", packed"
                if self.key_convolution is not None:  # what it exchanges is as large as there are sequences
                    collective.signature += f" halos of {cu_seqlens.numel() - 1}"
                collective.compare_lengths(cu_seqlens, seqlen, q.shape[0] * size)
                sequences = context_parallel.Sequences.packed(cu_seqlens, seqlen, q.shape[0] * size)
            if dense or seqlen <= moba.topk * moba.chunk_size:
                collective.signature += f", {dense_kernels()}"
            layout = given = None
            chooses = not dense and (self.selector is not None or replay.in_use and replay.is_active())
            if chooses or not dense and _observer is not None:
                layout = sequences.zigzag(size, dist.get_rank(group), moba.chunk_size)
                given = self._replayed(q, k, layout.segments, moba, layout.rows)
                if replay.is_active():
                    collective.signature += ", recorded" if given is None else ", replayed"
        if self.key_convolution is not None:
            k = self.key_convolution(k, sequences.cu_seqlens, group)
        if layout is not None and _observer is not None and seqlen > moba.topk * moba.chunk_size:
            _observer(self, q, k, layout.segments, group, layout.rows.global_rows)
        selected = self._choose(q, k, layout.segments, moba, given, group, layout.rows.global_rows) if chooses else None
        return context_parallel.context_parallel_attention(
            q, k, v, sequences, *moba.chunks(dense, seqlen), levels, comm_type=comm_type, shared=moba.selection,
            head_groups=moba.cp_head_groups, softmax_scale=self.softmax_scale, deterministic=self.deterministic,
            backend=moba.backend, workspace_mib=moba.workspace_mib, selected=selected)

    def _replayed(self, q: Tensor, k: Tensor, segments: Segments, moba: MoBAConfig, rows=None):
        if not replay.is_active():
            return None
        size = self.config.tensor_model_parallel_size
        part = size, dist.get_rank(self.tp_group or parallel_state.get_tensor_model_parallel_group()) if size > 1 else 0
        return replay.replayed(self.layer_number, q, k, segments, moba, part, rows, self.selector is None)

    def _choose(self, q: Tensor, k: Tensor, segments: Segments, moba: MoBAConfig, given, *view) -> Tensor | None:
        """As of :func:`.replay.choose`; ``view``: the group, and global rows."""
        select = None if self.selector is None else functools.partial(self.selector, q, k, segments, *view)
        return replay.choose(self.layer_number, q, lambda: context_parallel.gather_keys(k.detach(), *view) if view
                             else k, segments, moba, given, select)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}_extra_state", None)  # of Transformer Engine's attention, in all its checkpoints
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"layer_number={self.layer_number}, " + ("dense" if self.full_attention else self.moba_config.describe())


class MoBAOrTEDotProductAttention:
    """For Transformer Engine layers: MoBACoreAttention, or Transformer Engine's own attention in layers that are dense.
    Which one is decided by the layer's number, and only that: the switch by iteration is inside MoBACoreAttention."""

    def __new__(cls, config: TransformerConfig, layer_number: int, *args, moba_config: MoBAConfig | None = None,
                **kwargs):
        moba_config, last = _resolve_config(moba_config), config.num_layers
        if not moba_config.is_full_attention(min(_global_layer_number(config, layer_number), last), last):
            return MoBACoreAttention(config, layer_number, *args, moba_config=moba_config, **kwargs)
        kwargs.pop("submodules", None)  # of MoBACoreAttention
        from megatron.core.extensions.transformer_engine import TEDotProductAttention
        return TEDotProductAttention(config, layer_number, *args, **kwargs)


def _global_layer_number(config: TransformerConfig, layer_number: int) -> int:
    """Megatron's number; in a layer of multi-token prediction one behind the model's layers, where Megatron up to 0.15
    gives that of the pipeline stage's first layer, 0.16 those behind the last, and from 0.17 on 1, 2, ... again."""
    prediction = layer_being_built(MultiTokenPredictionLayer)
    return layer_number if prediction is None else config.num_layers + prediction.layer_number


def core_attention_beside(dense) -> type:
    """The class to put in a spec in place of ``dense``, the core attention that Megatron put there."""
    name = getattr(getattr(dense, "module", dense), "__name__", "")
    te = name in ("TEDotProductAttention", MoBAOrTEDotProductAttention.__name__)
    return MoBAOrTEDotProductAttention if te else MoBACoreAttention


def resolve_cp_comm_type(cp_comm_type: str | list[str] | None, config: TransformerConfig, layer_number: int) -> str:
    """How this layer's context parallel ranks communicate: one of ``context_parallel.COMM_TYPES``. A per-layer list is
    read from ``config`` by ``layer_number - 1``: Megatron up to 0.16 passes its neighbour's entry. So is one type where
    Megatron passes none: with a static size of 1, though groups may come with batches."""
    from_config = cp_comm_type is None or isinstance(config.cp_comm_type, (list, tuple))
    listed = cp_comm_type = config.cp_comm_type if from_config else cp_comm_type
    if isinstance(listed, (list, tuple)):
        if len(listed) != 1 and not 1 <= layer_number <= len(listed):
            raise ValueError(f"--cp-comm-type must name one type, or one for each layer, got {len(listed)} for layer "
                             f"{layer_number}")
        cp_comm_type = listed[0 if len(listed) == 1 else layer_number - 1]
    try:
        return context_parallel.canonical_comm_type("all_gather" if cp_comm_type is None else cp_comm_type)
    except ValueError as error:
        raise ValueError(f"--cp-comm-type, layer {layer_number}: {error}: pass --cp-comm-type all_gather, or a2a where "
                         "heads can be dealt out to the ranks") from None


def _resolve_config(moba_config: MoBAConfig | None) -> MoBAConfig:
    if moba_config is None:
        moba_config = get_default_config() or host_config() or _environment_config()
    if not isinstance(moba_config, MoBAConfig):
        raise TypeError(f"moba_config must be a MoBAConfig, got {type(moba_config).__name__}")
    return moba_config


@functools.lru_cache(maxsize=1)
def _environment_config() -> MoBAConfig:
    config = config_from_environment()
    print_once(f"> {config.describe()} (from MOBA_* environment variables and defaults)")
    return config


def _packed_lengths(packed: PackedSeqParams, total: int, device: torch.device) -> tuple[Tensor, int]:
    """cu_seqlens of all tokens as they lie in memory, and a bound of a sequence's length; without a host sync."""
    padded = packed.cu_seqlens_q_padded is not None
    cu_seqlens = packed.cu_seqlens_q_padded if padded else packed.cu_seqlens_q
    max_seqlen = packed.max_seqlen_q
    if isinstance(max_seqlen, Tensor):
        max_seqlen = int(max_seqlen.max()) if max_seqlen.device.type == "cpu" else None
    if padded or max_seqlen is None:  # max_seqlen_q speaks of the lengths without padding
        max_seqlen = total
    return check_cu_seqlens(cu_seqlens, max_seqlen, total, device), max_seqlen


def _to_thd(x: Tensor) -> Tensor:
    """``[s, b, h, d]`` as ``[b * s, h, d]``, sequence after sequence (a view where b is 1); THD as it is."""
    return x if x.dim() == 3 else x[:, 0] if x.shape[1] == 1 else x.transpose(0, 1).flatten(0, 1)


def _apart_from_projection(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """v itself, or a copy where v, kept for backward, would alone keep the output of the fused projection alive: with
    rotary embeddings q and k are new. At 128K tokens, 24 layers, 8:2 heads of 128 that saves 7.5 GiB."""
    storage = v.untyped_storage()
    shared = storage.data_ptr() in (q.untyped_storage().data_ptr(), k.untyped_storage().data_ptr())
    if shared or not (torch.is_grad_enabled() and v.requires_grad) or storage.nbytes() < 2 * v.nbytes:
        return v
    return v.contiguous()
