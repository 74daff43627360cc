"""What is compared, by name: full, hybrid, moba-512-3, moba-128-12-conv3, moba-64-4-every:4."""
from __future__ import annotations

import itertools
from dataclasses import dataclass

from moba_megatron import MoBAConfig

LENGTHS = (2048, 8192)
CHUNKS, TOPKS = (64, 128, 256, 512), (2, 4, 8, 16)
RULES = ("last:4", "last:10", "every:6", "every:3")
"""Of dense layers, at (64, 4)."""


def grid(length: int) -> list[str]:
    """Full attention, every chunk size and topk that leave something out, and the rules of dense layers."""
    return ["full", *(f"moba-{chunk}-{topk}" for chunk, topk in itertools.product(CHUNKS, TOPKS)
                      if chunk * topk < length), *(f"moba-64-4-{rule}" for rule in RULES)]


@dataclass(frozen=True)
class Variant:
    """An attention: its kind, chunk size and topk (0 where dense), dense layers and taps of the key convolution."""

    attention: str
    chunk_size: int = 0
    topk: int = 0
    full_attention_layers: str = "none"
    key_conv: int = 0

    @classmethod
    def of(cls, name: str) -> "Variant":
        """Reads a name.

        Raises:
            ValueError: it is none.
        """
        if name == "full":
            return cls(name)
        kind, *words = name.split("-")
        found = {}
        try:
            found |= {"chunk_size": int(words[0]), "topk": int(words[1])}
            for word in words[2:]:
                key, value = ("key_conv", int(word[4:])) if word.startswith("conv") else ("full_attention_layers", word)
                found[key] = value
            MoBAConfig(**found)
        except (IndexError, ValueError) as error:
            raise ValueError(f"a variant must be full or like moba-512-3, moba-128-12-conv3, moba-64-4-every:4, "
                             f"hybrid-512-3; got {name!r} ({error})") from None
        if kind not in ("moba", "hybrid"):
            raise ValueError(f"a variant must begin with full, moba or hybrid, got {name!r}")
        return cls(kind, **found)

    def flags(self) -> tuple[str, ...]:
        """The same for train_50m.py."""
        if self.attention == "full":
            return "--attention", "full"
        return ("--attention", self.attention, "--chunk-size", str(self.chunk_size), "--topk", str(self.topk),
                *(("--key-conv", str(self.key_conv)) if self.key_conv else ()),
                *(("--full-attention-layers", self.full_attention_layers) * (self.full_attention_layers != "none")))

    def label(self) -> str:
        """For tables and pictures."""
        if self.attention == "full":
            return "full"
        rule = "last:3" if self.attention == "hybrid" else self.full_attention_layers
        return (f"MoBA ({self.chunk_size}, {self.topk})" + f", convolution {self.key_conv}" * bool(self.key_conv)
                + f", {rule} dense" * (rule != "none"))
