"""Command-line flags and environment variables for MoBA, both generated from MoBAConfig's fields."""
import argparse
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from ..config import CHOICES, MoBAConfig

_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def add_moba_arguments(parser: argparse.ArgumentParser, default: str = "moba",
                       full_meaning: str = "full: dense causal attention in every layer through the same operator",
                       ) -> argparse.ArgumentParser:
    """Adds ``--attention {moba,full}``, a ``--moba-*`` flag for each field of MoBAConfig, and
    ``--moba-full-attention-last-fraction``, which sets ``full_attention_from_step`` by ``--train-iters``. ``default``:
    of ``--attention``; ``full_meaning``: what ``full`` does in this program, for ``--help``. Returns the parser, so
    that the function serves as Megatron-LM's ``extra_args_provider``."""
    group = parser.add_argument_group("moba", "Mixture of Block Attention")
    group.add_argument("--attention", choices=("moba", "full"), default=default,
                       help=f"moba, or {full_meaning} (default: {default})")
    group.add_argument("--moba-full-attention-last-fraction", type=float, metavar="F",
                       help="attend densely in the last fraction F of --train-iters, for example 0.1")
    for field, kind in _fields():
        options = {"action": "store_true"} if kind is bool else {"type": kind, "choices": CHOICES.get(field.name)}
        group.add_argument("--moba-" + field.name.replace("_", "-"), default=field.default,
                           help=f"{field.metadata['help']} (default: {field.default})", **options)
    return parser


def config_from_args(args: argparse.Namespace) -> MoBAConfig:
    """The MoBAConfig of parsed flags; ``--attention full`` makes every layer dense. TypeError or ValueError, which name
    the field, where a value is out of range."""
    values = {field.name: getattr(args, "moba_" + field.name) for field, _ in _fields()}
    flag, fraction = "--moba-full-attention-last-fraction", getattr(args, "moba_full_attention_last_fraction", None)
    if fraction is not None:
        from_step, train_iters = values["full_attention_from_step"], getattr(args, "train_iters", None)
        if not 0 <= fraction <= 1:
            raise ValueError(f"{flag} must be from 0 to 1, got {fraction}")
        if from_step is not None:
            raise ValueError(f"{flag} and --moba-full-attention-from-step exclude each other, got {fraction}, "
                             f"{from_step}")
        if train_iters is None:
            raise ValueError(f"{flag} needs --train-iters; with --train-samples give --moba-full-attention-from-step")
        values["full_attention_from_step"] = train_iters - round(train_iters * fraction)
    if args.attention == "full":
        values["full_attention_layers"] = "all"
    return MoBAConfig(**values)


def config_from_environment(environment: Mapping[str, str] | None = None) -> MoBAConfig:
    """The MoBAConfig of ``MOBA_CHUNK_SIZE``, ``MOBA_TOPK`` and so on; fields without a variable keep their default.
    ValueError, which names it, where a variable cannot be read."""
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for field, kind in _fields():
        name = "MOBA_" + field.name.upper()
        if text := environment.get(name, "").strip():
            try:
                values[field.name] = _BOOLEANS[text.lower()] if kind is bool else kind(text)
            except (KeyError, ValueError):
                expected = "0 or 1" if kind is bool else f"of type {kind.__name__}"
                raise ValueError(f"environment variable {name} must be {expected}, got {text!r}") from None
    return MoBAConfig(**values)


def _fields():
    """Each field with the type that reads its text: str for unions with str, X for ``X | None``."""
    hints = get_type_hints(MoBAConfig)
    for field in fields(MoBAConfig):
        kinds = [k for k in get_args(hints[field.name]) or (hints[field.name],) if k is not type(None)]
        yield field, str if str in kinds else kinds[0]
