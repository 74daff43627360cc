"""Every setting of every host is honoured or refused by name: the tables must name each field, so none is forgotten."""
import contextlib
import dataclasses
import importlib
import inspect
import re
import sys
from types import SimpleNamespace

import huggingface_models as hf
import pytest
import torch

from moba_megatron import MoBAConfig, MoBACoreAttention, record_selection, register_moba
from moba_megatron.huggingface import attention as huggingface

CHANGED = dict(chunk_size=4, topk=4, full_attention_layers="1", full_attention_from_step=0, deterministic=True,
               backend="reference", cp_head_groups=2, workspace_mib=7, key_conv=3, decode="moba",
               selection="group", per_layer="1:chunk=4,topk=3", topk_schedule="0:3")
"""A value of each field that is not its default."""
HONOURED = "honoured"


def expectations(**refused):
    return {**dict.fromkeys(CHANGED, HONOURED), **refused}


def transformers_call(config, monkeypatch, decode=None):
    """What the operator was given in the forward of a prompt, and the logits of a step after it."""
    register_moba(config, decode=decode)
    given, inner = [], huggingface.moba_attention
    monkeypatch.setattr(huggingface, "moba_attention", lambda *a, **k: (given.append((a[3].chunk_size, a[4], k)),
                                                                        inner(*a, **k))[1])
    with torch.no_grad():
        cache = (model := hf.model().eval())(hf.tokens(1, 30), use_cache=True)
        return given, model(hf.tokens(1, 1), past_key_values=cache.past_key_values).logits


def deepspeed_call(config, monkeypatch):
    from moba_megatron.deepspeed import attention as deepspeed

    parallel, length = None, 30
    if config.cp_head_groups:  # two ranks, of which one is enough: what they would send each other is not computed
        parallel, length = deepspeed.SequenceParallel("zigzag", 2), 32
    layer = deepspeed.MoBAAttention(config, 1, 2, parallel)
    given = without_communication(deepspeed, monkeypatch)
    monkeypatch.setattr(deepspeed, "moba_attention", lambda q, k, v, segments, *a, **options: (
        given.append((segments.chunk_size, a, options)), torch.zeros_like(q))[1])
    layer(*(torch.randn(1, length, heads, 8) for heads in (4, 2, 2)))
    return given


def without_communication(module, monkeypatch):
    """Lets a host's context parallelism run on one rank, up to the operator; returns the list of what that is given."""
    given = []
    monkeypatch.setattr(module, "CollectiveCheck", lambda group: contextlib.nullcontext(SimpleNamespace()))
    monkeypatch.setattr(module, "context_parallel_attention", lambda q, k, v, sequences, *a, head_groups, **options: (
        given.append(head_groups), torch.zeros_like(q))[1])
    return given


def megatron_call(config, monkeypatch):
    import megatron_on_cpu
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moba_megatron.megatron import core_attention

    megatron_on_cpu.enable()
    core = MoBACoreAttention(
        config=TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                                 attention_dropout=0.0, use_cpu_initialization=True),
        layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", moba_config=config,
        pg_collection=SimpleNamespace(tp=SimpleNamespace()))
    given = without_communication(core_attention.context_parallel, monkeypatch)
    monkeypatch.setattr(core_attention, "moba_attention", lambda q, k, v, segments, *a, **options: (
        given.append((segments.chunk_size, a, options)), torch.zeros_like(q))[1])
    q, k, v = (torch.randn(76, 1, heads, 8) for heads in (4, 2, 2))
    if config.cp_head_groups:
        monkeypatch.setattr(core_attention.context_parallel, "check_groups", lambda *_: None)
        core._group_for = lambda packed: SimpleNamespace(size=lambda: 2)
    core(q, k, v, None)
    if config.cp_head_groups:
        return given
    if not config.key_conv:  # whose filter needs all keys at once
        core(q[-1:], k, v, None)  # a new token over a cache
    return given, [name for name, _ in core.named_parameters()]


HOSTS = {
    "transformers": (transformers_call, expectations(
        full_attention_from_step="must be None for Transformers, got 0: its models do not know the training step",
        topk_schedule="must be None for Transformers, got '0:3': its models do not know the training step",
        cp_head_groups="must be None for Transformers, got 2",
        key_conv="must be 0 for Transformers, got 3")),
    "deepspeed": (deepspeed_call, expectations(
        full_attention_from_step=HONOURED,
        key_conv="must be 0 under DeepSpeed, got 3",
        decode="must be None under DeepSpeed, got 'moba'")),
    "megatron": (megatron_call, expectations()),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MoBAConfig)])
@pytest.mark.parametrize("host", HOSTS)
def test_field(host, field, monkeypatch):
    """Either the layer does something else than with the default, or it says that it cannot."""
    if host != "transformers":
        pytest.importorskip({"deepspeed": "deepspeed", "megatron": "megatron.core"}[host])
    call, expected = HOSTS[host]
    default = MoBAConfig(8, 2)
    value = "dense" if (host, field) == ("megatron", "decode") else CHANGED[field]
    config = dataclasses.replace(default, **{field: value})
    assert getattr(config, field) != getattr(default, field)
    if expected[field] == HONOURED:
        with monkeypatch.context() as patches:
            before = call(default, patches)
        after = call(config, monkeypatch)
        assert after == [2] if field == "cp_head_groups" else not same(after, before)
    else:
        with pytest.raises(ValueError, match=f"MoBAConfig.{field} {re.escape(expected[field])}"):
            call(config, monkeypatch)


def test_head_groups_need_zigzag():
    pytest.importorskip("deepspeed")
    from moba_megatron.deepspeed import MoBAAttention

    with pytest.raises(ValueError, match="cp_head_groups must be None under DeepSpeed, got 2: only zigzag"):
        MoBAAttention(MoBAConfig(cp_head_groups=2), 1, 1)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


ARGUMENTS = {
    "register_moba": {"config", "decode", "name", "selector"},
    "MoBAAttention": {"config", "layer_number", "num_layers", "parallel", "softmax_scale"},
    "moba_attention_forward": {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "name",
                               "kwargs"},
}
"""The arguments of integrations, each of which has a test that sees it honoured or refused: below, in
test_huggingface.py and in test_deepspeed.py."""


@pytest.mark.parametrize("host, needs", [("deepspeed", "deepspeed"), ("huggingface", "transformers")])
def test_names_of_an_earlier_version(host, needs, monkeypatch):
    """They warn once, and are the same objects."""
    pytest.importorskip(needs)
    monkeypatch.delitem(sys.modules, f"moba_megatron.integrations.{host}", raising=False)
    with pytest.warns(DeprecationWarning) as warned:
        before = importlib.import_module(f"moba_megatron.integrations.{host}")
        importlib.import_module(f"moba_megatron.integrations.{host}")
    now = importlib.import_module(f"moba_megatron.{host}")
    (warning,) = [w for w in warned if "integrations" in str(w.message)]
    assert str(warning.message).endswith(f"import moba_megatron.{host}")
    assert all(getattr(before, name) is getattr(now, name) for name in now.__all__)


def test_arguments_are_listed():
    pytest.importorskip("deepspeed")
    from moba_megatron.deepspeed import MoBAAttention

    for function in (register_moba, MoBAAttention, huggingface.moba_attention_forward):
        assert set(inspect.signature(function).parameters) == ARGUMENTS[function.__name__]


@pytest.mark.parametrize("config, argument, sparse", [
    (None, None, False), (None, "moba", True), (None, "dense", False), ("moba", None, True), ("dense", None, False),
    ("moba", "moba", True), ("dense", "dense", False)])
def test_decode_of_transformers(config, argument, sparse, monkeypatch):
    """The config's and the argument say the same thing; neither said is dense."""
    def logits(config, argument):
        with monkeypatch.context() as patches:
            return transformers_call(MoBAConfig(4, 3, decode=config), patches, argument)[1]

    assert torch.equal(logits(config, argument), logits(None, "moba" if sparse else "dense"))


def test_softmax_scale_under_deepspeed():
    pytest.importorskip("deepspeed")
    from moba_megatron.deepspeed import MoBAAttention

    q, k, v = (torch.randn(1, 30, heads, 8) for heads in (4, 2, 2))
    given, default, as_default = (MoBAAttention(MoBAConfig(8, 2), 1, 1, softmax_scale=scale)(q, k, v)
                                  for scale in (1.0, None, 8 ** -0.5))
    assert torch.equal(default, as_default) and not torch.allclose(given, default)


def test_deepspeed_does_not_record():
    pytest.importorskip("deepspeed")
    from moba_megatron.deepspeed import MoBAAttention

    x = torch.randn(1, 30, 2, 8)
    with pytest.raises(ValueError, match="record_selection and replay_selection are not for MoBAAttention"), (
            record_selection()):
        MoBAAttention(MoBAConfig(8, 2), 1, 1)(x, x, x)
