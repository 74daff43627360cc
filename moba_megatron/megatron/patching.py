"""Hooks into Megatron-LM's training scripts: `moba_megatron.launch` installs them at start, `patches/` in the source.

Each hook decorates one function of Megatron-LM. With ``--attention full``, the default, every one passes the call
through. Nothing of Megatron is imported here before a hook runs, so its modules may import this one.
"""
from __future__ import annotations

import argparse
import copy
import functools
import importlib
import inspect

from ..config import MoBAConfig
from .arguments import add_moba_arguments
from .checkpoint_flags import compare_flags, restore_flags
from .flops import correction
from .host import host_args, host_config, host_iteration, is_active, print_once

FULL_MEANING = "full: Megatron-LM's own attention, untouched"


def _hook(wrap):
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


@_hook
def moba_arguments(original, parser):
    """On ``add_megatron_arguments``: adds ``--attention`` and ``--moba-*``, and watches checkpoints for them."""
    parser = add_moba_arguments(original(parser), default="full", full_meaning=FULL_MEANING)
    group = parser.add_argument_group("moba logs")
    group.add_argument("--moba-log-router-interval", type=_at_least_one, metavar="N",
                       help="every N iterations log, to TensorBoard and as a line, each layer's share of queries on "
                            "the first chunk, load imbalance, selection entropy and recall; unset: never")
    group.add_argument("--moba-log-router-file", metavar="FILE", help="and to this file, as JSON lines")
    parse = parser.parse_known_args

    def parse_known_args(*args, **kwargs):
        parsed = parse(*args, **kwargs)
        if parsed[0].moba_log_router_file is not None and parsed[0].moba_log_router_interval is None:
            parser.error("--moba-log-router-file needs --moba-log-router-interval N: nothing would be written")
        return parsed

    parser.parse_known_args = parse_known_args
    _watch_checkpoints()
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _watch_checkpoints() -> None:
    try:
        checkpointing = importlib.import_module("megatron.training.checkpointing")
        checkpointing._load_base_checkpoint = moba_checkpoint(checkpointing._load_base_checkpoint)
    except (ImportError, AttributeError):
        print_once("> megatron.training.checkpointing has no _load_base_checkpoint: --moba-* flags are not compared "
                   "with a checkpoint's")


only_flags = False
"""Whether nothing but the flags was added to Megatron-LM, so that ``--attention moba`` would change nothing."""


@_hook
def moba_checkpoint(original, load_dir, args, *positional, **named):
    """On ``_load_base_checkpoint``: the checkpoint's MoBA flags are restored while Megatron-LM restores its own, else
    compared.

    Raises:
        ValueError: trained weights would be dropped, or the restored flags come too late.
    """
    result = original(load_dir, args, *positional, **named)
    saved = result[0].get("args") if isinstance(result[0], dict) else None
    if saved is None:
        return result
    if host_args() is args:
        compare_flags(args, saved)
    else:
        restore_flags(args, saved)
        if args.attention == "moba" and only_flags:
            raise ValueError("--attention must be moba, as the checkpoint's, got full: give it as a flag")
    return result


def core_attention_for(dense):
    """What a spec provider's ``core_attention`` returns in place of the backend's own class: MoBA's, or that class."""
    if not is_active():
        return dense
    from .core_attention import core_attention_beside

    return core_attention_beside(dense)


@_hook
def moba_core_attention(original, provider):
    """On a spec provider's ``core_attention``."""
    return core_attention_for(original(provider))


@_hook
def moba_hybrid_stack(original, *args, **kwargs):
    """On the constructor of HybridStack or MambaStack, whose specs name Transformer Engine's attention themselves."""
    if not is_active():
        return original(*args, **kwargs)
    from .layer_specs import with_moba_core_attention

    bound = inspect.signature(original).bind(*args, **kwargs)
    submodules = copy.deepcopy(bound.arguments["submodules"])  # specs are shared module-level objects
    for name in ("attention_layer", "mla_layer"):
        if hasattr(getattr(getattr(submodules, name, None), "submodules", None), "self_attention"):
            with_moba_core_attention(getattr(submodules, name))
    bound.arguments["submodules"] = submodules
    return original(*bound.args, **bound.kwargs)


@_hook
def moba_flops(original, args, batch_size, *sums, **named_sums):
    """On ``num_floating_point_operations``: the throughput log counts what MoBA computes."""
    dense = original(args, batch_size, *sums, **named_sums)
    if not is_active():
        return dense
    bound = inspect.signature(original).bind(args, batch_size, *sums, **named_sums).arguments
    return dense + correction(args, host_config(), host_iteration() or 0, batch_size,
                              bound.get("seqlen_squared_sum_in_batch"), bound.get("total_real_tokens_in_batch"))


@_hook
def moba_model_check(original, *args, **kwargs):
    """On ``setup_model_and_optimizer``: a model that took no notice of ``--attention moba`` is an error, not dense.

    With ``--moba-log-router-interval`` the training steps that follow are watched.
    """
    result = original(*args, **kwargs)
    if is_active():
        check_model(result[0], host_config())
        if getattr(host_args(), "moba_log_router_interval", None) is not None:
            from .router_log import watch_training

            watch_training()
    return result


def check_model(model, config: MoBAConfig) -> None:
    """Raises ValueError if a layer that ``config`` gives to MoBA attends through something else.

    Args:
        model: modules of this rank, one a virtual pipeline stage.
    """
    from .core_attention import MoBACoreAttention
    from .multi_token_prediction import within_multi_token_prediction

    behind = within_multi_token_prediction(model)
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
    print_once(f"> MoBA attention in {sparse} of {len(layers)} attention layers of rank 0")
