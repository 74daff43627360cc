"""Caches in Transformers: the means of chunks for sparse decoding, beside a cache's keys for as long as they are right.

An attention layer is handed a cache's keys, not the cache, so the means are attributes of the tensor of keys. A static
cache writes into one tensor; a growing one makes a new tensor at every step, to which :func:`follow_caches` hands them
on. Every other change of a cache (a crop, beams that change places, offloading, a step by another attention) leaves a
tensor without means, or one written to more often than they know; then they are made anew. So nothing has to be told,
threads share nothing, and a cache can be saved.
"""
import functools
import threading

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMixin

from .. import replay
from ..config import MoBAConfig
from ..ops.decode import decode_selection, fill_chunk_means, moba_decode

_generation = threading.local()


def sparse_decode(query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None, scaling: float | None,
                  config: MoBAConfig, layer: int) -> Tensor:
    """o ``[B, 1, H, DV]`` of one new token a row, ``[B, H, 1, D]``, over the cache, ``[B, HK, slots, D]``, that has it;
    ``layout`` is of ``mask.moba_mask``. It chooses chunks as :func:`moba_megatron.ops.decode.moba_decode` says."""
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    lengths, starts = _places(key, layout)
    means = _kept(key, config.chunk_size)
    # A graph writes into means that are there and keeps no new ones: CUDA graphs would take their memory back.
    is_right = means is not None and (torch.compiler.is_compiling() or key.moba_writes + 1 == _writes(key))
    means = _room(k, means if is_right else None, config.chunk_size)
    if not is_right:
        fill_chunk_means(k, means, lengths, config.chunk_size, cache_starts=starts, backend=config.backend)
    options = dict(cache_starts=starts, backend=config.backend, shared=config.selection)
    o = moba_decode(query[:, :, 0], k, v, means, lengths, config.chunk_size, config.topk, softmax_scale=scaling,
                    **options)
    if replay.is_active():
        replay.refuse_new_tokens(dense=False)
        chosen = decode_selection(query[:, :, 0], k, means, lengths, config.chunk_size, config.topk, **options)
        slots = key.shape[2]
        replay.record(layer, chosen, slots // config.chunk_size + 1, config, slots <= config.topk * config.chunk_size,
                      chosen.shape[1] != query.shape[1])
    _keep(key, means, config.chunk_size)
    return o[:, None]


def fill_after_prompt(key: Tensor, layout: Tensor | None, config: MoBAConfig) -> None:
    """Makes the means of a cache that took several tokens, so that the steps after it, compiled ones too, find them."""
    k, (lengths, starts), kept = key.transpose(1, 2), _places(key, layout), _kept(key, config.chunk_size)
    if kept is None and torch.compiler.is_compiling():
        return
    means = _room(k, kept, config.chunk_size)
    if kept is None and hasattr(key, "_dynamo_static_input_type"):  # as Transformers marks the keys of a static cache
        torch._dynamo.mark_static_address(means)
    fill_chunk_means(k, means, lengths, config.chunk_size, cache_starts=starts, backend=config.backend)
    _keep(key, means, config.chunk_size)


@functools.cache
def follow_caches() -> None:
    """Has every growing cache hand the means of its keys on to the tensor that takes their place, once a process."""
    update = DynamicLayer.update

    @functools.wraps(update)
    def follow(self, *args, **kwargs):
        before = getattr(self, "keys", None)
        # Taken, not copied: a shallow copy of the cache must not write into the same means.
        kept = None if before is None or torch.compiler.is_compiling() else vars(before).pop("moba_means", None)
        is_right = kept is not None and before.moba_writes == _writes(before)
        found = update(self, *args, **kwargs)
        if is_right:
            self.keys.moba_means, self.keys.moba_writes = kept, _writes(self.keys) - 1  # this token's are to come
        return found

    DynamicLayer.update = follow


@functools.cache
def note_prompts() -> None:
    """Has ``generate()`` note how long its prompt is, once a process."""
    generate = GenerationMixin.generate

    @functools.wraps(generate)
    def note(self, inputs=None, *args, **kwargs):
        before = getattr(_generation, "prompt", 0)
        given = (inputs, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")))
        _generation.prompt = max((x.shape[1] for x in given if isinstance(x, Tensor) and x.dim() > 1), default=0)
        try:
            return generate(self, inputs, *args, **kwargs)
        finally:
            _generation.prompt = before

    GenerationMixin.generate = note


def is_in_prompt(key: Tensor, layout: Tensor | None) -> bool:
    """Whether a single query is of the prompt, which may come in pieces, of the ``generate()`` in this thread."""
    prompt = 0 if torch.compiler.is_compiling() else getattr(_generation, "prompt", 0)
    if not prompt:
        return False
    if key.shape[2] <= prompt or layout is not None and int(layout[0, 0, 0, 2]) < prompt:  # static: where the query is
        return True
    _generation.prompt = 0  # from here on the tokens are new: the host need not look again
    return False


def _places(key: Tensor, layout: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Keys of each row and the slot of the first one, int32 ``[B]``; None for 0."""
    if layout is None:
        return torch.full((key.shape[0],), key.shape[2], dtype=torch.int32, device=key.device), None
    starts = layout[:, 0, 0, 0].contiguous()
    return layout[:, 0, 0, 1] - starts, starts


def _kept(key: Tensor, chunk_size: int) -> Tensor | None:
    """The means ``[B, chunks, HK, D]`` beside a cache's keys, which may be out of date; None without any that fit."""
    size, means = getattr(key, "moba_means", (0, None))
    if size != chunk_size or means.shape[0] != key.shape[0] or means.dtype != key.dtype:
        return None
    if not torch.compiler.is_compiling() and means.is_inference() and not torch.is_inference_mode_enabled():
        return None  # which nobody may write into any more
    return means


def _keep(key: Tensor, means: Tensor, chunk_size: int) -> None:
    if not torch.compiler.is_compiling():
        key.moba_means, key.moba_writes = (chunk_size, means), _writes(key)


def _room(k: Tensor, means: Tensor | None, chunk_size: int) -> Tensor:
    """The means with room for the chunks of ``k`` ``[B, slots, HK, D]``; twice what is needed where it must grow."""
    needed = k.shape[1] // chunk_size
    if means is not None and means.shape[1] >= needed:
        return means
    grown = k.new_empty(k.shape[0], 2 * needed, *k.shape[2:])
    if means is not None:
        grown[:, :means.shape[1]] = means
    return grown


def _writes(x: Tensor) -> int:
    """How often a tensor was written to. Inference tensors do not count: a static cache of them is read anew."""
    return 0 if x.is_inference() else x._version
