"""MoBA in a Transformers model: generate with one from a path, or train a small Llama on real text for a minute.

    python examples/llama.py --model path/to/Llama-3.1-8B     # greedy generation, prefill by MoBA
    python examples/llama.py                                  # no download: bytes of Python's standard library
"""
from __future__ import annotations

import argparse
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moba_megatron import MoBAConfig, register_moba

VOCABULARY = 256  # bytes
VALIDATION_FILES = 30
SHAPES = {
    "cpu": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2),
    "cuda": dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
                 num_key_value_heads=4),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a causal language model of Transformers: a local path or a name; unset: train one")
    p.add_argument("--attn", default="moba", help="moba, moba_reference, or another attention, as sdpa (moba)")
    p.add_argument("--decode", default="dense", choices=("dense", "moba"), help="how new tokens attend (dense)")
    p.add_argument("--moba-chunk-size", type=int, help="keys in a chunk (4096 with --model, else 64)")
    p.add_argument("--moba-topk", type=int, help="chunks a query attends to, its own too (12 with --model, else 3)")
    p.add_argument("--prompt", help="text to go on from")
    p.add_argument("--max-new-tokens", type=int, default=96)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seconds", type=float, default=60, help="training stops after so many seconds (60)")
    p.add_argument("--steps", type=int, default=10 ** 6, help="or after so many steps")
    p.add_argument("--seq-length", type=int, default=512, help="bytes of a training sequence at most (512)")
    p.add_argument("--batch-tokens", type=int, help="bytes of a step (1024 on the CPU, 65536 on CUDA)")
    p.add_argument("--seed", type=int, default=0)
    arguments = p.parse_args(argv)
    sizes = (4096, 12) if arguments.model else (64, 3)  # what the paper's models use, and what fits small ones
    arguments.moba_chunk_size = arguments.moba_chunk_size or sizes[0]
    arguments.moba_topk = arguments.moba_topk or sizes[1]
    arguments.batch_tokens = arguments.batch_tokens or (65536 if arguments.device.startswith("cuda") else 1024)
    return arguments


def read_text() -> tuple[list[bytes], list[bytes]]:
    """The sources of Python's standard library: for training and for validation."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text for text in (path.read_bytes() for path in paths) if len(text) > 1000]
    random.Random(1).shuffle(texts)
    return texts[VALIDATION_FILES:], texts[:VALIDATION_FILES]


def packed_batch(texts: list[bytes], tokens: int, seq_length: int, device: str, draw: random.Random) -> dict:
    """Pieces of texts, one behind the other in a row without padding: what a padding-free collator gives."""
    pieces, total = [], 0
    while total < tokens:
        text = draw.choice(texts)
        begin = draw.randrange(max(1, len(text) - seq_length))
        pieces.append(torch.frombuffer(bytearray(text[begin:begin + min(seq_length, tokens - total)]),
                                       dtype=torch.uint8).long())
        total += len(pieces[-1])
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
    ids = torch.cat(pieces)
    bounds = torch.tensor([0, *map(len, pieces)]).cumsum(0).int().to(device)
    longest = max(map(len, pieces))
    tensors = dict(input_ids=ids, labels=ids.masked_fill(positions == 0, -100), position_ids=positions)
    return {**{name: x[None].to(device) for name, x in tensors.items()}, "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


@torch.no_grad()
def bits_per_byte(model, texts: list[bytes], arguments: argparse.Namespace) -> float:
    """The mean over some batches of text that was not trained on."""
    model.eval()
    draw = random.Random(2)
    losses = [model(**packed_batch(texts, arguments.batch_tokens, arguments.seq_length, arguments.device, draw),
                    use_cache=False).loss.item() for _ in range(4)]
    return sum(losses) / len(losses) / math.log(2)


def train(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama over bytes from random weights; prints its loss on the way."""
    torch.manual_seed(arguments.seed)
    draw, (texts, validation) = random.Random(arguments.seed), read_text()
    kind = "cuda" if arguments.device.startswith("cuda") else "cpu"
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=1 << 16, pad_token_id=0, bos_token_id=None,
                         eos_token_id=None, attn_implementation=arguments.attn, **SHAPES[kind])
    model = LlamaForCausalLM(config).to(arguments.device, torch.bfloat16 if kind == "cuda" else torch.float32)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{millions:.1f} million parameters, {arguments.attn} attention, chunks of {arguments.moba_chunk_size}, topk "
          f"{arguments.moba_topk}, on {arguments.device}")
    print(f"validation: {bits_per_byte(model, validation, arguments):.3f} bits per byte before training", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    begin, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        rate = 3e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        batch = packed_batch(texts, arguments.batch_tokens, arguments.seq_length, arguments.device, draw)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        elapsed = time.perf_counter() - begin
        progress = max(elapsed / arguments.seconds, step / arguments.steps)
        if step % 20 == 0 or progress >= 1:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte, {elapsed:.0f} s", flush=True)
    print(f"validation: {bits_per_byte(model, validation, arguments):.3f} bits per byte after {step} steps")
    return model


def generate(model, ids: list[int], arguments: argparse.Namespace, **sampling) -> list[int]:
    """The prompt's tokens and those behind them: the likeliest, or drawn with these arguments of Transformers."""
    model.eval()
    ids = torch.tensor([ids], device=model.device)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=arguments.max_new_tokens,
                            **(sampling or {"do_sample": False}))
    return tokens[0].tolist()


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    register_moba(MoBAConfig(arguments.moba_chunk_size, arguments.moba_topk), decode=arguments.decode)
    if arguments.model is None:
        model = train(arguments)
        prompt = "class Stack:\n    def __init__(self" if arguments.prompt is None else arguments.prompt
        # what a minute teaches repeats itself where always the likeliest byte is taken
        text = generate(model, list(prompt.encode()), arguments, do_sample=True, temperature=0.7, top_k=0)
        print(bytes(text).decode(errors="replace"))
        return 0
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation=arguments.attn).to(
        arguments.device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompt = "how are you?" if arguments.prompt is None else arguments.prompt
    print(tokenizer.decode(generate(model, tokenizer.encode(prompt), arguments)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
