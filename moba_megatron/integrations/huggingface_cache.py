"""Sparse decoding in Transformers: the means of chunks beside each layer of a cache, for as long as they are its own.

An attention layer is handed the keys, not the cache they came from. So a layer that decodes gets a forward pre-hook,
which sees the cache before it takes the new key, and whether its keys are still what the last step left. Where they are
not (another cache, a crop, beams that changed places), the means are made anew from all keys.

The hook knows the cache by its type: its keyword has been past_key_value, past_key_values and, from Transformers 5.24
on, cache. The means stand on the layer of the cache, the hook's note in the thread that runs it; the module has neither.
"""
from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..config import MoBAConfig
from ..ops.decode import fill_chunk_means, moba_decode


@dataclass
class _Means:
    """Means ``[B, chunks, HK, D]`` of a cache layer, and the keys that they were right for when a step ended."""

    means: Tensor
    chunk_size: int
    keys: weakref.ref
    version: int | None

    def belong_to(self, keys: Tensor | None) -> bool:
        return keys is not None and self.keys() is keys and self.version is not None and self.version == keys._version

    def __reduce__(self):
        return type(None), ()  # a saved or copied cache has keys of its own: its means are made anew


_noted = threading.local()  # .call: the layer that this thread is about to run, its layer of the cache, are means right


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
    watch(module)
    cache, kept = _take_note(module, config.chunk_size)
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
        cache.moba_means = _Means(means, config.chunk_size, weakref.ref(key), _version(key))
    return o[:, None]


def watch(module: torch.nn.Module) -> None:
    """Has an attention layer note its cache from its next call on."""
    if not getattr(module, "moba_watched", False):
        module.register_forward_pre_hook(_note_cache, with_kwargs=True)
        module.moba_watched = True


def _take_note(module: torch.nn.Module, chunk_size: int) -> tuple[object | None, _Means | None]:
    """The layer of the cache that this call of an attention layer came with, and its means where they are right.

    Both None in a call that was not watched.
    """
    call, _noted.call = getattr(_noted, "call", None), None
    if call is None or call[0]() is not module:
        return None, None
    cache = call[1]()
    kept = getattr(cache, "moba_means", None) if call[2] else None
    return cache, kept if kept is not None and kept.chunk_size == chunk_size else None


@torch.compiler.disable
def _note_cache(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Before the layer runs: which layer of which cache, and whether its means are right for its keys as they are."""
    _noted.call = None
    given = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    layers = getattr(getattr(given, "self_attention_cache", given), "layers", ())
    if module.layer_idx < len(layers):
        cache = layers[module.layer_idx]
        kept = getattr(cache, "moba_means", None)
        right = kept is not None and kept.belong_to(getattr(cache, "keys", None))
        _noted.call = weakref.ref(module), weakref.ref(cache), right


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
