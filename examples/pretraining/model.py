"""The GPT (RoPE, GQA, RMSNorm, SwiGLU), its layer specs with MoBA, and Megatron's optimizer and schedule around it."""
from dataclasses import asdict

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from moba_megatron import get_moba_layer_local_spec, get_moba_layer_with_transformer_engine_spec


class RMSNorm(torch.nn.Module):
    """RMSNorm for Megatron's local layers, which otherwise have none that works under sequence parallelism.

    Args:
        config: only `sequence_parallel` is read: it tells Megatron to sum the weight's gradient over the ranks.
        hidden_size: size of the last dimension.
        eps: added to the mean of the squares.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def describe_model(args, tokenizer) -> dict:
    """What the model is, as plain values: it is built from this, and checkpoints keep it.

    Returns:
        `transformer` and `gpt`, arguments of TransformerConfig and GPTModel; `moba`; `tokenizer`. The keys are those
        that `python -m moba_megatron.inspect` reads.
    """
    return {
        "transformer": dict(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_query_groups=args.num_query_groups,
            kv_channels=args.kv_channels,
            ffn_hidden_size=args.ffn_hidden_size,
            normalization="RMSNorm",
            layernorm_epsilon=args.norm_epsilon,
            qk_layernorm=args.qk_layernorm,
            gated_linear_unit=True,
            activation_func="silu",
            add_bias_linear=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bf16=args.bf16,
        ),
        "gpt": dict(
            vocab_size=padded_vocab_size(args, tokenizer.vocab_size),
            max_sequence_length=args.seq_length,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=args.rotary_base,
        ),
        "moba": asdict(args.moba_config),
        "tokenizer": tokenizer.name,
    }


def build_config(args) -> TransformerConfig:
    """The TransformerConfig of the flags."""
    model = args.model_description["transformer"]
    on_cpu = not torch.cuda.is_available()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    recompute = {}
    if args.recompute_granularity == "full":
        recompute = {"recompute_method": args.recompute_method, "recompute_num_layers": args.recompute_num_layers}
    return TransformerConfig(
        **{**model, "activation_func": getattr(F, model["activation_func"])},
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        cp_comm_type=args.cp_comm_type,
        sequence_parallel=args.sequence_parallel,
        init_method_std=args.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=on_cpu,
        bias_activation_fusion=not on_cpu,
        # The loss is a sum over tokens, divided once by their number over all ranks: exact under context parallelism.
        calculate_per_token_loss=True,
        recompute_granularity=args.recompute_granularity,
        **recompute,
    )


def build_layer_spec(args):
    """One spec for all layers; MoBACoreAttention decides by layer number which attend densely."""
    if args.transformer_impl == "transformer_engine":
        return get_moba_layer_with_transformer_engine_spec(args.moba_config, qk_layernorm=args.qk_layernorm)
    spec = get_moba_layer_local_spec(args.moba_config, qk_layernorm=args.qk_layernorm, normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if args.qk_layernorm:
        spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
        spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return spec


def padded_vocab_size(args, vocab_size: int) -> int:
    """The vocabulary, or --vocab-size, rounded up so that tensor parallel ranks hold equal parts.

    Raises:
        ValueError: --vocab-size is too small for it.
    """
    if args.vocab_size is not None and args.vocab_size < vocab_size:
        raise ValueError(f"--vocab-size must be at least {vocab_size}, as the data's tokenizer has, got "
                         f"{args.vocab_size}")
    vocab_size = args.vocab_size or vocab_size
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def build_gpt(args, config: TransformerConfig) -> GPTModel:
    """This rank's stage of the GPT, on its device."""
    spec = build_layer_spec(args)
    if args.transformer_impl == "local":
        # A list of layers, so that the last norm can be named too: Megatron's own needs Apex or Transformer Engine.
        spec = TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **args.model_description["gpt"],
    )
    return model.cuda(torch.cuda.current_device())


def build_model(args, config: TransformerConfig) -> DistributedDataParallel:
    """The same inside Megatron's DistributedDataParallel."""
    model = build_gpt(args, config)
    if args.bf16:
        model = Float16Module(config, model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.bf16,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    model = DistributedDataParallel(config, ddp_config, model)
    model.broadcast_params()
    return model


def build_optimizer(args, config: TransformerConfig, model: DistributedDataParallel):
    """Adam with decoupled weight decay by Megatron, its schedule, and the hooks that Megatron's schedules call."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            min_lr=args.min_lr,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_eps=args.adam_eps,
            clip_grad=args.clip_grad,
            bf16=args.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=args.use_distributed_optimizer,
            overlap_param_gather=args.overlap_param_gather,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters,
        lr_decay_steps=args.lr_decay_iters,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters,
        wd_incr_style="constant",
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
        config.grad_sync_func = model.start_grad_sync
    if args.overlap_param_gather:
        config.param_sync_func = model.start_param_sync
    return optimizer, scheduler
