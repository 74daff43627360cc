"""The stages in plain torch, doing the selected work alone: for the CPU, and accelerators that Triton does not serve.

``gate``, ``attention_fwd`` and ``attention_bwd`` are its own, the other stages are ``moba_megatron.reference``'s.
"""
from ..reference import (
    block_sums,
    bounded,
    bounded_lengths,
    call,
    chunk_means,
    clear_rows,
    key_convolution,
    means_from_block_sums,
    route,
)
from .attention import attention_bwd, attention_fwd
from .gating import gate

__all__ = ["attention_bwd", "attention_fwd", "block_sums", "bounded", "bounded_lengths", "call", "chunk_means",
           "clear_rows", "gate", "key_convolution", "means_from_block_sums", "route", "route_and_attend"]


def route_and_attend(q, k, v, selected, segments, softmax_scale):
    """:func:`attention_fwd`, and the routing of the selection."""
    routing = route(selected, k.shape[1], segments.num_chunks(k.shape[0]))
    return *attention_fwd(q, k, v, selected, segments, softmax_scale, routing), routing
