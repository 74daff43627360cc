"""What a generation chose, prompt and new tokens, is what training attends to: Transformers' models, in fp64."""
import huggingface_models as hf
import numpy
import pytest
import torch

pytest.importorskip("transformers")

from moba_megatron import MoBAConfig, RecordedSelection, record_selection, register_moba, replay_selection, torch_stages
from moba_megatron.replay import LayerSelection

NEW = 24


def train(made, ids, mask):
    """Logits and gradients of a forward over whole sequences."""
    made.zero_grad()
    logits = made(ids, attention_mask=mask, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in made.parameters())]


def close(a, b):
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-11) for x, y in zip(a, b))


@pytest.mark.parametrize("selection", ["head", "group"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding, prompt", [((), 5), ((9, 0), 30)], ids=["short prompt", "left padding"])
def test_a_rollout_is_replayed_in_training(padding, prompt, cache, selection, tmp_path, monkeypatch):
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK, selection=selection), decode="moba")
    made, batch = hf.model().eval(), max(1, len(padding))
    prompts = hf.tokens(batch, prompt)
    mask = torch.ones_like(prompts)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    options = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=True,
                   **({"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}))
    plain = made.generate(prompts, **options)
    with record_selection() as choices:
        ids = made.generate(prompts, **options)
    assert torch.equal(ids, plain)
    assert [len(calls) for calls in choices.layers.values()] == [NEW, NEW]  # the last token is not fed
    rollout = choices.joined(batch)
    rollout.save(tmp_path / "rollout.npz")
    ids, mask = ids[:, :-1], torch.nn.functional.pad(mask, (0, NEW - 1), value=1)
    expected = train(made, ids, mask)
    with record_selection() as whole:
        train(made, ids, mask)
    valid = mask.bool().flatten()
    for layer, (call,) in whole.layers.items():
        (joined,) = rollout.layers[layer]
        assert torch.equal(joined.numbers[valid].sort(2)[0], call.numbers[valid].sort(2)[0])
    monkeypatch.setattr(torch_stages, "gate", None)
    for checkpointing in (None, True, False):
        if checkpointing is not None:
            made.train().gradient_checkpointing_enable({"use_reentrant": checkpointing})
        with replay_selection(RecordedSelection.load(tmp_path / "rollout.npz")):
            assert close(train(made, ids, mask), expected)


def test_another_models_choices_are_attended_to():
    """A replay is of the record, not of what the model would choose."""
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK))
    ids, made = hf.tokens(1, 50), hf.model()
    with record_selection() as choices:
        first = train(made, ids, None)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.neg_()
            layer.self_attn.k_proj.weight.neg_()
    with replay_selection(choices):
        assert close(train(made, ids, None)[:1], first[:1])  # scores are as they were
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.neg_()
    with replay_selection(choices), record_selection() as again:
        replayed = train(made, ids, None)
    with record_selection() as own:
        assert not close(train(made, ids, None), replayed)
    assert torch.equal(again.layers[2][0].numbers, choices.layers[2][0].numbers)
    assert not torch.equal(again.layers[2][0].numbers, own.layers[2][0].numbers)


def test_what_is_refused():
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK), decode="dense")
    made, ids = hf.model().eval(), hf.tokens(1, 30)
    with pytest.raises(ValueError, match="decode must be moba for record_selection, got dense"), record_selection():
        made.generate(ids, max_new_tokens=4, do_sample=False)
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK), decode="moba")
    with record_selection() as choices:
        made.generate(ids, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="not for single new tokens over a cache"), replay_selection(choices):
        made.generate(ids, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="was recorded for 33 tokens and 4 heads, got 34"), \
            replay_selection(choices.joined()):
        made(hf.tokens(1, 34))
    del choices.layers[2]
    with replay_selection(choices.joined()), pytest.raises(ValueError, match="call 1 of layer 2 was not recorded"):
        made(hf.tokens(1, 33))  # and nothing else is raised at the end


@pytest.mark.parametrize("kind", ["empty", "cut off", "damaged", "an array"])
def test_other_files_are_refused(kind, tmp_path):
    path = tmp_path / "choices"
    RecordedSelection({1: [LayerSelection(torch.zeros(4, 2, 1, dtype=torch.int16), 8, 2, False, False)]}).save(path)
    saved = bytearray(path.read_bytes())
    saved[150] ^= 255
    if kind == "an array":
        with path.open("wb") as file:
            numpy.save(file, numpy.zeros(3))
    else:
        path.write_bytes({"empty": b"", "cut off": saved[:200], "damaged": saved}[kind])
    with pytest.raises(ValueError, match="path must be what RecordedSelection.save wrote"):
        RecordedSelection.load(path)


def test_a_damaged_file_is_refused_or_whole(tmp_path):
    """Whatever byte is another; and a file that has not all calls of a layer, or has other arrays."""
    path, random = tmp_path / "choices.npz", numpy.random.default_rng(0)
    calls = [LayerSelection(torch.full((5, 2, 1), i, dtype=torch.int16), 8, 2, False, False) for i in range(3)]
    RecordedSelection({1: calls, 2: calls}).save(path)
    assert [x.name for x in tmp_path.iterdir()] == ["choices.npz"]
    saved = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(saved)
        damaged[random.integers(len(saved))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            layers = RecordedSelection.load(path).layers
        except ValueError:
            continue
        assert list(layers) in ([1, 2], []) and all(len(found) == 3 and all(
            torch.equal(a.numbers, b.numbers) for a, b in zip(found, calls)) for found in layers.values())
    for name, array in (("1.5.8.2.0.0.1", numpy.zeros((5, 2, 1), numpy.int16)),
                        ("1.0.8.2.0.0.1", numpy.zeros((5, 2, 1))),
                        ("1.0.8.2.0.0.1", numpy.zeros((5, 2), numpy.int16)),
                        ("1.0.8.2.0.0.2", numpy.zeros((5, 2, 1), numpy.int16))):
        numpy.savez(path, **{name: array})
        with pytest.raises(ValueError, match="path must be what RecordedSelection.save wrote"):
            RecordedSelection.load(path)
    with pytest.raises(ValueError, match="batch must be the number of sequences in each call, of .5. rows, got 3"):
        RecordedSelection({1: calls}).joined(3)


def test_what_is_not_replayed_at_all():
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK))
    made, ids = hf.model().eval(), hf.tokens(1, 30)
    with record_selection() as choices:
        made(ids)
    refused = pytest.raises(ValueError, match="layer 1 was recorded in 1 calls, and replayed in 0")
    with refused, replay_selection(choices):
        pass
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK, full_attention_layers="1"))
    with refused, replay_selection(choices):
        made(ids)
