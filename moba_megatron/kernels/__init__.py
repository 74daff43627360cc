"""The stages as Triton kernels, for CUDA tensors (or any tensor under TRITON_INTERPRET=1).

Stages, as in ``moba_megatron.reference``: ``chunk_means`` (and its halves ``block_sums``, ``means_from_block_sums``),
``gate``, ``route``, ``attention_fwd``, ``attention_bwd``; beside the gate ``group_queries`` and ``keep_earlier``.
``bounded`` makes lengths safe that nobody has looked at;
``key_convolution_fwd`` and ``key_convolution_bwd`` may come before them; ``call`` makes one of several.
"""
from .attention_bwd import attention_bwd
from .attention_fwd import attention_fwd, route_and_attend
from .bounds import bounded, bounded_lengths, clear_rows
from .chunk_means import block_sums, chunk_means, means_from_block_sums
from .gating import gate
from .host import INTERPRETED
from .key_convolution import key_convolution_bwd, key_convolution_fwd
from .launcher import call
from .routing import route
from .selection import group_queries, keep_earlier

__all__ = ["INTERPRETED", "attention_bwd", "attention_fwd", "block_sums", "bounded", "bounded_lengths", "call",
           "chunk_means", "clear_rows", "gate", "group_queries", "keep_earlier", "key_convolution_bwd",
           "key_convolution_fwd", "means_from_block_sums", "route", "route_and_attend"]
