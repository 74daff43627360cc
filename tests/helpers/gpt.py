"""A small GPT in fp64 on any parallel layout, its shards of common weights, and the rows that a rank holds.

On GPUs a larger one in fp32. MOBA_TEST_DTYPE names another dtype.
"""
import os
from dataclasses import dataclass

import megatron_on_cpu
import torch

megatron_on_cpu.enable()

import model_parallel  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402

from moba_megatron import MoBAConfig, get_moba_layer_local_spec, torch_stages  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = getattr(torch, os.environ.get("MOBA_TEST_DTYPE", "float32" if GPU else "float64"))
NUM_LAYERS, VOCAB, BATCH = 4, 64, 2
WIDTH, SEQLEN = (256, 8 * 119) if GPU else (32, 8 * 19)
# pieces of 19 and 38 do not divide into chunks
MOBA = MoBAConfig(chunk_size=24, topk=3, full_attention_layers="last:1", key_conv=5)


@dataclass(frozen=True)
class Layout:
    """How a model is spread."""

    name: str
    tp: int = 1
    cp: int = 1
    pp: int = 1
    sp: bool = False
    recompute: str | None = None
    comm: str | list[str] = "all_gather"
    levels: tuple[int, ...] | None = None
    hybrid: bool = False
    ep: int = 1


class RMSNorm(torch.nn.Module):
    """Megatron's torch norm refuses sequence parallelism; this one marks its weight for the gradient all-reduce."""

    def __init__(self, config, hidden_size, eps=1e-5, **kwargs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=DTYPE))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def build(layout, **options):
    """Initialises Megatron's process groups and builds this rank's part of the model; options: more of its config."""
    model_parallel.initialize(layout.tp, layout.pp, context_parallel_size=layout.cp,
                              expert_model_parallel_size=layout.ep,
                              hierarchical_context_parallel_sizes=layout.levels,
                              **({"hybrid_context_parallel": True} if layout.hybrid else {}))
    recompute = {"full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
                 "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"])}
    config = TransformerConfig(
        num_layers=NUM_LAYERS, hidden_size=WIDTH, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48,
        attention_dropout=0.0, hidden_dropout=0.0, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, use_cpu_initialization=True,
        params_dtype=DTYPE, pipeline_dtype=DTYPE, bf16=DTYPE == torch.bfloat16, tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp, context_parallel_size=layout.cp, sequence_parallel=layout.sp,
        expert_model_parallel_size=layout.ep, cp_comm_type=layout.comm if layout.cp > 1 else None,
        **recompute.get(layout.recompute, {}), **options)
    if isinstance(layout.comm, list):  # Megatron up to 0.16 reads one entry too far
        config.cp_comm_type = [*layout.comm, "p2p"]
    layer = get_moba_layer_local_spec(MOBA, normalization="RMSNorm", num_experts=options.get("num_moe_experts"))
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    block = TransformerBlockSubmodules(layer_specs=[layer] * (NUM_LAYERS // layout.pp), layer_norm=RMSNorm)
    return GPTModel(config, block, VOCAB, SEQLEN, pre_process=first, post_process=last, parallel_output=False,
                    position_embedding_type="rope", share_embeddings_and_output_weights=False).to(DEVICE, DTYPE)


def common_weights():
    """The whole model's weights, the same on every rank, from a model that is not spread."""
    generator = torch.Generator().manual_seed(7)
    model = build(Layout("whole"))
    scale = 0.2 * (32 / WIDTH) ** 0.5
    return {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) * (scale if p.dim() > 1 else 0.1)
            + (0 if p.dim() > 1 else 1) for name, p in model.named_parameters()}


def global_name(name, layout):
    """A parameter's name in the whole model: pipeline stages count their layers from 0."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        per_stage = NUM_LAYERS // layout.pp
        parts[2] = str(int(parts[2]) + parallel_state.get_pipeline_model_parallel_rank() * per_stage)
    return ".".join(parts)


def shard(whole, name, parameter):
    """This rank's part of a weight (or gradient) of the whole model."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    halves = whole.chunk(2) if "linear_fc1" in name else (whole,)  # SwiGLU: gate and up are sharded each
    return torch.cat([half.chunk(size, parameter.partition_dim)[rank] for half in halves])


def load(model, weights, layout):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shard(weights[global_name(name, layout)], name, parameter))


def token_loss(logits, labels, reduction="sum"):
    """Cross entropy of the tokens, of bf16 in fp32."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


def reduce_gradients(model, layout):
    """This rank's gradients of the whole batch: summed over the ranks that saw other tokens."""
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.clone()
        if layout.cp > 1:
            dist.all_reduce(grad, group=parallel_state.get_context_parallel_group())
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        grads[name] = grad
    return grads


def local_positions(lengths, size, rank):
    """Positions in the whole stream that a context parallel rank holds, by Megatron's zigzag of each sequence."""
    rows, start = [], 0
    for n in lengths:
        pieces = torch.arange(start, start + n).chunk(2 * size)
        rows += [pieces[rank], pieces[2 * size - 1 - rank]]
        start += n
    return torch.cat(rows)


class RecordedSelections:
    """Collects what the gate chose, call by call; nothing on GPUs, where the kernels' gate is not looked at."""

    def __enter__(self):
        self.selections, self._gate = [], torch_stages.gate

        def gate(*args):
            selected = self._gate(*args)
            self.selections.append(selected.sort(2)[0])
            return selected

        torch_stages.gate = gate
        return self

    def __exit__(self, *_):
        torch_stages.gate = self._gate
