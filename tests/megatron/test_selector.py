"""A selector of one's own: called with what it should be, on any layout, and what it chooses is what is attended to."""
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_megatron import (
    MoBAConfig,
    MoBACoreAttention,
    get_moba_layer_local_spec,
    record_selection,
    replay_selection,
    sparse_attn_varlen,
)
from moba_megatron.context_parallel import gather_keys
from moba_megatron.inspect.choices import look, watching
from moba_megatron.megatron.core_attention import MoBACoreAttentionSubmodules, MoBAOrTEDotProductAttention
from moba_megatron.ops import select_for_segments

MOBA = MoBAConfig(chunk_size=8, topk=3)
LAYOUTS = ["one", "recompute", "cp2", "a2a", "tp2_cp2", "by_layer"]


class Gate(torch.nn.Module):
    """MoBA's gate, for heads or groups, as a selector; with a parameter that changes nothing."""

    def __init__(self, config, layer_number, moba_config, shared="head"):
        super().__init__()
        self.layer_number, self.moba, self.shared, self.calls = layer_number, moba_config, shared, 0
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, q, k, segments, group=None, global_rows=None):
        self.calls += 1
        keys = k if group is None else gather_keys(k.detach(), group, global_rows)
        return select_for_segments(q * self.scale, keys, segments, self.moba.topk, shared=self.shared)


def core(selector, moba=MOBA, layer_number=1):
    config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                               attention_dropout=0.0)
    return MoBACoreAttention(config, layer_number, AttnMaskType.causal, "self", moba_config=moba,
                             submodules=MoBACoreAttentionSubmodules(selector) if selector else None)


def inputs(tokens=70, batch=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, batch, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2)]


@pytest.mark.parametrize("shared", ["head", "group"])
def test_the_gate_as_a_selector_is_the_gate(shared):
    q, k, v = inputs(batch=2)
    with_selector = core(ModuleSpec(Gate, params={"shared": shared}))
    assert with_selector.selector.layer_number == 1 and with_selector.selector.moba == MOBA
    expected = core(None, replace(MOBA, selection=shared))(q, k, v)
    assert torch.equal(with_selector(q, k, v), expected) and with_selector.selector.calls == 1
    decoded = with_selector(q[-1:], k, v, attn_mask_type=AttnMaskType.no_mask)  # a new token over a cache
    torch.testing.assert_close(decoded, expected[-1:], rtol=1e-12, atol=1e-13)


def test_what_is_chosen_is_attended_to():
    """A function; whatever it names: other sequences' chunks, later ones, any twice."""
    q, k, v = inputs(batch=2)
    chosen = torch.randint(-3, 25, (140, 2, 6), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    seen = []

    def choose(q, k, segments):
        seen.append((q.shape, k.shape, segments.chunk_size))
        return chosen

    o = core(choose)(q, k, v)
    packed = [x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)]
    expected = sparse_attn_varlen(*packed, chosen, torch.tensor([0, 70, 140], dtype=torch.int32), 70, 8)
    assert torch.equal(o.transpose(0, 1).flatten(0, 1), expected.flatten(1))
    assert seen == [((140, 4, 8), (140, 2, 8), 8)]


def test_layers_and_steps_that_are_dense_have_none():
    assert core(Gate, replace(MOBA, full_attention_layers="all")).selector is None
    q, k, v = inputs()
    dense = core(Gate, replace(MOBA, full_attention_from_step=0))
    dense(q, k, v)
    assert dense.selector.calls == 0


def test_a_selector_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="selected must have q's 70 tokens, and a list for each of q's 4 heads or of"):
        core(lambda q, k, segments: torch.zeros(70, 3, 2, dtype=torch.int32))(*inputs())


def test_its_parameters_are_the_models():
    layer = core(Gate)
    assert [name for name, _ in layer.named_parameters()] == ["selector.scale"]
    assert list(layer.state_dict()) == ["selector.scale"]


def test_specs(monkeypatch):
    spec = get_moba_layer_local_spec(MOBA, selector=Gate).submodules.self_attention.submodules.core_attention
    assert spec.submodules == MoBACoreAttentionSubmodules(Gate)
    assert get_moba_layer_local_spec(MOBA).submodules.self_attention.submodules.core_attention.submodules is None
    layer = MoBAOrTEDotProductAttention(core(None).config, 1, AttnMaskType.causal, "self", moba_config=MOBA,
                                        submodules=spec.submodules)
    assert isinstance(layer.selector, Gate)


def test_a_replay_needs_no_selector():
    q, k, v = inputs()
    for shared in ("head", "group"):
        layer = core(ModuleSpec(Gate, params={"shared": shared}))
        with record_selection() as choices:
            o = layer(q, k, v)
        with replay_selection(choices):
            assert torch.equal(layer(q, k, v), o) and layer.selector.calls == 1
    short = [x[:20] for x in (q, k, v)]  # of which the gate would take everything
    with record_selection() as choices:
        o = core(lambda q, k, segments: torch.full((20, 2, 1), 99, dtype=torch.int32))(*short)
    assert choices.layers[1][0].numbers.eq(-1).all() and not choices.layers[1][0].causal
    assert torch.equal(o, core(None, replace(MOBA, topk=1))(*short))


def test_the_router_that_is_watched_is_the_selector():
    seen, (q, k, v) = [], inputs()
    layer = core(lambda q, k, segments: torch.zeros(70, 2, 3, dtype=torch.int32))
    with watching(lambda *args: seen.append(look(*args))):
        layer(q, k, v)
    assert seen[0].selected.shape == (70, 4, 3)
    assert seen[0].selected[8:].eq(torch.tensor([0, -1, -1])).all() and seen[0].selected[:8].eq(-1).all()


def on_layout(layout, weights, batch):
    import gpt
    from test_selector import Gate

    results = []
    for selector in (None, Gate):
        with pytest.MonkeyPatch.context() as patch:
            make = gpt.get_moba_layer_local_spec
            patch.setattr(gpt, "get_moba_layer_local_spec", lambda *a, **k: make(*a, selector=selector, **k))
            model = gpt.build(layout)
        gpt.load(model, {**weights, **{gpt.global_name(name, layout): torch.ones(()) for name, _ in
                                       model.named_parameters() if "selector" in name}}, layout)
        rows = gpt.local_positions([gpt.SEQLEN], layout.cp, gpt.parallel_state.get_context_parallel_rank())
        logits = model(batch[:, rows], rows.expand(gpt.BATCH, -1), None)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for name, p in model.named_parameters() if "selector" not in name)])
        calls = [m.selector.calls for m in model.modules() if getattr(m, "selector", None) is not None]
    saved = [key for key in model.sharded_state_dict() if "selector.scale" in key]
    return all(map(torch.equal, *results)), calls, len(saved)


def everything(rank, size, directory):
    import sys
    sys.path.insert(0, directory)
    from gpt import BATCH, SEQLEN, VOCAB, Layout, common_weights

    layouts = [Layout("one"), Layout("recompute", recompute="full"), Layout("cp2", cp=2),
               Layout("a2a", cp=2, comm="a2a"), Layout("tp2_cp2", tp=2, cp=2),
               Layout("by_layer", cp=4, comm=["a2a+all_gather", "allgather", "a2a", "all_gather"], levels=(2, 2))]
    assert [layout.name for layout in layouts] == LAYOUTS
    weights = common_weights()
    batch = torch.randint(0, VOCAB, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(3))
    return {layout.name: on_layout(layout, weights, batch) for layout in layouts}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from pathlib import Path
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"), str(Path(__file__).parent))


@pytest.mark.parametrize("name", LAYOUTS)
def test_on_every_layout(results, name):
    """The gate as a selector gives a model's logits and gradients, bit for bit."""
    for same, calls, saved in (result[name] for result in results):
        assert same and calls == [2 if name == "recompute" else 1] * 3
        assert saved == 3  # in distributed checkpoints
