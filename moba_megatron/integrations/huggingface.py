"""MoBA in Transformers: ``register_moba(MoBAConfig(...))``, then ``attn_implementation="moba"``.

What the models hand over (``huggingface_mask.py`` reads masks) becomes query segments over packed keys: right and left
padding, packed rows, prefill over a cache, static caches. A new token attends densely, or sparsely with
``decode="moba"`` (``huggingface_cache.py`` keeps the means of chunks beside the cache). What MoBA cannot do is refused.
"""
from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from ..config import MoBAConfig
from ..ops import moba_attention
from ..segments import Segments
from .huggingface_cache import sparse_decode, watch
from .huggingface_mask import attended_slots, is_layout, moba_mask, packed_bounds, row_segments
from .mixed_precision import same_dtype

DECODES = ("dense", "moba")
BACKENDS = {
    "moba": None, "efficient_moba": None, "triton_moba": None,
    "moba_reference": "reference", "naive_moba": "reference", "moba_naive": "reference",
}
"""The names that are registered, and the backend of each; None for the config's."""


def register_moba(config: MoBAConfig | None = None, *, decode: str = "dense") -> None:
    """Makes MoBA known to Transformers, for models that are built or switched (``set_attn_implementation``) to it.

    Names: ``moba`` (also ``efficient_moba``, ``triton_moba``) with the config's backend, ``moba_reference`` (also
    ``naive_moba``, ``moba_naive``) with the reference. Registering again replaces the settings for all models.

    Args:
        config: chunk size, topk, dense layers (``full_attention_layers``), backend; None for ``MoBAConfig()``.
        decode: how a single new token attends to a cache: ``dense``, or ``moba``: it chooses chunks too. A prompt, and
            several tokens at once over a cache, always attend by MoBA.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value; the message names it.
    """
    config = MoBAConfig() if config is None else config
    if not isinstance(config, MoBAConfig):
        raise TypeError(f"config must be a MoBAConfig, got {type(config).__name__}")
    if decode not in DECODES:
        raise ValueError(f"decode must be one of {', '.join(DECODES)}; got {decode!r}")
    if config.full_attention_from_step is not None:
        raise ValueError("MoBAConfig.full_attention_from_step must be None for Transformers, whose models do not know "
                         f"the training step, got {config.full_attention_from_step}: train in two runs instead")
    for name, backend in BACKENDS.items():
        settings = _Settings(config, backend or config.backend, decode)
        AttentionInterface.register(name, functools.partial(moba_attention_forward, settings=settings))
        AttentionMaskInterface.register(name, moba_mask)


@dataclass(frozen=True)
class _Settings:
    config: MoBAConfig
    backend: str
    decode: str


def moba_attention_forward(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
                           attention_mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None, *,
                           settings: _Settings, **kwargs) -> tuple[Tensor, None]:
    """What an attention layer of Transformers calls, after RoPE and after its cache has taken the new keys.

    Args:
        module: the layer; its ``layer_idx`` decides whether it is dense.
        query: ``[B, H, Q, D]``; key: ``[B, HK, S, D]``; value: ``[B, HK, S, DV]``, all of the cache with a cache.
        attention_mask: what :func:`moba_mask` made.
        dropout: must be 0.
        scaling: multiplies the scores.
        settings: what :func:`register_moba` was given.
        kwargs: ``cu_seq_lens_q``, ``max_length_q`` and ``position_ids`` place packed sequences.

    Returns:
        o ``[B, Q, H, DV]``, and None for the weights.

    Raises:
        ValueError: a setting of the model that MoBA does not have; the message names it.
    """
    refuse(module, attention_mask, dropout, kwargs)
    query, key, value = same_dtype(query, key, value)
    config, topk = settings.config, settings.config.topk
    dense = config.is_full_attention(module.layer_idx + 1, module.config.num_hidden_layers)
    if query.shape[2] == 1 and key.shape[2] > 1:
        if settings.decode == "moba" and not dense:
            return sparse_decode(module, query, key, value, attention_mask, scaling, config, settings.backend), None
        slots = attended_slots(attention_mask, key.shape[2])
        return sdpa_attention_forward(module, query, key, value, slots, scaling=scaling, is_causal=False)
    segments = _segments(query, key, attention_mask, kwargs, config.chunk_size)
    if dense:  # one chunk that holds everything
        segments, topk = dataclasses.replace(segments, chunk_size=max(1, segments.max_seqlen_k)), 1
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    o = moba_attention(q, k, v, segments, topk, softmax_scale=scaling, deterministic=config.deterministic,
                       backend=settings.backend)
    if settings.decode == "moba" and not torch.compiler.is_compiling():
        watch(module)  # the means are made by the first step, and kept from there on
    return o.unflatten(0, (query.shape[0], query.shape[2])), None


def _segments(query: Tensor, key: Tensor, layout: Tensor | None, kwargs: dict, chunk_size: int) -> Segments:
    """Where the queries stand among the keys."""
    if kwargs.get("cu_seq_lens_q") is not None:
        return packed_bounds(kwargs["cu_seq_lens_q"], kwargs.get("max_length_q"), query, key, layout, chunk_size)
    return row_segments(query, key, layout, kwargs.get("position_ids"), chunk_size)


def refuse(module: torch.nn.Module, attention_mask: Tensor | None, dropout: float, kwargs: dict) -> None:
    """Raises ValueError where the model asks for what MoBA does not have; silence would mean another model."""
    unsupported = (
        ("attention_dropout", dropout > 0, dropout, "set config.attention_dropout = 0"),
        ("sliding_window", kwargs.get("sliding_window") is not None, kwargs.get("sliding_window"),
         "set config.sliding_window = None, or leave such a model to another attention"),
        ("softcap", kwargs.get("softcap") is not None, kwargs.get("softcap"), "MoBA does not bend scores"),
        ("s_aux (attention sinks)", kwargs.get("s_aux") is not None, "a tensor", "MoBA has no sinks"),
        ("position_bias", kwargs.get("position_bias") is not None, "a tensor", "MoBA adds nothing to scores"),
        ("head_mask", kwargs.get("head_mask") is not None, "a tensor", "MoBA has none"),
        ("output_attentions", bool(kwargs.get("output_attentions")), True, "MoBA never has the weights in one place"),
        ("cache (paged, continuous batching)", kwargs.get("cache") is not None, "a cache", "generate() works"),
    )
    for name, asked, value, hint in unsupported:
        if asked:
            raise ValueError(f"{name} is not supported by MoBA attention, got {value}: {hint}")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"is_causal must be True for MoBA attention, got False in {type(module).__name__}")
    if attention_mask is not None and not is_layout(attention_mask):
        raise ValueError("attention_mask must be a 2-dimensional padding mask [batch, tokens] for MoBA attention, got "
                         f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}")
