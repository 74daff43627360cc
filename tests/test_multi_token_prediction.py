"""Multi-token prediction: layers are numbered behind the model's, dense with its last one, and count in the FLOPs."""
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")
LAYERS, PREDICTIONS, TOKENS = 3, 2, 64


def numbers(moba):
    """Of the layers of a GPT that attend through MoBA, and of those that choose chunks in a training step."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    from moba_megatron import MoBACoreAttention, get_moba_layer_local_spec
    from moba_megatron.megatron import core_attention, patching

    config = TransformerConfig(
        num_layers=LAYERS, mtp_num_layers=PREDICTIONS, mtp_loss_scaling_factor=0.1, hidden_size=32,
        num_attention_heads=4, attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True,
        params_dtype=torch.float64)
    layer = get_moba_layer_local_spec(moba)
    model = GPTModel(config, layer, 64, TOKENS, position_embedding_type="rope",
                     mtp_block_spec=get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)).double()
    patching.check_model([model], moba)
    sparse = []
    before = core_attention.set_observer(lambda module, q, k, segments: sparse.append(module.layer_number))
    tokens = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    model(tokens, torch.arange(TOKENS)[None], None, labels=tokens).sum().backward()
    core_attention.set_observer(before)
    return [x.layer_number for x in model.modules() if isinstance(x, MoBACoreAttention)], sparse


def models(rank, size):
    from gpt import parallel_state, tensor_parallel

    from moba_megatron import MoBAConfig

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return [numbers(MoBAConfig(chunk_size=8, topk=2, full_attention_layers=rule)) for rule in ("none", "last:1")]


def test_layers_follow_the_model(tmp_path):
    from moba_megatron.megatron.flops import attention_layers

    (every, sparse), (same, without_last) = run_ranks(models, 1, tmp_path)[0]
    assert every == same == sparse == [1, 2, 3, 4, 5] and without_last == [1, 2]
    assert attention_layers(SimpleNamespace(num_layers=LAYERS, mtp_num_layers=PREDICTIONS)) == every
