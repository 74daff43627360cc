"""Trains a small GPT with MoBA and its key convolution under Megatron's data parallel wrappers, eager and compiled."""
from types import SimpleNamespace

import torch
from torch.distributed.device_mesh import DeviceMesh

FSDPS = ["torch-fsdp2", "megatron-fsdp"]
COMPILED = [f"{wrapper}, compiled" for wrapper in FSDPS]
WRAPPERS = ["ddp", "distributed optimizer", *FSDPS, *COMPILED]
TOKENS, VOCAB, STEPS = 96, 32, 5
FILTERS = 2 * 2 * 3 * 8  # layers, kv heads, taps, head dim


def wrap(wrapper, model, lr):
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
    if not torch.cuda.is_available():
        torch_fsdp2.DeviceMesh = SimpleNamespace(from_group=lambda group, device: DeviceMesh.from_group(group, "cpu"))
    kinds = {"megatron-fsdp": FullyShardedDataParallel, "torch-fsdp2": torch_fsdp2.TorchFullyShardedDataParallel}
    wrapped = kinds.get(wrapper, DistributedDataParallel)(config=model.config, ddp_config=config, module=model)
    optimizer = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=lr, weight_decay=0.5, clip_grad=0.0, use_distributed_optimizer=shared,
        bf16=model.config.bf16, params_dtype=model.config.params_dtype), [wrapped])
    OptimizerParamScheduler(  # sets the weight decay of each group
        optimizer, init_lr=lr, max_lr=lr, min_lr=lr, lr_warmup_steps=0, lr_decay_steps=STEPS,
        lr_decay_style="constant", start_wd=0.5, end_wd=0.5, wd_incr_steps=STEPS, wd_incr_style="constant")
    return wrapped, optimizer


def compile_parts(model, backend):
    """Compiles each layer's attention and MLP; the layers' own forward breaks into nothing but single calls."""
    torch.compiler.set_stance("default")  # megatron_on_cpu may have left another
    for layer in model.decoder.layers:
        for part in (layer.self_attention, layer.mlp):
            part.forward = torch.compile(part.forward, backend=backend)


def held(model):
    """This rank's part of the parameters, as the optimizer changes them."""
    buffers = getattr(model, "param_and_grad_buffer", None)
    named = buffers.optimizer_named_parameters if hasattr(buffers, "optimizer_named_parameters") else (
        model.named_parameters())
    return {name: (p.to_local() if hasattr(p, "to_local") else p).detach().clone() for name, p in named}


def train(wrapper, rank, dtype=torch.float32, backend="aot_eager", head_dim=8, lr=1e-2):
    """Losses of a few steps, each rank with tokens of its own, what this rank holds, what weight decay changed, graphs.

    The first step has no gradient: what it changes is decayed.

    Args:
        wrapper: one of WRAPPERS.
        rank: its tokens.
        dtype: of the parameters and activations.
        backend: of torch.compile.
        head_dim: of four heads.
        lr: of Adam.
    """
    import megatron_on_cpu
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from moba_megatron import MoBAConfig, get_moba_layer_local_spec

    megatron_on_cpu.enable()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=4 * head_dim, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48,
        attention_dropout=0.0, hidden_dropout=0.0, use_cpu_initialization=True, transformer_impl="local",
        gradient_accumulation_fusion=False, bf16=dtype == torch.bfloat16, params_dtype=dtype)
    model = GPTModel(config, get_moba_layer_local_spec(MoBAConfig(chunk_size=16, topk=2, key_conv=3)), VOCAB, TOKENS,
                     position_embedding_type="rope", share_embeddings_and_output_weights=False)
    for name, parameter in model.named_parameters():
        if "key_convolution" in name:
            torch.nn.init.normal_(parameter)
    model = model.to(device, dtype)  # norms too, as Float16Module does
    wrapper, _, compiled = wrapper.partition(", ")
    if compiled:
        compile_parts(model, backend)
    model, optimizer = wrap(wrapper, model, lr)
    losses, before = [], held(model)
    tokens = torch.randint(0, VOCAB, (1, TOKENS + 1), generator=torch.Generator().manual_seed(rank)).to(device)
    position_ids = torch.arange(TOKENS, device=device)[None]
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], position_ids, None, labels=tokens[:, 1:]).float().mean()
        (loss * min(step, 1)).backward()
        model.finish_grad_sync()
        optimizer.step()
        losses.append(loss.item())
        if step == 0:
            after = held(model)
            decayed = {name for name, part in after.items() if not torch.equal(part, before[name])}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return losses, {name: part.numel() for name, part in after.items()}, decayed, graphs
