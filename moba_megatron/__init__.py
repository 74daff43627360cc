"""MoBA, Mixture of Block Attention, for long-context training.

| name | what it is |
|---|---|
| ``moba_attn_varlen`` | the operator: packed sequences, ``[tokens, heads, head_dim]``, with gradients |
| ``moba_attn_varlen_triton`` | the same by Triton-MoBA's signature |
| ``select_chunks``, ``sparse_attn_varlen`` | its halves: the gate's choice, attention to given chunks |
| ``chunk_mass`` | the mass of dense attention on each chunk: what a router of one's own is trained towards |
| ``record_selection``, ``replay_selection`` | contexts: choices of a run recorded, and attended to in another run |
| ``RecordedSelection`` | what they record and replay: ``save``, ``load`` |
| ``MoBAConfig`` | chunk size, topk, which layers and steps are dense |
| ``MoBACoreAttention`` | Megatron-Core's core attention: SBHD and THD, context parallel |
| ``get_moba_layer_local_spec``, ``get_moba_layer_with_transformer_engine_spec`` | Megatron layer specs |
| ``register_moba`` | MoBA for Transformers' models: ``attn_implementation="moba"`` |

The names that need megatron-core or transformers are imported on first use.
"""
import importlib.metadata
from typing import TYPE_CHECKING

for _package, _oldest in {"torch": (2, 9), "triton": (3, 5)}.items():
    _found = next(iter(importlib.metadata.distributions(name=_package)), None)  # none, as Triton without a GPU
    _version = _found.version if _found else None  # None, too, where a removed package left its folder
    if _version and tuple(map(int, _version.split(".")[:2])) < _oldest:
        raise ImportError(f"moba_megatron needs {_package} {_oldest[0]}.{_oldest[1]} or later, found {_version}")

from .config import MoBAConfig
from .moba_triton import moba_attn_varlen_triton
from .ops import chunk_mass, moba_attn_varlen, select_chunks, sparse_attn_varlen
from .replay import RecordedSelection, record_selection, replay_selection

if TYPE_CHECKING:
    from .huggingface import register_moba
    from .megatron.core_attention import MoBACoreAttention
    from .megatron.layer_specs import get_moba_layer_local_spec, get_moba_layer_with_transformer_engine_spec

_LAZY_NAMES = {"MoBACoreAttention": "megatron.core_attention", "register_moba": "huggingface",
               "get_moba_layer_local_spec": "megatron.layer_specs",
               "get_moba_layer_with_transformer_engine_spec": "megatron.layer_specs"}

__version__ = "0.2.0"
__all__ = ["MoBAConfig", "MoBACoreAttention", "RecordedSelection", "chunk_mass", "get_moba_layer_local_spec",
           "get_moba_layer_with_transformer_engine_spec", "moba_attn_varlen", "moba_attn_varlen_triton",
           "record_selection", "register_moba", "replay_selection", "select_chunks", "sparse_attn_varlen"]


def __getattr__(name: str):
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module 'moba_megatron' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY_NAMES[name]}", __name__), name)
