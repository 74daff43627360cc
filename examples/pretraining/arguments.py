"""Command-line flags of the pretraining example, spelled as Megatron-LM spells them, and their validation."""
import argparse
import math
import os

from moba_megatron.context_parallel import canonical_comm_type
from moba_megatron.megatron.arguments import add_moba_arguments, config_from_args
from moba_megatron.rendezvous import ArgumentParser


def parse_args(argv=None) -> argparse.Namespace:
    """Parses and validates everything that can be judged without the data and the checkpoint.

    Returns:
        the flags as attributes; `moba_config` is the MoBAConfig of --attention and the --moba-* flags.
    """
    parser = ArgumentParser(description="Pretrains a GPT with MoBA on megatron.core.", fromfile_prefix_chars="@",
                    usage="torchrun --nproc-per-node N examples/pretrain_gpt.py FLAGS   (--help lists them)")
    _add_model_args(parser)
    _add_parallel_args(parser)
    _add_training_args(parser)
    add_data_args(parser)
    _add_checkpoint_args(parser)
    add_logging_args(parser)
    _add_router_args(parser)
    add_moba_arguments(parser)
    args = parser.parse_args(argv)
    args.world_size = int(os.environ.get("WORLD_SIZE", 1))
    try:
        args.moba_config = config_from_args(args)
        for layer_number in range(1, args.num_layers + 1):
            args.moba_config.is_full_attention(layer_number, args.num_layers)
        _derive_and_validate(args)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return args


def _add_model_args(parser):
    group = parser.add_argument_group("model")
    group.add_argument("--num-layers", type=int, required=True)
    group.add_argument("--hidden-size", type=int, required=True)
    group.add_argument("--num-attention-heads", type=int, required=True)
    group.add_argument("--ffn-hidden-size", type=int, help="default: 8/3 of the hidden size, rounded up to 64 (SwiGLU)")
    group.add_argument("--kv-channels", type=int, help="size of a head; default: hidden size / heads")
    group.add_argument("--group-query-attention", action="store_true")
    group.add_argument("--num-query-groups", type=int, help="key/value heads, with --group-query-attention")
    group.add_argument("--rotary-base", type=int, default=10000)
    group.add_argument("--norm-epsilon", type=float, default=1e-5)
    group.add_argument("--qk-layernorm", action="store_true", help="normalise queries and keys")
    group.add_argument("--init-method-std", type=float, default=0.02)
    group.add_argument("--vocab-size", type=int, help="of a model that has more ids than the data's tokenizer")
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    group.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")


def _add_parallel_args(parser):
    group = parser.add_argument_group("parallelism")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    group.add_argument("--context-parallel-size", type=int, default=1)
    group.add_argument("--cp-comm-type", default="all_gather")
    group.add_argument("--hierarchical-context-parallel-sizes", type=int, nargs=2, metavar=("INNER", "OUTER"),
                       help="for --cp-comm-type a2a+all_gather: ranks that exchange heads, such as a machine's, and "
                            "how many of those gather keys")
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--use-distributed-optimizer", action="store_true")
    group.add_argument("--overlap-grad-reduce", action="store_true")
    group.add_argument("--overlap-param-gather", action="store_true")
    group.add_argument("--recompute-granularity", choices=("full", "selective"))
    group.add_argument("--recompute-method", choices=("uniform", "block"), default="uniform")
    group.add_argument("--recompute-num-layers", type=int, default=1)
    group.add_argument("--distributed-timeout-minutes", type=float, default=10,
                       help="after which a collective that a rank does not join ends the run")


def _add_training_args(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--micro-batch-size", type=int, default=1)
    group.add_argument("--global-batch-size", type=int, help="default: micro batch size x data parallel size")
    group.add_argument("--train-iters", type=int, required=True)
    group.add_argument("--exit-interval", type=int, help="stop, with a checkpoint, after iterations divisible by this")
    group.add_argument("--lr", type=float, required=True)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--lr-decay-style", choices=("constant", "linear", "cosine", "inverse-square-root"),
                       default="linear")
    group.add_argument("--lr-decay-iters", type=int, help="default: --train-iters")
    group.add_argument("--lr-warmup-iters", type=int, default=0)
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.95)
    group.add_argument("--adam-eps", type=float, default=1e-8)
    group.add_argument("--bf16", action="store_true")
    group.add_argument("--seed", type=int, default=1234)


def add_data_args(parser):
    """What to read: --data-path, --split, --seq-length and how."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-path", nargs="+", required=True, metavar="PREFIX",
                       help="a prefix made by examples/prepare_data.py, or a blend: WEIGHT PREFIX WEIGHT PREFIX ...")
    group.add_argument("--split", default="969,30,1", help="weights of training, validation and test documents")
    group.add_argument("--seq-length", type=int, required=True)
    group.add_argument("--data-cache-path", help="where the index maps are kept; default: beside the data")
    group.add_argument("--num-workers", type=int, default=0, help="processes that read data, for each rank")


def _add_checkpoint_args(parser):
    group = parser.add_argument_group("checkpoints and validation")
    group.add_argument("--save", help="directory for checkpoints")
    group.add_argument("--save-interval", type=int)
    group.add_argument("--load", help="directory to resume from; training starts afresh where it holds no checkpoint. "
                       "It is unpickled, so it must be trusted")
    group.add_argument("--pretrained-checkpoint", help="directory of the weights to start from, without an optimizer's "
                       "state, where --load resumes nothing. It is unpickled, so it must be trusted")
    group.add_argument("--eval-interval", type=int, default=1000)
    group.add_argument("--eval-iters", type=int, default=100, help="global batches in a validation; 0: none")
    group.add_argument("--loss-position-bins", type=int, default=16,
                       help="parts of the sequence whose loss the validation reports, the trailing loss last")


def add_logging_args(parser):
    """What a run writes down besides checkpoints."""
    group = parser.add_argument_group("logging")
    group.add_argument("--log-interval", type=int, default=10)
    group.add_argument("--log-jsonl", metavar="FILE", help="JSON lines, continued when a run resumes")
    group.add_argument("--tensorboard-dir", metavar="DIR")


def _add_router_args(parser):
    group = parser.add_argument_group("looking at the router")
    group.add_argument("--router-log-interval", type=int, metavar="N",
                       help="every N steps log each layer's share of queries on the first chunk, load imbalance, "
                            "selection entropy and recall; unset: never")
    group.add_argument("--save-selection", metavar="FILE.npz",
                       help="at the end, write a routing trace: which chunks the queries of a validation text chose")


def _derive_and_validate(args):
    require_positive(args, "num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size",
                     "train_iters", "tensor_model_parallel_size", "pipeline_model_parallel_size",
                     "context_parallel_size", "log_interval", "eval_interval", "loss_position_bins", "ffn_hidden_size",
                     "kv_channels", "global_batch_size", "lr_decay_iters", "recompute_num_layers", "save_interval",
                     "exit_interval", "router_log_interval", "make_vocab_size_divisible_by", "vocab_size")
    require_in_range(args)
    model_parallel = (args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size)
    if args.world_size % model_parallel:
        raise ValueError(f"the number of processes must be a multiple of tensor x pipeline x context parallel size = "
                         f"{model_parallel}, got {args.world_size}: change torchrun's --nproc-per-node or the sizes")
    args.data_parallel_size = args.world_size // model_parallel
    _derive_model(args)
    _derive_batch(args)
    if args.num_layers % args.pipeline_model_parallel_size:
        raise ValueError(f"--num-layers must be a multiple of --pipeline-model-parallel-size "
                         f"({args.pipeline_model_parallel_size}), got {args.num_layers}")
    pieces = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    levels = args.hierarchical_context_parallel_sizes
    if levels and (min(levels) < 1 or math.prod(levels) != args.context_parallel_size):
        raise ValueError("--hierarchical-context-parallel-sizes must be positive, their product --context-parallel-size"
                         f" ({args.context_parallel_size}), got {levels[0]} {levels[1]}")
    if levels and canonical_comm_type(args.cp_comm_type) != "a2a+all_gather":
        raise ValueError("--hierarchical-context-parallel-sizes needs --cp-comm-type a2a+all_gather, got "
                         f"{args.cp_comm_type}: no other has two levels")
    if args.sequence_parallel:
        if args.tensor_model_parallel_size == 1:
            raise ValueError("--sequence-parallel splits over tensor parallel ranks, "
                             "got --tensor-model-parallel-size 1")
        pieces *= args.tensor_model_parallel_size
    if args.seq_length % pieces:
        raise ValueError(f"--seq-length must be a multiple of {pieces} (2 x context parallel size x tensor parallel "
                         f"size under sequence parallelism), got {args.seq_length}")
    if args.seq_length % args.loss_position_bins:
        raise ValueError(f"--loss-position-bins must divide --seq-length ({args.seq_length}), "
                         f"got {args.loss_position_bins}")
    if args.min_lr > args.lr or args.min_lr < 0:
        raise ValueError(f"--min-lr must be between 0 and --lr ({args.lr}), got {args.min_lr}")
    args.lr_decay_iters = args.lr_decay_iters or args.train_iters
    if not 0 <= args.lr_warmup_iters < args.lr_decay_iters:
        raise ValueError(f"--lr-warmup-iters must be below the decay's {args.lr_decay_iters} iterations, "
                         f"got {args.lr_warmup_iters}")
    if args.router_log_interval is not None and args.attention != "moba":
        raise ValueError("--router-log-interval needs --attention moba, got --attention full: there is no router")
    if args.save_interval and not args.save:
        raise ValueError("--save-interval needs --save, the directory for checkpoints")
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        raise ValueError("--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce")


def _derive_model(args):
    if args.kv_channels is None:
        if args.hidden_size % args.num_attention_heads:
            raise ValueError(f"--hidden-size must be a multiple of --num-attention-heads ({args.num_attention_heads}), "
                             f"got {args.hidden_size}; or give --kv-channels")
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if args.group_query_attention:
        groups = args.num_query_groups
        if groups is None or groups < 1 or args.num_attention_heads % groups:
            raise ValueError(f"--num-query-groups must divide --num-attention-heads ({args.num_attention_heads}), "
                             f"got {args.num_query_groups}")
    elif args.num_query_groups is not None:
        raise ValueError("--num-query-groups needs --group-query-attention")
    else:
        args.num_query_groups = args.num_attention_heads
    if args.num_query_groups % args.tensor_model_parallel_size:
        raise ValueError(f"--tensor-model-parallel-size must divide the key/value heads ({args.num_query_groups}), "
                         f"got {args.tensor_model_parallel_size}")
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = -(-args.hidden_size * 8 // (3 * 64)) * 64
    for name in ("num_attention_heads", "ffn_hidden_size", "hidden_size"):
        if getattr(args, name) % args.tensor_model_parallel_size:
            raise ValueError(f"--tensor-model-parallel-size must divide {_flag(name)} ({getattr(args, name)}), "
                             f"got {args.tensor_model_parallel_size}")


def _derive_batch(args):
    samples = args.micro_batch_size * args.data_parallel_size
    args.global_batch_size = args.global_batch_size or samples
    if args.global_batch_size % samples:
        raise ValueError(f"--global-batch-size must be a multiple of micro batch size x data parallel size "
                         f"({args.micro_batch_size} x {args.data_parallel_size}), got {args.global_batch_size}")
    args.num_microbatches = args.global_batch_size // samples


def require_positive(args, *names):
    """Raises ValueError unless each of these flags is at least 1, or not given."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{_flag(name)} must be at least 1, got {getattr(args, name)}")


RANGES = {"lr": (0, math.inf), "weight_decay": (0, math.inf), "clip_grad": (0, math.inf), "adam_beta1": (0, 1),
          "adam_beta2": (0, 1), "adam_eps": (0, math.inf), "norm_epsilon": (0, math.inf), "rotary_base": (1, math.inf),
          "init_method_std": (0, math.inf), "eval_iters": (0, math.inf), "num_workers": (0, math.inf)}
"""The least value of a flag, and what it must be below."""


def require_in_range(args):
    """Raises ValueError unless the flags of RANGES are in their ranges, as far as the program has them."""
    for name, (least, end) in RANGES.items():
        if hasattr(args, name) and not least <= getattr(args, name) < end:
            below = "finite" if end == math.inf else f"below {end}"
            raise ValueError(f"{_flag(name)} must be at least {least} and {below}, got {getattr(args, name)}")
    if not 0 < args.distributed_timeout_minutes < math.inf:
        raise ValueError("--distributed-timeout-minutes must be above 0 and finite, "
                         f"got {args.distributed_timeout_minutes}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
