"""Llama's weights and settings in Transformers' names and in those of Megatron-Core's GPTModel with local layers.

Both keep queries, keys and values as matrices [heads * head_dim, hidden]; Megatron's one matrix has, for each key/value
head, the queries that share it, then the key, then the value. Rotary embeddings pair the same dimensions in both.
"""
import torch
from torch import Tensor
from transformers import LlamaConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
WHOLE = {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": "decoder.final_layernorm.weight",
         "lm_head.weight": HEAD}
LAYER = {"input_layernorm.weight": "input_layernorm.weight",
         "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
         "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
         "mlp.down_proj.weight": "mlp.linear_fc2.weight"}
QKV = [f"self_attn.{name}_proj.weight" for name in "qkv"]
GATE_UP = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]


def model_flags(config: LlamaConfig) -> list[str]:
    """The flags of examples/pretrain_gpt.py for this model.

    Raises:
        ValueError: it is no Llama, or has something that this conversion does not carry over.
    """
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None),
                                                        **(getattr(config, "rope_scaling", None) or {})}
    theta = rope.get("rope_theta") or 0
    needed = {"model_type": (config.model_type, "llama"), "rope_type": (rope.get("rope_type", "default"), "default"),
              "rope_theta": (theta, int(theta))}
    for name, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        needed[name] = getattr(config, name, None), expected
    for name, (value, expected) in needed.items():
        if value != expected:
            raise ValueError(f"--huggingface: {name} of config.json must be {expected!r} for this conversion, got "
                             f"{value!r}: Megatron-Bridge itself knows more models (README.md)")
    flags = {"num-layers": config.num_hidden_layers, "hidden-size": config.hidden_size,
             "ffn-hidden-size": config.intermediate_size, "num-attention-heads": config.num_attention_heads,
             "num-query-groups": config.num_key_value_heads, "kv-channels": config.head_dim,
             "rotary-base": int(theta), "norm-epsilon": config.rms_norm_eps,
             "vocab-size": config.vocab_size, "make-vocab-size-divisible-by": 1}
    switches = ["--group-query-attention"]
    if not config.tie_word_embeddings:
        switches.append("--untie-embeddings-and-output-weights")
    return [*switches, *(f"--{name}={value}" for name, value in flags.items())]


def to_megatron(weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The state dict of LlamaForCausalLM as that of GPTModel."""
    groups, rows = config.num_key_value_heads, config.head_dim
    found = {ours: weights[theirs] for theirs, ours in _whole(config).items()}
    for theirs, ours in _layers(config):
        found.update({ours + b: weights[theirs + a] for a, b in LAYER.items()})
        parts = [weights[theirs + name].unflatten(0, (groups, -1, rows)) for name in QKV]
        found[ours + "self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).flatten(0, 2)
        found[ours + "mlp.linear_fc1.weight"] = torch.cat([weights[theirs + name] for name in GATE_UP])
    return found


def to_huggingface(weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The other way; rows of the embedding that Megatron added for tensor parallelism are left out."""
    groups, rows = config.num_key_value_heads, config.head_dim
    shared = config.num_attention_heads // groups
    found = {theirs: weights[ours][:config.vocab_size] if ours in (EMBEDDING, HEAD) else weights[ours]
             for theirs, ours in _whole(config).items()}
    for theirs, ours in _layers(config):
        found.update({theirs + a: weights[ours + b] for a, b in LAYER.items()})
        qkv = weights[ours + "self_attention.linear_qkv.weight"].unflatten(0, (groups, shared + 2, rows))
        found.update({theirs + name: part.flatten(0, 2)
                      for name, part in zip(QKV, qkv.split([shared, 1, 1], dim=1), strict=True)})
        found.update({theirs + name: part
                      for name, part in zip(GATE_UP, weights[ours + "mlp.linear_fc1.weight"].chunk(2), strict=True)})
    return found


def _whole(config: LlamaConfig) -> dict[str, str]:
    return {a: b for a, b in WHOLE.items() if b != HEAD or not config.tie_word_embeddings}


def _layers(config: LlamaConfig) -> list[tuple[str, str]]:
    return [(f"model.layers.{i}.", f"decoder.layers.{i}.") for i in range(config.num_hidden_layers)]
