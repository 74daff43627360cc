"""Sparse decoding in Transformers: the means of chunks beside each layer of a cache, for as long as they are its own.

An attention layer is handed the keys, not the cache they came from. So a layer that decodes gets a forward pre-hook,
which sees the cache before it takes the new key, and whether its keys are still what the last step left. Where they are
not (another cache, a crop, beams that changed places), the means are made anew from all keys.
"""
from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MoBAConfig
from ..ops.decode import fill_chunk_means, moba_decode


@dataclass
class _Means:
    """Means ``[B, chunks, HK, D]`` of a cache layer, and the keys that they were right for when a step ended."""

    means: Tensor
    keys: weakref.ref
    version: int | None

    def belong_to(self, keys: Tensor | None) -> bool:
        return keys is not None and self.keys() is keys and self.version is not None and self.version == keys._version


@torch.compiler.disable
def sparse_decode(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None,
                  scaling: float | None, config: MoBAConfig, backend: str) -> Tensor:
    """One new token a row, which chooses chunks as :func:`moba_megatron.ops.decode.moba_decode` says.

    Args:
        module: the attention layer.
        query: ``[B, H, 1, D]``; key, value: ``[B, HK, slots, D]``, the cache with the new token.
        layout: of ``huggingface_mask.moba_mask``, or None where every slot counts.
        scaling: multiplies the scores.
        config, backend: chunk size and topk; which backend.

    Returns:
        o ``[B, 1, H, DV]``.
    """
    cache, kept = take_note(module)
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if layout is None:
        lengths, starts = torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device), None
    else:
        starts, end = layout[:, 0, 0, 0].contiguous(), layout[:, 0, 0, 1]
        lengths = end - starts
    means = _room(k, None if kept is None else kept.means, config.chunk_size)
    if kept is None:
        fill_chunk_means(k, means, lengths, config.chunk_size, cache_starts=starts, backend=backend)
    o = moba_decode(query[:, :, 0], k, v, means, lengths, config.chunk_size, config.topk, cache_starts=starts,
                    softmax_scale=scaling, backend=backend)
    if cache is not None and cache.keys is key:  # an offloaded or quantized cache hands out copies
        cache.moba_means = _Means(means, weakref.ref(key), _version(key))
    return o[:, None]


def take_note(module: torch.nn.Module) -> tuple[object | None, _Means | None]:
    """The layer of the cache that this call of an attention layer came with, and its means where they are right.

    Both None at the layer's first call, which has it watched from the next one on.
    """
    if not hasattr(module, "moba_watched"):
        module.register_forward_pre_hook(_note_cache, with_kwargs=True)
        module.moba_watched = None
    if module.moba_watched is None:
        return None, None
    cache, kept = module.moba_watched
    module.moba_watched = None
    return cache(), kept


@torch.compiler.disable
def _note_cache(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Before the layer runs: which layer of which cache, and the means that are right for its keys as they are."""
    module.moba_watched = None
    layers = getattr(kwargs.get("past_key_values"), "layers", None)
    if layers is not None and module.layer_idx < len(layers):
        cache = layers[module.layer_idx]
        kept = getattr(cache, "moba_means", None)
        right = kept is not None and kept.belong_to(getattr(cache, "keys", None))
        module.moba_watched = weakref.ref(cache), kept if right else None


def _room(k: Tensor, means: Tensor | None, chunk_size: int) -> Tensor:
    """The means with room for the chunks of ``k`` ``[B, slots, HK, D]``; twice what is needed where it must grow."""
    needed = k.shape[1] // chunk_size
    if means is not None and means.shape[1] >= needed:
        return means
    grown = k.new_empty(k.shape[0], 2 * needed, *k.shape[2:])
    if means is not None:
        grown[:, :means.shape[1]] = means
    return grown


def _version(x: Tensor) -> int | None:
    """How often a tensor was written to; None for inference tensors, which do not count."""
    return None if x.is_inference() else x._version
