"""The stages of ``moba_megatron.reference`` as Triton kernels, for CUDA tensors (any tensor under TRITON_INTERPRET=1).

``bounded`` makes lengths safe that nobody has looked at; ``key_convolution_fwd`` and ``key_convolution_bwd`` may come
before the stages; ``call`` makes one of several.
"""
from .attention_bwd import attention_bwd
from .attention_fwd import attention_fwd, route_and_attend
from .bounds import bounded, bounded_lengths, clear_rows
from .chunk_means import block_sums, chunk_means, means_from_block_sums
from .gating import gate, group_queries, keep_earlier
from .host import INTERPRETED
from .key_convolution import key_convolution_bwd, key_convolution_fwd
from .launcher import call
from .routing import route

__all__ = ["INTERPRETED", "attention_bwd", "attention_fwd", "block_sums", "bounded", "bounded_lengths", "call",
           "chunk_means", "clear_rows", "gate", "group_queries", "keep_earlier", "key_convolution_bwd",
           "key_convolution_fwd", "means_from_block_sums", "route", "route_and_attend"]
