"""Megatron-FSDP and Megatron's torch FSDP2 around a GPT with MoBA and its key convolution: DDP's losses. Two gloo ranks."""
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
TOKENS, VOCAB, STEPS = 96, 32, 4


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

    sharded = wrapper == "megatron-fsdp"
    options = dict(use_megatron_fsdp=True, data_parallel_sharding_strategy="optim_grads_params",
                   overlap_grad_reduce=True, overlap_param_gather=True,
                   gradient_reduce_div_fusion=False) if sharded else {}  # gloo cannot multiply as it adds
    config = DistributedDataParallelConfig(use_distributed_optimizer=sharded, **options)
    torch_fsdp2.DeviceMesh = SimpleNamespace(from_group=lambda group, device: DeviceMesh.from_group(group, "cpu"))
    kinds = {"ddp": DistributedDataParallel, "megatron-fsdp": FullyShardedDataParallel,
             "torch-fsdp2": torch_fsdp2.TorchFullyShardedDataParallel}
    wrapped = kinds[wrapper](config=model.config, ddp_config=config, module=model)
    optimizer = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=sharded), [wrapped])
    return wrapped, optimizer


def train(wrapper, rank):
    """Losses of a few steps, each rank with its own tokens, and how many parameters this rank holds."""
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
    model, optimizer = wrap(wrapper, model)
    losses = []
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        tokens = torch.randint(0, VOCAB, (1, TOKENS + 1), generator=torch.Generator().manual_seed(9 * step + rank))
        loss = model(tokens[:, :-1], torch.arange(TOKENS)[None], None, labels=tokens[:, 1:]).mean()
        loss.backward()
        model.finish_grad_sync()
        optimizer.step()
        losses.append(loss.item())
    parameters = model.parameters()
    if wrapper == "megatron-fsdp":
        parameters = [p for _, p in model.param_and_grad_buffer.optimizer_named_parameters]
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)
    return losses, held


def everything(rank, size):
    import gpt  # noqa: F401: puts the examples on the path
    with NoCudaDevice():
        return {wrapper: train(wrapper, rank) for wrapper in ["ddp", *WRAPPERS]}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_losses_equal_ddp(results, wrapper):
    for result in results:
        losses, expected = result[wrapper][0], result["ddp"][0]
        assert losses == pytest.approx(expected, rel=1e-5)  # fp32; gradients are added up in another order
        assert len(set(expected)) == STEPS and result[wrapper][1] < 0.6 * result["ddp"][1]
