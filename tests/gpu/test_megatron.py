"""MoBA in Megatron-Core on one GPU: memory over many steps, recompute, offloading, lifetimes in graphs, inference."""
import pytest
import torch
from megatron_rank import one_rank  # noqa: F401

import comparison

pytest.importorskip("megatron.core")
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from moba_megatron import MoBAConfig, MoBACoreAttention, get_moba_layer_local_spec  # noqa: E402
from moba_megatron.megatron import core_attention  # noqa: E402
from moba_megatron.tensor_cache import cached_tensors  # noqa: E402

pytestmark = pytest.mark.gpu
MOBA = MoBAConfig(chunk_size=512, topk=8, backend="triton")
LONG, SHORT = 1 << 17, 1 << 13
MIB = 1 << 20


def build(tokens, moba=MOBA, **options):
    """Two layers, 256 wide, 2 heads of 128 with one kv head, bf16."""
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=256, num_attention_heads=2, num_query_groups=1, kv_channels=128, ffn_hidden_size=512,
        attention_dropout=0.0, hidden_dropout=0.0, normalization="RMSNorm", add_bias_linear=False, bf16=True,
        params_dtype=torch.bfloat16, use_cpu_initialization=True, masked_softmax_fusion=False, **options)
    model = GPTModel(config, get_moba_layer_local_spec(moba, normalization="RMSNorm"), vocab_size=64,
                     max_sequence_length=tokens, position_embedding_type="rope")
    return model.bfloat16().cuda().train()


def batch(tokens):
    ids = torch.randint(0, 64, (1, tokens + 1), generator=torch.Generator().manual_seed(2)).cuda()
    return ids[:, :-1], torch.arange(tokens, device="cuda")[None], ids[:, 1:]


def peaks(steps, tokens=LONG):
    """Peak memory of each training step, bytes."""
    model = build(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids, positions, labels = batch(tokens)
    found = []
    for _ in range(steps):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(ids, positions, None, labels=labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        found.append(torch.cuda.max_memory_allocated())
    return found


def test_peak_memory_at_128k_does_not_grow():
    found = peaks(50)
    assert found[1] > 100 * MIB and found[49] <= found[1], [peak >> 20 for peak in found]


def test_a_leak_would_show():
    kept = []
    before = core_attention.set_observer(lambda module, q, k, segments: kept.append(k.detach().clone()))
    try:
        found = peaks(4)
    finally:
        core_attention.set_observer(before)
    assert len(kept) == 4 * 2 and found[3] - found[1] >= 4 * kept[0].nbytes


def gradients(**options):
    """Loss and gradients of the second step (offloading warms up in the first), and what its forward kept, bytes."""
    model = build(SHORT, MoBAConfig(chunk_size=128, topk=3, deterministic=True, backend="triton"), **options)
    ids, positions, labels = batch(SHORT)
    for _ in range(2):
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        loss = model(ids, positions, None, labels=labels).mean()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        if options.get("fine_grained_activation_offloading"):
            from megatron.core.pipeline_parallel import fine_grained_activation_offload

            fine_grained_activation_offload.FineGrainedActivationOffloadingInterface.reset()
    return loss.item(), [p.grad.clone() for p in model.parameters()], kept


@pytest.fixture(scope="module")
def plain():
    return gradients()


@pytest.mark.parametrize("options, saves", [
    (dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1), True),
    (dict(recompute_granularity="selective", recompute_modules=["core_attn"]), False),  # v keeps the projection
    (dict(fine_grained_activation_offloading=True, offload_modules=["core_attn", "attn_proj"]), True),
], ids=["full recompute", "selective recompute", "offloading"])
def test_memory_savers_change_no_bit(plain, options, saves):
    if "offload_modules" in options:
        if "fine_grained_activation_offloading" not in TransformerConfig.__dataclass_fields__:
            pytest.skip("this Megatron-Core does not offload activations by module")
        pytest.importorskip("transformer_engine")  # Megatron sets a flag of its
    loss, grads, kept = gradients(**options)
    assert loss == plain[0]
    for a, b in zip(grads, plain[1]):
        assert torch.equal(a, b)
    assert not saves or kept < plain[2], f"{kept / MIB:.1f} MiB, without {plain[2] / MIB:.1f}"


def make_core(**options):
    """A core attention, and q, k, v ``[1000, 2, heads, 128]`` for it."""
    config = TransformerConfig(num_layers=1, hidden_size=256, num_attention_heads=2, num_query_groups=1,
                               attention_dropout=0.0)
    core = MoBACoreAttention(config, 1, AttnMaskType.causal, "self",
                             moba_config=MoBAConfig(64, 3, backend="triton", **options))
    return core, *(torch.randn(1000, 2, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (2, 1, 1))


@pytest.mark.parametrize("decode", ["moba", "dense"])
def test_static_inference(decode):
    """A prompt in two parts over a cache longer than it, then a token: rows of one call for all."""
    core, q, k, v = make_core(decode=decode)
    last = make_core(full_attention_layers="all")[0] if decode == "dense" else core
    with torch.inference_mode():
        expected = torch.cat((core(q, k, v)[:999], last(q, k, v)[999:]))
        cache = [torch.cat((x, torch.full_like(x, torch.nan))) for x in (k, v)]
        parts = [core(q[begin:end], *(x[:end] for x in cache), attn_mask_type=kind)
                 for begin, end, kind in ((0, 300, AttnMaskType.causal), (300, 999, AttnMaskType.causal),
                                          (999, 1000, AttnMaskType.no_mask))]
    for part, rows in zip(parts, expected.split((300, 699, 1))):
        assert comparison.relative_error(part, rows.double()) < 1e-2


def test_a_graph_outlives_the_cache_of_lengths():
    """What a captured call reads is not freed when many other lengths came by, as in generation between steps."""
    core, q, k, v = make_core()
    with torch.no_grad():
        eager = core(q, k, v)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = core(q, k, v)
        cached_tensors.clear()
        junk = [torch.full((n,), 7, dtype=torch.int32, device="cuda") for n in (1, 2, 3) for _ in range(500)]
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, eager) and len(junk) == 1500
