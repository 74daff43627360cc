"""A small pretrained model of Transformers as the trainer wants it, its tokens, and what it generates afterwards."""
from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moba_megatron import MoBAConfig

from .attention import DENSE_LAYERS, Attention
from .tasks import Edits, Tasks, overwritten
from .text import Windows

SYMBOLS = 10_000
"""Tokens that random blocks are made of, at most."""


class Pretrained(nn.Module):
    """A causal language model, called as :class:`~.model.GPT` is: tokens of packed sequences of one length."""

    def __init__(self, model: nn.Module, seq_length: int):
        super().__init__()
        self.model, self.seq_length = model, seq_length

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Losses fp32 ``[T]``, nats."""
        return functional.cross_entropy(self._logits(tokens).float(), targets, reduction="none")

    def predict(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The likeliest next token at each place, int64 ``[T]``."""
        return self._logits(tokens).argmax(-1)

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens.view(-1, self.seq_length), use_cache=False).logits.flatten(0, 1)


class Tokenizer:
    """A model's tokenizer: whole texts, and the pieces that tasks are written in."""

    def __init__(self, tokenizer):
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        self._piece = cache(lambda text: tuple(self._ids([text])[0]))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, and the end of text behind them."""
        return [[*ids, self.end] for ids in self._ids(texts)]

    def tasks(self, seq_length: int) -> Tasks:
        """The retrieval tasks in these tokens."""
        special = set(self.tokenizer.all_special_ids)
        plain = [i for i in range(min(len(self.tokenizer), SYMBOLS)) if i not in special]
        return Tasks(seq_length, np.asarray(plain), lambda text: list(self._piece(text.decode())))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file, or of a folder of Transformers'.

    Raises:
        ValueError: nothing is there.
    """
    from transformers import AutoTokenizer

    folder, where = _place(path)
    return Tokenizer(AutoTokenizer.from_pretrained(folder, **where))


def load_model(path: Path) -> nn.Module:
    """The model beside it, in fp32; a GGUF file's weights become dense."""
    import transformers

    folder, where = _place(path)
    if where and hasattr(transformers, "GgufConfig"):
        where["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)


def _place(path: Path) -> tuple[Path, dict]:
    if not path.exists():
        raise ValueError(f"--pretrained must name a GGUF file or a folder, got {path}")
    return (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})


def implementation(attention: str, chunk_size: int, topk: int, full_attention_layers: str = "none",
                   decode: str = "dense") -> str:
    """What Transformers calls an attention, registered where it is MoBA.

    Raises:
        ValueError: neither full, moba nor hybrid.
    """
    if attention == "full":
        return "sdpa"
    if attention not in ("moba", "hybrid"):
        raise ValueError(f"--attention must be full, moba or hybrid with --pretrained, got {attention!r}")
    from moba_megatron import register_moba

    rule = DENSE_LAYERS.get(attention, full_attention_layers)
    name = f"moba_{chunk_size}_{topk}_{rule.replace(':', '_').replace(',', '_')}_{decode}"
    register_moba(MoBAConfig(chunk_size=chunk_size, topk=topk, full_attention_layers=rule), decode=decode, name=name)
    return name


def build(args: argparse.Namespace, seq_length: int, device: torch.device) -> tuple[Pretrained, Attention, Tokenizer]:
    """What `train_50m.py --pretrained` goes on with."""
    if args.key_conv:
        raise ValueError("--key-conv must be 0 with --pretrained: Transformers' models have no place for its filters")
    model, tokenizer = load_model(args.pretrained), load_tokenizer(args.pretrained)
    if args.rotary_base:
        model.config.rope_parameters["rope_theta"] = args.rotary_base
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, seq_length)
    model.set_attn_implementation(implementation(args.attention, args.chunk_size, args.topk,
                                                 args.full_attention_layers))
    return Pretrained(model.to(device).train(), seq_length), Attention((), None, False), tokenizer


def generation(trained: Pretrained, args: argparse.Namespace, tasks: Tasks, windows: Windows,
               device: torch.device) -> dict[str, dict]:
    """Saves the model, loads it as Transformers does, and lets it generate answers, decoding densely and by MoBA.

    Returns:
        by decoding: ``loss`` of the text's first sequence, ``right`` of ``answers`` that were generated, of ``pairs``.
    """
    from transformers import AutoModelForCausalLM

    pairs = tasks.fitting_pairs()[:2][-1]
    folder = args.output / "model"
    trained.model.save_pretrained(folder)
    found = {}
    for decode in ("dense", "moba")[:1 + (args.attention != "full")]:
        name = implementation(args.attention, args.chunk_size, args.topk, args.full_attention_layers, decode)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name, dtype=torch.float32).to(device)
        right = 0
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            row = windows.rows(0, 1)
            loss = functional.cross_entropy(model(row[:, :-1]).logits[0].float(), row[0, 1:]).item()
            for i in range(args.generate):
                prompt, answer = question(tasks.recall(np.random.default_rng(i), pairs, 0.5), windows.rows(i, 1))
                said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(answer),
                                      min_new_tokens=len(answer), do_sample=False)
                right += said[0, prompt.shape[1]:].tolist() == answer
        found[decode] = {"loss": loss, "right": right, "answers": args.generate, "pairs": pairs}
    return found


def question(edits: Edits, rows: Tensor) -> tuple[Tensor, list[int]]:
    """An example written over a row ``[1, S + 1]``, up to its first answer, and that answer."""
    row = overwritten(rows, [edits])
    answers = np.asarray(edits.answers)
    places = np.asarray(edits.places)[answers == answers[answers >= 0][0]]
    return row[:, :places[0]], row[0, places].tolist()
