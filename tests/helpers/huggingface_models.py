"""Tiny models of Transformers, and MoBA for them by the oracle: dense masks, no cache, whole sequences."""
import contextlib

import oracle
import torch
import transformers
from transformers import AttentionInterface

CHUNK, TOPK = 4, 3
FAMILIES = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}}


def model(family="llama", attention="moba", layers=2, dtype=torch.float64, **changes):
    """A causal language model with random weights, the same for every attention; large, so that tokens vary."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = getattr(transformers, names[family] + "Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=61, max_position_embeddings=256, initializer_range=0.4, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, **{**FAMILIES[family], **changes})
    config._attn_implementation = attention
    torch.manual_seed(7)
    made = getattr(transformers, names[family] + "ForCausalLM")(config).to(dtype)
    made.generation_config.eos_token_id = None
    return made


def tokens(*shape, seed=3):
    return torch.randint(2, 61, shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def oracle_attention(sequences, dense_from=None, chunk=CHUNK, topk=TOPK):
    """Within the block the attention "moba_oracle" attends within these (row, first, end) slots, by the definition.

    Positions from ``dense_from`` on attend densely, as new tokens of a generation do.
    """
    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        for row, first, end in sequences:
            q, k, v = (x[row, :, first:end].transpose(0, 1) for x in (query, key, value))
            chosen = oracle.select(q.detach(), k.detach(), [end - first], chunk, topk)
            mask = oracle.mask_of(chosen, [end - first], q.shape[1], chunk)
            if dense_from is not None:
                causal = torch.ones(end - first, end - first, dtype=torch.bool).tril()
                mask[:, dense_from:] |= causal[dense_from:]
            out[row, first:end] = oracle.attend(q, k, v, mask, scaling)[0]
        return out, None

    AttentionInterface.register("moba_oracle", attend)
    yield


with oracle_attention(()):
    pass  # models may be built with it before a test says which sequences it attends within


def greedy(made, prompt, steps, dense_from=None):
    """The tokens that follow one prompt, each from a forward over the whole prefix by the oracle."""
    ids = prompt[None]
    for _ in range(steps):
        with oracle_attention([(0, 0, ids.shape[1])], dense_from), torch.no_grad():
            ids = torch.cat((ids, made(ids, use_cache=False).logits[:, -1:].argmax(2)), 1)
    return ids[0, prompt.shape[0]:]
