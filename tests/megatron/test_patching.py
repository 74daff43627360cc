"""Megatron changes when it is asked to, in one call, and changes back: the installed core and an imitated trainer."""
import sys
from types import SimpleNamespace

import pytest

from tests.megatron.test_megatron_lm import make_host, report_of, run_program_text

pytest.importorskip("megatron.core")

from moba_megatron.megatron import patching

PROGRAM = """
    import importlib, json, sys
    sys.path.insert(0, sys.argv.pop())
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    WHERE = {"megatron.core.transformer.multi_token_prediction": ["MultiTokenPredictionLayer.__init__"],
             "megatron.core.transformer.attention": ["Attention.__init__", "Attention.flash_decode",
                                                     "Attention.flash_decode_and_prefill"],
             "megatron.core.dist_checkpointing": ["load"],
             "megatron.core.models.backends": ["LocalSpecProvider.core_attention"],
             "megatron.core.models.gpt.gpt_layer_specs": ["get_gpt_layer_local_spec"],
             "megatron.training.arguments": ["add_megatron_arguments"],
             "megatron.training.checkpointing": ["_load_base_checkpoint"],
             "megatron.training.training": ["num_floating_point_operations", "setup_model_and_optimizer"]}

    def look():
        found = {}
        for module, names in WHERE.items():
            for name in names:
                x = importlib.import_module(module)
                for part in name.split("."):
                    x = getattr(x, part)
                found[f"{module}.{name}"] = x
        return found

    before, report = look(), {}

    def note(step):
        report[step] = sorted(name for name, x in look().items() if x is not before[name])

    import moba_megatron
    note("package")
    from moba_megatron import MoBACoreAttention, MoBAConfig, get_moba_layer_local_spec
    from moba_megatron import get_moba_layer_with_transformer_engine_spec
    import moba_megatron.launch, moba_megatron.megatron_lm
    get_moba_layer_local_spec()
    note("builder")
    from moba_megatron.layer_specs import moba_layer_spec
    note("spec")

    config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    def build():
        return MoBACoreAttention(config, 1, AttnMaskType.causal, "self")
    build(), build()
    note("layer")
    from moba_megatron.megatron import patching
    report["undone"] = sorted(patching.undo())
    note("undo")

    report["applied"] = patching.apply()
    assert patching.apply() == report["applied"]
    from megatron.training import arguments
    arguments.parse_args()
    build()
    note("apply")
    assert patching.undo() and not patching.undo()
    note("undo again")
    report["full"] = patching.apply("full")
    note("flags")
    patching.undo()
    assert not patching.only_flags
    note("at last")
    print("REPORT " + json.dumps(report))
"""


def test_megatron_changes_when_it_is_asked_to(tmp_path):
    """Not on import, the documented spec module's included; not by a builder; by a layer only as far as it must."""
    make_host(tmp_path, "0.18")
    report = report_of(run_program_text(PROGRAM, tmp_path))
    assert report["package"] == report["builder"] == report["spec"] == []
    guards = [f"megatron.core.transformer.attention.Attention.{name}"
              for name in ("flash_decode", "flash_decode_and_prefill")]
    assert report["layer"] == guards and report["undone"] == ["Attention.flash_decode",
                                                              "Attention.flash_decode_and_prefill"]
    assert report["undo"] == report["undo again"] == report["at last"] == []
    assert {name for name in report["applied"] if "Stack" not in name and "TE" not in name} < set(report["apply"])
    assert {"megatron.training.checkpointing._load_base_checkpoint", *guards} < set(report["apply"])
    assert report["full"] == report["flags"] == ["megatron.training.arguments.add_megatron_arguments"]


def test_what_others_wrapped_stays(monkeypatch):
    def step(number):
        return number + 1

    host = SimpleNamespace(step=step, __name__="host")
    monkeypatch.setitem(sys.modules, "host_of_a_test", host)
    monkeypatch.setattr(patching, "_hooked", [])
    double = patching._wrapper(lambda original, number: 2 * original(number))
    for _ in range(2):
        assert patching._hook("host_of_a_test", "step", double) and host.step(1) == 4
    ours, host.step = host.step, lambda number: -ours(number)
    with pytest.warns(UserWarning, match="host.step is not what moba_megatron put there, and stays as it is"):
        assert patching.undo() == []
    assert host.step(1) == -4
    host.step = ours
    assert patching._hook("host_of_a_test", "step", double) and host.step is ours  # wrapped, by whomever
    host.step = step
    assert patching._hook("host_of_a_test", "step", double) and patching.undo() == ["host.step"] and host.step is step
    assert not patching._hook("host_of_a_test", "stop", double)
