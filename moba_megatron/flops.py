"""Floating-point operations of MoBA attention, in the terms in which Megatron-LM counts dense causal attention.

Megatron-LM's throughput line counts ``3 * 2 * H * (DQK + DV) * L^2 / 2`` for the core attention of one layer over one
sequence of length L: two products, a multiply and an add each, forward once and backward twice, half of the square.
MoBA replaces ``L^2 / 2`` by the pairs of query and key that it attends to, and adds the gate's products, forward only.
"""
FORWARD_AND_BACKWARD = 3
MULTIPLY_AND_ADD = 2


def attended_pairs(seqlen: float, chunk_size: int, topk: int) -> float:
    """Pairs of query and key in the selected chunks of one sequence, whose length may be a mean, and then a fraction;
    ``seqlen ** 2 / 2`` where topk covers all chunks."""
    full, rest = divmod(seqlen, chunk_size)
    diagonal = (full * chunk_size**2 + rest**2) / 2  # as Megatron-LM counts a causal square: half of it
    ramp = min(full, topk - 1)  # query chunks 0..ramp-1 have fewer than topk - 1 earlier ones, and take them all
    earlier_chunks = ramp * (ramp - 1) / 2 + (full - ramp) * (topk - 1)
    return diagonal + chunk_size * (chunk_size * earlier_chunks + rest * min(full, topk - 1))


def scored_pairs(seqlen: float, chunk_size: int, topk: int) -> float:
    """Pairs of query and chunk mean that the gate scores: for queries that have more than topk - 1 earlier chunks."""
    full, rest = divmod(seqlen, chunk_size)
    chunks = (full - 1) * full / 2 - (topk - 1) * topk / 2 if full > topk - 1 else 0
    return chunk_size * chunks + (rest * full if full > topk - 1 else 0)


def attention_flops(seqlen: float, num_heads: int, qk_head_dim: int, v_head_dim: int, chunk_size: int,
                    topk: int, choosing_heads: int | None = None) -> float:
    """Forward and backward operations of one MoBA layer's core attention over one sequence, the gate included, which
    scores for ``choosing_heads``, None for all."""
    products = FORWARD_AND_BACKWARD * (qk_head_dim + v_head_dim) * attended_pairs(seqlen, chunk_size, topk)
    scores = qk_head_dim * scored_pairs(seqlen, chunk_size, topk)
    return MULTIPLY_AND_ADD * (num_heads * products + (choosing_heads or num_heads) * scores)


def dense_attention_flops(seqlen: float, num_heads: int, qk_head_dim: int, v_head_dim: int) -> float:
    """The same for dense causal attention, as Megatron-LM counts it."""
    return FORWARD_AND_BACKWARD * MULTIPLY_AND_ADD * num_heads * (qk_head_dim + v_head_dim) * seqlen**2 / 2
