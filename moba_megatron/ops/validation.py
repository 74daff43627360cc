"""What the public operators demand of their arguments, with errors that name the argument, the demand and what came."""
import os
import sys
from dataclasses import replace

import torch
from torch import Tensor

from ..config import SHARED, check_whole
from ..segments import Segments

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CHECK_CUDA_VALUES = os.environ.get("MOBA_CHECK_INPUTS", "0") == "1"
"""Also read cu_seqlens and places in caches back from the GPU to check their values, and on any device look at given
chunks, which are made harmless otherwise. Off by default: it stops the host at every call."""


def check_tensor(name: str, x: Tensor, dims: int, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES, words: str = "",
                 device: torch.device | None = None, of: str = "q") -> None:
    """A tensor of one of the dtypes, of so many dimensions, which ``words`` name, on the device of ``of`` if given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension{'s' * (dims > 1)}{words}, got shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {' or '.join(names.rsplit(', ', 1))}, got {x.dtype}")
    if device not in (None, x.device):
        raise ValueError(f"{name} must be on {of}'s device {device}, got {x.device}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q ``[T, H, D]``, k ``[S, HK, D]``, v ``[S, HK, DV]``: shapes, dtypes and devices."""
    check_tensor("q", q, 3, words=" [tokens, heads, head_dim]")
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, 3, words=" [tokens, heads, head_dim]", device=q.device)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"v must have k's tokens and heads {tuple(k.shape[:2])}, got {tuple(v.shape[:2])}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k must have q's head_dim {q.shape[2]}, got {k.shape[2]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q's heads must be a positive multiple of k's heads, got {heads} and {kv_heads}")
    if q.shape[2] < 1 or v.shape[2] < 1:
        raise ValueError(f"head_dim must be at least 1, got {q.shape[2]} for q and k, {v.shape[2]} for v")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on a kind of device; None where it is off."""
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def cast_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; where they have several dtypes and autocast is on, cast as it casts the inputs of
    ``scaled_dot_product_attention``: all to its dtype but those in fp64."""
    dtypes = set()
    for x in tensors:
        if not isinstance(x, Tensor):
            return tensors
        dtypes.add(x.dtype)
    if len(dtypes) == 1:
        return tensors
    device = tensors[0].device
    dtype = autocast_dtype(device.type)
    return tuple(x.to(dtype) if dtype and x.dtype in FLOAT_DTYPES[:3] and x.device == device else x for x in tensors)


def same_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype, as torch's attention wants them and the FlashAttention integrations make them. Under
    ``torch.autocast`` its dtype, as for ``scaled_dot_product_attention``: rotary embeddings and norms leave q and k in
    fp32 beside a v in bf16. Elsewhere v's, which no such step has touched. fp64 stays."""
    dtype = v.dtype if v.dtype == torch.float64 else autocast_dtype(q.device.type) or v.dtype
    # As they are where nothing is to be done, under torch.compile too: a cache's keys carry attributes.
    return tuple(x if x.dtype == dtype else x.to(dtype) for x in (q, k, v))


def check_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The scale of the scores: 1/sqrt(head_dim) for None, else a finite number."""
    if softmax_scale is None:
        return head_dim ** -0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale must be a float or None, got {softmax_scale!r}")
    if not abs(softmax_scale) <= sys.float_info.max:  # math.isfinite has no symbolic value, and refuses large ints
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)


def check_flag(name: str, value: bool) -> None:
    """A bool; a number or a string is refused, since "False" would mean True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


def check_workspace(workspace_mib: float | None) -> None:
    """A positive number of MiB, or None."""
    if isinstance(workspace_mib, bool) or not isinstance(workspace_mib, (int, float, type(None))):
        raise TypeError(f"workspace_mib must be a number of MiB or None, got {workspace_mib!r}")
    if workspace_mib is not None and not 0 < workspace_mib < 2 ** 40:
        raise ValueError(f"workspace_mib must be a positive number of MiB, got {workspace_mib}")


def check_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int, total: int, device: torch.device,
                     name: str = "cu_seqlens", max_name: str = "max_seqlen") -> Tensor:
    """Cumulative lengths ``[B + 1]`` of ``total`` packed tokens; returns them as int32, contiguous. Values are checked
    where reading them is free: on the CPU, or with ``MOBA_CHECK_INPUTS=1``."""
    check_tensor(name, cu_seqlens, 1, (torch.int32, torch.int64), device=device)
    if cu_seqlens.numel() < 2:
        raise ValueError(f"{name} must have shape [sequences + 1], got {tuple(cu_seqlens.shape)}: it starts with 0 "
                         "and every sequence adds its end")
    check_whole(max_name, max_seqlen, 0)
    if total >= 2 ** 31:
        raise ValueError(f"at most 2^31 - 1 packed tokens are supported, got {total}")
    if values_readable(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] > total:
            raise ValueError(f"{name} must run from 0 to the number of tokens {total} at most, got {values[0]} to "
                             f"{values[-1]}")
        lengths = [b - a for a, b in zip(values, values[1:])]
        if min(lengths) < 0:
            at = next(i for i, n in enumerate(lengths) if n < 0)
            raise ValueError(f"{name} must not decrease, got {values[at]} then {values[at + 1]} at index {at + 1}")
        if max(lengths) > max_seqlen:
            raise ValueError(f"{max_name} must be at least the longest sequence in {name}, {max(lengths)} tokens, "
                             f"got {max_seqlen}")
    return cu_seqlens.int().contiguous()


def check_segments(segments: Segments, total_q: int, total_k: int, device: torch.device) -> Segments:
    """Segments that place ``total_q`` queries among ``total_k`` keys, contiguous; values as in check_cu_seqlens."""
    if not isinstance(segments, Segments):
        raise TypeError(f"segments must be a moba_megatron.segments.Segments, got {type(segments).__name__}")
    strided = {}
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seq_ids", "offsets"):
        x = getattr(segments, name)
        check_tensor(f"segments.{name}", x, 1, (torch.int32,), device=device)
        if x.stride(0) != 1:
            strided[name] = x.contiguous()
    check_whole("segments.chunk_size", segments.chunk_size, 1)
    for side, total in (("q", total_q), ("k", total_k)):
        name, max_name = f"cu_seqlens_{side}", f"max_seqlen_{side}"
        check_cu_seqlens(getattr(segments, name), getattr(segments, max_name), total, device, f"segments.{name}",
                         f"segments.{max_name}")
    number = segments.num_segments
    for name in ("seq_ids", "offsets"):
        if getattr(segments, name).numel() != number:
            raise ValueError(f"segments.{name} must have one entry for each of the {number} segments of cu_seqlens_q, "
                             f"got {getattr(segments, name).numel()}")
    if segments.packed and number != segments.num_sequences:
        raise ValueError(f"segments.packed must be False unless every segment is a whole sequence, got True with "
                         f"{number} segments of {segments.num_sequences} sequences")
    if all(map(values_readable, (segments.cu_seqlens_q, segments.cu_seqlens_k, segments.seq_ids, segments.offsets))):
        cu_q, cu_k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
        seq_ids, offsets = segments.seq_ids.tolist(), segments.offsets.tolist()
        for i, (sequence, offset) in enumerate(zip(seq_ids, offsets)):
            if not 0 <= sequence < len(cu_k) - 1:
                raise ValueError(f"segments.seq_ids must be in 0..{len(cu_k) - 2} (the sequences of cu_seqlens_k), got "
                                 f"{sequence} at index {i}")
            queries, keys = cu_q[i + 1] - cu_q[i], cu_k[sequence + 1] - cu_k[sequence]
            if offset < 0 or queries and offset + queries > keys:
                raise ValueError("segments.offsets must be 0 or more and leave a segment within its sequence: segment "
                                 f"{i} has {queries} queries from position {offset}, sequence {sequence} has {keys} "
                                 "keys")
        if segments.exact and (cu_q[-1], cu_k[-1]) != (total_q, total_k):
            raise ValueError(f"segments.exact must be False where rows lie behind the last sequence: got {cu_q[-1]} of "
                             f"{total_q} queries and {cu_k[-1]} of {total_k} keys in sequences")
        if segments.packed and not (cu_q == cu_k and seq_ids == list(range(len(seq_ids))) and not any(offsets)):
            raise ValueError("segments.packed must be False unless every segment is a whole sequence: got True with "
                             "other cu_seqlens_q than cu_seqlens_k, or with seq_ids or offsets of parts of sequences")
    if segments.packed and total_q != total_k:
        raise ValueError(f"segments.packed must be False unless q and k have as many rows, got True with {total_q}, "
                         f"{total_k}")
    return replace(segments, **strided) if strided else segments


def check_shared(shared: str) -> str:
    """Who shares a choice."""
    if shared not in SHARED:
        raise ValueError(f"shared must be one of {', '.join(SHARED)}; got {shared!r}")
    return shared


def check_selected(selected: Tensor, q: Tensor, k: Tensor, segments: Segments | None) -> None:
    """Given chunks, int32 ``[T, H or HK, n]``; their values with segments and ``MOBA_CHECK_INPUTS=1`` alone."""
    check_tensor("selected", selected, 3, (torch.int32,), device=q.device)
    if selected.shape[0] != q.shape[0] or selected.shape[1] not in (q.shape[1], k.shape[1]):
        raise ValueError(f"selected must have q's {q.shape[0]} tokens, and a list for each of q's {q.shape[1]} heads "
                         f"or of k's {k.shape[1]}, got shape {tuple(selected.shape)}")
    if segments is None or not (
            CHECK_CUDA_VALUES and selected.numel() and all(map(values_readable, (selected, segments.cu_seqlens_q)))):
        return
    from ..reference.gating import earlier_chunks
    from ..reference.selection import keep_earlier
    bounds = earlier_chunks(segments, q.shape[0])
    ignored = (selected != keep_earlier(selected, segments))[:int(segments.cu_seqlens_q[-1])].nonzero().tolist()
    for token, head, j in ignored:
        chunk, (first, own) = int(selected[token, head, j]), (int(x[token]) for x in bounds)
        raise ValueError("selected must hold earlier chunks of the query's sequence, each once, or -1: token "
                         f"{token} has those from {first} to {own - 1}, got {chunk} at index {[token, head, j]}"
                         + " again" * (first <= chunk < own))


def values_readable(x: Tensor) -> bool:
    """Whether reading costs no wait that nobody asked for, and there are values: not of fakes, nor in a transform."""
    return (not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)
            and not torch._C._are_functorch_transforms_active()
            and (x.device.type == "cpu" or CHECK_CUDA_VALUES and x.is_cuda))
