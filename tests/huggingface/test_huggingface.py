"""MoBA in Transformers: training, packing, padding, prefill and generation against the oracle's dense masks."""
import copy
import io
import pickle
import threading

import huggingface_models as hf
import pytest
import torch
import transformers
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from moba_megatron import MoBAConfig, register_moba
from moba_megatron.huggingface import attention as huggingface
from moba_megatron.huggingface import cache as huggingface_cache

CONFIG = MoBAConfig(chunk_size=hf.CHUNK, topk=hf.TOPK)
is_5 = not transformers.__version__.startswith("4.")


@pytest.fixture(autouse=True)
def registered():
    register_moba(CONFIG)


def train(model, sequences=(), **inputs):
    """Loss and gradients."""
    model.train()
    with hf.oracle_attention(sequences):
        loss = model(**inputs).loss
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_training(family):
    ids = hf.tokens(2, 21)
    got = train(hf.model(family), input_ids=ids, labels=ids)
    assert_same(got, train(hf.model(family, "moba_oracle"), [(0, 0, 21), (1, 0, 21)], input_ids=ids, labels=ids))
    dense = train(hf.model(family, "sdpa"), input_ids=ids, labels=ids)
    assert (got["loss"] - dense["loss"]).abs() > 1e-4  # so the comparison above means something


@pytest.mark.parametrize("name", ["moba_reference", "naive_moba", "moba_naive", "efficient_moba", "triton_moba"])
def test_names(name):
    ids = hf.tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(hf.model(attention=name)(ids).logits, hf.model()(ids).logits)


@pytest.mark.parametrize("given", ["cu_seq_lens", "position_ids"])
def test_packing(given):
    """Three sequences in one row train as they would alone; the labels of first tokens do not count."""
    lengths = [13, 1, 22]
    ids, cu = hf.tokens(1, 36), torch.tensor([0, 13, 14, 36])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    packed = {"position_ids": positions}
    if given == "cu_seq_lens":
        packed |= dict(cu_seq_lens_q=cu.int(), cu_seq_lens_k=cu.int(), max_length_q=22, max_length_k=22)
    expected = train(hf.model(attention="moba_oracle"), [(0, 0, 13), (0, 13, 14), (0, 14, 36)], input_ids=ids,
                     labels=labels, position_ids=positions)
    assert_same(train(hf.model(), input_ids=ids, labels=labels, use_cache=False, **packed), expected)


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padding(side):
    """Rows of 23, 9 and 5 tokens among padding: values and gradients of the tokens that count."""
    first = {"right": [0, 0, 0], "left": [0, 14, 18], "both": [0, 6, 9]}[side]
    sequences = [(row, begin, begin + n) for row, (begin, n) in enumerate(zip(first, (23, 9, 5)))]
    mask = torch.zeros(3, 23, dtype=torch.long)
    for row, begin, end in sequences:
        mask[row, begin:end] = 1
    ids = hf.tokens(3, 23)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)  # the first token is predicted from padding
    inputs = dict(input_ids=ids, labels=labels, attention_mask=mask, position_ids=positions)
    expected = train(hf.model(attention="moba_oracle"), sequences, **inputs)
    assert_same(train(hf.model(), **inputs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ids = hf.tokens(2, 21)
    mask = (torch.arange(21) >= torch.tensor([[0], [7]])).long()
    inputs = dict(input_ids=ids, labels=ids.masked_fill(mask == 0, -100), attention_mask=mask)
    model = hf.model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(train(model, use_cache=False, **inputs), train(hf.model(), **inputs))


def test_dense_layers():
    """A layer that the config names attends as torch does; all of them make another model of it."""
    ids = hf.tokens(1, 30)
    expected = hf.model(attention="sdpa").generate(ids, max_new_tokens=6, do_sample=False)
    for decode in ("dense", "moba"):
        register_moba(MoBAConfig(hf.CHUNK, hf.TOPK, full_attention_layers="all"), decode=decode)
        assert torch.equal(hf.model().generate(ids, max_new_tokens=6, do_sample=False), expected)
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK, full_attention_layers="2"))
    with torch.no_grad():
        logits = hf.model()(ids).logits
    assert not torch.allclose(logits, hf.model(attention="sdpa")(ids).logits)


def cache_for(kind, model, batch):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=40)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 5])
def test_prefill_in_pieces(kind, padding):
    """A prompt in three parts over a cache, one row padded on the left, as in one part."""
    model, ids = hf.model(), hf.tokens(2, 31)
    mask = (torch.arange(31) >= torch.tensor([[0], [padding]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, parts = cache_for(kind, model, 2), []
        for begin, end in ((0, 10), (10, 13), (13, 31)):
            parts.append(model(ids[:, begin:end], attention_mask=mask[:, :end] if padding else None,
                               position_ids=positions[:, begin:end], past_key_values=cache).logits)
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1, padding:], expected[1, padding:])


@pytest.mark.parametrize("kind", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("decode", ["dense", "moba"])
def test_generate(decode, kind, monkeypatch):
    """A batch padded on the left generates, row by row, what the oracle does by recomputing the prefix, in fp32."""
    register_moba(CONFIG, decode=decode)
    filled = []
    fill = huggingface_cache.fill_chunk_means
    monkeypatch.setattr(huggingface_cache, "fill_chunk_means", lambda *x, **y: (filled.append(1), fill(*x, **y)))
    ids, lengths, steps = hf.tokens(2, 23), (23, 14), 10
    mask = torch.arange(23)[None] >= 23 - torch.tensor(lengths)[:, None]
    model = hf.model(dtype=torch.float32).eval()
    got = model.generate(ids.masked_fill(~mask, 0), attention_mask=mask.long(), max_new_tokens=steps, do_sample=False,
                         cache_implementation=kind)[:, 23:]
    assert len(filled) == (2 if decode == "moba" else 0)  # once a layer, not once a step
    reference = hf.model(attention="moba_oracle", dtype=torch.float32).eval()
    for row, length in enumerate(lengths):
        prompt = ids[row, 23 - length:]
        expected = hf.greedy(reference, prompt, steps, length if decode == "dense" else None)
        assert got[row].tolist() == expected.tolist()


@pytest.mark.parametrize("keyword", [None, "past_key_value", "past_key_values", "cache", "layer_past"])
def test_the_cache_is_known_by_its_type(keyword, monkeypatch):
    """Transformers has renamed the argument that brings the cache (5.24: cache); the means are filled once."""
    class Layer(torch.nn.Module):
        layer_idx, config = 0, hf.model().config

        def forward(self, x, *args, **kwargs):
            cache, = args or kwargs.values()
            return AttentionInterface()["moba"](self, x, *cache.update(x[:, :2], x[:, :2], 0), None)[0]

    register_moba(CONFIG, decode="moba")
    filled, fill = [], huggingface_cache.fill_chunk_means
    monkeypatch.setattr(huggingface_cache, "fill_chunk_means", lambda *x, **y: (filled.append(1), fill(*x, **y)))
    layer, cache = Layer(), DynamicCache()
    for tokens in (23, 1, 1, 1, 1):
        x = torch.randn(1, 4, tokens, 8)
        layer(x, cache) if keyword is None else layer(x, **{keyword: cache})
    assert len(filled) == 1


def number_by_mask(model):
    """Has ``generate()`` number a prompt's pieces as it numbers what follows them, without the padding on the left."""
    prepare = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda ids, position_ids=None, **kwargs: prepare(ids, **kwargs)


@pytest.mark.parametrize("kind", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("decode", ["dense", "moba"])
def test_a_prompt_may_come_in_pieces(decode, kind):
    """The tokens do not depend on whether the last token of the prompt comes alone, padded on the left or not."""
    register_moba(CONFIG, decode=decode)
    model, dense, ids = hf.model().eval(), hf.model(attention="sdpa").eval(), hf.tokens(2, 40)
    for padding in (0, 5):
        mask = (torch.arange(40) >= torch.tensor([[0], [padding]])).long()

        def generate(model, **more):
            return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **more)

        def same_in_pieces(model):
            whole = generate(model, cache_implementation=kind)
            return all(torch.equal(generate(model, cache_implementation=kind, prefill_chunk_size=size), whole)
                       for size in (7, 13))

        if not same_in_pieces(dense):  # 4.57 numbers pieces by slot and what follows by mask, whatever attends
            number_by_mask(dense), number_by_mask(model)
            assert same_in_pieces(dense)
        assert same_in_pieces(model)
    if kind is None:
        cache = cache_for("dynamic", model, 2)
        step_logits(model, ids[:, :39], cache, attention_mask=mask[:, :39],
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :39])
        assert torch.equal(generate(model, past_key_values=cache), generate(model))


def test_decoded_tokens_depend_on_how_they_attend():
    """Sparse decoding is not dense decoding on these models, so that the test above means something."""
    results = []
    for decode in ("dense", "moba"):
        register_moba(CONFIG, decode=decode)
        model = hf.model().eval()
        with torch.no_grad():
            cache = model(hf.tokens(1, 30), use_cache=True).past_key_values
            results.append(model(hf.tokens(1, 1), past_key_values=cache).logits)
    assert (results[0] - results[1]).abs().max() > 1e-3


def step_logits(model, ids, cache, **more):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **more).logits[:, -1]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_changed(kind):
    """Means are made anew for a cache that was cropped or reset, and two caches in turns do not mix."""
    register_moba(CONFIG, decode="moba")
    model, ids, other = hf.model().eval(), hf.tokens(1, 36), hf.tokens(1, 36, seed=9)
    caches = [cache_for(kind, model, 1) for _ in range(2)]
    for cache, x in zip(caches, (ids, other)):
        step_logits(model, x[:, :22], cache)
    for i in range(22, 30):
        for cache, x in zip(caches, (ids, other)):
            got = step_logits(model, x[:, i:i + 1], cache)
            with torch.no_grad():
                torch.testing.assert_close(got, model(x[:, :i + 1], use_cache=False).logits[:, -1])
    cache = caches[0]
    mixed = torch.cat((ids[:, :19], other[:, :9]), 1)
    if kind == "dynamic":
        cache.crop(19 - 30)
        begin = 19
    else:
        cache.reset()
        begin = 20
        step_logits(model, mixed[:, :20], cache)
    for i in range(begin, 28):
        got = step_logits(model, mixed[:, i:i + 1], cache)
        with torch.no_grad():
            torch.testing.assert_close(got, model(mixed[:, :i + 1], use_cache=False).logits[:, -1])


def recomputed(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, -1]


def test_threads_that_share_a_model():
    """Another thread's step, with a cache of its own, runs in the middle of this one's."""
    register_moba(CONFIG, decode="moba")
    model, mine, other = hf.model(layers=1).eval(), hf.tokens(1, 30), hf.tokens(1, 30, seed=9)
    caches = [cache_for("dynamic", model, 1) for _ in range(2)]
    for cache, ids in zip(caches, (mine, other)):
        step_logits(model, ids[:, :27], cache)
        step_logits(model, ids[:, 27:28], cache)
    found, main = {}, threading.current_thread()

    def step_of_the_other(*_):
        if threading.current_thread() is main:
            thread = threading.Thread(target=lambda: found.update(other=step_logits(model, other[:, 28:29], caches[1])))
            thread.start()
            thread.join()

    with model.model.layers[0].self_attn.register_forward_pre_hook(step_of_the_other):
        got = step_logits(model, mine[:, 28:29], caches[0])
    torch.testing.assert_close(got, recomputed(model, mine[:, :29]))
    torch.testing.assert_close(found["other"], recomputed(model, other[:, :29]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("between", ["another chunk size", "another attention", "a copy", "inference mode", "saving"])
def test_a_cache_between_two_steps(kind, between):
    """What may happen to a cache or to the settings between steps leaves the next steps what recomputing gives."""
    register_moba(CONFIG, decode="moba")
    model, ids, other = hf.model().eval(), hf.tokens(1, 36), hf.tokens(1, 36, seed=9)
    cache = cache_for(kind, model, 1)
    with torch.inference_mode(between == "inference mode" and kind == "dynamic"):
        step_logits(model, ids[:, :21], cache)
        for i in (21, 22):
            step_logits(model, ids[:, i:i + 1], cache)
    if between == "another chunk size":
        register_moba(MoBAConfig(chunk_size=5, topk=2), decode="moba")
    elif between == "another attention":
        model.set_attn_implementation("sdpa")
        for i in range(23, 29):
            step_logits(model, ids[:, i:i + 1], cache)
        model.set_attn_implementation("moba")
    elif between == "a copy":  # shallow: what both hold they must not write into
        copied = copy.copy(cache)
        copied.layers = [copy.copy(layer) for layer in cache.layers]
        if kind == "dynamic":
            for i in range(23, 32):
                step_logits(model, other[:, i:i + 1], copied)
    elif between == "saving":
        for saved in (model, cache):
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
        assert type(pickle.loads(pickle.dumps(cache))) is type(copy.deepcopy(cache)) is type(loaded)
        cache = loaded
    with torch.no_grad():  # what the cache holds is of the old settings or another attention: wanted too
        for i in range(29 if between == "another attention" else 23, 34):
            before = copy.deepcopy(cache)
            for layer in before.layers:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # without means
            torch.testing.assert_close(step_logits(model, ids[:, i:i + 1], cache),
                                       step_logits(model, ids[:, i:i + 1], before))


def test_means_are_kept_in_inference_mode(monkeypatch):
    register_moba(CONFIG, decode="moba")
    filled, fill = [], huggingface_cache.fill_chunk_means
    monkeypatch.setattr(huggingface_cache, "fill_chunk_means", lambda *x, **y: (filled.append(1), fill(*x, **y)))
    model, ids = hf.model().eval(), hf.tokens(1, 30)
    with torch.inference_mode():
        got = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert len(filled) == 2
    assert torch.equal(got, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_compiled_steps_over_a_static_cache(monkeypatch):
    """One graph without a break; the means that the prompt left are found, kept and right for an eager step after."""
    register_moba(CONFIG, decode="moba")
    model, ids = hf.model(layers=1).eval(), hf.tokens(1, 36)
    cache = cache_for("static", model, 1)
    step_logits(model, ids[:, :22], cache)
    monkeypatch.setattr(huggingface_cache, "fill_chunk_means", None)  # no step makes means
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i in range(22, 34):
        places = {} if is_5 else {"cache_position": torch.tensor([i])}  # which 4.57 computes by a graph break
        torch.testing.assert_close(step_logits(compiled, ids[:, i:i + 1], cache, **places),
                                   recomputed(model, ids[:, :i + 1]))
    monkeypatch.undo()
    torch.testing.assert_close(step_logits(model, ids[:, 34:35], cache), recomputed(model, ids[:, :35]))


def test_beams():
    """Beams that change places in the cache find what recomputing the prefix finds."""
    register_moba(CONFIG, decode="moba")
    model, ids = hf.model().eval(), hf.tokens(1, 22)
    cached, recomputed = (model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=use)
                          for use in (True, False))
    assert torch.equal(cached, recomputed)


@pytest.mark.parametrize("changes, message", [
    (dict(attention_dropout=0.1), "attention_dropout is not supported by MoBA attention, got 0.1: set config"),
    (dict(family="mistral", sliding_window=16), "sliding_window .* is not supported by MoBA attention, got 16"),
], ids=str)
def test_refused_models(changes, message):
    with pytest.raises(ValueError, match=message):
        hf.model(**changes).train()(hf.tokens(1, 9))


@pytest.mark.skipif(not is_5, reason="Qwen2-MoE of Transformers 4 looks attentions up in a table of its own")
@pytest.mark.parametrize("sliding_window", [4096, None])
def test_windows_are_refused_in_the_layers_that_get_one(sliding_window):
    """Qwen2-MoE makes the mask of a window that none of its layers has (use_sliding_window=False, its default)."""
    def moe(attention, **changes):
        torch.manual_seed(0)
        config = transformers.Qwen2MoeConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, initializer_range=.3, sliding_window=sliding_window, **changes)
        config._attn_implementation = attention
        return transformers.Qwen2MoeForCausalLM(config).eval()

    register_moba(MoBAConfig(64, 8))
    ids = hf.tokens(1, 40)
    torch.testing.assert_close(logits(moe("moba"), ids), logits(moe("sdpa"), ids), rtol=0, atol=1e-4)
    if sliding_window:
        with pytest.raises(ValueError, match="sliding_window .*is not supported by MoBA attention, got 4096"):
            logits(moe("moba", use_sliding_window=True, max_window_layers=2), ids)


def test_a_window_that_only_the_mask_knows():
    layout = huggingface.moba_mask(2, 9, 9, local_size=5)
    with pytest.raises(ValueError, match=r"sliding_window \(or attention_chunk_size\) is not .*, got 5 in Llama"):
        huggingface.refuse(hf.model().model.layers[0].self_attn, layout, 0.0, {})


def test_models_with_an_indexer_are_refused_by_name():
    """DeepSeek-V3.2 reads its mask before any attention is called."""
    model = hf.model()
    model.config.index_topk = 7
    with pytest.raises(ValueError, match="index_topk .*DeepSeek-V3.2.* is not supported by MoBA attention, got 7"):
        model(hf.tokens(1, 9))


def own_attention(family, attention):
    """A tiny model of a family whose layers look no attention up, in any version that the tests run with."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=61, n_layer=1, n_layers=1, n_head=4, n_heads=4, num_layers=1, num_hidden_layers=1, d_model=32,
        ffn_dim=48, hidden_size=32, attention_heads=4, num_attention_heads=4, attn_implementation=attention)
    return getattr(transformers, OWN_ATTENTION[family])(config)


OWN_ATTENTION = {"Bloom": "BloomForCausalLM", "XGLM": "XGLMForCausalLM", "Mpt": "MptForCausalLM"}
if not is_5:
    OWN_ATTENTION |= {"DiffLlama": "DiffLlamaForCausalLM", "Mimi": "MimiModel", "Dbrx": "DbrxForCausalLM"}


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_models_that_look_no_attention_up_are_refused(family):
    """Their own layers would attend to what comes after, for MoBA's layout of whole rows is no mask. MPT has a config
    within its config, and no model to go with it."""
    with pytest.raises(ValueError, match=f"attn_implementation='moba' is not supported by {OWN_ATTENTION[family]}"):
        own_attention(family, "moba")


@pytest.mark.parametrize("family", ["Bloom", "XGLM", "Mpt"])
@pytest.mark.parametrize("asked", ["moba", {"": "moba"}], ids=str)
def test_models_that_cannot_be_switched_are_refused(family, asked):
    """Transformers warns, and leaves them as they are."""
    model = own_attention(family, "eager")
    message = f"'moba' is not supported by {OWN_ATTENTION[family]}: it does not switch, and still attends by 'eager'"
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(asked)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")  # a warning, as before


def test_models_within_models_are_switched_by_name():
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=61)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=8,
                  patch_size=4)

    def llava(language):
        return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision), text_config=language))

    model = llava(transformers.LlamaConfig(**text))
    model.set_attn_implementation({"text_config": "moba"})
    assert model.config.text_config._attn_implementation == "moba" != model.config.vision_config._attn_implementation
    model = llava(transformers.XGLMConfig(
        vocab_size=61, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4))
    for asked in ("moba", {"text_config": "moba"}):
        with pytest.raises(ValueError, match="by LlavaForConditionalGeneration: text_config does not switch"):
            model.set_attn_implementation(asked)


def test_refused_layers():
    model = hf.model()
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal must be True for MoBA attention, got False in LlamaAttention"):
        model(hf.tokens(1, 9))


@pytest.mark.parametrize("heads, kv_heads, refused", [(4, 2, False), (2, 1, False), (1, 1, True)])
def test_ranks_that_share_the_heads_of_a_group_are_refused(heads, kv_heads, refused):
    """A layer of 4:2 heads is called with those of one rank, as DeepSpeed's ALST calls it."""
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK, selection="group"))
    layer = hf.model().model.layers[0].self_attn
    q, k, v = (torch.randn(1, number, 20, 8) for number in (heads, kv_heads, kv_heads))
    attend = AttentionInterface()["moba"]
    if refused:
        with pytest.raises(ValueError, match="selection must be 'head' where a rank has 1 of 4 query heads for 1 of"):
            attend(layer, q, k, v, None, scaling=1.0)
        register_moba(CONFIG)
    assert attend(layer, q, k, v, None, scaling=1.0)[0].shape == (1, 20, heads, 8)


@pytest.mark.parametrize("given, message", [
    (dict(attention_mask=torch.tensor([[1, 1, 0, 1, 1]])), "attention_mask must be 1 in one run .* in row 0"),
    (dict(attention_mask=torch.tensor([[1, 1, 0, 0, 1]])), "PEFT's prefix and prompt tuning .* pad on the right"),
    (dict(attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool)), "attention_mask must be a 2-dimensional padding"),
    (dict(output_attentions=True), "output_attentions is not supported"),
    (dict(softcap=3.0), "softcap is not supported by MoBA attention, got 3.0"),
    (dict(s_aux=torch.zeros(4)), "sinks.* is not supported"),
    (dict(cu_seq_lens_q=torch.tensor([0, 5]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])), "cu_seq_lens_q must"),
    (dict(cu_seq_lens_k=torch.tensor([0, 5])), "cu_seq_lens_q must have shape .* cu_seq_lens_k, .* shapes None"),
    (dict(max_length_q=5), "cu_seq_lens_q must have shape .* max_length_q or max_length_k is given, .* shapes None"),
    (dict(max_length_k=5), "cu_seq_lens_q must have shape .* max_length_q or max_length_k is given, .* shapes None"),
    (dict(cu_seq_lens_q=torch.tensor([[0, 5]])), r"must have shape \[sequences \+ 1\] .* shapes \(1, 2\)"),
    (dict(cu_seq_lens_q=torch.tensor([0, 2, 5]), cu_seq_lens_k=torch.tensor([0, 5])), "cu_seq_lens_k must equal it"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_refused_calls(given, message):
    with pytest.raises(ValueError, match=message):
        hf.model()(hf.tokens(1, 5), **given)


@pytest.mark.parametrize("decode", ["dense", "moba"])
def test_bounds_over_a_cache_are_refused(decode):
    """A single new token's too, which attends by other ways."""
    register_moba(CONFIG, decode=decode)
    model, ids = hf.model().eval(), hf.tokens(1, 9)
    with torch.no_grad():
        for tokens in (1, 2):
            cache = model(ids).past_key_values
            with pytest.raises(ValueError, match=f"cu_seq_lens_q must come without a cache, got {9 + tokens} keys"):
                model(ids[:, :tokens], past_key_values=cache, cu_seq_lens_q=torch.tensor([0, tokens]))


def test_bounds_that_change_between_calls_are_read_again():
    """In place, as a data loader's buffers do, each by itself."""
    model, ids = hf.model().eval(), hf.tokens(1, 30)
    q, k = torch.tensor([0, 13, 30]), torch.tensor([0, 13, 30])

    def logits(q, k):
        with torch.no_grad():
            return model(ids, use_cache=False, cu_seq_lens_q=q, cu_seq_lens_k=k).logits

    first = logits(q, k)
    k[1] = 20
    with pytest.raises(ValueError, match=r"cu_seq_lens_k must equal it, got \[\[0, 13, 30\], \[0, 20, 30\]\]"):
        logits(q, k)
    q[1] = 20
    assert not torch.equal(logits(q, k), first)
    assert torch.equal(logits(q, k), logits(q.clone(), None))


@pytest.mark.parametrize("call, error, message", [
    (lambda: register_moba(512), TypeError, "config must be a MoBAConfig, got int"),
    (lambda: register_moba(decode="sparse"), ValueError, "decode must be one of dense, moba; got 'sparse'"),
    (lambda: register_moba(MoBAConfig(full_attention_from_step=3)), ValueError, "full_attention_from_step must be"),
    (lambda: register_moba(MoBAConfig(decode="dense"), decode="moba"), ValueError, "decode must be MoBAConfig.decode"),
], ids=["config", "decode", "step", "two decodes"])
def test_refused_registrations(call, error, message):
    with pytest.raises(error, match=message):
        call()


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


class TestRegistration:
    def test_names_have_settings_of_their_own(self):
        """Two models, two configurations, in turns and in threads; a name of one's own leaves the common ones alone."""
        ids, expected = hf.tokens(1, 30), {}
        for topk in (1, 3):
            register_moba(MoBAConfig(hf.CHUNK, topk))
            expected[topk] = logits(hf.model(), ids)
            register_moba(MoBAConfig(hf.CHUNK, topk), name=f"moba_{topk}")
        register_moba(CONFIG)
        models = {topk: hf.model(attention=f"moba_{topk}") for topk in expected}
        assert not torch.allclose(expected[1], expected[3])
        for topk in (1, 3, 1):
            assert torch.equal(logits(models[topk], ids), expected[topk])
        found = {}
        threads = [threading.Thread(target=lambda topk=topk: found.update({topk: logits(models[topk], ids)}))
                   for topk in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[topk], expected[topk]) for topk in expected)

    def test_registering_again_says_what_it_does(self, recwarn):
        model, ids = hf.model(), hf.tokens(1, 30)
        register_moba(CONFIG)
        assert not [w for w in recwarn if "register_moba" in str(w.message)]
        with pytest.warns(UserWarning, match="all models with attn_implementation='moba' now attend by MoBA: chunk_size"
                                             r".*topk=1.* register_moba\(..., name="):
            register_moba(MoBAConfig(hf.CHUNK, 1))
        got = logits(model, ids)
        register_moba(MoBAConfig(hf.CHUNK, 1), name="moba_again")
        assert torch.equal(got, logits(hf.model(attention="moba_again"), ids))

    def test_who_holds_the_registered_function_has_the_latest_settings(self):
        """DeepSpeed's Ulysses keeps the function that it finds, and puts its own in front of later ones."""
        held, model, ids = AttentionInterface()["moba"], hf.model(), hf.tokens(1, 30)
        register_moba(MoBAConfig(hf.CHUNK, 1))
        expected = logits(model, ids)
        register_moba(CONFIG)
        assert not torch.equal(logits(model, ids), expected)
        AttentionInterface.register("moba_held", held)
        AttentionMaskInterface.register("moba_held", huggingface.moba_mask)
        register_moba(MoBAConfig(hf.CHUNK, 1))
        assert torch.equal(logits(hf.model(attention="moba_held"), ids), expected)

    def test_a_process_that_did_not_register_is_told(self, monkeypatch):
        monkeypatch.setattr(huggingface, "_settings", {})
        with pytest.raises(RuntimeError, match=r"'moba' has no settings in this process: call .*register_moba"):
            hf.model()(hf.tokens(1, 9))

    @pytest.mark.parametrize("name, error", [
        (3, TypeError), ("", ValueError), ("sdpa", ValueError), ("flash_moba", ValueError),
        ("kernels/moba", ValueError), ("moba_oracle", ValueError)], ids=repr)
    def test_refused_names(self, name, error):
        with pytest.raises(error, match="name must be"):
            register_moba(CONFIG, name=name)


@pytest.mark.parametrize("keyword", ["indices", "block_indices", "sinks", "head_mask", "cache_of_pages"])
def test_unknown_arguments_of_attention_are_refused(keyword):
    """Models with a selection of their own hand it to the attention; what MoBA does not know it must not drop."""
    model, ids = hf.model(), hf.tokens(1, 9)
    with pytest.raises(ValueError, match=f"{keyword} is not supported by MoBA attention, got a Tensor: LlamaAttention"):
        model(ids, **{keyword: torch.zeros(1)})
    with torch.no_grad():
        assert torch.equal(model(ids, **{keyword: None}).logits, model(ids, output_hidden_states=True).logits)


@pytest.mark.parametrize("given", [
    dict(shift_labels=hf.tokens(2, 30)), dict(shift_labels=hf.tokens(2, 30), num_items_in_batch=torch.tensor(60)),
    dict(ignore_index=7), dict(return_token_accuracy=True, use_token_scaling=True, num_items_in_batch=50),
    dict(token_type_ids=torch.ones(2, 30, dtype=torch.long)), dict(output_router_logits=True, skip_logits=True),
], ids=lambda given: ",".join(given))
def test_arguments_of_the_loss_and_of_outputs_pass(given):
    """Trainers and tokenizers send them through all layers; with every chunk chosen the loss is the dense one."""
    register_moba(MoBAConfig(hf.CHUNK, 30), name="moba_everything")
    ids = hf.tokens(2, 30, seed=4)
    got, dense, plain = (hf.model(attention=attention)(ids, labels=ids, **more).loss for attention, more in (
        ("moba_everything", given), ("sdpa", given), ("sdpa", {})))
    torch.testing.assert_close(got, dense)
    assert torch.equal(dense, plain) == given.keys().isdisjoint({"shift_labels", "ignore_index", "num_items_in_batch"})


def test_every_argument_that_transformers_names_was_judged():
    """A name that is new there passes, unless REFUSED has it: whether it changes attention must be decided by hand."""
    assert set(transformers.utils.TransformersKwargs.__annotations__) <= {
        "num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "cu_seq_lens_q",
        "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "is_causal", "seq_idx"}
    assert not huggingface.UNDERSTOOD & huggingface.REFUSED.keys()
