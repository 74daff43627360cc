"""Floating-point operations of MoBA attention, in the terms in which Megatron-LM counts dense causal attention.

Megatron-LM's throughput line counts ``3 * 2 * H * (DQK + DV) * L^2 / 2`` for the core attention of one layer over one
sequence of length L: two products, a multiply and an add each, forward once and backward twice, half of the square.
MoBA replaces ``L^2 / 2`` by the pairs of query and key that it attends to, and adds the gate's products, forward only.
"""
from __future__ import annotations

from .config import MoBAConfig

FORWARD_AND_BACKWARD = 3
MULTIPLY_AND_ADD = 2


def attended_pairs(seqlen: float, chunk_size: int, topk: int) -> float:
    """Pairs of query and key in the selected chunks of one sequence; ``seqlen ** 2 / 2`` where topk covers all chunks.

    Args:
        seqlen: tokens; may be a mean, and then a fraction.
        chunk_size: keys in a chunk.
        topk: chunks a query attends to, its own included.
    """
    full, rest = divmod(seqlen, chunk_size)
    own = (full * chunk_size**2 + rest**2) / 2  # as Megatron-LM counts a causal square: half of it
    ramp = min(full, topk - 1)  # query chunks 0..ramp-1 have fewer than topk - 1 earlier ones, and take them all
    earlier_chunks = ramp * (ramp - 1) / 2 + (full - ramp) * (topk - 1)
    return own + chunk_size * (chunk_size * earlier_chunks + rest * min(full, topk - 1))


def scored_pairs(seqlen: float, chunk_size: int, topk: int) -> float:
    """Pairs of query and chunk mean that the gate scores: for queries that have more than topk - 1 earlier chunks."""
    full, rest = divmod(seqlen, chunk_size)
    chunks = (full - 1) * full / 2 - (topk - 1) * topk / 2 if full > topk - 1 else 0
    return chunk_size * chunks + (rest * full if full > topk - 1 else 0)


def attention_flops(seqlen: float, num_heads: int, qk_head_dim: int, v_head_dim: int, chunk_size: int,
                    topk: int) -> float:
    """Forward and backward operations of one MoBA layer's core attention over one sequence, the gate included."""
    products = FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * (qk_head_dim + v_head_dim)
    products *= attended_pairs(seqlen, chunk_size, topk)
    gate = MULTIPLY_AND_ADD * qk_head_dim * scored_pairs(seqlen, chunk_size, topk)
    return num_heads * (products + gate)


def dense_attention_flops(seqlen: float, num_heads: int, qk_head_dim: int, v_head_dim: int) -> float:
    """The same for dense causal attention, as Megatron-LM counts it."""
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * num_heads * (qk_head_dim + v_head_dim) * seqlen**2 / 2


def correction(args, config: MoBAConfig, iteration: int, batch_size: int, seqlen_squared_sum: float | None = None,
               tokens: float | None = None) -> float:
    """What to add to Megatron-LM's ``num_floating_point_operations``: negative where MoBA saves work.

    Args:
        args: Megatron-LM's parsed arguments.
        config: which layers and iterations are MoBA.
        iteration: the current one.
        batch_size: sequences (of ``args.seq_length``) in the batch.
        seqlen_squared_sum: of packed sequences, the sum of their squared lengths; None for unpacked batches. Only sums
            are known, so the lengths count as equal: exact where they are.
        tokens: of packed sequences, the sum of their lengths.

    Returns:
        0 for models whose attention layers are not known here (``--experimental-attention-variant``, hybrids that are
        given by ratios instead of a pattern).
    """
    tokens = batch_size * args.seq_length if tokens is None else tokens
    seqlen = args.seq_length if seqlen_squared_sum is None else seqlen_squared_sum / max(tokens, 1)
    if config.is_full_step(iteration) or not seqlen:
        return 0
    layers = sum(not config.is_full_attention(min(layer, args.num_layers), args.num_layers)
                 for layer in attention_layers(args))
    if getattr(args, "multi_latent_attention", False) and not _hybrid_pattern(args):
        sizes = args.num_attention_heads, args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
    else:
        sizes = args.num_attention_heads, args.kv_channels, args.kv_channels
    saved = dense_attention_flops(seqlen, *sizes) - attention_flops(seqlen, *sizes, config.chunk_size, config.topk)
    return -saved * layers * tokens / seqlen


def attention_layers(args) -> list[int]:
    """1-based numbers of the layers whose softmax attention Megatron-LM counts; multi-token prediction is last.

    Of hybrid models it counts ``*``, in the pattern of each prediction behind ``/`` too, and leaves out latent
    attention, ``+``.
    """
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
