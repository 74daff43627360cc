"""Operators on ``[tokens, heads, head_dim]`` tensors: validation, backend choice, custom operators, gradients.

``moba_attn_varlen`` is self-attention over packed sequences, ``select_chunks`` and ``sparse_attn_varlen`` are its two
halves; ``moba_attention``, ``select_for_segments`` and ``sparse_attention`` take query segments over packed keys;
``causal_attn_varlen`` is dense; ``get_stages`` gives the stage functions themselves;
``key_convolution`` prepares keys; ``chunk_mass`` is what dense attention puts on each chunk.
"""
from .backend import get_stages
from .chunk_mass import chunk_mass
from .key_convolution import key_convolution
from .moba_attention import (
    causal_attn_varlen,
    moba_attention,
    moba_attn_varlen,
    select_chunks,
    select_for_segments,
    sparse_attention,
    sparse_attn_varlen,
)

from . import flop_formulas  # isort: skip  # noqa: F401  of operators that are there by now

__all__ = ["causal_attn_varlen", "chunk_mass", "get_stages", "key_convolution", "moba_attention", "moba_attn_varlen",
           "select_chunks", "select_for_segments", "sparse_attention", "sparse_attn_varlen"]
