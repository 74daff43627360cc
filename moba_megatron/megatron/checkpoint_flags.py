"""MoBA's flags in checkpoints: restored with Megatron-LM's ``--use-checkpoint-args``, compared without."""
import argparse
import dataclasses
import sys

from ..config import MoBAConfig
from .arguments import config_from_args
from .host import print_once

_SWITCHES = ("moba_full_attention_from_step", "moba_full_attention_last_fraction")
_TOGETHER = (_SWITCHES, ("moba_topk", "moba_topk_schedule"), ("moba_per_layer", "moba_topk_schedule"))  # typed together
MODEL_FLAGS = ("attention", "moba_chunk_size", "moba_topk", "moba_full_attention_layers", *_SWITCHES, "moba_key_conv",
               "moba_selection", "moba_per_layer", "moba_topk_schedule")
"""What a model was trained with; the other flags say how and where a run computes it."""


def restore_flags(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Sets the flags that were not typed to the checkpoint's, and says so."""
    typed = {word.partition("=")[0] for word in sys.argv}
    for name, value, own in _differences(args, saved):
        names = {name}.union(*(names for names in _TOGETHER if name in names))
        if not typed.isdisjoint(map(_flag, names)):
            print_once(f"> {_flag(name)} {own}, as given: the checkpoint was trained with {value}")
        else:
            print_once(f"> {_flag(name)} {'unset' if value is None else value}, as in the checkpoint")
            setattr(args, name, value)


def compare_flags(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Says which flags are not the checkpoint's; ValueError where trained key convolutions would be dropped."""
    differences = _differences(args, saved)
    dropped = sorted(_filters(saved).items() - _filters(args).items())  # the trained ones that are not there
    if dropped:
        flags = ", ".join(f"{_flag(name)} {value} (got {own})" for name, value, own in differences)
        layers = ", ".join(str(n) for n, _ in dropped)
        raise ValueError(f"the checkpoint has trained key convolutions in layers {layers}, which this run would drop: "
                         f"give the checkpoint's {flags}")
    for name, value, own in differences if args.attention == "moba" else differences[:1]:
        print_once(f"> {_flag(name)} {own}: the checkpoint was trained with {value}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _differences(args: argparse.Namespace, saved: argparse.Namespace) -> list[tuple]:
    """(name, the checkpoint's value, this run's) of the flags that differ; a dense checkpoint's have no meaning."""
    names = MODEL_FLAGS if getattr(saved, "attention", "full") == "moba" else ()
    return [(name, getattr(saved, name), getattr(args, name)) for name in names
            if hasattr(saved, name) and getattr(saved, name) != getattr(args, name)]


def _filters(args: argparse.Namespace) -> dict[int, int]:
    """The taps of each layer that has a key convolution."""
    defaults = {f"moba_{field.name}": field.default for field in dataclasses.fields(MoBAConfig)}
    args = argparse.Namespace(**{"attention": "full", **defaults, **vars(args)})
    config, layers = config_from_args(args), args.num_layers or 0
    return {n: config.key_conv for n in range(1, layers + 1)
            if config.key_conv and not config.is_full_attention(n, layers)}
