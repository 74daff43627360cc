"""Layer specs with MoBA core attention, for a model builder of one's own: they take every option of Megatron's."""
import importlib.util

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec

from ..config import MoBAConfig
from .core_attention import MoBACoreAttentionSubmodules, core_attention_beside


def get_moba_layer_local_spec(moba_config: MoBAConfig | None = None, selector=None, **kwargs) -> ModuleSpec:
    """Megatron's ``get_gpt_layer_local_spec``, which takes kwargs, with MoBA core attention; no Transformer Engine.

    Args:
        moba_config: None for the default at the time the model is built, see :class:`~moba_megatron.MoBACoreAttention`.
        selector: chooses chunks in place of MoBA's gate, see :class:`.core_attention.MoBACoreAttentionSubmodules`.
    """
    return with_moba_core_attention(gpt_layer_specs.get_gpt_layer_local_spec(**kwargs), moba_config, selector)


def get_moba_layer_with_transformer_engine_spec(moba_config: MoBAConfig | None = None, selector=None,
                                                **kwargs) -> ModuleSpec:
    """Megatron's ``get_gpt_layer_with_transformer_engine_spec``, which takes kwargs, with MoBA core attention.
    ``moba_config``, ``selector``: as :func:`get_moba_layer_local_spec`. ImportError without Transformer Engine."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise ImportError("the Transformer Engine spec needs transformer-engine (pip install moba-megatron[te], CUDA "
                          "only): without it use get_moba_layer_local_spec, or "
                          "--spec moba_megatron.layer_specs moba_layer_spec")
    return with_moba_core_attention(gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**kwargs), moba_config,
                                    selector)


def with_moba_core_attention(layer_spec: ModuleSpec, moba_config: MoBAConfig | None = None,
                             selector=None) -> ModuleSpec:
    """Replaces the core attention of a transformer layer's spec, in place, and returns the spec. Where that is
    Transformer Engine's, layers that ``moba_config`` names dense keep it. ValueError where the spec has no self
    attention with a core attention."""
    attention = getattr(layer_spec.submodules, "self_attention", None)
    submodules = getattr(attention, "submodules", None) or getattr(attention, "keywords", {}).get("submodules")
    if not hasattr(submodules, "core_attention"):
        raise ValueError(f"layer_spec must have submodules.self_attention with a core_attention, got {layer_spec}")
    submodules.core_attention = ModuleSpec(
        core_attention_beside(submodules.core_attention), params={"moba_config": moba_config},
        submodules=None if selector is None else MoBACoreAttentionSubmodules(selector))
    return layer_spec
