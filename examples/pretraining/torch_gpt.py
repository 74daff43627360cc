"""The GPT of the Megatron example (RoPE, GQA, RMSNorm, SwiGLU) in plain torch, for trainers other than Megatron's."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; `init_std` is that of every weight matrix."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    init_std: float = 0.02

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Linear(nn.Linear):
    """Without bias. Initialised inside the constructor, since ZeRO-3 takes the weight apart right after it."""

    def __init__(self, inputs: int, outputs: int, std: float):
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    """As Linear."""

    def __init__(self, number: int, size: int, std: float):
        self.std = std
        super().__init__(number, size)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


def rotary_tables(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines in fp32 for positions [b, s]: each [b, s, 1, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[..., None, None].float() * base ** -exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [b, s, heads, head_dim], the halves of a head paired as in Llama; computed in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Layer(nn.Module):
    """Norm, attention, norm, SwiGLU, with residuals.

    Args:
        config: the sizes.
        attention: [b, s, h, d], [b, s, hk, d], [b, s, hk, d] -> [b, s, h, d], causal.
    """

    def __init__(self, config: GPTConfig, attention: nn.Module):
        super().__init__()
        c = self.config = config
        kv_size = c.num_query_groups * c.head_dim
        self.attention = attention
        self.attention_norm = nn.RMSNorm(c.hidden_size, c.norm_epsilon)
        self.qkv = Linear(c.hidden_size, c.hidden_size + 2 * kv_size, c.init_std)
        self.output = Linear(c.hidden_size, c.hidden_size, c.init_std)
        self.mlp_norm = nn.RMSNorm(c.hidden_size, c.norm_epsilon)
        self.gate_up = Linear(c.hidden_size, 2 * c.ffn_hidden_size, c.init_std)
        self.down = Linear(c.ffn_hidden_size, c.hidden_size, c.init_std)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [b, s, hidden_size]; cos, sin from `rotary_tables`."""
        c = self.config
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split((c.num_attention_heads, c.num_query_groups, c.num_query_groups), dim=2)
        o = self.attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.output(o.flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class GPT(nn.Module):
    """Token losses of a causal language model.

    Args:
        config: the sizes.
        attention: makes the attention of a layer from its number, counted from 1.
        checkpoint: called as checkpoint(layer, *inputs) in training, to recompute activations in backward; None: keep.
    """

    def __init__(self, config: GPTConfig, attention: Callable[[int], nn.Module], checkpoint: Callable | None = None):
        super().__init__()
        self.config, self.checkpoint = config, checkpoint
        self.embedding = Embedding(config.vocab_size, config.hidden_size, config.init_std)
        self.layers = nn.ModuleList(Layer(config, attention(number)) for number in range(1, config.num_layers + 1))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_epsilon)
        self.head = Linear(config.hidden_size, config.vocab_size, config.init_std)

    def forward(self, tokens: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """tokens, position_ids, labels [b, s] int64 -> losses [b, s] fp32, nats."""
        x = self.embedding(tokens)
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rotary_base)
        for layer in self.layers:
            if self.checkpoint is not None and self.training:
                x = self.checkpoint(layer, x, cos, sin)
            else:
                x = layer(x, cos, sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
