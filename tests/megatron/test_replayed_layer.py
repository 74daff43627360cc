"""Recorded choices of one layer: what fits is replayed, by any checkpoint and packing, and what does not is refused."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch.utils.checkpoint import checkpoint

pytest.importorskip("megatron.core")

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_megatron import (
    MoBAConfig,
    MoBACoreAttention,
    RecordedSelection,
    record_selection,
    replay,
    replay_selection,
    torch_stages,
)
from moba_megatron.replay import LayerSelection
from moba_megatron.segments import Segments

MOBA = MoBAConfig(chunk_size=8, topk=3)


def layer(number=1, moba=MOBA, heads=4, kv_heads=2, **settings):
    config = TransformerConfig(num_layers=4, hidden_size=8 * heads, num_attention_heads=heads,
                               num_query_groups=kv_heads, attention_dropout=0.0, **settings)
    return MoBACoreAttention(config, number, AttnMaskType.causal, "self", moba_config=moba)


def inputs(tokens=70, seed=1, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 1, n, 8, generator=generator, dtype=torch.float64).requires_grad_()
            for n in (heads, kv_heads, kv_heads)]


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def not_reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def nested(function, *args):
    return reentrant(lambda *inner: not_reentrant(function, *inner), *args)


WAYS = {f.__name__: f for f in (reentrant, not_reentrant, nested)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("together", [False, True], ids=["backward each", "one backward"])
def test_recomputed_calls_are_the_same_calls(way, together, monkeypatch):
    """Whatever the order in which a backward pass recomputes them: a call that got another's choice would differ.

    Megatron's own checkpoints, which are reentrant, are in test_replay.py."""
    core, batches = layer(), [inputs(seed=seed) for seed in range(3)]

    def run(way):
        outputs = []
        for q, k, v in batches:
            outputs.append(way(lambda *x: core(*x, None), q, k, v))
            if not together:
                outputs[-1].square().sum().backward()
        if together:
            sum(o.square().sum() for o in outputs).backward()
        grads = [x.grad for batch in batches for x in batch]
        for batch in batches:
            for x in batch:
                x.grad = None
        return outputs + grads

    def unchecked(function, *args):
        return function(*args)

    expected = run(unchecked)
    with record_selection() as choices:
        run(WAYS[way])
    assert [len(calls) for calls in choices.layers.values()] == [3]
    others = [torch.equal(a.numbers, b.numbers) for a, b in zip(choices.layers[1], choices.layers[1][1:])]
    assert not any(others)
    monkeypatch.setattr(torch_stages, "gate", None)
    with replay_selection(choices):
        assert all(map(torch.equal, run(WAYS[way]), expected))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("within", ["function", "checkpoints"])
def test_calls_within_one_checkpoint(way, within):
    """A layer that is called twice in a checkpoint, by itself or in two checkpoints of its own: each has its own, in a
    second backward pass too."""
    core, (q, k, v) = layer(), inputs()
    inner = WAYS[way] if within == "checkpoints" else lambda function, *args: function(*args)

    def twice(q, k, v):
        back = inner(lambda *x: core(*x, None), q.flip(0), k, v).flip(0)
        return inner(lambda *x: core(*x, None), q, k, v) + 2 * back

    def grads():
        o, found, times = WAYS[way](twice, q, k, v), [], 2 if way == "not_reentrant" else 1
        for i in range(times):
            o.square().sum().backward(retain_graph=i + 1 < times)
            found += [x.grad for x in (q, k, v)]
            q.grad = k.grad = v.grad = None
        return found

    expected = grads()
    with record_selection() as choices:
        grads()
    assert len(choices.layers[1]) == 2 and not torch.equal(*(call.numbers for call in choices.layers[1]))
    with replay_selection(choices):
        assert all(map(torch.equal, grads(), expected))


def test_replays_end_in_any_order_and_in_one_thread():
    core, (q, k, v) = layer(), inputs()
    with record_selection() as choices:
        chosen = core(q, k, v, None)
    nothing = LayerSelection(torch.full_like(choices.layers[1][0].numbers, -1), 8, 3, False, False)
    first, second = replay_selection(RecordedSelection({1: [nothing]})), replay_selection(choices)
    first.__enter__()
    assert not torch.equal(core(q, k, v, None), chosen)
    second.__enter__()
    with pytest.raises(RuntimeError, match="replay_selection is under way in another thread"):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(replay_selection(choices).__enter__).result()
    first.__exit__(None, None, None)
    assert torch.equal(core(q, k, v, None), chosen)
    second.__exit__(None, None, None)
    assert not replay.is_active()


@pytest.mark.parametrize("rank", [0, 1])
def test_lists_of_groups_go_to_their_rank(rank):
    """What a selector chose for 8 groups of 16 heads, on two tensor parallel ranks: as many groups as heads a rank."""
    numbers = torch.arange(8, dtype=torch.int16)[None, :, None].repeat(40, 1, 2)
    recorded = RecordedSelection({1: [LayerSelection(numbers, 4, 3, False, True)]})
    segments = Segments.from_cu_seqlens(torch.tensor([0, 40], dtype=torch.int32), 40, 4)
    with replay_selection(recorded):
        ids, _ = replay.replayed(1, torch.zeros(40, 8, 8), torch.zeros(40, 4, 8), segments, MoBAConfig(4, 3), (2, rank),
                                 None, False)
    assert ids[0, :, 0].tolist() == list(range(4 * rank, 4 * rank + 4))


def test_backward_outside_of_the_replay():
    core, (q, k, v) = layer(), inputs()
    with record_selection() as choices:
        core(q, k, v, None)
    with replay_selection(choices):
        o = reentrant(lambda *x: core(*x, None), q, k, v)
    with pytest.raises(RuntimeError, match="replay_selection must surround the backward passes"):
        o.sum().backward()


def test_a_forward_that_is_new_in_a_backward_pass():
    core, (q, k, v) = layer(), inputs()
    with record_selection(), pytest.raises(RuntimeError, match="layer 1 runs in a backward pass, but not in it the"):
        q.register_hook(lambda grad: core(*inputs(), None) and None)
        core(q, k, v, None).sum().backward()


def test_numbers_are_of_any_packing():
    """What sequences chose one by one is replayed for the pack of them, and what was given is what is attended to."""
    core, lengths = layer(), (70, 8, 33)
    alone, outputs = RecordedSelection(), []
    for seed, tokens in enumerate(lengths):
        with record_selection() as choices:
            outputs.append(core(*inputs(tokens, seed), None)[:, 0])
        alone.layers.setdefault(1, []).extend(choices.layers[1])
    parts = [inputs(tokens, seed) for seed, tokens in enumerate(lengths)]
    q, k, v = (torch.cat([part[i][:, 0] for part in parts]) for i in range(3))
    cu_seqlens = torch.tensor([0, 70, 78, 111], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, max_seqlen_q=70)
    with replay_selection(alone.joined()), record_selection() as again:
        o = core(q, k, v, None, packed_seq_params=packed)
    torch.testing.assert_close(o, torch.cat(outputs), rtol=1e-12, atol=1e-13)
    assert torch.equal(again.layers[1][0].numbers, alone.joined().layers[1][0].numbers)
    nothing = torch.full_like(again.layers[1][0].numbers, -1)
    nothing = RecordedSelection({1: [LayerSelection(nothing, 8, 3, False, False)]})
    with replay_selection(nothing):
        own = core(q, k, v, None, packed_seq_params=packed)
    assert torch.equal(own, layer(moba=MoBAConfig(8, 1))(q, k, v, None, packed_seq_params=packed))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 5),
       st.sampled_from(("head", "group")), st.integers(0, 99))
@examples(25)
def test_any_shape_is_replayed(lengths, chunk_size, topk, selection, seed):
    core = layer(moba=MoBAConfig(chunk_size, topk, selection=selection))
    q, k, v = (x[:, 0] for x in inputs(sum(lengths), seed))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, max_seqlen_q=max(lengths))
    plain = core(q, k, v, None, packed_seq_params=packed)
    with record_selection() as choices:
        recorded = core(q, k, v, None, packed_seq_params=packed)
    with replay_selection(choices):
        replayed = core(q, k, v, None, packed_seq_params=packed)
    assert torch.equal(recorded, plain) and torch.equal(replayed, plain)


def test_int32_where_chunks_do_not_fit(tmp_path):
    core = layer(moba=MoBAConfig(1, 2), heads=1, kv_heads=1)
    dtypes = []
    for tokens in (2 ** 15 - 1, 2 ** 15):
        with record_selection() as choices, torch.no_grad():
            core(*(x[:, :, :, :8] for x in inputs(tokens, heads=1, kv_heads=1)), None)
        dtypes.append(choices.layers[1][0].numbers.dtype)
        choices.save(tmp_path / "record.npz")
        loaded = RecordedSelection.load(tmp_path / "record.npz").layers[1][0]
        assert loaded.numbers.dtype == dtypes[-1] and torch.equal(loaded.numbers, choices.layers[1][0].numbers)
    assert dtypes == [torch.int16, torch.int32]


def recorded(calls=1):
    core = layer()
    with record_selection() as choices:
        for seed in range(calls):
            core(*inputs(seed=seed), None)
    return choices


@pytest.mark.parametrize("wrong, settings, calls, tokens, match", [
    ("chunk size", dict(moba=MoBAConfig(16, 3)), 1, 70,
     "call 1 of layer 1 was recorded with chunk_size 8, got 16"),
    ("topk", dict(moba=MoBAConfig(8, 4)), 1, 70, "call 1 of layer 1 was recorded with topk 3, got 4"),
    ("layer", dict(number=2), 1, 70, "call 1 of layer 2 was not recorded, its record has 0 calls"),
    ("tokens", {}, 1, 69, "was recorded for 70 tokens and 4 heads, got 69 and 4 here"),
    ("heads", dict(moba=MoBAConfig(8, 3, selection="group")), 1, 70, "70 tokens and 4 heads, got 70 and 2 here"),
    ("more calls", {}, 3, 70, "call 3 of layer 1 was not recorded, its record has 2 calls"),
    ("fewer calls", {}, 1, 70, "layer 1 was recorded in 2 calls, and replayed in 1")])
def test_refused(wrong, settings, calls, tokens, match):
    core, choices = layer(**settings), recorded(2)
    with pytest.raises(ValueError, match=match), replay_selection(choices):
        for _ in range(calls):
            core(*inputs(tokens), None)


def test_refused_arguments(tmp_path):
    with pytest.raises(TypeError, match="choices must be a RecordedSelection, got dict"), replay_selection({}):
        pass
    with pytest.raises(RuntimeError, match="inside of another"), record_selection(), record_selection():
        pass
    (tmp_path / "text").write_text("not a record")
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    np.savez(tmp_path / "pickle.npz", **{"1.0.8.3.0.0.1": np.array([{}], dtype=object)})
    for name in ("text", "other.npz", "pickle.npz"):
        with pytest.raises(ValueError, match="path must be what RecordedSelection.save wrote"):
            RecordedSelection.load(tmp_path / name)
    with pytest.raises(ValueError, match="decode must be moba for record_selection, got dense"), record_selection():
        q, k, v = inputs()
        layer(moba=MoBAConfig(8, 3, decode="dense"))(q[-1:], k, v, None)


def test_dense_layers_are_not_recorded():
    with record_selection() as choices:
        layer(moba=MoBAConfig(8, 3, full_attention_layers="all"))(*inputs(), None)
    assert choices.layers == {}
