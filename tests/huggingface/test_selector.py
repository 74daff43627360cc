"""A selector of one's own in Transformers: of training, prompts, packed rows, padding and generations."""
import huggingface_models as hf
import pytest
import torch

pytest.importorskip("transformers")

from moba_megatron import MoBAConfig, record_selection, register_moba, replay_selection
from moba_megatron.ops import select_for_segments

CONFIG = MoBAConfig(hf.CHUNK, hf.TOPK)


def gate(module, q, k, segments):
    """MoBA's own."""
    return select_for_segments(q, k, segments, hf.TOPK)


def train(made, ids, mask=None):
    made.zero_grad()
    logits = made(ids, attention_mask=mask, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in made.parameters())]


@pytest.mark.parametrize("padding", [(), (9, 0)], ids=["whole", "left padding"])
def test_the_gate_as_a_selector_is_the_gate(padding):
    """Forward and backward, bit for bit; and the tokens of a generation, which choose by all keys at each step."""
    results = []
    batch = max(1, len(padding))
    ids, mask = hf.tokens(batch, 40), torch.ones(batch, 40, dtype=torch.int64)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    for selector in (None, gate):
        register_moba(CONFIG, decode="moba", selector=selector)
        made = hf.model()
        trained = train(made, ids, mask)
        results.append((*trained, made.eval().generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)))
    assert all(map(torch.equal, *results))


def test_it_sees_the_layer_and_its_choice_counts():
    seen = []

    def nothing(module, q, k, segments):
        seen.append((module.layer_idx, q.shape, k.shape, segments.chunk_size))
        return torch.full((q.shape[0], k.shape[1], 2), -1, dtype=torch.int32)

    register_moba(CONFIG, selector=nothing)
    ids = hf.tokens(1, 30)
    own = train(hf.model(), ids)
    assert seen == [(layer, (30, 4, 8), (30, 2, 8), hf.CHUNK) for layer in (0, 1)]
    register_moba(MoBAConfig(hf.CHUNK, 1))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(own, train(hf.model(), ids)))


def test_names_have_selectors_of_their_own():
    register_moba(CONFIG)
    register_moba(CONFIG, name="moba_own", selector=lambda module, q, k, segments: torch.full(
        (q.shape[0], 2, 1), -1, dtype=torch.int32))
    ids = hf.tokens(1, 30)
    assert not torch.equal(hf.model()(ids).logits, hf.model(attention="moba_own")(ids).logits)
    with pytest.warns(UserWarning, match="all models with attn_implementation='moba_own' now attend by"):
        register_moba(CONFIG, name="moba_own")
    assert torch.equal(hf.model()(ids).logits, hf.model(attention="moba_own")(ids).logits)


def test_what_is_refused():
    with pytest.raises(TypeError, match="selector must be a function or None, got str"):
        register_moba(CONFIG, selector="indexer")
    register_moba(CONFIG, name="moba_own", selector=lambda module, q, k, segments: None)  # a forgotten return
    with pytest.raises(TypeError, match="what the selector returns must be a torch.Tensor, got NoneType"):
        hf.model(attention="moba_own")(hf.tokens(1, 30))


def test_record_and_replay():
    """Generated tokens too: they pass where prompts do, so that a replay may be of the generation itself."""
    register_moba(CONFIG, decode="moba", selector=gate)
    made, ids = hf.model().eval(), hf.tokens(2, 21)
    with record_selection() as choices:
        made.generate(ids, max_new_tokens=8, do_sample=False)

    def never(*_):
        raise AssertionError("chosen in a replay")

    register_moba(CONFIG, decode="moba", selector=never)
    with replay_selection(choices):
        tokens = made.generate(ids, max_new_tokens=8, do_sample=False)
    with replay_selection(choices.joined(2)):
        logits = made(tokens[:, :-1]).logits
    register_moba(CONFIG, decode="moba")
    assert torch.allclose(logits, made(tokens[:, :-1]).logits, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [dict(selector=gate), {}], ids=["selector", "per layer"])
def test_compiled(options):
    """In one graph, selectors and layers of their own too; and eager, though compiled, while choices are recorded."""
    config = CONFIG if options else MoBAConfig(64, 2, per_layer=f"1-2:chunk={hf.CHUNK},topk={hf.TOPK}")
    register_moba(config, **options)
    made, ids = hf.model(), hf.tokens(1, 50)
    with torch.no_grad():
        expected = made(ids, use_cache=False).logits
        graph = torch.compile(made, fullgraph=True, backend="eager")
        assert torch.allclose(graph(ids, use_cache=False).logits, expected, rtol=1e-9, atol=1e-11)
        with record_selection() as choices:
            torch.compile(made, backend="eager")(ids, use_cache=False)
    assert [len(calls) for calls in choices.layers.values()] == [1, 1]


def test_layers_of_their_own():
    """The first layer's settings are its own; a layer beyond the model is an error."""
    ids = hf.tokens(1, 50)
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK, per_layer="2:chunk=16,topk=4"))
    dense_later = hf.model()(ids).logits
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK, full_attention_layers="2"))
    assert torch.allclose(hf.model()(ids).logits, dense_later, rtol=1e-9, atol=1e-11)  # 4 chunks of 16 are everything
    register_moba(MoBAConfig(per_layer="3:topk=2"))
    with pytest.raises(ValueError, match="per_layer names layer 3, but the model has 2"):
        hf.model()(ids)
