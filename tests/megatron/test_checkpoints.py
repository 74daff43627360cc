"""Without the key convolution MoBA has no parameters: its checkpoints are those of dense GPT models, both ways.

With it, a dense checkpoint takes it on unchanged, and its filters are resharded with the kv heads; layers without it
have none in the checkpoint, and a filter never comes to another layer than its own.
"""
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")

# kind of attention, tensor and pipeline parallel size; each loads what the one before it saved
CHAIN = [("moba", 2, 1), ("dense", 1, 2), ("moba", 1, 1), ("dense", 2, 1)]


def build(kind, tp=1, pp=1, dense="none"):
    import megatron_on_cpu

    megatron_on_cpu.enable()
    import model_parallel
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from moba_megatron import MoBAConfig, get_moba_layer_local_spec

    model_parallel.initialize(tp, pp)
    torch.manual_seed(3 if kind == "moba" else 4)
    config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                               attention_dropout=0.0, use_cpu_initialization=True, pipeline_dtype=torch.float32,
                               tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    spec = get_gpt_layer_local_spec() if kind == "dense" else get_moba_layer_local_spec(
        MoBAConfig(16, 2, dense, key_conv=3 if kind == "convolution" else 0))
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


def optimizer_of(model):
    """Megatron's plain optimizer, with the states of a first step."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    adam = torch.optim.Adam(model.parameters())
    optimizer = FP32Optimizer(adam, OptimizerConfig(), lambda *_: None)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    adam.step()
    return optimizer


def filters(model, optimizer=None):
    """Each layer's filter, or the optimizer's first moment of it, by the layer's number."""
    found = {layer.layer_number: layer.self_attention.core_attention.key_convolution for layer in model.decoder.layers}
    found = {number: conv.weight for number, conv in found.items() if conv is not None}
    return found if optimizer is None else {n: optimizer.optimizer.state[w]["exp_avg"] for n, w in found.items()}


def convolution(rank, size, directory):
    """A dense model takes on the key convolution, which learns at TP 2 and PP 2; saved, and loaded unspread.

    Returns:
        logits before and after; what each layer learnt and what was loaded; errors of loading into other models.
    """
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    tokens = torch.arange(64)[None] * 7 % 64
    positions = torch.arange(64)[None]

    def save(name, state):
        if rank == 0:
            Path(f"{directory}/{name}").mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(state, f"{directory}/{name}")

    def load(model, name, **state):
        state = dist_checkpointing.load({"model": model.sharded_state_dict(), **state}, f"{directory}/{name}")
        model.load_state_dict(state["model"], strict=True)
        return state

    moba = build("moba", 2, dense="2,4")
    save("dense", {"model": moba.sharded_state_dict()})
    fresh = build("convolution", 2, dense="2,4")
    load(fresh, "dense")  # with Megatron's own strictness
    logits = [m.eval()(tokens, positions, None, runtime_gather_output=True).detach() for m in (moba, fresh)]

    learnt = build("convolution", 1, 2, dense="2,4")
    load(learnt, "dense")
    for number, weight in filters(learnt).items():
        weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    optimizer = optimizer_of(learnt)
    for number, moment in filters(learnt, optimizer).items():
        moment.fill_(number)
    sharded = learnt.sharded_state_dict()
    save("learnt", {"model": sharded, "optimizer": optimizer.sharded_state_dict(sharded)})
    expected = {n: w.detach().clone() for n, w in filters(learnt).items()}

    spread = build("convolution", 2, dense="2,4")
    optimizer, sharded = optimizer_of(spread), spread.sharded_state_dict()
    state = load(spread, "learnt", optimizer=optimizer.sharded_state_dict(sharded, is_loading=True))
    gathered = {}
    for number, weight in filters(spread).items():
        gathered[number] = tensor_parallel.gather_from_tensor_model_parallel_region(weight.detach())
    numbers = {id(parameter): i for i, parameter in enumerate(spread.parameters())}
    moments = {n: state["optimizer"]["state"][numbers[id(w)]]["exp_avg"].unique().tolist()
               for n, w in filters(spread).items()}

    taken = build("convolution", 2, dense="2,4")  # an optimizer's states are new with the filters
    optimizer, sharded = optimizer_of(taken), taken.sharded_state_dict()
    save("plain", {"model": moba.sharded_state_dict(), "optimizer": plain_optimizer(moba)})
    load(taken, "plain", optimizer=optimizer.sharded_state_dict(sharded, is_loading=True))

    every = build("convolution", 2)
    for weight in filters(every).values():
        weight.data += parallel_state.get_tensor_model_parallel_rank() + torch.arange(len(weight))
    stacked = every.sharded_state_dict()
    for name, tensor in stacked.items():
        if "key_convolution" in name:
            stacked[name] = as_before(tensor)
    save("stacked", {"model": stacked})
    after = build("convolution", 2)
    load(after, "stacked")
    same = all(torch.equal(a, b) for a, b in zip(filters(every).values(), filters(after).values()))
    try:
        load(build("convolution", 2, dense="1,4"), "learnt")
        error = None
    except ValueError as refused:
        error = str(refused)
    return logits, (expected, gathered, moments), (len(filters(after)), same), error


def plain_optimizer(model):
    return optimizer_of(model).sharded_state_dict(model.sharded_state_dict())


def as_before(tensor):
    """A filter's part in a checkpoint as it was when all layers were stacked under one name."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor

    layer = int(tensor.key.split("layer_")[1].split(".")[0])
    return ShardedTensor.from_rank_offsets(
        tensor.key.replace(f"layer_{layer}.", ""), tensor.data, (0, layer, 4),
        (1, parallel_state.get_tensor_model_parallel_rank(), 2), prepend_axis_num=1)


def test_the_key_convolution_is_taken_on_and_resharded(tmp_path):
    whole = {}
    results = run_ranks(convolution, 2, tmp_path, str(tmp_path))
    for (before, fresh), (expected, _, _), stacked, error in results:
        assert torch.equal(before, fresh)
        assert stacked == (4, True)
        assert "the checkpoint has key convolutions, but no decoder.layers.self_attention.core_attention" in error
        assert "--moba-full-attention-layers" in error
        whole |= expected
    assert sorted(whole) == [1, 3] and not torch.equal(whole[1], whole[3])
    for _, (_, gathered, moments), _, _ in results:
        assert gathered.keys() == whole.keys() and all(torch.equal(gathered[n], whole[n]) for n in whole)
        assert moments == {1: [1.0], 3: [3.0]}


def test_dense_and_moba_checkpoints_are_the_same(tmp_path):
    for wholes, keys, sharded in run_ranks(interchange, 2, tmp_path, str(tmp_path)):
        assert keys[0] == keys[1] and sharded[0] == sharded[1]
        first, last = wholes
        assert first.keys() == last.keys() and len(first) > 10
        assert all(torch.equal(first[name], last[name]) for name in first)
