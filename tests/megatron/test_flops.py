"""FLOPs of MoBA attention: counted pair by pair, equal to Megatron-LM's count where MoBA is dense, and by layer."""
from types import SimpleNamespace

import pytest

from moba_megatron import MoBAConfig
from moba_megatron.flops import attended_pairs, attention_flops, dense_attention_flops, scored_pairs
from moba_megatron.megatron.flops import attention_layers, correction


def count(seqlen, chunk_size, topk):
    """Pairs of query and key, and of query and scored chunk, query by query. Own chunks as half squares."""
    attended = scored = 0
    for position in range(seqlen):
        chunk = position // chunk_size
        attended += chunk_size * min(chunk, topk - 1) + position % chunk_size + 0.5
        scored += chunk if chunk > topk - 1 else 0
    return attended, scored


@pytest.mark.parametrize("topk", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("seqlen, chunk_size", [(1, 4), (7, 4), (64, 4), (63, 8), (100, 7), (16, 64), (96, 32)])
def test_pairs_are_those_counted_query_by_query(seqlen, chunk_size, topk):
    case = seqlen, chunk_size, topk
    assert (attended_pairs(*case), scored_pairs(*case)) == count(*case)


@pytest.mark.parametrize("seqlen", [1, 100, 512, 4095, 4096])
def test_topk_of_all_chunks_is_megatrons_dense_count(seqlen):
    assert attention_flops(seqlen, 8, 128, 64, chunk_size=512, topk=8) == dense_attention_flops(seqlen, 8, 128, 64)


def gpt_args(**changes):
    values = dict(num_layers=4, seq_length=8192, num_attention_heads=8, kv_channels=64, hidden_size=512)
    return SimpleNamespace(**{**values, **changes})


def test_correction_replaces_the_core_attention_of_sparse_layers():
    config = MoBAConfig(chunk_size=512, topk=3, full_attention_layers="last:1")
    one = dense_attention_flops(8192, 8, 64, 64) - attention_flops(8192, 8, 64, 64, 512, 3)
    assert one > 0
    assert correction(gpt_args(), config, 0, batch_size=2) == pytest.approx(-2 * 3 * one)
    assert correction(gpt_args(), MoBAConfig(full_attention_layers="all"), 0, 2) == 0


def test_correction_ends_with_the_switch_to_full_attention():
    config = MoBAConfig(chunk_size=512, topk=3, full_attention_from_step=10)
    assert correction(gpt_args(), config, 9, 2) < 0
    assert correction(gpt_args(), config, 10, 2) == 0


def test_correction_is_each_layers_at_each_step():
    def one(*settings):
        return dense_attention_flops(8192, 8, 64, 64) - attention_flops(8192, 8, 64, 64, *settings)

    config = MoBAConfig(512, 3, "last:1", per_layer="1:chunk=128,topk=16;4:chunk=64")
    assert correction(gpt_args(), config, 0, 1) == pytest.approx(-one(128, 16) - 2 * one(512, 3))
    config = MoBAConfig(512, 3, per_layer="1:chunk=128", topk_schedule="0:8,10:2")
    for step, topk in ((9, 8), (10, 2)):
        assert correction(gpt_args(), config, step, 1) == pytest.approx(-one(128, topk) - 3 * one(512, topk))


def test_packed_sequences_of_one_length_count_exactly():
    config = MoBAConfig(chunk_size=512, topk=2)
    packed = correction(gpt_args(), config, 0, 1, seqlen_squared_sum=4 * 2048**2, tokens=4 * 2048)
    assert packed == pytest.approx(correction(gpt_args(seq_length=2048), config, 0, batch_size=4))
    assert correction(gpt_args(), config, 0, 1, seqlen_squared_sum=0, tokens=0) == 0


def test_multi_latent_attention_has_its_own_head_sizes():
    args = gpt_args(multi_latent_attention=True, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128)
    saved = dense_attention_flops(8192, 8, 192, 128) - attention_flops(8192, 8, 192, 128, 512, 3)
    assert correction(args, MoBAConfig(512, 3), 0, 1) == pytest.approx(-4 * saved)


@pytest.mark.parametrize("gqa, groups, choosing", [(True, 2, 2), (False, 1, 8), (False, None, 8)])
def test_groups_that_choose_together_score_once(gqa, groups, choosing):
    """1 is Megatron-LM's default where heads have their own keys."""
    args = gpt_args(group_query_attention=gqa, num_query_groups=groups)
    saved = dense_attention_flops(8192, 8, 64, 64) - attention_flops(8192, 8, 64, 64, 512, 3, choosing)
    assert correction(args, MoBAConfig(512, 3, selection="group"), 0, 1) == pytest.approx(-4 * saved, rel=1e-12)


@pytest.mark.parametrize("changes, layers", [
    ({}, [1, 2, 3, 4]),
    ({"mtp_num_layers": 2}, [1, 2, 3, 4, 5, 6]),
    ({"hybrid_override_pattern": "M*-M*"}, [2, 5]),
    ({"hybrid_layer_pattern": "M*|M*/*M/*M"}, [2, 4, 5, 6]),
    ({"hybrid_layer_pattern": "M+M+"}, []),
    ({"is_hybrid_model": True, "hybrid_override_pattern": None}, []),
    ({"experimental_attention_variant": "gated_delta_net"}, []),
])
def test_attention_layers(changes, layers):
    assert attention_layers(gpt_args(**changes)) == layers
