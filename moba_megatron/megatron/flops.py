"""What MoBA saves of the operations that Megatron-LM's throughput line counts."""
from ..config import MoBAConfig
from ..flops import attention_flops, dense_attention_flops


def correction(args, config: MoBAConfig, iteration: int, batch_size: int, seqlen_squared_sum: float | None = None,
               tokens: float | None = None) -> float:
    """What to add to Megatron-LM's ``num_floating_point_operations``: negative where MoBA saves work, 0 where attention
    layers are not known (``--experimental-attention-variant``, hybrids by ratios, not a pattern). ``batch_size``:
    sequences of ``args.seq_length``, where they are not packed; ``seqlen_squared_sum``, ``tokens``: the sums of packed
    sequences' squared lengths and lengths. Nothing else is known, so lengths count as equal: exact where they are."""
    tokens = batch_size * args.seq_length if tokens is None else tokens
    seqlen = args.seq_length if seqlen_squared_sum is None else seqlen_squared_sum / max(tokens, 1)
    if config.is_full_step(iteration) or not seqlen:
        return 0
    latent = getattr(args, "multi_latent_attention", False) and not _hybrid_pattern(args)
    sizes = (args.num_attention_heads, *(
        (args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim) if latent else (args.kv_channels,) * 2))
    # without GQA num_query_groups is Megatron-LM's default, 1, and no number of groups
    grouped = config.selection == "group" and not latent and getattr(args, "group_query_attention", False)
    groups = args.num_query_groups if grouped else None
    saved = 0.0
    for layer in attention_layers(args):
        place = min(layer, args.num_layers), args.num_layers
        if not config.is_full_attention(*place):
            moba = config.for_layer(*place).at_step(iteration)
            saved += dense_attention_flops(seqlen, *sizes) - attention_flops(seqlen, *sizes, moba.chunk_size, moba.topk,
                                                                             groups)
    return -saved * tokens / seqlen


def attention_layers(args) -> list[int]:
    """1-based numbers of the layers whose softmax attention Megatron-LM counts; multi-token prediction is last. Of
    hybrid models it counts ``*``, also in each prediction's pattern behind ``/``, but not ``+``, latent attention."""
    if getattr(args, "experimental_attention_variant", None) is not None:
        return []
    pattern = _hybrid_pattern(args)
    if pattern:
        model, *predictions = pattern.replace("|", "").split("/")  # "|" starts a pipeline stage
        numbers = [number for number, symbol in enumerate(model, 1) if symbol == "*"]
        return numbers + [len(model) + depth for depth, layers in enumerate(predictions, 1)
                          for symbol in layers if symbol == "*"]
    if getattr(args, "is_hybrid_model", False):
        return []
    return list(range(1, args.num_layers + (getattr(args, "mtp_num_layers", None) or 0) + 1))


def _hybrid_pattern(args) -> str | None:
    return getattr(args, "hybrid_layer_pattern", None) or getattr(args, "hybrid_override_pattern", None)
