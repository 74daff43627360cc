"""Layer specs with MoBA core attention for Megatron-LM's ``--spec``, and the functions that make them.

``--spec moba_megatron.layer_specs moba_layer_spec`` takes a ready ModuleSpec: plain GPT layers, hyper-parameters from
the default config or from the ``MOBA_*`` environment variables. A model builder of one's own calls the functions, which
take every option of Megatron's (experts, qk_layernorm, multi_latent_attention, ...).
"""
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from .megatron.layer_specs import (
    get_moba_layer_local_spec,
    get_moba_layer_with_transformer_engine_spec,
    with_moba_core_attention,
)

__all__ = ["get_moba_layer_local_spec", "get_moba_layer_with_transformer_engine_spec", "moba_layer_spec",
           "moba_layer_te_spec", "with_moba_core_attention"]


class _NeedsTransformerEngine(BaseTransformerLayer):
    """Stands for the Transformer Engine layer where that is not installed: building it says what to do. It is a layer:
    ``--spec`` takes it from the module's dictionary, and Megatron builds nothing there but transformer layers."""

    def __init__(self, *args, **kwargs):
        get_moba_layer_with_transformer_engine_spec()


moba_layer_spec = get_moba_layer_local_spec()
moba_layer_te_spec = (get_moba_layer_with_transformer_engine_spec() if gpt_layer_specs.HAVE_TE
                      else ModuleSpec(_NeedsTransformerEngine))
