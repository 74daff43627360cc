"""Values on the GPU that Megatron may hand over and MoBA must not ignore: refused at a later call, without waiting."""
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from moba_megatron import MoBAConfig, MoBACoreAttention  # noqa: E402

pytestmark = pytest.mark.gpu
LENGTH = 1024


def make_core():
    config = TransformerConfig(num_layers=2, hidden_size=256, num_attention_heads=2, num_query_groups=1,
                               kv_channels=128, attention_dropout=0.0)
    return MoBACoreAttention(config, 1, AttnMaskType.causal, "self", moba_config=MoBAConfig(256, 2),
                             pg_collection=SimpleNamespace(cp=None, tp=None))


def causal():
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").triu(1)[None, None]


def documents():
    mask = causal()
    mask[..., 600:, :600] = True
    return mask


def lengths(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device="cuda")


def packed(*ends):
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=lengths(600, LENGTH), cu_seqlens_kv=lengths(*ends),
                           max_seqlen_q=600, max_seqlen_kv=600)


@pytest.mark.parametrize("kind", ["mask", "lengths"])
def test_wrong_values_are_refused_at_a_later_call(kind):
    core = make_core()
    q, k, v = (torch.randn(LENGTH, 1, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (2, 1, 1))
    if kind == "mask":
        good, again, wrong = [(q, k, v, mask) for mask in (causal(), causal(), documents())]
        call = lambda arguments: core(*arguments)  # noqa: E731
    else:
        good, again, wrong = packed(600, LENGTH), packed(600, LENGTH), packed(500, LENGTH)
        call = lambda params: core(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=params)  # noqa: E731
    expected = call(good)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = [call(again), call(wrong)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    assert all(torch.equal(o, expected) for o in outputs)
    with pytest.raises(ValueError, match="in an earlier call: (attention_mask|packed_seq_params.cu_seqlens_kv) must"):
        call(again)
    assert torch.equal(call(again), expected)
    call(wrong)  # again, and not only the first time
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="in an earlier call"):
        call(again)
