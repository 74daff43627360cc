"""The GPT of `benchmarks gpt`, built from Megatron-Core: Transformer Engine layers on GPUs, local layers on a CPU."""
from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from moba_megatron import MoBAConfig, get_moba_layer_local_spec, get_moba_layer_with_transformer_engine_spec
from moba_megatron.megatron.core_attention import set_observer

from .cp_cases import hierarchy
from .distributed import Ranks
from .gpt_cases import Row, Shape

SEED = 1


def set_up_parallel(row: Row, ranks: Ranks, inner: int) -> None:
    """Makes Megatron's process groups for a row.

    Raises:
        ValueError: the ranks cannot be split as the row asks.
    """
    cp = ranks.size // row.tp
    if cp * row.tp != ranks.size:
        raise ValueError(f"{ranks.size} ranks must be a multiple of tensor parallel size {row.tp}")
    options = {}
    if row.comm and "+" in row.comm:
        sizes = hierarchy(cp, inner)
        if sizes is None:
            raise ValueError(f"{row.comm} needs {inner} times 2 or more context parallel ranks, got {cp}")
        options["hierarchical_context_parallel_sizes"] = list(sizes)
    fitting = (parallel_state.model_parallel_is_initialized() and not options
               and parallel_state.get_tensor_model_parallel_world_size() == row.tp)
    if not fitting:  # communicators take memory: rows that can share them do
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=row.tp, context_parallel_size=cp,
                                                 create_gloo_process_groups=False, **options)
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)


def build_model(row: Row, shape: Shape, ranks: Ranks) -> GPTModel:
    """The model of a row on this rank; weights depend on the seed alone, so rows of one ``tp`` start equal.

    Fused: SwiGLU, residual addition and RoPE, as Megatron-LM switches on by default; the same for both attentions.
    """
    cuda = ranks.device.type == "cuda"
    torch.manual_seed(SEED)
    more = {"cp_comm_type": row.comm} if row.comm else {}
    if row.recompute:
        more |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if row.fp8:
        more |= {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    dtype = torch.bfloat16 if cuda else torch.float32
    config = TransformerConfig(
        num_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
        num_query_groups=shape.groups, kv_channels=shape.head_dim, ffn_hidden_size=shape.ffn,
        tensor_model_parallel_size=row.tp, context_parallel_size=ranks.size // row.tp, sequence_parallel=row.tp > 1,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0, bf16=cuda, params_dtype=dtype, pipeline_dtype=dtype,
        use_cpu_initialization=not cuda, bias_activation_fusion=cuda, bias_dropout_fusion=cuda, apply_rope_fusion=cuda,
        **more)
    model = GPTModel(config, _layer_spec(row, cuda), vocab_size=shape.vocabulary, max_sequence_length=row.tokens,
                     position_embedding_type="rope")
    return model.to(ranks.device).train()


def _layer_spec(row: Row, cuda: bool):
    if not cuda:  # Megatron's own dense local attention refuses context parallelism
        moba = row.moba or MoBAConfig(full_attention_layers="all")
        return get_moba_layer_local_spec(moba, normalization="RMSNorm")
    if row.moba:
        return get_moba_layer_with_transformer_engine_spec(row.moba)
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()


def local_batch(row: Row, ranks: Ranks, data: bytes | None) -> dict[str, Tensor]:
    """Tokens, positions and labels of this rank: its two pieces of the one sequence, in zigzag order.

    Args:
        data: bytes of text, at least ``tokens + 1``; None for random bytes, the same on every rank.

    Raises:
        ValueError: the text is too short.
    """
    if data is None:
        generator = torch.Generator().manual_seed(SEED)
        whole = torch.randint(256, (row.tokens + 1,), generator=generator)
    elif len(data) > row.tokens:
        whole = torch.frombuffer(bytearray(data[:row.tokens + 1]), dtype=torch.uint8).long()
    else:
        raise ValueError(f"--text must have more than {row.tokens} bytes, got {len(data)}")
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    pieces = torch.arange(row.tokens).view(2 * size, -1)
    positions = torch.cat((pieces[rank], pieces[2 * size - 1 - rank])) if size > 1 else pieces.flatten()
    batch = {"input_ids": whole[positions], "position_ids": positions, "labels": whole[positions + 1]}
    return {name: x[None].to(ranks.device) for name, x in batch.items()}


class AttentionCount:
    """Which attention a step really runs: modules by class, and calls; sparse ones as MoBACoreAttention reports them.

    Used as ``with AttentionCount(model) as count`` around a step.
    """

    def __init__(self, model: torch.nn.Module):
        self._cores = [module.core_attention for module in model.modules() if hasattr(module, "core_attention")]
        self.modules = Counter(type(core).__name__ for core in self._cores)
        self.calls: Counter[str] = Counter()
        self.sparse_calls = 0

    def __enter__(self) -> "AttentionCount":
        self._hooks = [core.register_forward_hook(self._called) for core in self._cores]
        self._before = set_observer(self._sparse)
        return self

    def __exit__(self, *error) -> None:
        set_observer(self._before)
        for hook in self._hooks:
            hook.remove()

    def _called(self, module, arguments, output) -> None:
        self.calls[type(module).__name__] += 1

    def _sparse(self, *arguments) -> None:
        self.sparse_calls += 1

    def check(self, row: Row, layers: int) -> dict:
        """What ran, as a record.

        Raises:
            RuntimeError: not the attention that the row names.
        """
        sparse_layers = 0
        if row.moba:
            sparse_layers = sum(not row.moba.is_full_attention(i, layers) for i in range(1, layers + 1))
        expected = sparse_layers * (2 if row.recompute else 1)
        if self.sparse_calls != expected or len(self._cores) != layers:
            raise RuntimeError(f"a step must call MoBA {expected} times in {layers} layers, got {self.sparse_calls} "
                               f"calls; core attentions: {dict(self.modules)}")
        return {"modules": dict(self.modules), "calls": dict(self.calls), "sparse_calls": self.sparse_calls,
                "transformer_engine": transformer_engine_backend()
                if "TEDotProductAttention" in self.modules else None}


def transformer_engine_backend() -> str | None:
    """The kernels that Transformer Engine chose for its last attention call, from its own record."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    chosen = getattr(dot_product_attention, "_attention_backends", {})
    used = [name.removeprefix("use_") for name, on in chosen.items() if name.startswith("use_") and on]
    return ", ".join(used) or None


