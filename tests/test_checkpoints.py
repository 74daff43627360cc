"""Without the key convolution MoBA has no parameters: its checkpoints are those of dense GPT models, both ways.

With it, a dense checkpoint takes it on unchanged, and its filters are resharded with the kv heads.
"""
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")

# kind of attention, tensor and pipeline parallel size; each loads what the one before it saved
CHAIN = [("moba", 2, 1), ("dense", 1, 2), ("moba", 1, 1), ("dense", 2, 1)]


def build(kind, tp=1, pp=1):
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import megatron_on_cpu

    megatron_on_cpu.enable()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from moba_megatron import MoBAConfig, get_moba_layer_local_spec

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(3 if kind == "moba" else 4)
    config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                               attention_dropout=0.0, use_cpu_initialization=True, pipeline_dtype=torch.float32,
                               tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    spec = get_gpt_layer_local_spec() if kind == "dense" else get_moba_layer_local_spec(
        MoBAConfig(16, 2, key_conv=3 if kind == "convolution" else 0))
    return GPTModel(config, spec, 64, 64, position_embedding_type="rope", share_embeddings_and_output_weights=False,
                    pre_process=parallel_state.is_pipeline_first_stage(),
                    post_process=parallel_state.is_pipeline_last_stage())


def interchange(rank, size, directory):
    """Runs the chain; returns the whole model's parameters after its unspread links, and the keys of both kinds."""
    from megatron.core import dist_checkpointing

    wholes = []
    for number, (kind, tp, pp) in enumerate([*CHAIN, ("dense", 1, 1)]):
        model = build(kind, tp, pp)
        if number:
            state = dist_checkpointing.load({"model": model.sharded_state_dict()}, f"{directory}/{number - 1}")
            model.load_state_dict(state["model"])
        if rank == 0:
            Path(f"{directory}/{number}").mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, f"{directory}/{number}")
        if (tp, pp) == (1, 1):
            wholes.append({name: p.detach().clone() for name, p in model.named_parameters()})
    moba, dense = build("moba"), build("dense")
    plain = moba.state_dict()
    dense.load_state_dict(plain, strict=True)
    moba.load_state_dict(dense.state_dict(), strict=True)
    sharded = [{getattr(value, "key", name) for name, value in m.sharded_state_dict().items()} for m in (moba, dense)]
    return wholes, [list(plain), list(dense.state_dict())], sharded


def convolution(rank, size, directory):
    """A dense model takes on the key convolution, which learns at TP 2; saved, and loaded unspread.

    Returns:
        logits of the dense model, with the fresh convolution, and with what it learnt before and after resharding.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.validation import StrictHandling

    tokens = torch.arange(64)[None] * 7 % 64
    positions = torch.arange(64)[None]
    logits = []
    if rank == 0:
        Path(f"{directory}/dense").mkdir()
        Path(f"{directory}/learnt").mkdir()
    moba = build("moba", 2)
    torch.distributed.barrier()
    dist_checkpointing.save({"model": moba.sharded_state_dict()}, f"{directory}/dense")
    model = build("convolution", 2)
    missing, _ = model.load_state_dict(dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, f"{directory}/dense", strict=StrictHandling.LOG_UNEXPECTED)["model"],
        strict=False)
    for m in (moba, model):
        logits.append(m.eval()(tokens, positions, None, runtime_gather_output=True))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        for layer in model.decoder.layers:
            weight = layer.self_attention.core_attention.key_convolution.weight
            whole = torch.randn(2 * weight.numel(), generator=generator)
            weight.copy_(whole.chunk(2)[parallel_state.get_tensor_model_parallel_rank()])
    logits.append(model(tokens, positions, None, runtime_gather_output=True))
    dist_checkpointing.save({"model": model.sharded_state_dict()}, f"{directory}/learnt")
    whole = build("convolution")
    state = dist_checkpointing.load({"model": whole.sharded_state_dict()}, f"{directory}/learnt")
    whole.load_state_dict(state["model"])
    logits.append(whole.eval()(tokens, positions, None))
    return [x.detach() for x in logits], sorted(missing)


def test_the_key_convolution_is_taken_on_and_resharded(tmp_path):
    for (before, fresh, learnt, resharded), missing in run_ranks(convolution, 2, tmp_path, str(tmp_path), seconds=240):
        assert missing == [f"decoder.layers.{i}.self_attention.core_attention.key_convolution.weight" for i in (0, 1)]
        assert torch.equal(before, fresh)
        assert (learnt - fresh).abs().max() > 1e-3
        assert torch.allclose(resharded, learnt, rtol=1e-4, atol=1e-5)


def test_dense_and_moba_checkpoints_are_the_same(tmp_path):
    for wholes, keys, sharded in run_ranks(interchange, 2, tmp_path, str(tmp_path), seconds=240):
        assert keys[0] == keys[1] and sharded[0] == sharded[1]
        first, last = wholes
        assert first.keys() == last.keys() and len(first) > 10
        assert all(torch.equal(first[name], last[name]) for name in first)
