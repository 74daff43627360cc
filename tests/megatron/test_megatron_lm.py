"""`python -m moba_megatron.launch` and the hooks under it, on hosts that imitate megatron.training, and on a real one.

The imitation has Megatron-LM's names and calling order and nothing else; megatron.core below it is the installed one.
Set MEGATRON_LM_PATH to a Megatron-LM checkout to hook into that as well.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from ranks import ROOT, run_program

pytest.importorskip("megatron.core")

from moba_megatron import MoBAConfig, MoBACoreAttention, doctor, launch
from moba_megatron.megatron import checkpoint_flags, core_attention, patching
from moba_megatron.megatron import host as megatron_host
from moba_megatron.megatron.arguments import add_moba_arguments, config_from_args
from moba_megatron.megatron.core_attention import MoBAOrTEDotProductAttention

ARGUMENTS = """
    import argparse
    from megatron.training import checkpointing, global_vars

    def add_megatron_arguments(parser):
        sizes = {"num-layers": 3, "seq-length": 64, "train-iters": 3, "num-attention-heads": 2, "kv-channels": 8}
        for name, default in sizes.items():
            parser.add_argument("--" + name, type=int, default=default)
        parser.add_argument("--load")
        parser.add_argument("--attention-dropout", type=float, default=0.1)
        parser.add_argument("--no-create-attention-mask-in-dataloader", action="store_false",
                            dest="create_attention_mask_in_dataloader")
        parser.add_argument("--cp-comm-type", nargs="+", default=["p2p"])
        parser.add_argument("--context-parallel-size", type=int, default=1)
        parser.add_argument("--hierarchical-context-parallel-sizes", nargs="+", type=int)
        parser.add_argument("--hybrid-context-parallel", action="store_true")
        parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
        parser.add_argument("--group-query-attention", action="store_true")
        parser.add_argument("--num-query-groups", type=int, default=1)
        parser.add_argument("--spec", nargs="*")
        parser.add_argument("--use-checkpoint-args", action="store_true")
        parser.add_argument("--yaml-cfg")
        return parser

    def parse_args(extra_args_provider=None, ignore_unknown_args=False):
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        return parser.parse_args()

    def parse_and_validate_args(extra_args_provider=None, args_defaults={}):
        args = parse_args(extra_args_provider)
        if args.use_checkpoint_args:
            saved = checkpointing._load_base_checkpoint(args.load, args, rank0=True)[0]["args"]
            for name in ("attention_dropout", "group_query_attention", "num_query_groups"):  # whatever flags said
                if hasattr(saved, name):
                    setattr(args, name, getattr(saved, name))
        global_vars._GLOBAL_ARGS = args
        return args
"""
CHECKPOINTING = """
    import argparse
    import json

    def _load_base_checkpoint(load_dir, args, rank0=False, sharded_state_dict=None):
        with open(load_dir) as file:
            return {"args": argparse.Namespace(**json.load(file))}, "name", False, None
"""
TRAINING = {
    "0.13": """
        from megatron.training import arguments, global_vars

        def num_floating_point_operations(args, batch_size):
            return 1e9

        def setup_model_and_optimizer(model_provider):
            return [model_provider()], None, None

        def pretrain(model_provider, train_step, args_defaults={}):
            args = global_vars._GLOBAL_ARGS = arguments.parse_args()
            model, _, _ = setup_model_and_optimizer(model_provider)
            for args.curr_iteration in range(args.train_iters):
                train_step(model[0])
            return num_floating_point_operations(args, 2)
    """,
    "0.18": """
        from megatron.training import checkpointing, global_vars

        PARSED_BY_SCRIPT = True

        def num_floating_point_operations(args, batch_size, seqlen_squared_sum_in_batch=None,
                                          total_real_tokens_in_batch=None):
            return 1e9

        def setup_model_and_optimizer(model_cfg, model_type=None):
            return [model_cfg()], None, None

        def pretrain(model_provider, train_step):
            args = global_vars._GLOBAL_ARGS
            args.curr_iteration = 0
            if args.load:
                checkpointing._load_base_checkpoint(args.load, args)
            model, _, _ = setup_model_and_optimizer(model_provider)
            for args.curr_iteration in range(args.train_iters):
                train_step(model[0])
            return num_floating_point_operations(args, 2, 2 * 64 * 64, 2 * 64)
    """,
}
SCRIPT = """
    import json
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import build_module, import_module
    from megatron.training import arguments, global_vars, training
    from moba_megatron.megatron.core_attention import get_iteration

    report = {"iterations": []}

    def model_provider():
        args = global_vars._GLOBAL_ARGS
        config = TransformerConfig(num_layers=args.num_layers, hidden_size=16, num_attention_heads=2,
                                   attention_dropout=0.0)
        spec = import_module(args.spec) if args.spec else get_gpt_layer_local_spec()
        core = spec.submodules.self_attention.submodules.core_attention
        report["spec"] = getattr(core, "module", core).__name__
        model = torch.nn.ModuleList(torch.nn.Module() for _ in range(args.num_layers))
        for number, layer in enumerate(model, 1):
            layer.config, layer.layer_number = config, number
            if report["spec"] != "DotProductAttention":  # which needs process groups
                layer.core_attention = build_module(core, config=config, layer_number=number,
                                                    attn_mask_type=AttnMaskType.causal, attention_type="self")
        report["dense"] = [layer.core_attention.full_attention for layer in model if hasattr(layer, "core_attention")]
        return model

    def train_step(model):
        report["iterations"].append(get_iteration())

    if __name__ == "__main__":
        if hasattr(training, "PARSED_BY_SCRIPT"):
            arguments.parse_and_validate_args()
        report["flops"] = training.pretrain(model_provider, train_step)
        names = ("attention_dropout", "create_attention_mask_in_dataloader", "cp_comm_type")
        report["chosen"] = [getattr(global_vars._GLOBAL_ARGS, name) for name in names]
        report["from_step"] = getattr(global_vars._GLOBAL_ARGS, "moba_full_attention_from_step", "no such flag")
        print("REPORT " + json.dumps(report))
"""
DENSE_FLOPS = 3 * 2 * 2 * (8 + 8) * 64**2 / 2  # one layer, one sequence
MOBA_FLOPS = 3 * 2 * 2 * (8 + 8) * (8 * 8**2 / 2 + 7 * 8**2) + 2 * 2 * 8 * 8 * (7 * 8 / 2 - 1)  # chunk 8, topk 2


def make_host(directory, family):
    package = directory / "megatron" / "training"
    package.mkdir(parents=True)
    for name, text in (("__init__", ""), ("global_vars", "_GLOBAL_ARGS = None"), ("arguments", ARGUMENTS),
                       ("checkpointing", CHECKPOINTING), ("training", TRAINING[family])):
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    script = directory / "pretrain_gpt.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return script


def run(*arguments, module="moba_megatron.launch", **environment):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return run_program([*(["-m", module] if module else []), *arguments],
                       {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **environment})


def run_program_text(program, *arguments, **environment):
    """The same for a program's text in a fresh interpreter: what it imports has not been imported before."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)], env=environment,
                          capture_output=True, text=True, timeout=300)


def report_of(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("REPORT ")))


@pytest.mark.parametrize("family", TRAINING)
def test_launch_switches_moba_on(tmp_path, family):
    done = run(make_host(tmp_path, family), "--attention", "moba", "--moba-chunk-size", "8", "--moba-topk", "2",
               "--moba-full-attention-layers", "last:1", "--seq-length", "64")
    report = report_of(done)
    assert report["spec"] == "MoBACoreAttention" and report["dense"] == [False, False, True]
    assert report["iterations"] == [0, 1, 2]
    assert report["flops"] == 1e9 - 2 * 2 * (DENSE_FLOPS - MOBA_FLOPS)  # two sparse layers, two sequences
    assert "> MoBA: chunk_size=8, topk=2, full_attention_layers=last:1" in done.stdout
    assert "> MoBA attention in 2 of 3 attention layers of rank 0" in done.stdout


@pytest.mark.parametrize("flags, spec, said", [
    (["--use-checkpoint-args"], "MoBACoreAttention",
     ["> --attention moba, as in the checkpoint", "> --moba-chunk-size 8, as in the checkpoint",
      "> --moba-full-attention-layers last:1, as in the checkpoint", "> MoBA: chunk_size=8, topk=2,"]),
    ([], None, ["ValueError: the checkpoint has trained key convolutions in layers 1, 2, which this run would drop: "
                "give the checkpoint's --attention moba (got full)"]),
    (["--attention", "moba", "--moba-topk", "2"], "MoBACoreAttention",
     ["> --moba-chunk-size 512: the checkpoint was trained with 8",
      "> --moba-full-attention-layers none: the checkpoint was trained with last:1"]),
], ids=["restored", "dropped", "compared"])
def test_a_checkpoint_says_how_it_was_trained(tmp_path, flags, spec, said):
    script = make_host(tmp_path, "0.18")
    saved = dict(attention="moba", num_layers=3, train_iters=3, moba_chunk_size=8, moba_topk=2,
                 moba_key_conv=0 if spec else 3, moba_full_attention_layers="last:1", moba_backend="triton")
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    done = run(script, "--load", tmp_path / "saved.json", *flags)
    if spec:
        assert report_of(done)["spec"] == spec and report_of(done)["chosen"] == [0.0, False, ["p2p"]]
    else:
        assert done.returncode != 0
    for line in said:
        assert line in done.stdout + done.stderr


CP = ["--context-parallel-size", "2"]


@pytest.mark.parametrize("flags, chosen, said", [
    ([], [0.0, False, ["p2p"]], "attention_dropout 0.0 for 0.1, create_attention_mask_in_dataloader False for True"),
    (CP, [0.0, False, ["a2a"]], "cp_comm_type ['a2a'] for ['p2p']"),
    ([*CP, "--group-query-attention"], [0.0, False, ["all_gather"]], "cp_comm_type ['all_gather'] for ['p2p']"),
    ([*CP, "--tensor-model-parallel-size", "4"], [0.0, False, ["all_gather"]], "['all_gather'] for ['p2p']"),
    (["--context-parallel-size", "4", "--hierarchical-context-parallel-sizes", "2", "2"],
     [0.0, False, ["a2a+all_gather"]], "cp_comm_type ['a2a+all_gather'] for ['p2p']"),
    (["--hybrid-context-parallel"], [0.0, False, ["all_gather"]], "cp_comm_type ['all_gather'] for ['p2p']"),
    ([*CP, "--hybrid-context-parallel"], [0.0, False, ["all_gather"]], "cp_comm_type ['all_gather'] for ['p2p']"),
    ([*CP, "--cp-comm-type", "p2p", "--attention-dropout", "0.1"], [0.1, False, ["p2p"]],
     "sets what no flag said: create_attention_mask_in_dataloader False for True"),
], ids=["one rank", "a2a", "one kv head", "fewer heads than ranks", "two levels", "groups of any size",
        "and a static one", "said"])
def test_one_flag_is_enough(tmp_path, flags, chosen, said):
    """What Megatron-LM would have set, and MoBA cannot take; what was said stays, for MoBA's layers to refuse."""
    done = run(make_host(tmp_path, "0.13"), "--attention", "moba", "--moba-chunk-size", "8", *flags)
    assert report_of(done)["chosen"] == chosen
    assert done.stdout.count("> --attention moba sets what no flag said") == 1 and said in done.stdout


@pytest.mark.parametrize("flags, dropout", [([], 0.1), (["--attention-dropout", "0"], 0.0)], ids=["unsaid", "said"])
def test_what_a_dense_checkpoint_says(tmp_path, flags, dropout):
    """Its dropout is its word, unless a flag says another; the exchange is chosen by its heads."""
    saved = dict(num_layers=3, attention_dropout=0.1, group_query_attention=True, num_query_groups=1,
                 num_attention_heads=8)
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    done = run(make_host(tmp_path, "0.18"), "--load", tmp_path / "saved.json", "--use-checkpoint-args", "--attention",
               "moba", *CP, *flags)
    assert report_of(done)["chosen"] == [dropout, False, ["all_gather"]]


def test_launch_does_not_train_densely_what_a_file_calls_moba(tmp_path):
    (tmp_path / "it.yaml").write_text("attention: moba\n")
    done = run(make_host(tmp_path, "0.13"), "--yaml-cfg", tmp_path / "it.yaml")
    assert done.returncode == 2 and "--yaml-cfg replaces all flags" in done.stderr


@pytest.mark.parametrize("said", [dict(attention="moba"), dict(moba_chunk_size=8)], ids=repr)
def test_layers_of_a_spec_refuse_what_a_file_says(monkeypatch, said):
    """With --spec alone nothing is hooked: the file's namespace is what layers find, with few of MoBA's settings."""
    args = SimpleNamespace(yaml_cfg="it.yaml", **said)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", SimpleNamespace(_GLOBAL_ARGS=args))
    with pytest.raises(ValueError, match=f"--yaml-cfg it.yaml must not say {next(iter(said))}: .*MOBA_"):
        megatron_host.host_config()
    vars(args).pop(next(iter(said)))
    assert megatron_host.host_config() is None


def test_launch_without_moba_leaves_megatron_alone(tmp_path):
    done = run(make_host(tmp_path, "0.13"), "--moba-topk", "3")
    report = report_of(done)
    assert report["chosen"] == [0.1, True, ["p2p"]] and "keeps Megatron-LM's attention dropout, 0.1" in done.stdout
    assert report["spec"] == "DotProductAttention" and report["flops"] == 1e9
    assert "no effect without --attention moba" in done.stdout


def test_spec_alone_reads_the_environment_and_follows_the_iteration(tmp_path):
    script = make_host(tmp_path, "0.13")
    done = run(script, "--spec", "moba_megatron.layer_specs", "moba_layer_spec", module=None, MOBA_CHUNK_SIZE="8",
               MOBA_FULL_ATTENTION_LAYERS="1")
    report = report_of(done)
    assert report["spec"] == "MoBACoreAttention" and report["dense"] == [True, False, False]
    assert report["iterations"] == [0, 1, 2] and report["from_step"] == "no such flag"
    assert "> MoBA: chunk_size=8, topk=8, full_attention_layers=1" in done.stdout


@pytest.mark.parametrize("arguments, message", [
    ([], "usage: python -m moba_megatron.launch"),
    (["nowhere.py"], "no file nowhere.py: give the path of Megatron-LM's pretrain_gpt.py"),
    ([__file__, "--attention", "moba", "--moba-topk", "0"], "MoBAConfig.topk must be at least 1, got 0"),
    ([__file__, "--attention", "sparse"], "invalid choice: 'sparse'"),
    ([__file__, "--attention", "moba", "--moba-full-attention-last-fraction", "0.1"], "needs --train-iters"),
], ids=["no script", "no file", "topk", "attention", "last fraction"])
def test_launch_refuses(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert launch.main(arguments) == 2
    except SystemExit as stop:  # argparse
        assert stop.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("megatron.training") is not None, reason="megatron.training is installed")
def test_launch_says_that_megatron_training_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert launch.main([__file__, "--attention", "moba"]) == 2
    assert "give the path of a script in a Megatron-LM checkout" in capsys.readouterr().err


def test_launch_says_what_megatron_training_lacks(monkeypatch, capsys, tmp_path):
    """A checkout is there, and a package that it imports is not: the path is no help."""
    (tmp_path / "megatron" / "training").mkdir(parents=True)
    (tmp_path / "megatron" / "training" / "__init__.py").write_text("import absent_package\n")
    megatron = pytest.importorskip("megatron")
    monkeypatch.setattr(megatron, "__path__", [str(tmp_path / "megatron")])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("megatron.training")]:
        monkeypatch.delitem(sys.modules, name)
    assert launch.main([__file__, "--attention", "moba"]) == 2
    said, problem = capsys.readouterr().err, "No module named 'absent_package'"
    assert problem in said and "the extra megatron-lm" in said and "give the path" not in said
    doctor.report_megatron()
    assert f"megatron.training              ModuleNotFoundError: {problem}" in capsys.readouterr().out


@pytest.fixture
def host(monkeypatch):
    """Megatron-LM's parsed arguments, as of --attention moba; the test may change them."""
    args = add_moba_arguments(argparse.ArgumentParser(), "full", "full").parse_args(["--attention", "moba"])
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", SimpleNamespace(_GLOBAL_ARGS=args))
    monkeypatch.setattr(core_attention, "_iteration", None)
    return args


def namespace(**kwargs):
    return argparse.Namespace(**kwargs)


@pytest.mark.parametrize("change, dropped", [
    (dict(moba_full_attention_layers="last:1"), "layers 4"),
    (dict(moba_full_attention_layers="2", moba_topk=3), "layers 2"),
    (dict(moba_key_conv=0), "layers 1, 2, 3, 4"),
    (dict(moba_key_conv=5), "layers 1, 2, 3, 4"),
    (dict(attention="full"), "layers 1, 2, 3, 4"),
    (dict(moba_topk=3), None),
])
def test_a_run_that_would_drop_filters_stops(host, change, dropped):
    saved = namespace(**{**vars(host), "num_layers": 4, "moba_key_conv": 3})
    vars(host).update(vars(saved) | change)
    if dropped is None:
        checkpoint_flags.compare_flags(host, saved)
        return
    flag = "--" + next(iter(change)).replace("_", "-")
    with pytest.raises(ValueError, match=f"trained key convolutions in {dropped}, which this run would drop: .*{flag}"):
        checkpoint_flags.compare_flags(host, saved)


def test_a_dense_checkpoint_says_nothing(host, capsys):
    host.num_layers = 4
    for saved in (namespace(num_layers=4), namespace(**{**vars(host), "attention": "full", "moba_topk": 3})):
        checkpoint_flags.compare_flags(host, saved)
        checkpoint_flags.restore_flags(host, saved)
    assert capsys.readouterr().out == "" and host.moba_topk == 8


def test_layers_and_schedules_are_restored_and_compared(host, monkeypatch, capsys):
    host.num_layers, own = 4, dict(moba_per_layer="1-2:chunk=64", moba_topk_schedule="0:8,10:4")
    saved = namespace(**{**vars(host), **own})
    checkpoint_flags.compare_flags(host, saved)
    assert "> --moba-topk-schedule None: the checkpoint was trained with 0:8,10:4" in capsys.readouterr().out
    checkpoint_flags.restore_flags(host, saved)
    assert {name: getattr(host, name) for name in own} == own
    assert "> --moba-per-layer 1-2:chunk=64, as in the checkpoint" in capsys.readouterr().out
    host.moba_topk_schedule = None
    monkeypatch.setattr(sys, "argv", ["x", "--moba-topk", "8"])
    checkpoint_flags.restore_flags(host, saved)
    assert host.moba_topk_schedule is None


@pytest.mark.parametrize("typed, value, saved_name, saved_value", [
    ("--moba-topk-schedule", "0:8,10:4", "moba_per_layer", "1-2:chunk=64,topk=4"),
    ("--moba-per-layer", "1-2:topk=4", "moba_topk_schedule", "0:6,10:4"),
    ("--moba-per-layer", "none", "moba_per_layer", "1-2:topk=4"),
])
def test_a_typed_flag_ends_what_the_checkpoint_says_of_the_other(host, monkeypatch, capsys, typed, value, saved_name,
                                                                 saved_value):
    saved = namespace(**{**vars(host), saved_name: saved_value})
    monkeypatch.setattr(sys, "argv", ["x", typed, value])
    setattr(host, typed[2:].replace("-", "_"), value)
    checkpoint_flags.restore_flags(host, saved)
    config = config_from_args(host)
    assert [config.per_layer, config.topk_schedule].count(None) == 1 + (value == "none")
    assert f"as given: the checkpoint was trained with {saved_value}" in capsys.readouterr().out


def test_flags_that_are_typed_stay(host, monkeypatch, capsys):
    saved = namespace(**{**vars(host), "moba_full_attention_last_fraction": 0.5, "moba_topk": 2, "moba_chunk_size": 4})
    monkeypatch.setattr(sys, "argv", ["x", "--moba-full-attention-from-step", "7", "--moba-topk=5"])
    host.moba_full_attention_from_step, host.moba_topk = 7, 5
    checkpoint_flags.restore_flags(host, saved)
    assert (host.moba_full_attention_from_step, host.moba_full_attention_last_fraction) == (7, None)
    assert (host.moba_topk, host.moba_chunk_size) == (5, 4)
    assert "> --moba-topk 5, as given: the checkpoint was trained with 2" in capsys.readouterr().out


def test_restored_flags_that_come_too_late_are_an_error(monkeypatch):
    saved = namespace(attention="moba", moba_topk=2)
    load = patching.moba_checkpoint(lambda load_dir, args: ({"args": saved}, "", False, None))
    args = namespace(attention="full", moba_topk=8)
    monkeypatch.setattr(patching, "only_flags", True)
    with pytest.raises(ValueError, match="--attention must be moba, as the checkpoint's"):
        load("directory", args)
    monkeypatch.setattr(patching, "only_flags", False)
    assert load("directory", args)[0]["args"] is saved and args.moba_topk == 2


@pytest.mark.parametrize("flags, message", [
    (["--moba-log-router-interval", "0"],
     "argument --moba-log-router-interval: must be a whole number of at least 1, got 0"),
    (["--moba-log-router-file", "x"], "--moba-log-router-file needs --moba-log-router-interval N"),
    (["--attention", "moba", "--yaml-cfg", "none.yaml"], "--yaml-cfg replaces all flags"),
    *((["--yaml-cfg", name], "its file cannot say attention or moba_*") for name in ("1.yaml", "2.yaml", "3.yaml")),
])
def test_flags_are_checked_when_they_are_read(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    for name, text in (("0", "seq_length: 64  # attention: moba\nattention_backend: auto\n"),
                       ("1", "attention: moba\n"), ("2", "language_model:\n  moba_topk: 3\n"),
                       ("3", '{"num_layers": 3, "attention": "moba"}')):
        (tmp_path / f"{name}.yaml").write_text(text)
    parser = patching.moba_arguments(lambda parser: parser)(argparse.ArgumentParser())
    parser.add_argument("--yaml-cfg")
    assert parser.parse_args(["--moba-log-router-interval", "1", "--moba-log-router-file", "x"])
    assert parser.parse_args(["--yaml-cfg", "0.yaml"]).attention == "full"
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert message in capsys.readouterr().err


class TEDotProductAttention:
    pass


def test_hook_of_a_spec_provider(host):
    class Provider:
        @patching.moba_core_attention
        def core_attention(self):
            return TEDotProductAttention

    assert Provider().core_attention() is MoBAOrTEDotProductAttention
    once = Provider.core_attention
    assert patching.moba_core_attention(once) is once
    host.attention = "full"
    assert Provider().core_attention() is TEDotProductAttention


@pytest.mark.parametrize("dense", [MoBACoreAttention, MoBAOrTEDotProductAttention])
def test_patched_and_launched_is_patched(host, dense):
    assert patching.core_attention_for(dense) is dense


def test_hook_of_the_hybrid_stack(host):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    class Stack:
        @patching.moba_hybrid_stack
        def __init__(self, config, submodules, layers=None):
            self.submodules = submodules

    shared = SimpleNamespace(attention_layer=get_gpt_layer_local_spec(), mamba_layer=None, mla_layer=None)

    def core(submodules):
        return submodules.attention_layer.submodules.self_attention.submodules.core_attention

    before = core(shared)
    assert core(Stack(None, submodules=shared).submodules).module is MoBACoreAttention
    assert core(shared) is before
    host.attention = "full"
    assert Stack(None, shared).submodules is shared


def test_a_model_that_ignores_moba_is_an_error(host):
    layer = launch_layer(2, TEDotProductAttention())
    hooked = patching.moba_model_check(lambda: ([layer], None, None))
    with pytest.raises(ValueError, match="layer 2 attends through TEDotProductAttention"):
        hooked()
    host.moba_full_attention_layers = "2"
    assert hooked()[0] == [layer]


def launch_layer(number, core):
    layer = SimpleNamespace(layer_number=number, core_attention=core, config=SimpleNamespace(num_layers=4))
    layer.modules = lambda: [layer]
    return layer


def test_iteration_comes_from_the_host_until_it_is_set(host):
    assert core_attention.get_iteration() == 0
    host.iteration = 7  # where a checkpoint was loaded, and nothing trained yet
    assert core_attention.get_iteration() == 7
    host.curr_iteration = 8
    assert core_attention.get_iteration() == 8
    core_attention.set_iteration(3)
    assert core_attention.get_iteration() == 3


def test_host_config_serves_a_moba_spec_whatever_attention_says(host, monkeypatch):
    host.attention, host.moba_chunk_size = "full", 64
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", "9")  # the operators' own
    assert megatron_host.host_config() == MoBAConfig(chunk_size=64)
    monkeypatch.setenv("MOBA_TOPK", "3")  # as for --spec in a Megatron-LM without the flags
    with pytest.raises(ValueError, match="variable MOBA_TOPK must not be set beside Megatron-LM's --moba-"):
        megatron_host.host_config()


def test_launch_says_nothing_of_flags_that_a_spec_reads(capsys):
    megatron_host.print_once.cache_clear()
    launch.check_flags(["--moba-topk", "3", "--spec", "moba_megatron.layer_specs", "moba_layer_spec"])
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize("fraction, step", [(0.1, 90), (0.0, 100), (1.0, 0), (0.333, 67)])
def test_last_fraction(fraction, step):
    config = parsed("--moba-full-attention-last-fraction", str(fraction), train_iters=100)
    assert config.full_attention_from_step == step


@pytest.mark.parametrize("flags, message", [
    (["1.5"], "must be from 0 to 1, got 1.5"),
    (["0.1", "--moba-full-attention-from-step", "5"], "exclude each other"),
])
def test_last_fraction_refuses(flags, message):
    with pytest.raises(ValueError, match=message):
        parsed("--moba-full-attention-last-fraction", *flags, train_iters=100)


def parsed(*flags, **others):
    args = add_moba_arguments(argparse.ArgumentParser()).parse_args(flags)
    return config_from_args(argparse.Namespace(**vars(args), **others))


def test_unknown_version_is_said(monkeypatch):
    monkeypatch.setattr(megatron_host, "megatron_version", lambda: "0.42.0")
    with pytest.warns(UserWarning, match=r"megatron-core 0.42.0 was not checked .*0.13 to 0.20.*not found: a.b"):
        patching._warn_of_unknown_version(["a.b"])


@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ, reason="set MEGATRON_LM_PATH to a Megatron-LM checkout")
def test_hooks_exist_in_a_real_checkout():
    program = """
        import sys, typing
        if not hasattr(typing, "override"):
            typing.override = lambda function: function  # Megatron-LM 0.19 wants Python 3.12
        from moba_megatron.megatron import patching
        hooked = patching.apply()
        assert patching.apply() == hooked
        from megatron.training import arguments
        assert arguments.add_megatron_arguments.moba_hook == "moba_arguments"
        sys.argv = ["x", "--attention", "moba", "--moba-topk", "5", "--micro-batch-size", "1"]
        args = arguments.parse_args()
        assert (args.attention, args.moba_topk) == ("moba", 5)
        print("REPORT", len(hooked))
    """
    path = os.pathsep.join([str(ROOT), os.environ["MEGATRON_LM_PATH"], os.environ.get("PYTHONPATH", "")])
    assert report_of(run_program_text(program, PYTHONPATH=path)) >= 5
