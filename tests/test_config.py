"""MoBAConfig: which layers and steps are dense, and what it says to wrong values."""
import dataclasses

import pytest

from moba_megatron import MoBAConfig
from moba_megatron.config import get_default_config, set_default_config

LAYERS = range(1, 9)  # of a model with 8


@pytest.mark.parametrize("rule, dense", (
    ("none", ()), ("", ()), ((), ()), ([], ()),
    ("all", LAYERS), (" ALL ", LAYERS),
    ("last:1", (8,)), ("last:3", (6, 7, 8)), ("last:8", LAYERS), ("last:99", LAYERS),
    ("every:1", LAYERS), ("every:4", (4, 8)), ("every:9", ()),
    ("1,2,8", (1, 2, 8)), (" 8, 1 ", (1, 8)), ("3", (3,)), ("3,3", (3,)),
    ((1, 2, 8), (1, 2, 8)), ([5], (5,)), (range(2, 5), (2, 3, 4)), ({7, 1}, (1, 7)),
), ids=repr)
def test_layer_rules(rule, dense):
    config = MoBAConfig(full_attention_layers=rule)
    assert [n for n in LAYERS if config.is_full_attention(n, len(LAYERS))] == list(dense)


def test_layer_numbers_from_an_iterator_are_kept():
    config = MoBAConfig(full_attention_layers=(n for n in (4, 2)))
    assert config.full_attention_layers == (2, 4) and config.is_full_attention(2, 4)


def test_listed_layer_must_exist():
    with pytest.raises(ValueError, match="full_attention_layers names layer 24.*the model has 12"):
        MoBAConfig(full_attention_layers="1,24").is_full_attention(1, 12)


@pytest.mark.parametrize("number", (0, -1, 9))
def test_layer_number_is_one_based(number):
    with pytest.raises(ValueError, match=rf"layer_number must be in 1\.\.8.*got {number}"):
        MoBAConfig().is_full_attention(number, 8)


@pytest.mark.parametrize("field, value, error, parts", (
    ("chunk_size", 0, ValueError, ("at least 1", "got 0")),
    ("key_conv", 4, ValueError, ("one of 0, 3, 5", "got 4")),
    ("workspace_mib", 0, ValueError, ("at least 1", "got 0")),
    ("cp_head_groups", 0, ValueError, ("at least 1", "got 0")),
    ("chunk_size", -512, ValueError, ("at least 1", "got -512")),
    ("chunk_size", 512.0, TypeError, ("int", "got 512.0", "float")),
    ("chunk_size", True, TypeError, ("int", "got True", "bool")),
    ("chunk_size", None, TypeError, ("int", "got None")),
    ("chunk_size", "512", TypeError, ("int", "got '512'", "str")),
    ("topk", 0, ValueError, ("at least 1", "got 0")),
    ("topk", 2.5, TypeError, ("int", "got 2.5")),
    ("topk", False, TypeError, ("int", "got False")),
    ("full_attention_from_step", -1, ValueError, ("at least 0", "got -1")),
    ("full_attention_from_step", 1e3, TypeError, ("int", "got 1000.0")),
    ("deterministic", 1, TypeError, ("bool", "got 1")),
    ("deterministic", "false", TypeError, ("bool", "got 'false'")),
    ("backend", "cuda", ValueError, ("auto, triton, torch, reference", "got 'cuda'")),
    ("backend", None, ValueError, ("auto, triton, torch, reference", "got None")),
    *(("per_layer", text, ValueError, ("1-based layers, each once", f"got {text!r}")) for text in (
        "", "1", "1:", "0:topk=2", "2-1:topk=2", "1-2:topk=0", "1:chunk=-4", "1:heads=2", "1:topk=2;1:chunk=4",
        "1-4:topk=2;3:topk=4", "1:topk=2.5", "1:topk=2;", "1:topk=9999999999", "1 2:topk=2", "1:topk=1 6",
        "1:topk=2,topk=4", "1:chunk=4topk=2", "1:topk=2,")),
    ("per_layer", 8, TypeError, ("str or None", "got 8")),
    *(("topk_schedule", text, ValueError, ("begin with 0 and grow", f"got {text!r}")) for text in (
        "", "8", "1:8", "0:0", "0:8,0:4", "0:8,20:4,10:2", "0:8,", "0:8;10:4", "0:8,-1:4", "0:1 6",
        "0:8,1 0:4", "0:8,9999999999:4")),
    ("topk_schedule", 8, TypeError, ("str or None", "got 8")),
    ("decode", "sparse", ValueError, ("moba, dense", "got 'sparse'")),
    *(("full_attention_layers", value, ValueError, ("'none', 'all', 'last:N', 'every:N'", "1,2,24", f"got {value!r}"))
      for value in ("last", "last:", "last:0", "last:-1", "last:x", "first:2", "every:0", "every:1.5", "1,,2", "0",
                    "-1", "1;2", "some", (0,), (1, -2), (1.0,), (True,), ("1",))),
    *(("full_attention_layers", value, TypeError, ("'none', 'all'", f"got {value!r}")) for value in (3, None, 1.5)),
), ids=repr)
def test_wrong_values_are_named(field, value, error, parts):
    with pytest.raises(error) as raised:
        MoBAConfig(**{field: value})
    assert f"MoBAConfig.{field} must be" in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


def test_dense_from_a_step_on():
    assert not any(MoBAConfig().is_full_step(step) for step in (0, 10 ** 9))
    config = MoBAConfig(full_attention_from_step=2)
    assert [config.is_full_step(step) for step in range(4)] == [False, False, True, True]
    assert MoBAConfig(full_attention_from_step=0).is_full_step(0)


def test_config_is_a_frozen_value():
    config = MoBAConfig(full_attention_layers=[2, 1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.topk = 3
    assert config == MoBAConfig(full_attention_layers=(1, 2)) and hash(config) == hash(dataclasses.replace(config))
    assert dataclasses.replace(config, topk=3).full_attention_layers == (1, 2)


def test_every_field_is_described_and_has_help():
    for field in dataclasses.fields(MoBAConfig):
        assert f"{field.name}={getattr(MoBAConfig(), field.name)}" in MoBAConfig().describe()
        assert field.metadata["help"]


def test_default_config_is_set_and_forgotten():
    before = get_default_config()
    try:
        config = MoBAConfig(topk=2)
        set_default_config(config)
        assert get_default_config() is config
        with pytest.raises(TypeError, match="config must be a MoBAConfig or None, got dict"):
            set_default_config({"topk": 2})
        assert get_default_config() is config
        set_default_config(None)
        assert get_default_config() is None
    finally:
        set_default_config(before)


def test_layers_of_their_own():
    config = MoBAConfig(512, 8, per_layer="1-2:chunk=128,topk=16; 4:topk=2;5-5:chunk=64")
    found = [config.for_layer(n, 8) for n in LAYERS]
    assert [(c.chunk_size, c.topk) for c in found] == [(128, 16), (128, 16), (512, 8), (512, 2), (64, 8),
                                                       *[(512, 8)] * 3]
    assert {c.per_layer for c in found} == {None}
    assert MoBAConfig().for_layer(3, 8) == MoBAConfig()
    with pytest.raises(ValueError, match="per_layer names layer 5, but the model has 4"):
        config.for_layer(1, 4)


def test_none_unsets():
    assert MoBAConfig(per_layer="none", topk_schedule="none") == MoBAConfig()


def test_topk_by_iteration():
    config = MoBAConfig(topk_schedule="0:64, 1000:16,2000:8")
    assert [config.at_step(i).topk for i in (0, 999, 1000, 1999, 2000, 9999)] == [64, 64, 16, 16, 8, 8]
    assert MoBAConfig(topk=3).at_step(5).topk == 3
    both = dataclasses.replace(config, per_layer="2:chunk=64").for_layer(2, 8).at_step(1000)
    assert (both.chunk_size, both.topk) == (64, 16)
    with pytest.raises(ValueError, match="topk_schedule must be None where per_layer gives a topk, got '0:8' and"):
        MoBAConfig(per_layer="1:topk=4", topk_schedule="0:8")
