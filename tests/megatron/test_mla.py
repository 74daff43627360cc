"""Multi-latent attention with MoBA (values narrower than keys): packed, tensor parallel, recomputed; fp64 on gloo."""
import json

import pytest
import torch
from ranks import run_ranks, torchrun

from comparison import relative_error

pytest.importorskip("megatron.core")

HEADS, WIDTH = 4, 32
LENGTHS = [70, 41, 97]  # chunks of 16, two a query: there is something to select
TOLERANCE = 1e-12
# Megatron's local layers do not add the gradients of the rotary keys, which all heads share, over tensor parallel
# ranks: so it is with dense attention too.
UNSUMMED = ("input", "linear_kv_down_proj.weight")


class Dense(torch.nn.Module):
    """Causal attention by torch; Megatron's own local one takes no values of another width."""

    def __init__(self, softmax_scale, **kwargs):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **kwargs):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return o.permute(2, 0, 1, 3).flatten(2)


def build(tp, moba, recompute=()):
    """One attention module of Megatron's local spec: 4 heads, keys 8 + 4 wide, values 6. Dense without ``moba``."""
    import model_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from moba_megatron.layer_specs import with_moba_core_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False  # 0.16 believes in it without Transformer Engine
    model_parallel.initialize(tp)
    selective = dict(recompute_granularity="selective", recompute_modules=list(recompute)) if recompute else {}
    config = MLATransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=HEADS, q_lora_rank=16, kv_lora_rank=12, qk_head_dim=8,
        qk_pos_emb_head_dim=4, v_head_dim=6, rope_type="rope", apply_rope_fusion=False, attention_dropout=0.0,
        hidden_dropout=0.0, add_bias_linear=False, use_cpu_initialization=True, params_dtype=torch.float64,
        tensor_model_parallel_size=tp, **selective)
    spec = get_gpt_layer_local_spec(multi_latent_attention=True)
    if moba is not None:
        with_moba_core_attention(spec, moba)
    else:
        spec.submodules.self_attention.submodules.core_attention = Dense
    attention = build_module(spec.submodules.self_attention, config=config, layer_number=1)
    return attention.double().train()


def load(attention, weights):
    from gpt import shard

    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.copy_(shard(weights[name], name, parameter))


def run(attention, hidden, packed=None):
    """Output ``[s, b, width]``, and the gradients of the input and of each parameter."""
    hidden = hidden.clone().requires_grad_()
    out, _ = attention(hidden, None, packed_seq_params=packed)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    (out * weight).sum().backward()
    return out.detach(), {"input": hidden.grad, **{name: p.grad for name, p in attention.named_parameters()}}


def farthest(got, expected, without=()):
    """Largest relative error of an output and its gradients, this rank's shards against the whole."""
    from gpt import shard

    out, grads, attention = got
    parameters = {"input": None, **dict(attention.named_parameters())}
    errors = [relative_error(grads[name], shard(expected[1][name], name, parameter))
              for name, parameter in parameters.items() if name not in without]
    return max(relative_error(out, expected[0]), *errors)


def everything(rank, size):
    import gpt  # noqa: F401 (lets Megatron run without a GPU)
    from megatron.core.packed_seq_params import PackedSeqParams

    from moba_megatron import MoBAConfig

    moba = MoBAConfig(chunk_size=16, topk=2, key_conv=3)
    generator = torch.Generator().manual_seed(7)
    attention = build(1, moba)
    weights = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
               for name, p in attention.named_parameters()}

    def attend(hidden, tp=1, config=moba, packed=None, recompute=()):
        attention = build(tp, config, recompute)
        load(attention, weights)
        return *run(attention, hidden, packed), attention

    hidden = torch.randn(150, 2, WIDTH, generator=generator, dtype=torch.float64)
    whole = attend(hidden)
    plain = MoBAConfig(chunk_size=16, topk=2)
    everywhere = attend(hidden, config=MoBAConfig(chunk_size=256, topk=1))
    result = {"tp 2": farthest(attend(hidden, tp=2), whole, UNSUMMED),
              "dense": farthest(everywhere, attend(hidden, config=None)),
              "sparse differs": relative_error(attend(hidden, config=plain)[0], everywhere[0]),
              "convolution differs": relative_error(whole[0], attend(hidden, config=plain)[0])}
    for modules in (["core_attn"], ["mla_up_proj"]):
        result["recompute " + modules[0]] = farthest(attend(hidden, recompute=modules), whole)
    stream = torch.randn(sum(LENGTHS), 1, WIDTH, generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                             max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))
    together = attend(stream, packed=packed)
    result["packed, tp 2"] = farthest(attend(stream, tp=2, packed=packed), together, UNSUMMED)
    alone = torch.cat([attend(part)[0] for part in stream.split(LENGTHS)])
    result["packed"] = relative_error(together[0], alone)
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["tp 2", "packed", "packed, tp 2", "dense", "recompute core_attn",
                                  "recompute mla_up_proj"])
def test_the_same_attention(results, name):
    """On two ranks as on one, packed as alone, with all chunks as dense attention."""
    assert max(result[name] for result in results) <= TOLERANCE


@pytest.mark.parametrize("name", ["sparse differs", "convolution differs"])
def test_another_attention(results, name):
    assert min(result[name] for result in results) > 1e-2


def test_the_check_for_two_gpus(tmp_path):
    result = torchrun(2, "benchmarks.check_mla", str(tmp_path / "mla.json"))
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "good", result.stderr[-4000:]
    stored = json.loads((tmp_path / "mla.json").read_text())
    assert stored["good_on_both_ranks"] and len(stored["errors"]) == 6
