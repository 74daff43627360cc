"""The call that Triton-MoBA's users know, ``moba_attn_varlen_triton``, with its positional signature."""
from torch import Tensor

from .ops import moba_attn_varlen


def moba_attn_varlen_triton(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, moba_chunk_size: int,
                            moba_topk: int) -> Tensor:
    """:func:`moba_megatron.moba_attn_varlen` by Triton-MoBA's signature; without a GPU it runs in plain torch.

    Args:
        q, k, v: ``[T, H, D]``; k and v may have fewer heads.
        cu_seqlens, max_seqlen: int32 ``[B + 1]``, 0 to T, and an upper bound of a sequence's length, tokens.
        moba_chunk_size, moba_topk: keys in a chunk, and chunks a query attends to, its own included.

    Returns:
        o ``[T, H, D]`` in q's dtype.
    """
    return moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk)
