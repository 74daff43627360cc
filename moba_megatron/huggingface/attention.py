"""MoBA in Transformers: ``register_moba(MoBAConfig(...))``, then ``attn_implementation="moba"``.

What the models hand over (``mask.py`` reads masks) becomes query segments over packed keys: right and left
padding, packed rows, prefill over a cache, static caches. A new token attends densely, or sparsely with
``decode="moba"`` (``cache.py`` keeps the means of chunks beside the cache). What MoBA cannot do is refused.
"""
import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import TransformersKwargs

from .. import replay
from ..config import CHOICES, MoBAConfig, parse_per_layer
from ..ops import moba_attention, sparse_attention
from ..ops.validation import same_dtype
from .cache import fill_after_prompt, follow_caches, is_in_prompt, note_prompts, sparse_decode
from .mask import attended_slots, is_layout, moba_mask, packed_bounds, row_segments

BACKENDS = {"moba": None, "efficient_moba": None, "triton_moba": None,
            "moba_reference": "reference", "naive_moba": "reference", "moba_naive": "reference"}
"""The names that are registered, and the backend of each; None for the config's."""

_settings: dict[str, MoBAConfig] = {}
_by_layer: dict[str, dict[int, MoBAConfig]] = {}  # layers that per_layer names
_selectors: dict[str, Callable | None] = {}
"""By name. The registered functions look here at each call, so that whoever holds one has the latest settings."""


def register_moba(config: MoBAConfig | None = None, *, decode: str | None = None, name: str | None = None,
                  selector: Callable | None = None) -> None:
    """Makes MoBA known to Transformers, for models that are built or switched (``set_attn_implementation``) to it.

    Names: ``moba`` (also ``efficient_moba``, ``triton_moba``) with the config's backend, ``moba_reference`` (also
    ``naive_moba``, ``moba_naive``) with the reference. Registering a name again replaces its settings for all models
    that attend by it, with a warning; models with their own settings have their own names. Each process must register.

    Args:
        config: chunk size, topk, dense layers (``full_attention_layers``), backend; None for ``MoBAConfig()``.
        decode: how a single new token attends to a cache: ``dense``, or ``moba``: it chooses chunks too. A prompt, and
            several tokens at once over a cache, always attend by MoBA; in ``generate()`` a prompt's last token does so
            where it comes alone, elsewhere that is a new token. None for the config's, ``dense`` unless set.
        name: register this name alone, such as ``moba_512``; None for those above.
        selector: None for MoBA's gate, or what chooses chunks: called as ``selector(module, q, k, segments)``, with the
            attention layer, q ``[T, H, D]`` and k ``[S, HK, D]`` after rotary embedding, at every step all keys of a
            cache, it returns int32 ``[T, H or HK, n]``, ids as of :func:`~moba_megatron.sparse_attn_varlen`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value; the message names it.
    """
    config = MoBAConfig() if config is None else config
    if not isinstance(config, MoBAConfig):
        raise TypeError(f"config must be a MoBAConfig, got {type(config).__name__}")
    if selector is not None and not callable(selector):
        raise TypeError(f"selector must be a function or None, got {type(selector).__name__}")
    if decode not in (None, *CHOICES["decode"]):
        raise ValueError(f"decode must be one of dense, moba; got {decode!r}")
    if decode and config.decode and decode != config.decode:
        raise ValueError(f"decode must be MoBAConfig.decode where both are given, got {decode!r} and {config.decode!r}")
    config.refuse("for Transformers", {
        "full_attention_from_step": "its models do not know the training step, train in two runs instead",
        "topk_schedule": "its models do not know the training step, register other settings between steps",
        "cp_head_groups": "its models know no context parallelism",
        "key_conv": "its models have no place for the convolution's parameters"})
    if not isinstance(name, (str, type(None))):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    names = BACKENDS if name is None else (name,)
    # Transformers reads meanings into names: of kernels to download, of its own attentions
    if name not in (None, *_settings, *BACKENDS) and (
            name in AttentionInterface() or not re.fullmatch(r"\w+", name)
            or re.search("eager|sdpa|flash|flex|paged", name)):
        raise ValueError("name must be of letters, digits and _, and none of Transformers' attentions (nor contain "
                         f"eager, sdpa, flash, flex or paged), got {name!r}")
    config = replace(config, decode=decode or config.decode or "dense")
    follow_caches() if config.decode == "moba" else note_prompts()
    settings = {name: replace(config, backend=BACKENDS.get(name) or config.backend) for name in names}
    replaced = [name for name in names if name in _settings and (
        (_settings[name], _selectors[name]) != (settings[name], selector))]
    if replaced:
        warnings.warn(f"register_moba: all models with attn_implementation={replaced[0]!r} now attend by "
                      f"{settings[replaced[0]].describe()}: to keep the settings they had, give one of the two a name "
                      "of its own, register_moba(..., name=\"moba_2\")", stacklevel=2)
    _settings.update(settings)
    layers = parse_per_layer(config.per_layer) if config.per_layer else {}
    _by_layer.update((name, {n: settings[name].for_layer(n, max(layers)) for n in layers}) for name in names)
    _selectors.update(dict.fromkeys(names, selector))
    for name in names:
        _make_known(name)


def _make_known(name: str) -> None:
    AttentionInterface.register(name, functools.partial(moba_attention_forward, name=name))
    AttentionMaskInterface.register(name, moba_mask)


def moba_attention_forward(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
                           attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None, *,
                           name: str, **kwargs) -> tuple[Tensor, None]:
    """What an attention layer of Transformers calls, after RoPE and after its cache has taken the new keys.

    Args:
        query: ``[B, H, Q, D]``; key: ``[B, HK, S, D]``; value: ``[B, HK, S, DV]``, all of the cache with a cache.
        attention_mask: what :func:`moba_mask` made.
        name: whose settings :func:`register_moba` was given.
        kwargs: ``cu_seq_lens_q``, ``max_length_q`` (and ``_k``) or ``position_ids`` place packed sequences.

    Returns:
        o ``[B, Q, H, DV]``, and None for the weights.

    Raises:
        RuntimeError: the name has no settings here. ValueError: an argument that is not supported; its name is said.
    """
    if name not in _settings:
        raise RuntimeError(f"attn_implementation={name!r} has no settings in this process: call "
                           "moba_megatron.register_moba(MoBAConfig(...)) before the model runs, in each process")
    layer, last = module.layer_idx + 1, module.config.num_hidden_layers
    config = _by_layer[name].get(layer, _settings[name])
    if max(_by_layer[name], default=0) > last:
        _settings[name].for_layer(layer, last)  # says so
    refuse(module, attention_mask, dropout, kwargs)
    query, key, value = same_dtype(query, key, value)
    packed = packed_bounds(kwargs, query, key, attention_mask, config.chunk_size)
    dense = config.is_full_attention(layer, last)
    by_gate = dense or _selectors[name] is None
    if config.selection == "group" and by_gate and not dense:
        refuse_split_groups(module, query.shape[1], key.shape[1])
    if query.shape[2] == 1 and key.shape[2] > 1 and config.decode == "moba" and not dense and by_gate:
        return sparse_decode(query, key, value, attention_mask, scaling, config, layer), None
    if query.shape[2] == 1 and key.shape[2] > 1 and (
            dense or config.decode == "dense" and not is_in_prompt(key, attention_mask)):
        if not dense:
            replay.refuse_new_tokens(dense=True)
        slots = attended_slots(attention_mask, key.shape[2])
        return sdpa_attention_forward(module, query, key, value, slots, scaling=scaling, is_causal=False)
    segments = packed or row_segments(query, key, attention_mask, kwargs.get("position_ids"), config.chunk_size)
    chunk_size, topk = config.chunks(dense, segments.max_seqlen_k)
    if dense:
        segments = replace(segments, chunk_size=chunk_size)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    selected = None
    if not dense and (replay.is_active() or not by_gate):
        given = replay.replayed(layer, q, k, segments, config, by_gate=by_gate) if replay.is_active() else None
        select = None if by_gate else functools.partial(_selectors[name], module, q, k, segments)
        selected = replay.choose(layer, q, lambda: k, segments, config, given, select)
    options = dict(softmax_scale=scaling, deterministic=config.deterministic, backend=config.backend,
                   workspace_mib=config.workspace_mib)
    o = (moba_attention(q, k, v, segments, topk, shared=config.selection, **options) if selected is None else
         sparse_attention(q, k, v, selected, segments, **options))
    if config.decode == "moba" and not dense and by_gate and key.shape[2] > query.shape[2]:
        fill_after_prompt(key, attention_mask, config)
    return o.unflatten(0, (query.shape[0], query.shape[2])), None


_correct, _set = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.set_attn_implementation


@functools.wraps(_correct)
def _refuse_models(self: PreTrainedModel, requested_attention: str | None, *args, **kwargs) -> str:
    """Layers that never look a name up attend on their own: densely, and where MoBA's layout is None not causally."""
    looks_up = self._supports_attention_backend or any(
        hasattr(sys.modules.get(x.__module__), "ALL_ATTENTION_FUNCTIONS") for x in type(self).__mro__
        if issubclass(x, PreTrainedModel) and x is not PreTrainedModel)
    has_models = any(getattr(getattr(self.config, x, None), "model_type", "") for x in self.config.sub_configs)
    if requested_attention in {*BACKENDS, *_settings} and not (looks_up or has_models):
        raise ValueError(f"attn_implementation={requested_attention!r} is not supported by {type(self).__name__}, its "
                         "layers have an attention of their own: leave such a model to another attention")
    return _correct(self, requested_attention, *args, **kwargs)


@functools.wraps(_set)
def _refuse_switches(self: PreTrainedModel, attn_implementation: str | dict, *args, **kwargs) -> None:
    """Where Transformers warns alone: the model, or one within it, keeps the attention that it has."""
    _set(self, attn_implementation, *args, **kwargs)
    every = dict.fromkeys(("", *self.config.sub_configs), attn_implementation)
    for key, name in (attn_implementation if isinstance(attn_implementation, dict) else every).items():
        config = getattr(self.config, key, None) if key else self.config
        if config is not None and name in (*BACKENDS, *_settings) and config._attn_implementation != name:
            raise ValueError(f"attn_implementation={name!r} is not supported by {type(self).__name__}: "
                             f"{key or 'it'} does not switch, and still attends by {config._attn_implementation!r}")


PreTrainedModel.get_correct_attn_implementation = _refuse_models
PreTrainedModel.set_attn_implementation = _refuse_switches
for _name in BACKENDS:  # so that a model that runs without settings is told what is missing
    _make_known(_name)


REFUSED = {
    "attention_dropout": "set config.attention_dropout = 0",
    "sliding_window": "set config.sliding_window = None, or leave such a model to another attention",
    "softcap": "MoBA does not bend scores",
    "s_aux": "MoBA has no sinks",
    "position_bias": "MoBA adds nothing to scores",
    "output_attentions": "MoBA never has the weights in one place",
    "cache": "generate() works, with caches that are not paged"}
"""What attention layers ask for that MoBA does not have, and what to do. Names that are in neither are refused too."""
UNDERSTOOD = {
    "position_ids", "is_causal", *TransformersKwargs.__annotations__, *inspect.signature(ForCausalLMLoss).parameters,
    # what else a call, a trainer, a tokenizer or a fused loss hands through to all layers, and changes no attention
    "cache_position", "logits_to_keep", "return_dict", "return_predicted_tokens", "return_token_accuracy", "seq_idx",
    "skip_logits", "special_tokens_mask", "token_type_ids", "use_cache", "use_token_scaling"} - REFUSED.keys()
"""What this attention reads, or causal decoders' attention has no use for: their masks come from the models."""
MEANINGS = {"sliding_window": "sliding_window (or attention_chunk_size)", "s_aux": "s_aux (attention sinks)",
            "cache": "cache (paged, continuous batching)"}


def refuse_split_groups(module: torch.nn.Module, heads: int, kv_heads: int) -> None:
    """Raises ValueError where heads are dealt out to ranks, and this one got a part of those that choose together."""
    of_all = module.config.num_attention_heads
    kv_of_all = getattr(module.config, "num_key_value_heads", None) or of_all
    if heads < of_all and heads * kv_of_all < of_all * kv_heads:
        raise ValueError(f"MoBAConfig.selection must be 'head' where a rank has {heads} of {of_all} query heads for "
                         f"{kv_heads} of {kv_of_all} key/value heads, got 'group': no rank has a whole group's queries")


def refuse(module: torch.nn.Module, attention_mask: Tensor | None, dropout: float, kwargs: dict) -> None:
    """Raises ValueError where the model asks for what MoBA does not have; silence would mean another model."""
    for name, value in {"attention_dropout": dropout or None, **kwargs}.items():
        if value is None or value is False or name in UNDERSTOOD:
            continue
        got = repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
        raise ValueError(f"{MEANINGS.get(name, name)} is not supported by MoBA attention, got {got}: "
                         + REFUSED.get(name, f"{type(module).__name__}, or the model's call, gave it: leave it out of "
                                             "the call, or leave a model whose layers need it to another attention"))
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"is_causal must be True for MoBA attention, got False in {type(module).__name__}")
    if attention_mask is not None and attention_mask.shape[-1] == 0:
        raise ValueError(f"{MEANINGS['sliding_window']} is not supported by MoBA attention, got "
                         f"{attention_mask.shape[2]} in {type(module).__name__}: {REFUSED['sliding_window']}")
    if attention_mask is not None and not is_layout(attention_mask):
        raise ValueError("attention_mask must be a 2-dimensional padding mask [batch, tokens] for MoBA attention, got "
                         f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}")
