"""Megatron's hybrid models (HybridModel from 0.19 on, MambaModel before): attention layers get MoBA by a hook."""
import argparse
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")
TOKENS, PATTERN = 64, "*-*-"  # attention and feed-forward layers; Mamba layers need packages of their own


def classes():
    """Model, stack, and the stack's submodules."""
    try:
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel
        return HybridModel, HybridStack, HybridStackSubmodules
    except ImportError:
        from megatron.core.models.mamba.mamba_model import MambaModel
        from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
        return MambaModel, MambaStack, MambaStackSubmodules


def layer_specs():
    """Of attention alone and of feed-forward alone, from Megatron's local layer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    whole = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    attention = TransformerLayerSubmodules(input_layernorm=whole.input_layernorm, self_attention=whole.self_attention,
                                           self_attn_bda=whole.self_attn_bda)
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=whole.pre_mlp_layernorm, mlp=whole.mlp, mlp_bda=whole.mlp_bda)
    return ModuleSpec(module=TransformerLayer, submodules=attention), ModuleSpec(module=MLPLayer, submodules=mlp)


def build(*flags):
    """The model as the host builds it with these flags."""
    from megatron.core.transformer import ModuleSpec, TransformerConfig

    from moba_megatron.megatron.arguments import add_moba_arguments

    arguments = add_moba_arguments(argparse.ArgumentParser(), "full", "full").parse_args(flags)
    sys.modules["megatron.training.global_vars"] = SimpleNamespace(_GLOBAL_ARGS=arguments)
    model, stack, submodules = classes()
    attention, mlp = layer_specs()
    spec = ModuleSpec(module=stack, submodules=submodules(attention_layer=attention, mlp_layer=mlp))
    known = inspect.signature(model.__init__).parameters
    options = {"hybrid_stack_spec" if "hybrid_stack_spec" in known else "mamba_stack_spec": spec,
               "hybrid_layer_pattern" if "hybrid_layer_pattern" in known else "hybrid_override_pattern": PATTERN}
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8, ffn_hidden_size=48,
        attention_dropout=0.0, hidden_dropout=0.0, normalization="RMSNorm", add_bias_linear=False,
        gated_linear_unit=True, use_cpu_initialization=True, params_dtype=torch.float64, masked_softmax_fusion=False)
    return model(config, **options, vocab_size=64, max_sequence_length=TOKENS, position_embedding_type="rope").double()


def losses_and_gradients(model):
    tokens = torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
    losses = model(tokens, torch.arange(TOKENS).expand(2, -1), mask, labels=tokens.roll(-1, 1))
    losses.sum().backward()
    return [losses.detach(), *(x.grad for x in model.parameters())]


def models(rank, size):
    """Of full attention, of MoBA that chooses everything, and of MoBA: results, and numbers of MoBA's layers."""
    from gpt import parallel_state
    from megatron.core import tensor_parallel

    from moba_megatron import MoBAConfig, MoBACoreAttention
    from moba_megatron.megatron import patching

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    stack = classes()[1]
    # the norm behind the last layer is Transformer Engine's
    sys.modules[stack.__module__].TENorm = lambda config, hidden_size, eps: torch.nn.RMSNorm(hidden_size, eps)
    hooks = [hook for module, name, hook in patching.OPTIONAL_HOOKS if patching._owner(module, name) is stack]
    assert hooks  # one; in 0.19 a second finds the same class by its old name
    for hook in hooks:  # what patching.apply does in Megatron-LM
        stack.__init__ = hook(stack.__init__)
    moba = "--attention", "moba", "--moba-chunk-size", "8", "--moba-topk"
    found = []
    for flags in ((), (*moba, "8"), (*moba, "2")):
        model = build(*flags)
        layers = [layer.layer_number for layer in model.decoder.layers
                  if any(isinstance(x, MoBACoreAttention) for x in layer.modules())]
        if flags:
            patching.check_model([model], MoBAConfig(8, int(flags[-1])))
        found.append((losses_and_gradients(model), layers))
    return found


def test_attention_layers_of_a_hybrid_model(tmp_path):
    (full, none), (everything, layers), (sparse, same) = run_ranks(models, 1, tmp_path)[0]
    assert none == [] and layers == same == [1, 3]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(full, everything))
    assert (full[0] - sparse[0]).abs().max() > 1e-3
