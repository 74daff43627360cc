"""What MoBA refuses of Megatron by name instead of ignoring it: masks, flags, layouts, arguments, lengths, bypasses."""
import copy
import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_megatron import MoBAConfig, MoBACoreAttention
from moba_megatron.megatron import refusals

LENGTH = 40


def make_core(context_parallel_size=1, **kwargs):
    config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                               attention_dropout=0.0)
    config.context_parallel_size = context_parallel_size
    for name in [name for name in kwargs if name in refusals.LAYOUT_FIELDS]:
        setattr(config, name, kwargs.pop(name))
    return MoBACoreAttention(config, 1, AttnMaskType.causal, "self", moba_config=MoBAConfig(16, 2),
                             pg_collection=SimpleNamespace(cp="group", tp=None), **kwargs)


def qkv(queries=LENGTH, batch=2):
    return (torch.randn(queries, batch, 4, 8), *(torch.randn(LENGTH, batch, 2, 8) for _ in range(2)))


def causal(queries=LENGTH):
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None, LENGTH - queries:]


def changed(mask, where, value):
    mask = mask.expand(2, -1, -1, -1).clone()
    mask[where] = value
    return mask


@pytest.mark.parametrize("queries, mask", [
    (LENGTH, causal()), (LENGTH, causal().expand(2, 4, -1, -1)), (7, causal(7)), (1, causal(1)),
    (LENGTH, torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(causal(), -1e9)), (LENGTH, causal()[0, 0]),
], ids=["bool", "each head's", "behind a cache", "one query", "additive", "2 dimensions"])
def test_a_causal_mask_says_nothing(queries, mask):
    core, inputs = make_core(), qkv(queries)
    assert torch.equal(core(*inputs, mask), core(*inputs, None))


@pytest.mark.parametrize("mask", [
    changed(causal(), (1, 0, slice(25, None), slice(25)), True),  # two documents, as --reset-attention-mask
    changed(causal(), (1, 0, slice(None), slice(3)), True),  # padding on the left
    changed(causal(), (1, 0, slice(None), slice(35, None)), True),  # and on the right
    changed(causal(), (0, 0, 7, 3), True),
    changed(causal(), (0, 0, 7, 8), False),
    changed(causal().flip(-1), 0, causal()),  # the same sums over rows
    torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool),
    causal(7), torch.ones(2, LENGTH, dtype=torch.bool), (causal(), None),
], ids=["documents", "left", "right", "hides one", "shows one", "mirrored", "all", "rows", "padding", "tuple"])
def test_any_other_mask_is_refused_at_every_call(mask):
    core, inputs = make_core(), qkv()
    for _ in range(2):
        with pytest.raises(ValueError, match="attention_mask must be None or (a )?causal.*packed_seq_params"):
            core(*inputs, mask)


def test_a_mask_that_changes_in_place_is_read_again():
    core, inputs, mask = make_core(), qkv(), causal().clone()
    core(*inputs, mask)
    mask[..., 5, 2] = True
    with pytest.raises(ValueError, match="attention_mask must be None or causal"):
        core(*inputs, mask)


def saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_of_a_mask_is_read_itself(copied):
    core, inputs, mask = make_core(), qkv(), causal().clone()
    while mask._version < 5:
        mask |= mask
    core(*inputs, mask)
    other = copied(mask)
    while other._version < 5:  # that alone does not tell it from the mask
        other[..., 5, 2] = True
    with pytest.raises(ValueError, match="attention_mask must be None or causal"):
        core(*inputs, other)


@pytest.mark.parametrize("flag, size, text", [
    ("reset_attention_mask", 1, "--reset-attention-mask must not be given, got True"),
    ("dataloader_inter_document_masking", 2, "--dataloader-inter-document-masking must not be given with "
                                             "--context-parallel-size 2"),
])
def test_flags_of_the_data_loader(monkeypatch, flag, size, text):
    args = SimpleNamespace(**{flag: True})
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", SimpleNamespace(_GLOBAL_ARGS=args))
    with pytest.raises(ValueError, match=re.escape(text)):
        make_core(size)
    setattr(args, flag, False)
    make_core(size)
    if size > 1:  # each document is attended to alone
        setattr(args, flag, True)
        make_core(1)


@pytest.mark.parametrize("flag, field, value", [
    ("--num-experts", "num_moe_experts", 4), ("--qk-layernorm", "qk_layernorm", True),
    ("--qk-l2-norm", "qk_l2_norm", True), ("--multi-latent-attention", "multi_latent_attention", True),
    ("--experimental-attention-variant", "experimental_attention_variant", "dsa"),
])
def test_what_a_plain_layer_would_ignore(monkeypatch, flag, field, value):
    """Megatron-LM looks at none of these with --spec: the model would be another one, without a word."""
    args = SimpleNamespace(spec=["moba_megatron.layer_specs", "moba_layer_spec"])
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", SimpleNamespace(_GLOBAL_ARGS=args))
    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, attention_dropout=0.0)
    refusals.refuse_unsupported(config, AttnMaskType.causal, "self", None)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"^{flag} must not be given with --spec moba_megatron.layer_specs, got"):
        refusals.refuse_unsupported(config, AttnMaskType.causal, "self", None)
    args.spec = ["a.spec", "of_ones_own"]
    refusals.refuse_unsupported(config, AttnMaskType.causal, "self", None)


@pytest.mark.parametrize("field", refusals.LAYOUT_FIELDS)
def test_layouts_other_than_zigzag(field):
    make_core(2, **{field: "zigzag"})
    make_core(1, **{field: "contiguous"})
    for layout in ("contiguous", SimpleNamespace(value="contiguous")):
        with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} .*must be 'zigzag', got .*contiguous"):
            make_core(2, **{field: layout})
    with pytest.raises(ValueError, match=rf"PackedSeqParams.{field}\) must be 'zigzag', got 'contiguous'"):
        packed = packed_params()
        setattr(packed, field, "contiguous")
        refusals.check_packed(packed, group=object())


def packed_params(**kwargs):
    lengths = torch.tensor([0, 25, LENGTH], dtype=torch.int32)
    return PackedSeqParams(**{**dict(qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_kv=lengths.clone(),
                                     max_seqlen_q=25, max_seqlen_kv=25), **kwargs})


def test_ranks_of_a_sequence_without_their_group():
    core, inputs, packed = make_core(), [x[:, 0] for x in qkv(batch=1)], packed_params()
    packed.local_cp_size = 1
    core(*inputs, packed_seq_params=packed)
    packed.local_cp_size = 2
    with pytest.raises(ValueError, match="packed_seq_params.cp_group must be given with local_cp_size 2, got None"):
        core(*inputs, packed_seq_params=packed)


def test_unknown_arguments():
    core, inputs = make_core(), qkv()
    assert torch.equal(core(*inputs, x=None, flags=[], more=False, none=torch.empty(0)), core(*inputs))
    make_core(is_mtp_layer=False)
    for value in (1, 0, True, "a", torch.zeros(1)):
        with pytest.raises(TypeError, match=r"MoBACoreAttention.forward got an argument sinks of type"):
            core(*inputs, sinks=value)
        with pytest.raises(TypeError, match="MoBACoreAttention got an argument sinks of type"):
            make_core(sinks=value)


@pytest.mark.parametrize("change, text", [
    (dict(cu_seqlens_kv=[0, 20, 40]), "packed_seq_params.cu_seqlens_kv must equal cu_seqlens_q"),
    (dict(cu_seqlens_kv=[0, 10, 20, 40]), r"cu_seqlens_kv must equal .*got shapes \(4,\) and \(3,\)"),
    (dict(cu_seqlens_q_padded=[0, 25, 40], cu_seqlens_kv_padded=[0, 26, 40]), "cu_seqlens_kv_padded must equal"),
    (dict(cu_seqlens_kv_padded=[0, 25, 40]), "cu_seqlens_kv_padded must equal .*None"),
    (dict(cu_seqlens_q_padded=[0, 24, 40]), "cu_seqlens_q_padded must leave room for .* of cu_seqlens_q$"),
    (dict(cu_seqlens_q_padded=[0, 25, 30, 40]), r"cu_seqlens_q_padded must leave .*got shapes \(4,\) and \(3,\)"),
])
def test_keys_of_other_lengths(change, text):
    core, inputs = make_core(), [x[:, 0] for x in qkv()]
    core(*inputs, packed_seq_params=packed_params())
    packed = packed_params(**{name: torch.tensor(values, dtype=torch.int32) for name, values in change.items()})
    for _ in range(2):
        with pytest.raises(ValueError, match=text):
            core(*inputs, packed_seq_params=packed)


@pytest.mark.parametrize("name", ["flash_decode", "flash_decode_and_prefill"])
def test_a_release_that_cannot_be_guarded(monkeypatch, name):
    monkeypatch.delattr(Attention, name)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"Attention has no {name}, .*MoBA does not start"):
            make_core()
    monkeypatch.undo()
    make_core()


def test_a_dense_state_dict_of_transformer_engine_loads_strictly():
    core = make_core()
    state = {"layer._extra_state": torch.zeros(3, dtype=torch.uint8)}
    done = torch.nn.ModuleDict({"layer": core}).load_state_dict(state, strict=True)
    assert not done.missing_keys and not done.unexpected_keys
    with pytest.raises(RuntimeError, match='Unexpected key.*"other"'):
        core.load_state_dict({"_extra_state": torch.zeros(1), "other": torch.zeros(1)}, strict=True)
