"""MoBAConfig: the hyper-parameters of MoBA, validated in one place, and the default that a launcher may set."""
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
SHARED = ("head", "group")
CHOICES = {"backend": BACKENDS, "decode": ("moba", "dense"), "key_conv": (0, 3, 5), "selection": SHARED}
"""Fields that are one of a few values (or None, where that is the default)."""
_default: "MoBAConfig | None" = None


def _flag(default, help: str):
    """A config field whose help text also serves the generated command-line flag."""
    return field(default=default, metadata={"help": help})


def check_whole(name: str, value, minimum: int) -> None:
    """An int of at least ``minimum`` and below 2^31 (no bool, float, tensor), or what a compiler does not know yet."""
    if isinstance(value, torch.SymInt):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        hint = ": read it on the host once, with .item()" if hasattr(value, "item") else ""
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}{hint}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value >= 2 ** 31:
        raise ValueError(f"{name} must be below 2^31, got {value}")


def _parse_layers(value: str | Iterable[int]) -> tuple[str, Any]:
    """Turns the layer rule into ("none" | "all", None), ("last" | "every", n) or ("set", numbers)."""
    expected = ("MoBAConfig.full_attention_layers must be 'none', 'all', 'last:N', 'every:N' or 1-based layer numbers "
                f"such as '1,2,24' or (1, 2, 24); got {value!r}")
    try:
        if isinstance(value, str):
            text = value.strip().lower()
            if text in ("none", "", "all"):
                return text or "none", None
            rule, _, number = text.partition(":")
            if rule in ("last", "every") and int(number) >= 1:
                return rule, int(number)
            value = [int(part) for part in text.split(",")]
        numbers = tuple(value)
    except (TypeError, ValueError) as error:
        raise type(error)(expected) from None
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(expected)
    return "set", frozenset(numbers)


def parse_per_layer(text: str) -> dict[int, dict[str, int]]:
    """Fields by layer number."""
    layers: dict[int, dict[str, int]] = {}
    for part in re.sub(r" *([-:;,=]) *", r"\1", text.strip()).split(";"):
        found = re.fullmatch(r"([1-9]\d{0,3})(?:-(\d{1,4}))?:((chunk|topk)=[1-9]\d{0,8}(?:,(?!\4)(?:chunk|topk)="
                             r"[1-9]\d{0,8})?)", part)
        numbers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
        if not numbers or not layers.keys().isdisjoint(numbers):
            raise ValueError("MoBAConfig.per_layer must be 1-based layers, each once, with chunk=, topk= or both, such "
                             f"as '1-8:chunk=128,topk=16;9-24:topk=8', got {text!r}")
        values = dict(pair.split("=") for pair in found[3].split(","))
        given = {{"chunk": "chunk_size"}.get(name, name): int(value) for name, value in values.items()}
        layers.update(dict.fromkeys(numbers, given))
    return layers


def _parse_schedule(text: str) -> list[tuple[int, int]]:
    """Iterations and the topk from each on."""
    is_list = re.fullmatch(r"( *\d{1,9} *: *[1-9]\d{0,8} *,)+", text + ",")
    steps = [tuple(map(int, part.split(":"))) for part in text.split(",")] if is_list else []
    iterations = [step for step, _ in steps]
    if not steps or iterations[0] or iterations != sorted(set(iterations)):
        raise ValueError("MoBAConfig.topk_schedule must be iterations that begin with 0 and grow, each with a topk, as "
                         f"'0:64,1000:16,2000:8', got {text!r}")
    return steps


@dataclass(frozen=True)
class MoBAConfig:
    """How MoBA attends, and in which layers and steps (arXiv 2502.13189, sections 2.2 and 3).

    Args:
        chunk_size: keys in a chunk, at least 1 (the Triton kernels need at least 16).
        topk: chunks that a query attends to, its own included; 1 is the own chunk alone.
        full_attention_layers: layers with dense causal attention: ``"none"``, ``"all"``, ``"last:N"``, ``"every:N"``
            (each N-th layer) or 1-based global layer numbers, as a string ``"1,2,24"`` or a sequence.
        full_attention_from_step: first training iteration (0-based) with dense attention everywhere; None for never.
        deterministic: bitwise reproducible gradients.
        backend: ``auto`` (Triton on CUDA, plain torch elsewhere), ``triton``, ``torch`` or ``reference``.
        cp_head_groups: under context parallelism, groups of kv heads that travel and are computed one after the other;
            more need less memory. None: by size.
        workspace_mib: limit of the Triton kernels' scratch memory, MiB; None for ``MOBA_WORKSPACE_MIB``, else 1024.
        key_conv: taps of the key convolution (arXiv 2511.11571) in MoBA layers, 3 or 5; 0 for none. It has parameters,
            zeros at first, where it changes nothing.
        decode: how a new token attends to a cache in MoBA layers: ``moba``, which is what a forward over the whole
            prefix gives, or ``dense``, to all before it. Prompts attend sparsely in both. None: the host's own,
            ``moba`` in Megatron-Core's static inference, ``dense`` in Transformers.
        selection: ``head``: each query head chooses its chunks; ``group``: those of a kv head choose together, by the
            sum of their scores.
        per_layer: ``chunk_size`` and ``topk`` of some layers, such as ``"1-8:chunk=128,topk=16;9-24:topk=8"``, by
            1-based global numbers; others have those above.
        topk_schedule: ``topk`` by training iteration, such as ``"0:64,1000:16,2000:8"``, in place of the field.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; the message names it.
    """

    chunk_size: int = _flag(512, "keys in a chunk")
    topk: int = _flag(8, "chunks that a query attends to, its own included")
    full_attention_layers: str | tuple[int, ...] = _flag(
        "none", "layers with dense attention: none, all, last:N, every:N or layer numbers such as 1,2,24")
    full_attention_from_step: int | None = _flag(None, "iteration from which every layer attends densely; unset: never")
    deterministic: bool = _flag(False, "bitwise reproducible gradients")
    backend: str = _flag("auto", "auto, triton, torch or reference")
    cp_head_groups: int | None = _flag(None, "groups of kv heads that context parallelism sends one after the other, "
                                             "to overlap and to save memory; unset: by size")
    workspace_mib: int | None = _flag(None, "limit of the kernels' scratch memory in MiB; unset: MOBA_WORKSPACE_MIB, "
                                            "else 1024")
    key_conv: int = _flag(0, "taps of the convolution over keys in MoBA layers, 3 or 5; 0: none")
    decode: str | None = _flag(None, "attention of generated tokens, moba or dense; unset: moba in Megatron-Core's "
                                     "static inference")
    selection: str = _flag("head", "who chooses chunks: each query head, or the group of a kv head together")
    per_layer: str | None = _flag(None, "chunk size, topk of some layers: 1-8:chunk=128,topk=16;9-24:topk=8, or none")
    topk_schedule: str | None = _flag(None, "topk from an iteration on, such as 0:64,1000:16,2000:8, or none")

    def __post_init__(self):
        for name, minimum in (("chunk_size", 1), ("topk", 1), ("full_attention_from_step", 0), ("cp_head_groups", 1),
                              ("workspace_mib", 1), ("key_conv", 0)):
            if getattr(self, name) is not None or getattr(type(self), name) is not None:
                check_whole(f"MoBAConfig.{name}", getattr(self, name), minimum)
        if not isinstance(self.deterministic, bool):
            raise TypeError(f"MoBAConfig.deterministic must be a bool, got {self.deterministic!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in (*choices, getattr(type(self), name)):
                raise ValueError(f"MoBAConfig.{name} must be one of {', '.join(map(str, choices))}; got "
                                 f"{getattr(self, name)!r}")
        for name, parse in (("per_layer", parse_per_layer), ("topk_schedule", _parse_schedule)):
            text = getattr(self, name)
            if not isinstance(text, (str, type(None))):
                raise TypeError(f"MoBAConfig.{name} must be a str or None, got {text!r}")
            if text == "none":  # a flag that unsets what a checkpoint says
                object.__setattr__(self, name, None)
            elif text is not None:
                parse(text)
        if self.topk_schedule and "topk" in (self.per_layer or ""):
            raise ValueError("MoBAConfig.topk_schedule must be None where per_layer gives a topk, got "
                             f"{self.topk_schedule!r} and {self.per_layer!r}")
        rule, numbers = _parse_layers(self.full_attention_layers)
        if rule == "set" and not isinstance(self.full_attention_layers, str):
            object.__setattr__(self, "full_attention_layers", tuple(sorted(numbers)))

    def is_full_attention(self, layer_number: int, num_layers: int) -> bool:
        """Whether a layer, by its global 1-based number, attends densely; ValueError where that, or a listed layer, is
        not in 1..num_layers."""
        if not 1 <= layer_number <= num_layers:
            raise ValueError(f"layer_number must be in 1..{num_layers} (num_layers), got {layer_number}")
        rule, n = _parse_layers(self.full_attention_layers)
        if rule == "set" and n and max(n) > num_layers:
            raise ValueError(f"MoBAConfig.full_attention_layers names layer {max(n)}, but the model has {num_layers}")
        return (rule == "all" or rule == "last" and layer_number > num_layers - n
                or rule == "every" and layer_number % n == 0 or rule == "set" and layer_number in n)

    def is_full_step(self, iteration: int) -> bool:
        """Whether every layer attends densely at this training iteration (0-based)."""
        return self.full_attention_from_step is not None and iteration >= self.full_attention_from_step

    def for_layer(self, layer_number: int, num_layers: int) -> "MoBAConfig":
        """The config of a layer, by its global 1-based number: with its own ``chunk_size`` and ``topk``. ValueError
        where per_layer names a layer beyond num_layers."""
        if self.per_layer is None:
            return self
        layers = parse_per_layer(self.per_layer)
        if max(layers) > num_layers:
            raise ValueError(f"MoBAConfig.per_layer names layer {max(layers)}, but the model has {num_layers}")
        return replace(self, per_layer=None, **layers.get(layer_number, {}))

    def at_step(self, iteration: int) -> "MoBAConfig":
        """The config at a training iteration (0-based): with that one's ``topk``."""
        if self.topk_schedule is None:
            return self
        topk = [topk for step, topk in _parse_schedule(self.topk_schedule) if step <= iteration][-1]
        return replace(self, topk=topk, topk_schedule=None)

    def chunks(self, dense: bool, max_seqlen: int) -> tuple[int, int]:
        """Chunk size and topk of a layer: where it is dense, those of one chunk that holds everything."""
        return (max(1, max_seqlen), 1) if dense else (self.chunk_size, self.topk)

    def refuse(self, host: str, reasons: Mapping[str, str]) -> None:
        """Raises ValueError where a field that a host cannot honour, and why, is not at its default."""
        for name, reason in reasons.items():
            value, default = getattr(self, name), getattr(MoBAConfig, name)
            if value != default:
                raise ValueError(f"MoBAConfig.{name} must be {default} {host}, got {value!r}: {reason}")

    def describe(self) -> str:
        """One line with every field, for logs."""
        return "MoBA: " + ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def set_default_config(config: MoBAConfig | None) -> None:
    """Sets what modules built without a config of their own use; None forgets it."""
    global _default
    if config is not None and not isinstance(config, MoBAConfig):
        raise TypeError(f"config must be a MoBAConfig or None, got {type(config).__name__}")
    _default = config


def get_default_config() -> MoBAConfig | None:
    """The config set by :func:`set_default_config`, or None."""
    return _default
