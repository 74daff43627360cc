"""What is the torch backend's own: who takes it, its gate's doubts, its batches; results are test_reference.py's."""
from unittest import mock

import pytest
import torch
from cases import Case

from moba_megatron import reference, torch_stages
from moba_megatron.ops import get_stages, moba_attention, moba_attn_varlen
from moba_megatron.reference.chunk_means import accumulate_dtype
from moba_megatron.segments import Segments
from moba_megatron.torch_stages import attention, gating

NAMES = ("o", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("device", ("cpu", "xpu", "mps"))
def test_auto_takes_it_where_triton_does_not_run(device):
    assert get_stages("auto", device) is torch_stages is get_stages("torch", device)
    assert get_stages("reference", device) is reference


def scores_of(kind, dtype):
    """q ``[T, H, D]`` and means ``[chunks, HK, D]`` of one sequence of chunks of one key."""
    generator = torch.Generator().manual_seed(3)
    q, means = (torch.randn(70, heads, 24, generator=generator, dtype=torch.float64) for heads in (4, 2))
    if kind == "integers":
        q, means = q.round(), means.round()
    elif kind == "near ties":  # the order of additions decides
        means = means[:1] * (1 + torch.randint(-2, 3, means.shape, generator=generator) * torch.finfo(dtype).eps)
    elif kind == "cancellation":
        q[..., 1], means[..., 0], means[..., 1] = -q[..., 0], 1e4, 1e4
    elif kind == "overflow":
        q, means = q * 1e19, means * 1e19
    elif kind == "underflow":
        q, means = q * 1e-23, means * 1e-22
    elif kind == "bad":
        q[5, 1, 3], q[40, 2, 0], means[7, 0, 1], means[9, 1, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    return q.to(dtype), means.to(dtype)


KINDS = ("random", "integers", "near ties", "cancellation", "overflow", "underflow", "bad")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", (2, 5, 40, 90))
@pytest.mark.parametrize("wide", (True, False), ids=("fp64 products", "products as narrow as the tree"))
def test_the_gate_chooses_what_the_tree_chooses(kind, dtype, topk, wide, monkeypatch):
    q, means = scores_of(kind, dtype)
    segments = Segments.from_cu_seqlens(torch.tensor([0, 31, 70], dtype=torch.int32), 39, 1)
    means = torch.cat((means, means[:2]))  # an id more for each sequence
    if not wide:
        monkeypatch.setattr(gating, "product_dtype", lambda q: accumulate_dtype(q.dtype))
    monkeypatch.setattr(gating, "SCORE_ELEMENTS", 20_000)  # several blocks
    got, want = (stages.gate(q, means, segments, topk) for stages in (torch_stages, reference))
    assert torch.equal(got, want)


def test_few_queries_are_in_doubt():
    q, k = torch.randn(2000, 4, 64), torch.randn(2000, 2, 64)
    segments = Segments.from_cu_seqlens(torch.tensor([0, 2000], dtype=torch.int32), 2000, 32)
    with mock.patch.object(gating, "best_chunks", side_effect=gating.best_chunks) as tree:
        torch_stages.gate(q, torch_stages.chunk_means(k, segments), segments, 4)
    assert len(tree.call_args.args[0]) < 40


def results(backend, q, k, v, do, dlse, segments, topk, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = moba_attention(*leaves, segments, topk, backend=backend, return_lse=True, **options)
    return o.detach(), lse.detach(), *torch.autograd.grad((o, lse), leaves, (do, dlse))


def assert_close(got, want, tolerance=1e-11):
    for name, a, b in zip(NAMES, got, want):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("case", (Case((140, 3, 60), 20, 3, heads=6, kv_heads=2), Case((400,), 130, 2, data="twins"),
                                  Case((333,), 333, 1, heads=2, kv_heads=1)), ids=("GQA", "long chunks", "dense"))
@pytest.mark.parametrize("elements, keys", ((64, 16), (4096, 64), (1 << 19, 512)))
def test_scores_in_memory_are_bounded(case, elements, keys, monkeypatch):
    inputs = *case.tensors(), case.segments(), case.topk
    want, sizes, bmm = results("reference", *inputs), [], torch.bmm
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", elements)
    monkeypatch.setattr(attention, "KEYS", keys)

    def recorded(a, b):
        sizes.append((a.shape[0], a.shape[1], b.shape[2]))
        return bmm(a, b)

    monkeypatch.setattr(attention.torch, "bmm", recorded)
    assert_close(results("torch", *inputs), want)
    least = 64 * case.heads // case.kv_heads * keys  # the rows of 64 queries, which own chunks always take
    assert sizes and all(n == 1 and rows * width <= least or n * rows * width <= max(elements, least) or width <= 16
                         for n, rows, width in sizes)


def test_segments_that_share_a_chunk():
    """Two segments ask the same positions, a third others of the same chunk."""
    case = Case((50,), 16, 3, heads=4, kv_heads=2)
    q, k, v, do, dlse = case.tensors()
    rows = torch.cat((torch.arange(32, 48), torch.arange(32, 48), torch.arange(40, 50)))
    places = (torch.tensor(x, dtype=torch.int32) for x in ((0, 16, 32, 42), (0, 50), (0, 0, 0), (32, 32, 40)))
    inputs = q[rows], k, v, do[rows], dlse[rows], Segments(*places, 16, 50, 16), 3
    assert_close(results("torch", *inputs), results("reference", *inputs))


def test_rows_of_no_sequence():
    """They are finite: the reference, which takes what is not, does not see this call."""
    case = Case((45, 30), 8, 3, heads=4, kv_heads=2)
    q, k, v, do, dlse = (torch.cat((x, torch.full_like(x[:9], 1e3))) for x in case.tensors())
    with mock.patch.object(reference, "attention_fwd", None), mock.patch.object(reference, "attention_bwd", None):
        got = results("torch", q, k, v, do, dlse, case.segments(), 3)
    for name, x, want in zip(NAMES, got, results("reference", q, k, v, do, dlse, case.segments(), 3)):
        torch.testing.assert_close(x, want, rtol=1e-11, atol=1e-11, msg=lambda m: f"{name}: {m}")
        assert (x[75:] == (-torch.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("kind", ("q.k of another sequence", "do.v of a later key", "a chunk at -inf"))
def test_products_that_overflow(kind):
    """Finite values whose products are not: only rows that attend to them may suffer."""
    q, k, v, do, dlse = Case((3, 37), 16, 3, heads=2, kv_heads=1).tensors(torch.float32)
    lens = (40,)
    if kind == "q.k of another sequence":
        lens, q[2], k[:3], k[5:] = (3, 37), 1e20, 1e-20, 1e20
    elif kind == "do.v of a later key":
        v[30], do[25] = 1e20, 1e20
    else:
        q[35], k[:32], k[32:36] = 1e20, 1e-20, -1e20
    segments = Segments.from_cu_seqlens(torch.tensor((0, *lens)).cumsum(0).int(), max(lens), 16)
    got, want = (results(backend, q, k, v, do, dlse, segments, 2) for backend in ("torch", "reference"))
    for name, a, b in zip(NAMES, got, want):
        assert torch.equal(a.isfinite(), b.isfinite()), name
        a, b = (x[b.isfinite()].double() for x in (a, b))
        assert (a - b).norm() <= 1e-5 * b.norm(), name


def batches_of(lens, max_seqlen, chunk_size, heads=4, queries=None):
    """Batches of a dense call, H = HK, D 64: ``queries`` last positions of each sequence, or all."""
    cu, count = torch.tensor((0, *lens)).cumsum(0).int(), torch.tensor([min(n, queries or n) for n in lens])
    cu_q = torch.cat((count.new_zeros(1), count.cumsum(0))).int()
    segments = Segments(cu_q, cu, torch.arange(len(lens)).int(), (cu.diff() - count).int(), max_seqlen, max_seqlen,
                        chunk_size)
    return list(attention._own_chunks(heads, 64, torch.empty(sum(lens), heads, 64), segments))


def test_what_is_not_there_is_not_visited():
    assert len(batches_of((100,), 131_072, 131_072)) == 1
    assert len(batches_of((16_000,), 16_000, 16_000, queries=1)) <= 4
    assert batches_of((), 0, 16) == batches_of((0,), 0, 16) == []


def test_short_runs_are_not_padded_to_long_ones():
    batches = batches_of((*[16] * 300, 9000), 9000, 4096)
    short = [batch for batch in batches if batch.keys.shape[1] <= 16]
    assert sum(batch.rows.numel() for batch in short) == 300 * 16 * 4 and all(batch.padded is None for batch in short)


@pytest.mark.parametrize("chunk_size", (1, 4))
def test_rows_in_memory_are_bounded(chunk_size):
    """Beside small chunks, what is gathered is larger than the scores."""
    case = Case((3000,), chunk_size, 3, heads=8, kv_heads=2)
    q, k, v, *_ = case.tensors()
    selected = torch_stages.gate(q, torch_stages.chunk_means(k, case.segments()), case.segments(), 3)
    batches = list(attention._batches(q, k, 64, selected, case.segments(), None))
    assert all(max(x.numel() for x in (batch.rows, batch.keys)) * 64 <= attention.SCORE_ELEMENTS for batch in batches)


def test_deterministic_is_refused_on_cuda():
    with pytest.raises(ValueError, match="deterministic must be False .* use backend='triton'"):
        get_stages("torch", torch.device("cuda"), deterministic=True)
    assert get_stages("torch", "cuda") is get_stages("torch", "cpu", deterministic=True) is torch_stages


@pytest.mark.parametrize("scale", (300.0, -300.0, 1e-9))
def test_scores_of_any_size(scale):
    """The largest score rises from chunk to chunk, and falls."""
    for rising in (True, False):
        case = Case((90,), 8, 5, heads=4, kv_heads=2)
        q, k, v, do, dlse = case.tensors()
        size = torch.arange(1, 91, dtype=k.dtype)[:, None, None]
        inputs = q, k * (size if rising else size.flip(0)), v, do, dlse, case.segments(), case.topk
        got, want = (results(backend, *inputs, softmax_scale=scale) for backend in ("torch", "reference"))
        assert_close(got[:2], want[:2])
        for name, a, b in zip(NAMES[2:], got[2:], want[2:]):
            assert (a - b).norm() <= 1e-11 * b.norm(), name


def test_the_same_bits_every_time():
    case = Case((700, 333), 32, 4, heads=8, kv_heads=2, head_dim=16, v_dim=16)
    inputs = *case.tensors(torch.float32), case.segments(), case.topk
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = (results("torch", *inputs, deterministic=True) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_gradients_by_differences():
    case = Case((19, 12), 4, 3, heads=4, kv_heads=2, head_dim=3, v_dim=2)
    leaves = [x.requires_grad_() for x in case.tensors()[:3]]
    assert torch.autograd.gradcheck(lambda *x: moba_attn_varlen(
        *x, case.cu_seqlens(), 19, 4, 3, backend="torch", return_lse=True), leaves)
