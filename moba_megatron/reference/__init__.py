"""The stages in plain torch: any device, fp64-capable, readable, slow. What the others are tested against.

Stages, as in ``moba_megatron.kernels``: ``chunk_means`` (and its halves ``block_sums``, ``means_from_block_sums``),
``gate``, ``route``, ``attention_fwd``, ``attention_bwd``; beside the gate ``group_queries`` and ``keep_earlier``.
``key_convolution`` may come before them; ``call`` runs several.
"""
from .attention import attention_bwd, attention_fwd
from .bounds import bounded, bounded_lengths, clear_rows
from .chunk_means import block_sums, chunk_means, means_from_block_sums
from .gating import gate
from .key_convolution import key_convolution
from .routing import route
from .selection import group_queries, keep_earlier

__all__ = ["attention_bwd", "attention_fwd", "block_sums", "bounded", "bounded_lengths", "call", "chunk_means",
           "clear_rows", "gate", "group_queries", "keep_earlier", "key_convolution", "means_from_block_sums", "route"]


def call(function, *args, workspace_mib=None, event=None, out=None, **named):
    """``function(*args, **named)``, into ``out`` where that is given, and then ``event``: nothing to prepare here."""
    result = function(*args, **named)
    if out is not None:
        for x, value in zip(out, result):
            x.copy_(value)
        result = out
    if event is not None:
        event.record()
    return result
