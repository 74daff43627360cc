"""Megatron's FSDPs and distributed optimizer with MoBA and its key convolution, eager and compiled: DDP's losses, its
weight decay. gloo.
"""
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("stands for GPUs with the CPU, which needs a machine without one", allow_module_level=True)

WRAPPERS = ["torch-fsdp2", "megatron-fsdp"]
COMPILED = [f"{wrapper}, compiled" for wrapper in WRAPPERS]
ALL = ["ddp", "distributed optimizer", *WRAPPERS, *COMPILED]
TOKENS, VOCAB, STEPS = 96, 32, 5
FILTERS = 2 * 2 * 3 * 8  # layers, kv heads, taps, head dim


class NoCudaDevice(TorchFunctionMode):
    """Without a GPU the current device's name is "cpu", and Megatron-FSDP puts "cuda:" before it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], str) and args[0] == "cuda:cpu":
            return torch.device("cpu")
        return func(*args, **(kwargs or {}))


def wrap(wrapper, model):
    """The model in Megatron's wrapper, and Megatron's optimizer for it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed import torch_fully_sharded_data_parallel as torch_fsdp2
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    sharded = wrapper == "megatron-fsdp"
    shared = sharded or wrapper == "distributed optimizer"
    options = dict(use_megatron_fsdp=True, data_parallel_sharding_strategy="optim_grads_params",
                   overlap_grad_reduce=True, overlap_param_gather=True,
                   gradient_reduce_div_fusion=False) if sharded else {}  # gloo cannot multiply as it adds
    config = DistributedDataParallelConfig(use_distributed_optimizer=shared, **options)
    torch_fsdp2.DeviceMesh = SimpleNamespace(from_group=lambda group, device: DeviceMesh.from_group(group, "cpu"))
    kinds = {"megatron-fsdp": FullyShardedDataParallel, "torch-fsdp2": torch_fsdp2.TorchFullyShardedDataParallel}
    wrapped = kinds.get(wrapper, DistributedDataParallel)(config=model.config, ddp_config=config, module=model)
    optimizer = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.5, clip_grad=0.0, use_distributed_optimizer=shared), [wrapped])
    OptimizerParamScheduler(  # sets the weight decay of each group
        optimizer, init_lr=1e-2, max_lr=1e-2, min_lr=1e-2, lr_warmup_steps=0, lr_decay_steps=STEPS,
        lr_decay_style="constant", start_wd=0.5, end_wd=0.5, wd_incr_steps=STEPS, wd_incr_style="constant")
    return wrapped, optimizer


def compile_parts(model):
    """Compiles each layer's attention and MLP; the layers' own forward breaks into nothing but single calls."""
    torch.compiler.set_stance("default")  # megatron_on_cpu may have left another
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.decoder.layers:
        for part in (layer.self_attention, layer.mlp):
            part.forward = torch.compile(part.forward, backend="aot_eager")


def held(model):
    """This rank's part of the parameters, as the optimizer changes them."""
    buffers = getattr(model, "param_and_grad_buffer", None)
    named = buffers.optimizer_named_parameters if hasattr(buffers, "optimizer_named_parameters") else (
        model.named_parameters())
    return {name: (p.to_local() if hasattr(p, "to_local") else p).detach().clone() for name, p in named}


def train(wrapper, rank):
    """Losses of a few steps, each rank with its own tokens, what this rank holds, what weight decay changed, graphs.

    The first step has no gradient: what it changes is decayed.
    """
    import megatron_on_cpu
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from moba_megatron import MoBAConfig, get_moba_layer_local_spec

    megatron_on_cpu.enable()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48,
        attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, transformer_impl="local",
        gradient_accumulation_fusion=False)
    model = GPTModel(config, get_moba_layer_local_spec(MoBAConfig(chunk_size=16, topk=2, key_conv=3)), VOCAB, TOKENS,
                     position_embedding_type="rope", share_embeddings_and_output_weights=False)
    for name, parameter in model.named_parameters():
        if "key_convolution" in name:
            torch.nn.init.normal_(parameter)
    wrapper, _, compiled = wrapper.partition(", ")
    if compiled:
        compile_parts(model)
    model, optimizer = wrap(wrapper, model)
    losses, before = [], held(model)
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        tokens = torch.randint(0, VOCAB, (1, TOKENS + 1), generator=torch.Generator().manual_seed(9 * step + rank))
        loss = model(tokens[:, :-1], torch.arange(TOKENS)[None], None, labels=tokens[:, 1:]).mean()
        (loss * min(step, 1)).backward()
        model.finish_grad_sync()
        optimizer.step()
        losses.append(loss.item())
        if step == 0:
            after = held(model)
            decayed = {name for name, part in after.items() if not torch.equal(part, before[name])}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return losses, {name: part.numel() for name, part in after.items()}, decayed, graphs


def everything(rank, size):
    import gpt  # noqa: F401: puts the examples on the path
    with NoCudaDevice():
        return {wrapper: train(wrapper, rank) for wrapper in ALL}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("wrapper", ALL[1:])
def test_losses_equal_ddp(results, wrapper):
    for result in results:
        losses, parts, _, graphs = result[wrapper]
        expected, whole, *_ = result["ddp"]
        assert losses == pytest.approx(expected, rel=1e-5)  # fp32; gradients are added up in another order
        assert len(set(expected)) == STEPS
        assert wrapper not in WRAPPERS + COMPILED or sum(parts.values()) < 0.6 * sum(whole.values())
        assert (graphs >= 4) == (wrapper in COMPILED), "attention and MLP of two layers"


@pytest.mark.parametrize("wrapper", ALL)
def test_weight_decay_spares_the_key_convolution(results, wrapper):
    filters = sum(n for result in results for name, n in result[wrapper][1].items() if "key_convolution" in name)
    decayed = set.union(*(result[wrapper][2] for result in results))
    assert filters >= FILTERS and any("linear_qkv.weight" in name for name in decayed)
    assert not [name for name in decayed if "key_convolution" in name]
