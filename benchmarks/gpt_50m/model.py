"""A GPT of 50M parameters over bytes, in plain torch: 16 layers, 512 wide, RoPE, RMSNorm, GELU, tied embeddings."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import Attend, Attention


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults are the 50M one of the README's benchmark."""

    layers: int = 16
    width: int = 512
    heads: int = 8
    hidden: int = 2048
    vocabulary: int = 256
    rotary_base: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


TOY = Shape(layers=4, width=32, heads=2, hidden=64)
"""For machines without a GPU: everything runs, nothing is learned."""


class Block(nn.Module):
    """Attention and MLP, each behind an RMSNorm and added to the stream of activations ``[tokens, width]``."""

    def __init__(self, shape: Shape, attend: Attend, key_conv: int = 0):
        super().__init__()
        self.heads, self.head_dim, self.attend = shape.heads, shape.head_dim, attend
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.project = nn.Linear(shape.width, shape.width, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        self.filter = nn.Parameter(torch.zeros(shape.heads, key_conv, shape.head_dim)) if key_conv else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        """x ``[T, width]``, cos and sin ``[S, head_dim / 2]``, cu_seqlens int32 ``[B + 1]`` with T = B * S."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(1, (3, self.heads, self.head_dim))
        q, k, v = qkv.unbind(1)
        extra = () if self.filter is None else (self.filter,)
        o = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, cu_seqlens, cos.shape[0], *extra)
        x = x + self.project(o.flatten(1))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class Head(nn.Module):
    """The last norm, the logits by the embedding's weight, and each token's cross entropy."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)

    def forward(self, x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """x ``[T, width]``, embedding ``[vocabulary, width]``, targets int64 ``[T]``; losses fp32 ``[T]``."""
        logits = functional.linear(self.norm(x), embedding)
        return functional.cross_entropy(logits.float(), targets, reduction="none")


class GPT(nn.Module):
    """The model; ``forward`` gives the loss of every token.

    Args:
        shape: its sizes.
        attention: what its layers attend with.
        seq_length: tokens in every sequence.
    """

    def __init__(self, shape: Shape, attention: Attention, seq_length: int):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        taps = attention.key_conv or (0,) * len(attention.layers)
        self.blocks = nn.ModuleList(Block(shape, *layer) for layer in zip(attention.layers, taps))
        self.head = Head(shape)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angles = torch.outer(torch.arange(seq_length, dtype=torch.float64), shape.rotary_base ** -half)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self._initialise(shape)

    def _initialise(self, shape: Shape) -> None:
        """Normal with 0.02; what is added to the stream, 1/sqrt(2 * layers) of it."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 * (2 * shape.layers) ** -0.5 if last else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """tokens and targets int64 ``[T]``, packed sequences; losses fp32 ``[T]``, nats."""
        return self.head(self._hidden(tokens, cu_seqlens), self.embedding.weight, targets)

    def predict(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The likeliest next token at each place, int64 ``[T]``."""
        return functional.linear(self.head.norm(self._hidden(tokens, cu_seqlens)), self.embedding.weight).argmax(-1)

    def _hidden(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin, cu_seqlens)
        return x

    def compile_parts(self, traceable: bool) -> None:
        """Compiles a block and the head: one graph serves all blocks that attend alike, so that it takes seconds."""
        for part in (*self.blocks, self.head):
            part.compile(dynamic=False, fullgraph=traceable)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``[B * S, H, D]`` with tables ``[S, D / 2]``; the halves of a head are the pairs."""
    a, b = x.unflatten(0, (-1, cos.shape[0])).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(0, 1).to(x.dtype)
