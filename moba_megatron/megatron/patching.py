"""Every change of Megatron: `apply` makes them for Megatron-LM's training scripts, `undo` takes them back.

`moba_megatron.launch` calls `apply`; `patches/` has the same hooks as decorators in the source. Each wraps one function
of Megatron, and with ``--attention full``, the default, passes the call through. A MoBA layer that is built applies
what it needs of Megatron-Core, `guard_layers`. Nothing of Megatron is imported here before a hook runs, so its modules
may import this one, and nothing is changed by importing.
"""
import argparse
import copy
import functools
import importlib
import inspect
import re
import warnings
from pathlib import Path

from ..config import MoBAConfig
from . import host
from .arguments import add_moba_arguments
from .checkpoint_flags import compare_flags, restore_flags
from .flops import correction

FULL_MEANING = "full: Megatron-LM's own attention, untouched"
DEFAULTS = ("attention_dropout", "create_attention_mask_in_dataloader", "cp_comm_type")
"""Arguments whose defaults in Megatron-LM MoBA cannot take."""
_unsaid: dict[str, object] = {}  # those that the command line did not say, and Megatron-LM's defaults
only_flags = False
"""Whether nothing but the flags was added to Megatron-LM, so that ``--attention moba`` would change nothing."""
_hooked: list[tuple] = []  # module or class, attribute, what was there, what was put there


def apply(attention: str = "moba") -> list[str]:
    """Hooks MoBA into the Megatron-LM that ``import megatron`` finds; returns what is hooked, as ``module.name``.
    Calling it again changes nothing. With ``attention="full"`` only the argument parser is extended. ImportError where
    there is no megatron.training, or it lacks a function that must be hooked."""
    try:
        importlib.import_module("megatron.training")
    except ImportError as error:
        advice = ("give the path of a script in a Megatron-LM checkout, or set PYTHONPATH to one. (megatron-core's "
                  "wheels have it from 0.17.1 on.)" if (error.name or "").startswith("megatron") else "install what it "
                  "imports (the extra megatron-lm of moba_megatron); Megatron-LM 0.18 and later need Python 3.12")
        raise ImportError(f"megatron.training cannot be imported ({error}): {advice}") from error
    global only_flags
    only_flags = attention != "moba"
    required, optional = ([ARGUMENTS_HOOK], []) if only_flags else ([ARGUMENTS_HOOK, *HOOKS], OPTIONAL_HOOKS)
    missing = [f"{module}.{name}" for module, name, _ in required if _owner(module, name) is None]
    version = _warn_of_unknown_version(missing)
    if missing:
        raise ImportError(f"megatron-core {version} has no {', '.join(missing)}: --attention moba cannot be hooked in. "
                          "Use --spec moba_megatron.layer_specs moba_layer_spec with MOBA_* environment variables")
    return [f"{module}.{name}" for module, name, wrap in (*required, *optional) if _hook(module, name, wrap)]


def undo() -> list[str]:
    """Puts back what Megatron had before :func:`apply`, and before MoBA layers were built; they are unguarded then.
    Returns what was put back. What another package has wrapped since stays, with a warning."""
    global only_flags
    only_flags, restored = False, []
    while _hooked:
        owner, attribute, original, ours = _hooked.pop()
        name, found = f"{owner.__name__}.{attribute}", getattr(owner, attribute, original)
        if found is ours:
            setattr(owner, attribute, original)
            restored.append(name)
        elif found is not original:
            warnings.warn(f"{name} is not what moba_megatron put there, and stays as it is", stacklevel=2)
    return restored


def guard_layers() -> None:
    """Makes Megatron's inference paths that bypass core attention refuse MoBA layers: they would be dense, silently."""
    for name in ("flash_decode", "flash_decode_and_prefill"):
        if not _hook("megatron.core.transformer.attention", f"Attention.{name}", moba_inference_guard):
            raise RuntimeError(f"megatron.core's Attention has no {name}, by whose name MoBA layers refuse to be "
                               "bypassed: this release may attend densely under another name, so MoBA does not start")


def hook_loading() -> None:
    """Has checkpoints of dense models load into one with key convolutions, which each of them asks for."""
    _hook("megatron.core.dist_checkpointing", "load", moba_load)


def _hook(module: str, name: str, wrap) -> bool:
    """Wraps a function of Megatron where it is, once; False where this Megatron or its dependencies lack it."""
    owner, attribute = _owner(module, name), name.rpartition(".")[2]
    if owner is None:
        return False
    original = getattr(owner, attribute)
    ours = wrap(original)
    if ours is not original:
        _hooked.append((owner, attribute, original, ours))
        setattr(owner, attribute, ours)
    return True


def _owner(module: str, name: str):
    """The module or class that has ``name``; None where there is none."""
    *classes, attribute = name.split(".")
    try:
        owner = functools.reduce(getattr, classes, importlib.import_module(module))
        return owner if hasattr(owner, attribute) else None
    except (ImportError, AttributeError):
        return None


def _warn_of_unknown_version(missing: list[str]) -> str:
    version = host.megatron_version()
    if not host.is_known_version(version):
        found = "all of the hooked functions are there" if not missing else f"not found: {', '.join(missing)}"
        warnings.warn(f"megatron-core {version} was not checked with moba_megatron (checked: {host.CHECKED_VERSIONS[0]}"
                      f" to {host.CHECKED_VERSIONS[-1]}); {found}", stacklevel=3)
    return version


def _wrapper(wrap):
    """A decorator from ``wrap(original, *args, **kwargs)``. Applied twice it still acts once."""

    @functools.wraps(wrap)
    def decorator(original):
        if getattr(original, "moba_hook", None) == wrap.__name__:
            return original

        @functools.wraps(original)
        def hooked(*args, **kwargs):
            return wrap(original, *args, **kwargs)

        hooked.moba_hook = wrap.__name__
        return hooked

    return decorator


@_wrapper
def moba_arguments(original, parser):
    """On ``add_megatron_arguments``: ``--attention`` and ``--moba-*``, what no flag says, and checkpoints that know."""
    parser = add_moba_arguments(original(parser), default="full", full_meaning=FULL_MEANING)
    group = parser.add_argument_group("moba logs")
    group.add_argument("--moba-log-router-interval", type=_at_least_one, metavar="N",
                       help="every N iterations log, to TensorBoard and as a line, each layer's share of queries on "
                            "the first chunk, load imbalance, selection entropy and recall; unset: never")
    group.add_argument("--moba-log-router-file", metavar="FILE", help="and to this file, as JSON lines")
    parse, unsaid = parser.parse_known_args, object()
    usual = {name: parser.get_default(name) for name in DEFAULTS if parser.get_default(name) is not None}
    parser.set_defaults(**dict.fromkeys(usual, unsaid))

    def parse_known_args(*args, **kwargs):
        parsed = parse(*args, **kwargs)
        file, said = getattr(parsed[0], "yaml_cfg", None), r"""^([^#\n]*[{,])?\s*["']?(attention|moba_\w+)["']?\s*:"""
        if file is not None and (parsed[0].attention == "moba" or re.search(said, Path(file).read_text(), re.M)):
            parser.error("--yaml-cfg replaces all flags, and its file cannot say attention or moba_*: give flags")
        _unsaid.clear()
        _unsaid.update((name, value) for name, value in usual.items() if getattr(parsed[0], name) is unsaid)
        choose_unsaid(parsed[0])
        if parsed[0].moba_log_router_file is not None and parsed[0].moba_log_router_interval is None:
            parser.error("--moba-log-router-file needs --moba-log-router-interval N: nothing would be written")
        return parsed

    parser.parse_known_args = parse_known_args
    if not _hook("megatron.training.checkpointing", "_load_base_checkpoint", moba_checkpoint):
        host.print_once("> megatron.training.checkpointing has no _load_base_checkpoint: --moba-* flags are not "
                        "compared with a checkpoint's")
    return parser


def choose_unsaid(args: argparse.Namespace, model: argparse.Namespace | None = None) -> None:
    """Sets what no flag said to what MoBA takes, with one line that says so; without MoBA to Megatron-LM's defaults.
    ``model``: whose numbers of heads count, a checkpoint's that are to be restored; None for ``args``."""
    values = dict(_unsaid)
    if args.attention == "moba":
        values.update((name, type(value)()) for name, value in _unsaid.items() if name != "cp_comm_type")  # 0.0, False
        ranks, any_size = getattr(args, "context_parallel_size", 1), getattr(args, "hybrid_context_parallel", False)
        if "cp_comm_type" in _unsaid and (any_size or ranks > 1):
            sizes = argparse.Namespace(**(vars(args) | vars(model or args)))
            groups = getattr(sizes, "group_query_attention", False)
            heads = sizes.num_query_groups if groups else sizes.num_attention_heads
            each = max(1, (heads or 1) // getattr(args, "tensor_model_parallel_size", 1))
            hierarchical = getattr(args, "hierarchical_context_parallel_sizes", None) and "a2a+all_gather"
            values["cp_comm_type"] = [hierarchical or ("all_gather" if any_size or each % ranks else "a2a")]
        chosen = [f"{name} {values[name]} for {value}" for name, value in _unsaid.items() if values[name] != value]
        if chosen:
            host.print_once(f"> --attention moba sets what no flag said: {', '.join(chosen)}")
    elif only_flags and values.get("attention_dropout"):
        host.print_once("> --attention full keeps Megatron-LM's attention dropout, "
                        f"{values['attention_dropout']}; MoBA has none: to compare them give --attention-dropout 0")
    vars(args).update(values)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


@_wrapper
def moba_checkpoint(original, load_dir, args, *positional, **named):
    """On ``_load_base_checkpoint``: MoBA's flags are restored while Megatron-LM restores its own, else compared."""
    result = original(load_dir, args, *positional, **named)
    saved = result[0].get("args") if isinstance(result[0], dict) else None
    if saved is not None and host.host_args() is args:
        compare_flags(args, saved)
    elif saved is not None:
        restore_flags(args, saved)
        if args.attention == "moba" and "attention_dropout" in vars(args).keys() - _unsaid.keys():
            saved.attention_dropout = args.attention_dropout  # as given: Megatron-LM takes the checkpoint's
        choose_unsaid(args, saved)
        if args.attention == "moba" and only_flags:
            raise ValueError("--attention must be moba, as the checkpoint's, got full: give it as a flag")
    return result


def core_attention_for(dense):
    """What a spec provider's ``core_attention`` returns in place of the backend's own class: MoBA's, or that class."""
    if not host.is_active():
        return dense
    from .core_attention import core_attention_beside
    return core_attention_beside(dense)


@_wrapper
def moba_core_attention(original, provider):
    """On a spec provider's ``core_attention``."""
    return core_attention_for(original(provider))


@_wrapper
def moba_hybrid_stack(original, *args, **kwargs):
    """On the constructor of HybridStack or MambaStack, whose specs name Transformer Engine's attention themselves."""
    if not host.is_active():
        return original(*args, **kwargs)
    from .layer_specs import with_moba_core_attention
    bound = inspect.signature(original).bind(*args, **kwargs)
    submodules = copy.deepcopy(bound.arguments["submodules"])  # specs are shared module-level objects
    for name in ("attention_layer", "mla_layer"):
        if hasattr(getattr(getattr(submodules, name, None), "submodules", None), "self_attention"):
            with_moba_core_attention(getattr(submodules, name))
    bound.arguments["submodules"] = submodules
    return original(*bound.args, **bound.kwargs)


@_wrapper
def moba_flops(original, args, batch_size, *sums, **named_sums):
    """On ``num_floating_point_operations``: the throughput log counts what MoBA computes."""
    dense = original(args, batch_size, *sums, **named_sums)
    if not host.is_active():
        return dense
    bound = inspect.signature(original).bind(args, batch_size, *sums, **named_sums).arguments
    return dense + correction(args, host.host_config(), host.host_iteration() or 0, batch_size,
                              bound.get("seqlen_squared_sum_in_batch"), bound.get("total_real_tokens_in_batch"))


@_wrapper
def moba_model_check(original, *args, **kwargs):
    """On ``setup_model_and_optimizer``: a model that took no notice of ``--attention moba`` is an error, not dense.
    With ``--moba-log-router-interval`` the training steps that follow are watched."""
    result = original(*args, **kwargs)
    if host.is_active():
        check_model(result[0], host.host_config())
        if getattr(host.host_args(), "moba_log_router_interval", None) is not None:
            from ..inspect.router_log import log_router
            _hook("megatron.training.training", "train_step", log_router)
    return result


def check_model(model, config: MoBAConfig) -> None:
    """Raises ValueError if a layer, of this rank's virtual stages, that is MoBA's attends through something else."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    from .core_attention import MoBACoreAttention
    behind = {id(module) for part in model for layer in part.modules() if isinstance(layer, MultiTokenPredictionLayer)
              for module in layer.modules()}
    layers = [module for part in model for module in part.modules() if hasattr(module, "core_attention")]
    for layer in layers:
        core, last = layer.core_attention, layer.config.num_layers
        number = last if id(layer) in behind else min(layer.layer_number, last)
        if isinstance(core, MoBACoreAttention) or config.is_full_attention(number, last):
            continue
        raise ValueError(
            f"--attention moba: layer {layer.layer_number} attends through {type(core).__name__}. Its spec names its "
            "core attention itself, past the spec providers (encoders, T5, heterogeneous layers, --transformer-impl "
            "inference_optimized, --attention-backend local do). Build the spec with moba_megatron.layer_specs."
            "with_moba_core_attention, or name the layer in --moba-full-attention-layers")
    sparse = sum(isinstance(layer.core_attention, MoBACoreAttention) and not layer.core_attention.full_attention
                 for layer in layers)
    host.print_once(f"> MoBA attention in {sparse} of {len(layers)} attention layers of rank 0")


@_wrapper
def moba_inference_guard(original, self, *args, **kwargs):
    """On an inference path of Megatron's attention that does not call core attention."""
    from .core_attention import MoBACoreAttention
    if isinstance(self.core_attention, MoBACoreAttention):
        raise ValueError(f"Attention.{original.__name__} (dynamic batching: DynamicInferenceContext, or "
                         "StaticInferenceEngine without legacy=True; or --flash-decode) would bypass MoBA and "
                         "attend densely: use static batching, StaticInferenceEngine(..., legacy=True)")
    return original(self, *args, **kwargs)


@_wrapper
def moba_load(original, sharded_state_dict, checkpoint_dir, *args, **kwargs):
    """On ``dist_checkpointing.load``: a checkpoint without key convolutions loads into a model that has them."""
    from .key_convolution import as_saved
    return original(as_saved(sharded_state_dict, checkpoint_dir), checkpoint_dir, *args, **kwargs)


ARGUMENTS_HOOK = ("megatron.training.arguments", "add_megatron_arguments", moba_arguments)
HOOKS = (
    ("megatron.core.models.backends", "LocalSpecProvider.core_attention", moba_core_attention),
    ("megatron.training.training", "setup_model_and_optimizer", moba_model_check),
    ("megatron.training.training", "num_floating_point_operations", moba_flops))
OPTIONAL_HOOKS = (  # Transformer Engine may be missing; the hybrid model has moved, and needs packages of its own
    ("megatron.core.extensions.transformer_engine_spec_provider", "TESpecProvider.core_attention", moba_core_attention),
    ("megatron.core.models.hybrid.hybrid_block", "HybridStack.__init__", moba_hybrid_stack),
    ("megatron.core.ssm.mamba_block", "MambaStack.__init__", moba_hybrid_stack))
