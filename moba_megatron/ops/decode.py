"""Decoding operators: one query a sequence over a key/value cache, with the means of its chunks beside it."""
import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..tensor_cache import is_unobserved
from . import validation
from .backend import check_backend, get_stages


@torch.no_grad()
def moba_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor,
                chunk_size: int, topk: int, *, block_table: Tensor | None = None, cache_starts: Tensor | None = None,
                softmax_scale: float | None = None, backend: str = "auto", return_lse: bool = False,
                shared: str = "head") -> Tensor | tuple[Tensor, Tensor]:
    """MoBA for the last position of each sequence; its key and value must be in the caches already. No gradient.

    The query attends to its own chunk and to the ``topk - 1`` earlier chunks with the largest ``<q, mean key>``, as
    :func:`moba_megatron.moba_attn_varlen` does there. On CUDA nothing waits for the host: CUDA graphs capture a step.

    Args:
        q: ``[B, H, D]``, bf16, fp16, fp32 (or fp64: not by Triton); under ``torch.autocast`` cast to the caches' dtype.
        k_cache: ``[B, S, HK, D]``, any strides; with a block table, pages ``[pages, page_size, HK, D]``.
        v_cache: as k_cache, with a head dim DV of its own.
        means_cache: ``[B, chunks, HK, D]`` in k's dtype, contiguous in its last dimension, ``chunks`` at least the rows
            of a sequence // chunk_size. Must hold the means of all full chunks, as after :func:`fill_chunk_means` and
            at every next step, but the one that may have ended with the key before the query's: that is written here.
        cache_seqlens: int32 ``[B]``, keys of each sequence, the query's own included; checked where reading is free.
        chunk_size: keys in a chunk (Triton: any).
        topk: chunks a query attends to, its own included, at least 1.
        block_table: int32 ``[B, pages a sequence]``: row ``r`` of ``b`` is in page ``block_table[b, r // page_size]``.
        cache_starts: int32 ``[B]``, the row of each sequence's first key (left padding), where chunks begin; None: 0.
        softmax_scale, backend, return_lse, shared: as of :func:`moba_megatron.moba_attn_varlen`.

    Returns:
        o ``[B, H, DV]`` in q's dtype, 0 where a sequence has no key; with return_lse also lse ``[B, H]``, natural log.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.

    Source: arXiv 2502.13189, section 2.2, for one query.
    """
    _check_caches(k_cache, means_cache, cache_seqlens, chunk_size, block_table, cache_starts)
    q = _checked_query(q, k_cache, v_cache, means_cache.shape[0])
    validation.check_whole("topk", topk, 1)
    validation.check_flag("return_lse", return_lse)
    check_backend(backend)
    scale = validation.check_scale(softmax_scale, q.shape[2])
    # the kernels and the custom operator would drop tangents without a word; compilers and torch.func hide who has one
    if torch.autograd.forward_ad._current_level >= 0 and (
            torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
            or any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None
                   for x in (q, k_cache, v_cache, means_cache))):
        raise NotImplementedError("forward-mode differentiation (torch.func.jvp, linearize, forward_ad) of moba_decode "
                                  "is not implemented: it has no gradient")
    run = _decode if is_unobserved(q, k_cache, cache_seqlens) else _decode_op
    o, lse = run(q, k_cache, v_cache, means_cache, cache_seqlens, chunk_size, topk, block_table, cache_starts, scale,
                 backend, validation.check_shared(shared))
    return (o, lse) if return_lse else o


@torch.no_grad()
def decode_selection(q: Tensor, k_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int,
                     topk: int, *, block_table: Tensor | None = None, cache_starts: Tensor | None = None,
                     backend: str = "auto", shared: str = "head") -> Tensor:
    """The earlier chunks that :func:`moba_decode` attends to: what the router of a generation did. Args, Raises: as
    :func:`moba_decode`. Returns int32 ``[B, H, topk - 1]``, or ``[B, HK, topk - 1]`` for a group: chunk numbers within
    each sequence in no particular order, -1 where fewer exist."""
    _check_caches(k_cache, means_cache, cache_seqlens, chunk_size, block_table, cache_starts)
    q = _checked_query(q, k_cache, k_cache, means_cache.shape[0])
    validation.check_whole("topk", topk, 1)
    check_backend(backend)
    if validation.check_shared(shared) == "group":
        q = get_stages(backend, q.device).group_queries(q, k_cache.shape[2])
    return _stages(backend, q.device).decode_gate(q, k_cache, means_cache, cache_seqlens, chunk_size, topk,
                                                  block_table=block_table, cache_starts=cache_starts)


@torch.no_grad()
def fill_chunk_means(k_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int, *,
                     block_table: Tensor | None = None, cache_starts: Tensor | None = None,
                     backend: str = "auto") -> None:
    """Writes the means of all full chunks of a cache, as after a prefill; other rows of ``means_cache`` stay. Args,
    Raises: as :func:`moba_decode`, with ``cache_seqlens`` the keys that are in the cache."""
    _check_caches(k_cache, means_cache, cache_seqlens, chunk_size, block_table, cache_starts)
    check_backend(backend)
    run = _means if is_unobserved(k_cache, cache_seqlens) else _means_op
    run(k_cache, means_cache, cache_seqlens, chunk_size, block_table, cache_starts, backend)


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int,
            topk: int, block_table: Tensor | None, cache_starts: Tensor | None, softmax_scale: float,
            backend: str, shared: str) -> tuple[Tensor, Tensor]:
    topk = min(topk, 1 + means_cache.shape[1])
    stages = get_stages(backend, q.device)
    return stages.call(_one_step, stages, _stages(backend, q.device), q, k_cache, v_cache, means_cache, cache_seqlens,
                       chunk_size, topk, block_table, cache_starts, softmax_scale, shared)


def _one_step(training, stages, q, k_cache, v_cache, means_cache, cache_seqlens, chunk_size, topk, block_table,
              cache_starts, softmax_scale, shared):
    places = {"block_table": block_table, "cache_starts": cache_starts}
    scoring = training.group_queries(q, k_cache.shape[2]) if shared == "group" else q  # the queries that choose
    selected = stages.decode_gate(scoring, k_cache, means_cache, cache_seqlens, chunk_size, topk, **places)
    return stages.decode_attention(q, k_cache, v_cache, selected, cache_seqlens, chunk_size, softmax_scale, **places)


def _means(k_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int, block_table: Tensor | None,
           cache_starts: Tensor | None, backend: str) -> None:
    _stages(backend, k_cache.device).cache_means(k_cache, means_cache, cache_seqlens, chunk_size,
                                                 block_table=block_table, cache_starts=cache_starts)


def _stages(backend: str, device: torch.device) -> ModuleType:
    """The module ``decode`` beside the stages."""
    return importlib.import_module(".decode", get_stages(backend, device).__name__)


_decode_op = torch.library.custom_op("moba_megatron::decode", _decode, mutates_args=("means_cache",))
_means_op = torch.library.custom_op("moba_megatron::cache_means", _means, mutates_args=("means_cache",))


@_decode_op.register_fake
def _(q, k_cache, v_cache, means_cache, cache_seqlens, chunk_size, topk, block_table, cache_starts, softmax_scale,
      backend, shared):
    return (q.new_empty(*q.shape[:2], v_cache.shape[3]),
            q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)))


def _check_caches(k_cache: Tensor, means_cache: Tensor, cache_seqlens: Tensor, chunk_size: int,
                  block_table: Tensor | None, cache_starts: Tensor | None) -> None:
    validation.check_whole("chunk_size", chunk_size, 1)
    for name, x in (("k_cache", k_cache), ("means_cache", means_cache)):
        validation.check_tensor(name, x, 4, words=" [sequences, rows or chunks, heads, head_dim]")
    if 0 in k_cache.shape[2:]:
        raise ValueError(f"k_cache must have at least one head, and head_dim 1, got shape {tuple(k_cache.shape)}")
    batch = means_cache.shape[0]
    _check_ints("cache_seqlens", cache_seqlens, (batch,), k_cache.device)
    if cache_starts is not None:
        _check_ints("cache_starts", cache_starts, (batch,), k_cache.device)
    if block_table is not None:
        _check_ints("block_table", block_table, (batch, None), k_cache.device)
    elif k_cache.shape[0] != batch:
        raise ValueError(f"k_cache must have the {batch} sequences of means_cache, got {k_cache.shape[0]}: for a paged "
                         "cache give block_table")
    rows = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if means_cache.shape[2:] != k_cache.shape[2:] or means_cache.shape[1] < rows // chunk_size:
        raise ValueError(f"means_cache must have shape [B, at least {rows // chunk_size}, {k_cache.shape[2]}, "
                         f"{k_cache.shape[3]}] (a mean for each {chunk_size} of {rows} rows), got "
                         f"{tuple(means_cache.shape)}")
    if means_cache.dtype != k_cache.dtype or means_cache.device != k_cache.device:
        raise ValueError(f"means_cache must be {k_cache.dtype} on {k_cache.device} as k_cache, got {means_cache.dtype} "
                         f"on {means_cache.device}")
    if means_cache.stride(3) != 1:
        raise ValueError(f"means_cache must be contiguous in its last dimension, got strides {means_cache.stride()}")
    if all(validation.values_readable(x) for x in (cache_seqlens, cache_starts, block_table) if x is not None):
        starts = [0] * batch if cache_starts is None else cache_starts.tolist()
        for b, (start, length) in enumerate(zip(starts, cache_seqlens.tolist())):
            if min(start, length) < 0 or length and start + length > rows:
                raise ValueError(f"cache_seqlens and cache_starts must lie within the {rows} rows of a sequence, got "
                                 f"{length} keys from row {start} on in sequence {b}")
            pages, size = k_cache.shape[:2]
            if block_table is not None and length:
                used = block_table[b, start // size:-(-(start + length) // size)].tolist()
                if not 0 <= min(used) <= max(used) < pages:
                    raise ValueError(f"block_table must name pages from 0 to {pages - 1}, got {used} in sequence {b}")


def _checked_query(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: int) -> Tensor:
    """q; under autocast in the caches' dtype, since caches are not copied."""
    validation.check_tensor("v_cache", v_cache, 4, words=" [sequences, rows, heads, head_dim]")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"v_cache must have k_cache's first dimensions {tuple(k_cache.shape[:3])}, got "
                         f"{tuple(v_cache.shape[:3])}")
    if not isinstance(q, Tensor) or q.dim() != 3 or q.shape[0] != batch:
        raise ValueError(f"q must be a tensor [sequences, heads, head_dim] of the caches' {batch} sequences, got "
                         f"{tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__}")
    if q.shape[2] != k_cache.shape[3] or q.shape[1] % k_cache.shape[2] or q.shape[1] == 0:
        raise ValueError(f"q must have k_cache's head_dim {k_cache.shape[3]} and a positive multiple of its "
                         f"{k_cache.shape[2]} heads, got {q.shape[1]} heads of {q.shape[2]}")
    if {q.dtype, k_cache.dtype} <= {*validation.FLOAT_DTYPES[:3]} and validation.autocast_dtype(k_cache.device.type):
        q = q.to(k_cache.dtype)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
    return q


def _check_ints(name: str, x: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    validation.check_tensor(name, x, len(shape), (torch.int32,), device=device, of="k_cache")
    if any(n not in (None, m) for n, m in zip(shape, x.shape)):
        raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(x.shape)}")
    if x.numel() > 1 and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
