"""The call that Triton-MoBA's users know, ``moba_attn_varlen_triton``, with its positional signature."""
from torch import Tensor

from .ops import moba_attn_varlen


def moba_attn_varlen_triton(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, moba_chunk_size: int,
                            moba_topk: int) -> Tensor:
    """:func:`moba_megatron.moba_attn_varlen` by Triton-MoBA's signature; without a GPU it runs in plain torch. Args,
    Returns, Raises: as there."""
    return moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk)
