"""Decoding, interpreted: means, selection, o and lse of every path against the reference and fp64; step after step."""
import pytest
import torch

import decoding
from moba_megatron.kernels import tuning
from moba_megatron.ops.decode import moba_decode


@pytest.mark.parametrize("case", decoding.CASES.values(), ids=decoding.CASES)
def test_against_the_reference_and_fp64(case):
    decoding.check(*decoding.make(**case), case["chunk"], case["topk"])


@pytest.mark.parametrize("programs", [1, 100])
def test_pieces_of_chunks(programs):
    """A chunk in one piece and in as many as it has tiles, the last one shorter."""
    row = {"BLOCK_N": 16, "PROGRAMS": programs, "num_warps": 4, "num_stages": 1}
    with tuning.forced(configs={"decode": row}):
        decoding.check(*decoding.make([377, 20], 100, 3, heads=2), 100, 3)


def test_several_rounds_of_the_gate():
    """Chunks that are better than those chosen so far come in later rounds."""
    q, k, v, lengths, places = decoding.make([121], 2, 4, heads=2)
    k[:] = k * torch.arange(k.shape[1])[None, :, None, None]
    with tuning.forced(configs={"decode_gate": {"BLOCK_C": 16, "num_warps": 4, "num_stages": 1}}):
        decoding.check(q, k, v, lengths, places, 2, 4)


def test_ties_go_to_the_later_chunk_and_nan_is_never_chosen():
    q, k, _, lengths, places = decoding.make([81], 8, 4, heads=2, kv_heads=1)
    q[:], k[:] = 1.0, 1.0
    k[:, 72] = torch.nan
    means = decoding.filled_means(k, lengths, 8, places, "triton")
    selected = decoding.stages.decode_gate(q, k, means, lengths, 8, 4)
    assert selected.sort(2)[0].tolist() == [[[6, 7, 8]] * 2]
    q[:, 0] = torch.nan
    assert (decoding.stages.decode_gate(q, k, means, lengths, 8, 4)[:, 0] == -1).all()


def test_heads_that_share_a_chunk():
    """Equal query heads choose equal chunks, which one program serves for all of them."""
    q, k, v, lengths, places = decoding.make([150], 16, 4, heads=4, kv_heads=1)
    q[:] = q[:, :1]
    o, _ = decoding.check(q, k, v, lengths, places, 16, 4)
    assert torch.equal(o[:, 1], o[:, 0])


def test_steps_complete_the_means():
    """From an empty cache on, every step leaves the means that the next one needs."""
    q, k, v, _, _ = decoding.make([13, 13], 4, 3, kv_heads=2)
    means = decoding.empty_means(k, torch.tensor([13, 13]), 4, {})
    for step in range(1, 14):
        lengths = torch.tensor([step, max(0, step - 3)], dtype=torch.int32)
        o = moba_decode(q, k, v, means, lengths, 4, 3, backend="triton")
        expected = moba_decode(q, k, v, decoding.filled_means(k, lengths, 4, {}, "reference"), lengths, 4, 3)
        torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk, dtype", [(70, torch.float32), (130, torch.float16)])
def test_means_are_those_of_training(chunk, dtype):
    _, k, _, lengths, _ = decoding.make([300, 140], chunk, 3, dtype=dtype, integers=False)
    decoding.assert_means_of_training(k, lengths, chunk)


def test_refuses_fp64():
    q, k, v, lengths, _ = decoding.make([40], 16, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="q must be bfloat16, float16 or float32 for the Triton kernels, got float64"):
        moba_decode(q, k, v, decoding.empty_means(k, lengths, 16, {}), lengths, 16, 2, backend="triton")
