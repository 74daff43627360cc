"""Multi-token prediction: layers are numbered behind the model's, dense with its last one, and count in the FLOPs."""
import sys
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")
LAYERS, PREDICTIONS, TOKENS = 3, 2, 64


def by_builder(moba):
    from moba_megatron import get_moba_layer_local_spec

    return get_moba_layer_local_spec(moba)


def by_spec(moba):
    """As ``--spec moba_megatron.layer_specs moba_layer_spec``."""
    from megatron.core.transformer.spec_utils import import_module

    from moba_megatron.config import set_default_config

    set_default_config(moba)
    return import_module(["moba_megatron.layer_specs", "moba_layer_spec"])


def by_launcher(moba):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moba_megatron.megatron import patching

    host(moba)
    module, name, hook = patching.HOOKS[0]
    assert name == "LocalSpecProvider.core_attention" and patching._hook(module, name, hook)
    try:
        return get_gpt_layer_local_spec()
    finally:
        patching.undo()


def by_patch(moba):
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from moba_megatron.megatron_lm import core_attention_for

    host(moba)
    original = LocalSpecProvider.core_attention
    LocalSpecProvider.core_attention = lambda self: core_attention_for(DotProductAttention)
    try:
        return get_gpt_layer_local_spec()
    finally:
        LocalSpecProvider.core_attention = original


ROUTES = (by_builder, by_spec, by_launcher, by_patch)


def host(moba):
    """Megatron-LM's arguments, as of ``--attention moba`` and the config's flags."""
    import argparse
    from dataclasses import asdict

    from moba_megatron.megatron.arguments import add_moba_arguments

    args = add_moba_arguments(argparse.ArgumentParser()).parse_args([])
    vars(args).update({f"moba_{name}": value for name, value in asdict(moba).items()})
    sys.modules["megatron.training.global_vars"] = SimpleNamespace(_GLOBAL_ARGS=args)


def numbers(route, moba):
    """Of the layers of a GPT that attend through MoBA, and of those that choose chunks in a training step."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    from moba_megatron import MoBACoreAttention
    from moba_megatron.config import set_default_config
    from moba_megatron.megatron import core_attention, patching

    config = TransformerConfig(
        num_layers=LAYERS, mtp_num_layers=PREDICTIONS, mtp_loss_scaling_factor=0.1, hidden_size=32,
        num_attention_heads=4, attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True,
        params_dtype=torch.float64)
    layer = route(moba)
    model = GPTModel(config, layer, 64, TOKENS, position_embedding_type="rope",
                     mtp_block_spec=get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)).double()
    set_default_config(None)
    sys.modules.pop("megatron.training.global_vars", None)
    patching.check_model([model], moba)
    sparse = []
    before = core_attention.set_observer(lambda module, q, k, segments: sparse.append(module.layer_number))
    tokens = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    model(tokens, torch.arange(TOKENS)[None], None, labels=tokens).sum().backward()
    core_attention.set_observer(before)
    return [x.layer_number for x in model.modules() if isinstance(x, MoBACoreAttention)], sparse


def models(rank, size):
    from gpt import parallel_state
    from megatron.core import tensor_parallel

    from moba_megatron import MoBAConfig

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return [[numbers(route, MoBAConfig(chunk_size=8, topk=2, full_attention_layers=rule))
             for rule in ("none", "last:1")] for route in ROUTES]


def test_layers_follow_the_model(tmp_path):
    """Whether a spec was made by a builder, by ``--spec``, by the launcher's hook or by a patched provider."""
    from moba_megatron.megatron.flops import attention_layers

    results = run_ranks(models, 1, tmp_path)[0]
    assert len(results) == len(ROUTES)
    for (every, sparse), (same, without_last) in results:
        assert every == same == sparse == [1, 2, 3, 4, 5] and without_last == [1, 2]
    assert attention_layers(SimpleNamespace(num_layers=LAYERS, mtp_num_layers=PREDICTIONS)) == every
