"""Gate under the interpreter: the reference's chunks, ties included; near-ties alone where scores are real."""
import pytest
import torch

from moba_megatron import kernels, reference
from moba_megatron.segments import Segments

CASES = {
    "one sequence": dict(lengths=[90], chunk=8, topk=4),
    "gqa": dict(lengths=[70], chunk=8, topk=4, heads=4, kv_heads=2),
    "mqa": dict(lengths=[70], chunk=8, topk=4, heads=3, kv_heads=1),
    "packed, ragged, empty, short": dict(lengths=[0, 3, 61, 1, 0, 33], chunk=4, topk=4),
    "chunk not a power of two": dict(lengths=[100], chunk=7, topk=3),
    "D 80, fp16": dict(lengths=[60], chunk=4, topk=4, dim=80, dtype=torch.float16),
    "D 96, fp16": dict(lengths=[60], chunk=4, topk=4, dim=96, dtype=torch.float16),
    "D 24": dict(lengths=[60], chunk=4, topk=4, dim=24),
    "one other chunk": dict(lengths=[60], chunk=4, topk=2),
    "more choices than chunks": dict(lengths=[40], chunk=8, topk=9),
    "long lists": dict(lengths=[70], chunk=2, topk=13),
    "topk 64": dict(lengths=[132], chunk=2, topk=64, heads=1, kv_heads=1),
    "shorter than a chunk": dict(lengths=[20, 9], chunk=32, topk=3),
}


def make(lengths, chunk, topk, heads=2, kv_heads=2, dim=16, dtype=torch.float32, integers=True):
    """Queries, means, segments; integer scores are exact and full of ties."""
    segments = Segments.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), chunk)
    total = sum(lengths)

    def draw(rows, heads):
        x = torch.randn(rows, heads, dim)
        return (x.round() if integers else x).to(dtype)

    return draw(total, heads), draw(segments.num_chunks(total), kv_heads), segments


def same(q, means, segments, topk):
    got, expected = (stages.gate(q, means, segments, topk) for stages in (kernels, reference))
    assert got.shape == expected.shape and got.dtype == torch.int32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_named_cases(case):
    same(*make(**case), case["topk"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_chunks", [31, 32, 33, 64, 65, 257])
def test_numbers_of_chunks_around_the_tiles(num_chunks, dtype):
    same(*make([num_chunks], chunk=1, topk=8, heads=1, kv_heads=1, dtype=dtype), 8)


@pytest.mark.parametrize("topk", [5, 20])  # in one pass, in three: a pass goes on among the equals of the one before
def test_all_scores_equal_choose_the_latest(topk):
    q, means, segments = make([90], chunk=1, topk=topk, heads=1, kv_heads=1)
    selected = kernels.gate(torch.ones_like(q), torch.ones_like(means), segments, topk)
    expected = torch.arange(90)[:, None] - torch.arange(1, topk)
    assert torch.equal(selected[:, 0].sort(1)[0], torch.where(expected < 0, -1, expected).sort(1)[0].int())


@pytest.mark.parametrize("topk", [4, 16])
def test_nan_and_infinite_scores(topk):
    q, means, segments = make([54], chunk=2, topk=topk)
    q[50] = torch.nan
    q[51, :, 1:] = 0
    means[3, :, 0], means[7, :, 1], means[9, :, 2] = torch.inf, -torch.inf, torch.nan
    same(q, means, segments, topk)
    assert (kernels.gate(q, means, segments, topk)[50] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_real_scores_differ_by_near_ties_only(dtype):
    q, means, segments = make([150], chunk=2, topk=5, dtype=dtype, integers=False)
    selected = kernels.gate(q, means, segments, 5).long()
    score = torch.einsum("thd,chd->thc", q.double(), means.double())
    earlier = torch.arange(means.shape[0]) < (torch.arange(150) // 2)[:, None]
    score = score.masked_fill(~earlier[:, None], -torch.inf)
    wanted = score.topk(4, dim=2)[0]
    got = score.gather(2, selected.clamp(min=0)).masked_fill(selected < 0, -torch.inf).sort(2, descending=True)[0]
    # products of 16 terms below 16 in size, each fp32 sum off by at most half a unit in the last place
    assert torch.where(wanted.isfinite(), (got - wanted).abs(), (got != wanted).double()).max() <= 16 * 256 * 2 ** -24


def test_parts_of_a_sequence_choose_what_the_whole_chooses():
    q, means, whole = make([100, 60], chunk=4, topk=4, integers=False)
    expected = kernels.gate(q, means, whole, 4).sort(2)[0]
    rows = torch.tensor([*range(130, 160), *range(0, 37), *range(70, 100)])
    segments = Segments(torch.tensor([0, 30, 30, 67, 97]).int(), whole.cu_seqlens_k, torch.tensor([1, 1, 0, 0]).int(),
                        torch.tensor([30, 0, 0, 70]).int(), 37, 100, 4)
    assert torch.equal(kernels.gate(q[rows], means, segments, 4).sort(2)[0], expected[rows])
    same(q[rows], means.round(), segments, 4)


def test_strided_queries():
    q, means, segments = make([50], chunk=4, topk=3)
    fused = torch.randn(50, 7, 16)
    fused[:, 2:4] = q
    same(fused[:, 2:4], means, segments, 3)
    same(q.permute(2, 1, 0).contiguous().permute(2, 1, 0), means, segments, 3)


def test_nothing_to_do():
    q, means, segments = make([20], chunk=4, topk=3)
    assert kernels.gate(q, means, segments, 1).shape == (20, 2, 0)
    empty = Segments.from_cu_seqlens(torch.tensor([0, 0]).int(), 0, 4)
    assert kernels.gate(q[:0], means[:1], empty, 3).shape == (0, 2, 2)
