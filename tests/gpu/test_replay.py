"""Recorded choices, a selector and chunk masses on one GPU: the same bits, without waits, against fp64."""
import pytest
import torch
from megatron_rank import one_rank  # noqa: F401

pytest.importorskip("megatron.core")
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from moba_megatron import (  # noqa: E402
    MoBAConfig,
    RecordedSelection,
    chunk_mass,
    get_moba_layer_local_spec,
    kernels,
    record_selection,
    replay_selection,
)
from moba_megatron.ops import select_for_segments  # noqa: E402
from moba_megatron.segments import Segments  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE, TOKENS = "cuda", 4096
RECOMPUTE = {"kept": {}, "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
             "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)}


def build(selection="head", selector=None, **options):
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=256, num_attention_heads=4, num_query_groups=2, kv_channels=64, ffn_hidden_size=512,
        attention_dropout=0.0, hidden_dropout=0.0, normalization="RMSNorm", add_bias_linear=False, bf16=True,
        params_dtype=torch.bfloat16, use_cpu_initialization=True, masked_softmax_fusion=False, **options)
    moba = MoBAConfig(128, 8, deterministic=True, selection=selection)
    model = GPTModel(config, get_moba_layer_local_spec(moba, selector, normalization="RMSNorm"), vocab_size=64,
                     max_sequence_length=TOKENS, position_embedding_type="rope")
    return model.bfloat16().to(DEVICE).train()


def train(model):
    """Two micro batches: losses and gradients."""
    model.zero_grad()
    ids = torch.randint(0, 64, (2, 1, TOKENS + 1), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    losses = []
    for tokens in ids:
        loss = model(tokens[:, :-1], torch.arange(TOKENS, device=DEVICE)[None], None, labels=tokens[:, 1:]).mean()
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("selection", ["head", "group"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_replay_gives_the_same_bits(recompute, selection, tmp_path, monkeypatch):
    model = build(selection, **RECOMPUTE[recompute])
    plain = train(model)
    with record_selection() as choices:
        recorded = train(model)
    assert all(map(torch.equal, recorded, plain)), "recording changes the run"
    assert [len(calls) for calls in choices.layers.values()] == [2, 2]
    assert {call.numbers.dtype for calls in choices.layers.values() for call in calls} == {torch.int16}
    choices.save(tmp_path / "choices.npz")
    monkeypatch.setattr(kernels, "gate", None)
    with replay_selection(RecordedSelection.load(tmp_path / "choices.npz")):
        assert all(map(torch.equal, train(model), plain))


def test_recording_does_not_wait():
    """Before the end of the block."""
    core = build().decoder.layers[0].self_attention.core_attention
    q, k, v = (torch.randn(TOKENS, 1, n, 64, device=DEVICE).bfloat16() for n in (4, 2, 2))
    core(q, k, v)
    with record_selection() as choices:
        core(q, k, v)
        torch.cuda.set_sync_debug_mode("error")
        try:
            core(q, k, v)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    first, second = choices.layers[1]
    assert torch.equal(first.numbers, second.numbers) and first.numbers.max() == TOKENS // 128 - 2


def test_the_gate_as_a_selector_is_the_gate():
    def gate(q, k, segments):
        return select_for_segments(q, k, segments, 8)

    assert all(map(torch.equal, train(build(selector=gate)), train(build())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunk_mass(dtype):
    lengths = [1500, 0, 700, 33]
    q, k = (torch.randn(sum(lengths), n, 64, device=DEVICE).to(dtype) for n in (4, 2))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    segments = Segments.from_cu_seqlens(cu_seqlens, 1500, 128)
    rows = torch.randint(sum(lengths), (300,), device=DEVICE)
    exact = chunk_mass(q.double(), k.double(), segments)
    assert (exact.sum(2) - 1).abs().max() < 1e-12
    torch.testing.assert_close(chunk_mass(q, k, segments).double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(chunk_mass(q, k, segments, rows).double(), exact[rows], rtol=0, atol=1e-5)
