"""Numbers of heads that do not fit: refused by name wherever tensors come in, not by a division or a wrong result."""
import pytest
import torch
import torch.distributed as dist

from moba_megatron import MoBAConfig, context_parallel, moba_attn_varlen, moba_attn_varlen_triton, ops
from moba_megatron.context_parallel import COMM_TYPES, Sequences
from moba_megatron.deepspeed import MoBAAttention
from moba_megatron.ops.decode import decode_selection, fill_chunk_means, moba_decode
from moba_megatron.segments import Segments

T, D = 8, 16
CU = torch.tensor([0, T], dtype=torch.int32)
SEGMENTS = Segments.from_cu_seqlens(CU, T, 4)
HEADS = {"none": (0, 0), "no query heads": (0, 2), "no kv heads": (2, 0), "no multiple": (3, 2),
         "more kv heads": (2, 4)}
REFUSED = "|".join(("^q's heads must be a positive multiple of k's heads, got", "^k_cache must have at least one head",
                    "^q must have k_cache's head_dim .* a positive multiple of its"))


def chosen(q):
    return torch.full((T, q.shape[1], 1), -1, dtype=torch.int32)


def cache(k):
    """Keys, means and lengths of a cache of one sequence."""
    return k[None], k.new_zeros(1, 2, k.shape[1], D), CU[1:]


def attend_context_parallel(q, k, v, comm_type):
    group = dist.group.WORLD
    levels = (group, group) if comm_type == "a2a+all_gather" else group
    sequences = Sequences.uniform(T, 1, torch.device("cpu"))
    return context_parallel.context_parallel_attention(q, k, v, sequences, 4, 2, levels, comm_type=comm_type)


CALLS = {
    "moba_attn_varlen": lambda q, k, v: moba_attn_varlen(q, k, v, CU, T, 4, 2),
    "moba_attn_varlen by groups": lambda q, k, v: moba_attn_varlen(q, k, v, CU, T, 4, 2, shared="group"),
    "moba_attn_varlen_triton": lambda q, k, v: moba_attn_varlen_triton(q, k, v, CU, T, 4, 2),
    "causal_attn_varlen": lambda q, k, v: ops.causal_attn_varlen(q, k, v, CU, T),
    "moba_attention": lambda q, k, v: ops.moba_attention(q, k, v, SEGMENTS, 2),
    "select_chunks": lambda q, k, v: ops.select_chunks(q, k, CU, T, 4, 2),
    "select_for_segments": lambda q, k, v: ops.select_for_segments(q, k, SEGMENTS, 2),
    "sparse_attn_varlen": lambda q, k, v: ops.sparse_attn_varlen(q, k, v, chosen(q), CU, T, 4),
    "sparse_attention": lambda q, k, v: ops.sparse_attention(q, k, v, chosen(q), SEGMENTS),
    "chunk_mass": lambda q, k, v: ops.chunk_mass(q, k, SEGMENTS),
    "moba_decode": lambda q, k, v: moba_decode(q[:1], k[None], v[None], *cache(k)[1:], 4, 2),
    "decode_selection": lambda q, k, v: decode_selection(q[:1], *cache(k), 4, 2, shared="group"),
    "DeepSpeed": lambda q, k, v: MoBAAttention(MoBAConfig(4, 2), 1, 2)(q[None], k[None], v[None]),
    **{f"context_parallel_attention {comm_type}": lambda q, k, v, comm_type=comm_type: attend_context_parallel(
        q, k, v, comm_type) for comm_type in COMM_TYPES},
}
KEYS_ALONE = {"fill_chunk_means": lambda k: fill_chunk_means(*cache(k), 4),
              "key_convolution": lambda k: ops.key_convolution(k, torch.randn(k.shape[1], 3, D), CU)}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("heads, kv_heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", CALLS)
def test_heads_that_do_not_fit_are_refused(name, heads, kv_heads):
    q, k, v = (torch.randn(T, h, D) for h in (heads, kv_heads, kv_heads))
    with pytest.raises(ValueError, match=REFUSED):
        CALLS[name](q, k, v)
    CALLS[name](*(torch.randn(T, h, D) for h in (4, 2, 2)))


@pytest.mark.parametrize("name", KEYS_ALONE)
def test_keys_without_heads_are_refused(name):
    with pytest.raises(ValueError, match="^k(_cache)? must have at least one head"):
        KEYS_ALONE[name](torch.randn(T, 0, D))
    KEYS_ALONE[name](torch.randn(T, 2, D))
