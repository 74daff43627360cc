"""The stored judgements of Megatron's fields: they are complete, what they call refused is, and the page is theirs."""
import re
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from benchmarks import megatron_fields  # noqa: E402
from moba_megatron import MoBAConfig  # noqa: E402
from moba_megatron.megatron import patching, refusals  # noqa: E402

STORED = megatron_fields.judgements()
REFUSED = [(name, entry, owner) for owner, part in (("config", STORED), ("args", STORED["arguments"]))
           for name, entry in part["refused"].items()]


def test_every_field_is_judged_once():
    assert megatron_fields.unjudged() == []
    for part in (STORED, STORED["arguments"]):
        names = [*part["refused"], *(name for kind in ("honoured", "irrelevant") for group in part[kind].values()
                                     for name in group)]
        assert len(names) == len(set(names))


def test_a_new_field_is_named(monkeypatch, capsys):
    monkeypatch.setattr(megatron_fields, "installed_fields", lambda: {"num_layers", "quadratic_attention"})
    assert megatron_fields.run_fields(SimpleNamespace(write=False)) == 1
    assert capsys.readouterr().out.endswith("not judged: quadratic_attention\n")


@pytest.mark.parametrize("name, entry, owner", [case for case in REFUSED if case[1]["by"] == "core_attention"],
                         ids=lambda x: x if isinstance(x, str) else "")
def test_refused_by_core_attention(monkeypatch, name, entry, owner):
    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, attention_dropout=0.0)
    config.context_parallel_size = entry.get("context_parallel_size", 1)
    args = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", SimpleNamespace(_GLOBAL_ARGS=args))
    refusals.refuse_unsupported(config, AttnMaskType.causal, "self", None)
    setattr(config if owner == "config" else args, name, entry["value"])
    with pytest.raises(ValueError, match="--?" + name.replace("_", "[-_]")):
        refusals.refuse_unsupported(config, AttnMaskType.causal, "self", None)


def test_refused_by_name_are_all_in_the_list():
    """What core attention compares is in the list of refused fields, with a value that it does not take."""
    for name, allowed, _ in refusals._UNSUPPORTED_FIELDS:
        assert STORED["refused"][name]["by"] == "core_attention" and STORED["refused"][name]["value"] != allowed
    assert set(refusals.LAYOUT_FIELDS) <= set(STORED["refused"])


def test_refused_by_check_model():
    """A layer that Megatron's own attention has, as each of these fields puts it there or another class like it."""
    spec = get_gpt_layer_local_spec()
    layer = SimpleNamespace(layer_number=1, config=SimpleNamespace(num_layers=2),
                            core_attention=object.__new__(spec.submodules.self_attention.submodules.core_attention))
    model = SimpleNamespace(modules=lambda: [layer])
    with pytest.raises(ValueError, match="layer 1 attends through DotProductAttention") as error:
        patching.check_model([model], MoBAConfig(8, 2))
    for part in ("inference_optimized", "--attention-backend local", "heterogeneous"):
        assert part in str(error.value)


def test_the_page_is_of_the_list():
    assert megatron_fields.PAGE.read_text() == megatron_fields.page(), "run python -m benchmarks fields --write"
    for name in megatron_fields.judged(STORED) | megatron_fields.judged(STORED["arguments"]):
        assert re.search(rf"`{name}`", megatron_fields.page())
