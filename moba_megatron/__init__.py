"""MoBA, Mixture of Block Attention, for long-context training.

| name | what it is |
|---|---|
| ``moba_attn_varlen`` | the operator: packed sequences, ``[tokens, heads, head_dim]``, with gradients |
| ``moba_attn_varlen_triton`` | the same by Triton-MoBA's signature |
| ``MoBAConfig`` | chunk size, topk, which layers and steps are dense |
| ``MoBACoreAttention`` | Megatron-Core's core attention: SBHD and THD, context parallel |
| ``get_moba_layer_local_spec``, ``get_moba_layer_with_transformer_engine_spec`` | Megatron layer specs |

The names that need megatron-core are imported on first use.
"""
import importlib

from .config import MoBAConfig
from .moba_triton import moba_attn_varlen_triton
from .ops import moba_attn_varlen

_MEGATRON_NAMES = {
    "MoBACoreAttention": "core_attention",
    "get_moba_layer_local_spec": "layer_specs",
    "get_moba_layer_with_transformer_engine_spec": "layer_specs",
}

__version__ = "0.1.0"
__all__ = ["MoBAConfig", "moba_attn_varlen", "moba_attn_varlen_triton", *_MEGATRON_NAMES]


def __getattr__(name: str):
    if name not in _MEGATRON_NAMES:
        raise AttributeError(f"module 'moba_megatron' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MEGATRON_NAMES[name]}", __name__), name)
