"""Megatron-Core's own inference classes around MoBA: what the engine generates, and what it is refused.

Greedy and in fp64, so that equal attention means equal tokens.
"""
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")

PROMPTS = (60, 83)  # both longer than topk chunks; the engine prefills 60 tokens of both
NEW = 40


class Tokenizer:
    """Text is numbers."""

    eod, vocab_size, bos = 10 ** 6, 64, None

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, tokens, **kwargs):
        return " ".join(map(str, tokens))


def make_engine(model):
    """Megatron's static engine, by the constructor of this release."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    sizes = dict(inference_max_requests=2, inference_max_seq_length=152)
    try:
        from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
    except ImportError:  # 0.18 and later
        wrapped = GPTInferenceWrapper(model, StaticInferenceContext(2, 152))
    else:
        config = InferenceWrapperConfig(hidden_size=32, params_dtype=torch.float64, padded_vocab_size=64,
                                        inference_batch_times_seqlen_threshold=10 ** 6, **sizes)
        wrapped = GPTInferenceWrapper(model, config, StaticInferenceContext(2, 152))
    return StaticInferenceEngine(TextGenerationController(wrapped, Tokenizer()), legacy=True)


def generate(model, prompts):
    """What the engine adds to each prompt."""
    from megatron.core.inference.sampling_params import SamplingParams

    texts = [" ".join(map(str, prompt.tolist())) for prompt in prompts]
    requests = make_engine(model).generate(prompts=texts, sampling_params=SamplingParams(
        top_k=1, num_tokens_to_generate=NEW))
    return [torch.as_tensor(request.generated_tokens).tolist() for request in requests]


def recompute(model, prompt, first_dense=None):
    """Tokens by a forward over the whole prefix each, rows from ``first_dense`` on attending densely; least margin."""
    from moba_megatron import MoBAConfig, MoBACoreAttention

    def attend(core, query, *args, **kwargs):
        sparse = forward(core, query, *args, **kwargs)
        if first_dense is None or core.full_attention:
            return sparse
        sparse_config, core.moba_config = core.moba_config, MoBAConfig(10 ** 6, 1)
        dense = forward(core, query, *args, **kwargs)
        core.moba_config = sparse_config
        return torch.cat((sparse[:first_dense], dense[first_dense:]))

    forward, tokens, margin = MoBACoreAttention.forward, prompt, float("inf")
    MoBACoreAttention.forward = attend
    try:
        with torch.inference_mode():
            for _ in range(NEW):
                logits = model(tokens[None], torch.arange(len(tokens))[None], None, runtime_gather_output=True)[0, -1]
                best = logits.topk(2)
                margin = min(margin, (best.values[0] - best.values[1]).item())
                tokens = torch.cat((tokens, best.indices[:1]))
    finally:
        MoBACoreAttention.forward = forward
    return tokens[len(prompt):].tolist(), margin


def dynamic_batching(model):
    """The error that a step of dynamic batching ends with in the first attention layer."""
    from megatron.core.transformer import attention

    attention.HAVE_FA3 = True  # asked for before
    context = SimpleNamespace(
        is_static_batching=lambda: False, is_dynamic_batching=lambda: True, is_decode_only=lambda: False,
        use_flashinfer_fused_rope=False,
        append_key_value_cache=lambda *args: None, cu_query_lengths=lambda: (None, 1),
        cu_kv_lengths=lambda: (None, None, 1), key_value_cache=lambda layer: (torch.zeros(1), torch.zeros(1), None))
    try:
        with torch.inference_mode():
            model.decoder.layers[0].self_attention(torch.zeros(4, 1, 32, dtype=torch.float64), None,
                                                   inference_context=context)
    except ValueError as error:
        return str(error)


def everything(rank, size):
    import dataclasses

    import gpt

    if not hasattr(torch.cuda.Event, "elapsed_time"):  # what stands for one without a GPU
        torch.cuda.Event.elapsed_time = lambda self, end: 0.0
    layout = gpt.Layout("inference")
    weights = gpt.common_weights()
    results = {}
    for decode in ("moba", "dense"):
        gpt.MOBA = dataclasses.replace(gpt.MOBA, decode=decode)
        model = gpt.build(layout).eval()
        gpt.load(model, weights, layout)
        generator = torch.Generator().manual_seed(5)
        prompts = [torch.randint(0, gpt.VOCAB, (n,), generator=generator) for n in PROMPTS]
        whole = [recompute(model, prompt, min(PROMPTS) if decode == "dense" else None) for prompt in prompts]
        results[decode] = generate(model, prompts), [tokens for tokens, _ in whole], min(margin for _, margin in whole)
    results["dynamic"] = dynamic_batching(model)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 1, tmp_path_factory.mktemp("ranks"))[0]


@pytest.mark.parametrize("decode", ["moba", "dense"])
def test_static_batching_generates_what_recomputing_the_prefix_does(results, decode):
    generated, expected, margin = results[decode]
    assert generated == expected
    assert margin > 1e-9 and [len(tokens) for tokens in generated] == [NEW, NEW]


def test_dense_decoding_is_another_model(results):
    assert results["moba"][1] != results["dense"][1]


def test_dynamic_batching_is_refused(results):
    assert "dynamic batching: DynamicInferenceContext" in results["dynamic"] and "legacy=True" in results["dynamic"]
