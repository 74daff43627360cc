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
