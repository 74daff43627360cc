"""MoBACoreAttention's contract with Megatron: layouts, dense layers and steps, inference, refusals. One process."""
import argparse
import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("megatron.core")

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from moba_megatron import MoBAConfig, MoBACoreAttention, layer_specs, moba_attn_varlen
from moba_megatron.config import set_default_config
from moba_megatron.megatron import core_attention
from moba_megatron.megatron.arguments import add_moba_arguments, config_from_args, config_from_environment
from moba_megatron.megatron.core_attention import resolve_cp_comm_type, set_iteration
from moba_megatron.megatron.key_convolution import KeyConvolution
from moba_megatron.ops import causal_attn_varlen

MOBA = MoBAConfig(chunk_size=16, topk=2)


def make_config():
    return TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                             attention_dropout=0.0)


def make_core(moba=MOBA, layer_number=1, config=None, **kwargs):
    kwargs = dict(attn_mask_type=AttnMaskType.causal, attention_type="self", moba_config=moba) | kwargs
    return MoBACoreAttention(config=config or make_config(), layer_number=layer_number, **kwargs)


def fused_qkv(tokens, batch, heads=4, kv_heads=2, d=8, seed=1):
    """q, k, v as Megatron hands them over: strided views of one projection [s, b, kv_heads, (group + 2) * d]."""
    generator = torch.Generator().manual_seed(seed)
    group = heads // kv_heads
    mixed = torch.randn(tokens, batch, kv_heads, (group + 2) * d, generator=generator, dtype=torch.float64)
    q, k, v = torch.split(mixed.requires_grad_(), [group * d, d, d], dim=3)
    return q.reshape(tokens, batch, heads, d), k, v


def expected(q, k, v, moba=MOBA, dense=False, **kwargs):
    """The same through the public operator, one sequence at a time."""
    outputs = []
    for i in range(q.shape[1]):
        cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32)
        arguments = (q[:, i], k[:, i], v[:, i], cu_seqlens, q.shape[0])
        outputs.append(causal_attn_varlen(*arguments, **kwargs) if dense else
                       moba_attn_varlen(*arguments, moba.chunk_size, moba.topk, **kwargs))
    return torch.stack(outputs, dim=1).flatten(2)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)  # fp64, the same arithmetic


@pytest.mark.parametrize("batch", [1, 3])
def test_sbhd_strided(batch):
    q, k, v = fused_qkv(75, batch)
    assert not k.is_contiguous() and not v.is_contiguous()
    o = make_core()(q, k, v, None, attn_mask_type=AttnMaskType.causal)
    assert o.shape == (75, batch, 32)
    assert_same(o, expected(q, k, v))
    do = torch.randn_like(o)
    for a, b in zip(torch.autograd.grad(o, (q, k, v), do, retain_graph=True),
                    torch.autograd.grad(expected(q, k, v), (q, k, v), do)):
        assert_same(a, b)


@pytest.mark.parametrize("rotated, copied", [(True, True), (False, False)])
def test_v_does_not_keep_the_projection_alive(monkeypatch, rotated, copied):
    """With rotary embeddings q and k are new tensors, and only v would keep the fused output."""
    q, k, v = fused_qkv(75, 1)
    if rotated:
        q, k = q * 2, k * 2
    kept = []
    monkeypatch.setattr(core_attention, "moba_attention", lambda q, k, v, *args, **kwargs: kept.append(v) or q)
    make_core()(q, k, v, None, attn_mask_type=AttnMaskType.causal)
    with torch.no_grad():
        make_core()(q, k, v, None, attn_mask_type=AttnMaskType.causal)
    compact = [x.untyped_storage().nbytes() == x.nbytes for x in kept]
    assert compact == [copied, False] and all(torch.equal(x, v[:, 0]) for x in kept)


@pytest.mark.parametrize("by_flag, by_megatron", [(False, False), (True, False), (False, True)])
def test_determinism_and_workspace_reach_the_operator(monkeypatch, by_flag, by_megatron):
    """--moba-deterministic or Megatron's own --deterministic-mode, and --moba-workspace-mib."""
    config, given = make_config(), {}
    config.deterministic_mode = by_megatron
    monkeypatch.setattr(core_attention, "moba_attention", lambda q, k, v, *args, **kwargs: given.update(kwargs) or q)
    make_core(MoBAConfig(16, 2, deterministic=by_flag, workspace_mib=7), config=config)(*fused_qkv(40, 1))
    assert given["deterministic"] == (by_flag or by_megatron) and given["workspace_mib"] == 7


def test_attention_mask_is_ignored():
    q, k, v = fused_qkv(40, 1)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).triu(1)
    assert torch.equal(make_core()(q, k, v, mask), make_core()(q, k, v, None))


def test_a_pass_of_fake_tensors_leaves_nothing_behind():
    """As an export, or a memory estimate, before training at the same shape."""
    core, mask = make_core(), torch.ones(1, 1, 75, 75, dtype=torch.bool).triu(1)
    with FakeTensorMode():
        fake = core(*(torch.randn(75, 2, heads, 8) for heads in (4, 2, 2)))
    q, k, v = fused_qkv(75, 2)
    o = core(q, k, v, mask)
    assert fake.shape == o.shape and type(o) is torch.Tensor
    assert_same(o, expected(q, k, v))


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
def test_thd(padded):
    q, k, v = (x[:, 0] for x in fused_qkv(96, 1))
    cu = torch.tensor([0, 41, 41, 96], dtype=torch.int32)
    real = torch.tensor([0, 38, 38, 90], dtype=torch.int32)
    lengths = dict(cu_seqlens_q=real, cu_seqlens_kv=real, cu_seqlens_q_padded=cu, cu_seqlens_kv_padded=cu,
                   max_seqlen_q=52, max_seqlen_kv=52) if padded else dict(cu_seqlens_q=cu, max_seqlen_q=55)
    o = make_core()(q, k, v, None, packed_seq_params=PackedSeqParams(qkv_format="thd", **lengths),
                    attn_mask_type=AttnMaskType.padding_causal)
    assert o.shape == (96, 32)
    assert_same(o, moba_attn_varlen(q, k, v, cu, 55, 16, 2).flatten(1))


def test_value_dimension_and_scale_of_mla():
    q, k, _ = fused_qkv(50, 2)
    v = torch.randn(50, 2, 2, 5, dtype=torch.float64)
    core = make_core(softmax_scale=0.3, k_channels=8, v_channels=5)
    assert_same(core(q, k, v), expected(q, k, v, softmax_scale=0.3))


def test_dense_layers_by_number():
    q, k, v = fused_qkv(75, 2)
    moba = MoBAConfig(chunk_size=16, topk=2, full_attention_layers="last:1")
    for layer_number, dense in ((1, False), (3, False), (4, True), (5, True)):  # 5: multi-token prediction
        assert_same(make_core(moba, layer_number)(q, k, v), expected(q, k, v, dense=dense))


def test_iteration_switch():
    q, k, v = fused_qkv(75, 1)
    core = make_core(MoBAConfig(chunk_size=16, topk=2, full_attention_from_step=10))
    try:
        for iteration, dense in ((0, False), (9, False), (10, True), (11, True), (3, False)):
            set_iteration(iteration)
            assert_same(core(q, k, v), expected(q, k, v, dense=dense))
    finally:
        set_iteration(0)


def test_settings_by_layer_and_by_iteration():
    q, k, v = fused_qkv(150, 1)
    moba = MoBAConfig(16, 2, per_layer="2:chunk=32", topk_schedule="0:5,10:3,20:2")
    try:
        for layer, chunk_size in ((1, 16), (2, 32), (5, 16)):  # 5: multi-token prediction, as the last layer
            core = make_core(moba, layer)
            for iteration, topk in ((0, 5), (10, 3), (25, 2)):
                set_iteration(iteration)
                assert_same(core(q, k, v), expected(q, k, v, MoBAConfig(chunk_size, topk)))
    finally:
        set_iteration(0)
    with pytest.raises(ValueError, match="per_layer names layer 9, but the model has 4"):
        make_core(MoBAConfig(per_layer="9:topk=2"))


@pytest.mark.parametrize("dense", [False, True], ids=["moba", "dense"])
def test_static_inference_equals_training(dense):
    q, k, v = fused_qkv(60, 2)
    core = make_core(MoBAConfig(chunk_size=16, topk=2, full_attention_layers="all" if dense else "none"))
    whole = core(q, k, v)
    with torch.inference_mode():
        prefill = core(q[:30], k[:30], v[:30])
        continued = core(q[30:59], k[:59], v[:59])
        decoded = core(q[59:], k, v, attn_mask_type=AttnMaskType.no_mask)
    assert_same(torch.cat((prefill, continued, decoded)), whole.detach())
    core(q[:30], k[:30], v[:30]).sum().backward()  # what inference cached must still serve training


def test_dense_decoding():
    q, k, v = fused_qkv(60, 2)
    core = make_core(MoBAConfig(chunk_size=16, topk=2, decode="dense"))
    with torch.inference_mode():
        assert_same(core(q[:59], k[:59], v[:59]), expected(q[:59], k[:59], v[:59]).detach())  # a prompt
        generated = core(q[59:], k, v, attn_mask_type=AttnMaskType.no_mask)
    assert_same(generated, expected(q, k, v, dense=True)[59:].detach())


def test_no_state_and_no_parameters():
    core = make_core()
    before = dict(vars(core))
    core(*fused_qkv(40, 1))
    assert vars(core).keys() == before.keys() and not core.state_dict()


REFUSED = {
    "attention_dropout": (dict(attention_dropout=0.1), "--attention-dropout 0"),
    "window_size": (dict(window_size=(128, 0)), "--window-size"),
    "softmax_type": (dict(softmax_type="learnable"), "--softmax-type"),
    "qk_clip": (dict(qk_clip=True), "--qk-clip"),
    "log_max_attention_logit": (dict(log_max_attention_logit=True), "--log-max-attention-logit"),
    "fp8_dot_product_attention": (dict(fp8_dot_product_attention=True), "--fp8-dot-product-attention"),
    "fp8_multi_head_attention": (dict(fp8_multi_head_attention=True), "--fp8-multi-head-attention"),
    "query_key_layer_scaling": (dict(apply_query_key_layer_scaling=True), "--apply-query-key-layer-scaling"),
    "batch_invariant_mode": (dict(batch_invariant_mode=True), "--batch-invariant-mode"),
    "flash_decode": (dict(flash_decode=True), "--flash-decode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_config_refused(name):
    changes, flag = REFUSED[name]
    config = make_config()
    for field, value in changes.items():
        if field not in TransformerConfig.__dataclass_fields__:
            pytest.skip(f"this Megatron-Core has no {field}")
        setattr(config, field, value)
    with pytest.raises(ValueError, match=flag):
        make_core(config=config)


@pytest.mark.parametrize("field, value", [("cuda_graph_impl", "local"), ("cuda_graph_impl", "transformer_engine"),
                                          ("enable_cuda_graph", True), ("external_cuda_graph", True)])
def test_a_switch_by_iteration_is_refused_in_cuda_graphs(field, value):
    config = make_config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"--moba-full-attention-from-step .* with --{field.replace('_', '-')}, got 9"):
        make_core(MoBAConfig(full_attention_from_step=9), config=config)
    with pytest.raises(ValueError, match="--moba-topk-schedule cannot be used with .*'0:9' and .*Capture nothing, or"):
        make_core(MoBAConfig(topk_schedule="0:9"), config=config)
    make_core(MoBAConfig(full_attention_layers="last:1"), config=config)
    make_core(MoBAConfig(full_attention_layers="last:1", full_attention_from_step=9), 4, config)  # dense at any step


@pytest.mark.parametrize("arguments, text", [
    (dict(attn_mask_type=AttnMaskType.padding), "attn_mask_type must be AttnMaskType.causal"),
    (dict(attn_mask_type=AttnMaskType.no_mask), "attn_mask_type must be AttnMaskType.causal"),
    (dict(attention_type="cross"), "attention_type must be 'self', got 'cross'"),
    (dict(attention_dropout=0.2), "attention_dropout must be 0, got 0.2"),
    (dict(layer_number=0), "layer_number must be in 1..4"),
    (dict(moba=MoBAConfig(full_attention_layers="7")), "full_attention_layers names layer 7"),
])
def test_constructor_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        make_core(**arguments)


@pytest.mark.parametrize("given", ["p2p", "a2a+p2p", "nonsense"])
def test_cp_comm_type_refused(given):
    with pytest.raises(ValueError, match=r"--cp-comm-type, layer 1: cp_comm_type must be one of all_gather, a2a, "
                                         r"a2a\+all_gather, selective for MoBA attention, got '" + re.escape(given)):
        resolve_cp_comm_type(given, make_config(), 1)


def test_cp_comm_type_accepted():
    for given in (None, "all_gather", "allgather", ["all_gather"]):
        assert resolve_cp_comm_type(given, make_config(), 1) == "all_gather"
    assert resolve_cp_comm_type("a2a", make_config(), 1) == "a2a"
    config = make_config()
    config.cp_comm_type = ["all_gather", "p2p", "a2a+allgather", "a2a"]
    assert resolve_cp_comm_type("p2p", config, 1) == "all_gather"  # Megatron up to 0.16 passes the next layer's entry
    assert resolve_cp_comm_type("p2p", config, 3) == "a2a+all_gather"
    with pytest.raises(ValueError, match="layer 2: .* got 'p2p'"):
        resolve_cp_comm_type("allgather", config, 2)
    with pytest.raises(ValueError, match="one for each layer, got 4 for layer 5"):
        resolve_cp_comm_type("allgather", config, 5)


def test_groups_that_come_with_the_batch_have_the_type_that_was_said():
    config = make_config()
    config.hybrid_context_parallel, groups = True, SimpleNamespace(cp="group")
    assert make_core(config=config, cp_comm_type="a2a", pg_collection=groups).cp_comm_type == "a2a"
    config.cp_comm_type = "selective"  # Megatron's layers pass none where the static size is 1
    assert make_core(config=config, pg_collection=groups).cp_comm_type == "selective"
    config.cp_comm_type = "p2p"
    with pytest.raises(ValueError, match="--cp-comm-type, layer 1: .* got 'p2p'"):
        make_core(config=config, pg_collection=groups)


@pytest.mark.parametrize("levels", [None, ["one"], ["one", "two", "three"]])
def test_hierarchy_needs_two_levels(levels):
    config = make_config()
    config.context_parallel_size = 4
    groups = SimpleNamespace(cp="group", hcp=levels)
    with pytest.raises(ValueError, match="--hierarchical-context-parallel-sizes must have two sizes .* got "
                                         f"{len(levels or ())}"):
        make_core(config=config, cp_comm_type="a2a+all_gather", pg_collection=groups)
    groups.hcp = ["inner", "outer"]
    core = make_core(config=config, cp_comm_type="a2a+allgather", pg_collection=groups)
    assert core.cp_levels == ["inner", "outer"] and core.cp_group == "group"


@pytest.mark.parametrize("change, text", [
    (lambda a: a.update(attention_bias=torch.zeros(1)), "attention_bias must be None"),
    (lambda a: a.update(attn_mask_type=AttnMaskType.padding), "attn_mask_type must be causal"),
    (lambda a: a.update(attn_mask_type=AttnMaskType.no_mask), "attn_mask_type must be causal"),
    (lambda a: a.update(attn_mask_type=AttnMaskType.padding_causal), "attn_mask_type must be causal"),
    (lambda a: a.update(query=a["query"][:, 0]), r"query must have shape \[s, b, h, d\]"),
    (lambda a: a.update(value=None), "value must have shape .* got NoneType"),
    (lambda a: a.update(key=a["key"][:20], value=a["value"][:20]), "key must have at least query's 40 tokens"),
    (lambda a: a.update(packed_seq_params=PackedSeqParams(qkv_format="thd")),
     r"query must have shape \[t, h, d\] for packed_seq_params"),
])
def test_forward_refuses(change, text):
    arguments = dict(zip(("query", "key", "value"), fused_qkv(40, 2)), attention_mask=None)
    change(arguments)
    with pytest.raises(ValueError, match=text):
        make_core()(**arguments)


def test_forward_refuses_types_and_lengths():
    q, k, v = fused_qkv(40, 1)
    with pytest.raises(TypeError, match="k must have q's dtype"):
        make_core()(q, k.float(), v)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 30, 20, 40], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
        make_core()(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=packed)
    with pytest.raises(TypeError, match="cu_seqlens must be a torch.Tensor, got NoneType"):
        make_core()(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=PackedSeqParams(qkv_format="thd"))


def test_paths_around_core_attention_are_refused():
    make_core()
    stub = argparse.Namespace(core_attention=make_core())
    for name in ("flash_decode", "flash_decode_and_prefill"):
        with pytest.raises(ValueError, match="would bypass MoBA"):
            getattr(Attention, name)(stub)


def test_config_sources(monkeypatch):
    monkeypatch.setenv("MOBA_CHUNK_SIZE", "64")
    try:
        set_default_config(MoBAConfig(chunk_size=32))
        assert make_core(moba=None).moba_config.chunk_size == 32
    finally:
        set_default_config(None)
    core_attention._environment_config.cache_clear()
    assert make_core(moba=None).moba_config.chunk_size == 64
    core_attention._environment_config.cache_clear()
    with pytest.raises(TypeError, match="moba_config must be a MoBAConfig, got dict"):
        make_core(moba={"chunk_size": 1})


def test_layer_specs():
    for spec in (layer_specs.moba_layer_spec, layer_specs.get_moba_layer_local_spec(MOBA, qk_layernorm=True)):
        assert spec.submodules.self_attention.submodules.core_attention.module is MoBACoreAttention
    if layer_specs.gpt_layer_specs.HAVE_TE:
        return
    stand_in = vars(layer_specs)["moba_layer_te_spec"].module  # --spec reads the module's dictionary
    assert issubclass(stand_in, BaseTransformerLayer)  # a transformer block builds nothing else
    for build in (layer_specs.get_moba_layer_with_transformer_engine_spec, stand_in):
        with pytest.raises(ImportError, match="needs transformer-engine"):
            build()


def test_names_that_stay():
    """Of programs of 0.1, and of patched checkouts of Megatron-LM (tests/megatron/test_patches.py)."""
    from moba_megatron import arguments as old_arguments
    from moba_megatron import core_attention as old

    assert old.MoBACoreAttention is MoBACoreAttention and old.set_iteration is set_iteration
    assert old_arguments.add_moba_arguments is add_moba_arguments


def test_flags_round_trip():
    parser = add_moba_arguments(argparse.ArgumentParser())
    assert config_from_args(parser.parse_args([])) == MoBAConfig()
    text = ("--moba-chunk-size 128 --moba-topk 3 --moba-full-attention-layers last:2 --moba-full-attention-from-step 9 "
            "--moba-deterministic --moba-backend reference --moba-workspace-mib 256 --moba-decode dense")
    assert config_from_args(parser.parse_args(text.split())) == MoBAConfig(
        128, 3, "last:2", 9, True, "reference", workspace_mib=256, decode="dense")
    assert config_from_args(parser.parse_args(["--attention", "full"])).is_full_attention(1, 4)
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        config_from_args(parser.parse_args(["--moba-topk", "0"]))


def test_environment():
    assert config_from_environment({}) == MoBAConfig()
    environment = {"MOBA_CHUNK_SIZE": "128", "MOBA_TOPK": "3", "MOBA_FULL_ATTENTION_LAYERS": "1,4",
                   "MOBA_FULL_ATTENTION_FROM_STEP": "9", "MOBA_DETERMINISTIC": "1", "MOBA_BACKEND": "reference"}
    assert config_from_environment(environment) == MoBAConfig(128, 3, "1,4", 9, True, "reference")
    for name, text in (("MOBA_TOPK", "three"), ("MOBA_DETERMINISTIC", "maybe")):
        with pytest.raises(ValueError, match=f"environment variable {name} must be .*, got '{text}'"):
            config_from_environment({name: text})


def test_key_convolution_refuses_repeated_heads():
    config = SimpleNamespace(num_query_groups=2, num_attention_heads=8, tensor_model_parallel_size=4, kv_channels=8)
    with pytest.raises(ValueError, match=r"--moba-key-conv needs kv heads .* multiple of the tensor .* got 2 and 4"):
        KeyConvolution(config, 3, tp_group=object())
