"""Chunk means, gate and routing on a GPU: exact against torch at 4096 chunks, near-ties alone where scores are real."""
import pytest
import torch

from moba_megatron import kernels, reference
from moba_megatron.kernels import routing as routing_kernels
from moba_megatron.kernels.routing import make_tiles, route, route_in_tiles
from moba_megatron.reference.chunk_means import block_rows
from moba_megatron.segments import SUM_BLOCK, Segments

pytestmark = pytest.mark.gpu


def packed(lengths, chunk):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    return Segments.from_cu_seqlens(cu_seqlens, max(lengths), chunk)


def earlier_chunks(segments, total):
    """First chunk id and own chunk id of each query's sequence, int64 ``[T]``."""
    sequence, position = segments.query_positions(total)
    first = segments.first_chunk()[sequence]
    return first, first + position // segments.chunk_size


def best_by_key(key, first, own, wanted):
    """Ids of the ``wanted`` largest keys ``[T, chunks]`` among the earlier chunks, sorted, -1 for none."""
    ids = torch.arange(key.shape[1], device=key.device)
    earlier = (ids >= first[:, None]) & (ids < own[:, None])
    value, index = key.masked_fill(~earlier, -2 ** 60).topk(min(wanted, key.shape[1]), dim=1)
    return torch.where(value == -2 ** 60, -1, index).sort(1)[0].int()


@pytest.mark.parametrize("topk", [2, 8, 9, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_4096_chunks_with_ties(topk, dtype):
    """Integer inputs: the scores are exact and full of ties, so the selection must be the very same."""
    if dtype == torch.float32 and topk not in (2, 8):
        pytest.skip("once is enough for the slow products")
    tokens, chunk, heads, kv_heads, dim = 4096 * 16, 16, 4, 2, 64
    segments = packed([tokens - 5000, 0, 7, 4993], chunk)
    q = torch.randint(-2, 3, (tokens, heads, dim), device="cuda").to(dtype)
    means = torch.randint(-2, 3, (segments.num_chunks(tokens), kv_heads, dim), device="cuda").to(dtype)
    selected = kernels.gate(q, means, segments, topk).sort(2)[0]
    first, own = earlier_chunks(segments, tokens)
    ids = torch.arange(means.shape[0], device="cuda")
    for head in range(heads):
        score = (q[:, head].float() @ means[:, head // 2].float().T).round().long()
        assert torch.equal(selected[:, head], best_by_key(score * 8192 + ids, first, own, topk - 1))


@pytest.mark.parametrize("dim", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_scores_differ_by_near_ties_only(dim, dtype):
    tokens, chunk, heads, topk = 30000, 32, 2, 8
    segments = packed([17000, 13000], chunk)
    q = torch.randn(tokens, heads, dim, device="cuda", dtype=dtype)
    k = torch.randn(tokens, heads, dim, device="cuda", dtype=dtype)
    means = kernels.chunk_means(k, segments)
    selected = kernels.gate(q, means, segments, topk)
    first, own = earlier_chunks(segments, tokens)
    ids = torch.arange(means.shape[0], device="cuda")
    earlier = (ids >= first[:, None]) & (ids < own[:, None])
    for head in range(heads):
        a, b = q[:, head].double(), means[:, head].double()
        score = (a @ b.T).masked_fill(~earlier, -torch.inf)
        wanted = score.topk(topk - 1, dim=1)[0]
        chosen = selected[:, head].long()
        assert torch.equal((chosen >= 0).sum(1), wanted.isfinite().sum(1))
        got = score.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, -torch.inf).sort(1, descending=True)[0]
        # an fp32 dot of D terms is off by at most D rounding errors of the largest partial sum
        bound = dim * 2 ** -23 * (a.abs() @ b.abs().T).amax(1, keepdim=True)
        off = torch.where(wanted.isfinite(), (got - wanted).abs(), 0)
        assert (off <= bound).all()
        assert (chosen.sort(1)[0].diff(dim=1)[chosen.sort(1)[0][:, 1:] >= 0] > 0).all()  # no chunk twice


def test_selection_of_a_part_is_that_of_the_whole():
    """Segments with offsets choose what the whole sequence chooses, bit for bit."""
    tokens, chunk, topk = 20000, 64, 8
    q, k = (torch.randn(tokens, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    whole = packed([tokens], chunk)
    means = kernels.chunk_means(k, whole)
    expected = kernels.gate(q, means, whole, topk).sort(2)[0]
    cuts = [0, 1000, 1037, 9000, 9001, tokens]
    int32 = dict(dtype=torch.int32, device="cuda")
    parts = Segments(torch.tensor(cuts, **int32), torch.tensor([0, tokens], **int32),
                     torch.zeros(len(cuts) - 1, **int32), torch.tensor(cuts[:-1], **int32), tokens, tokens, chunk)
    assert torch.equal(kernels.gate(q, means, parts, topk).sort(2)[0], expected)


@pytest.mark.parametrize("chunk, dim, heads", [(128, 128, 16), (512, 128, 1), (100, 80, 3), (64, 96, 2), (1000, 32, 5)])
def test_block_sums_give_the_bits_of_chunk_means(chunk, dim, heads):
    segments = packed([3 * chunk + 5, 1, 0, 7 * chunk], chunk)
    total = int(segments.cu_seqlens_k[-1])
    k = torch.randn(total, 3 * heads, dim, device="cuda", dtype=torch.bfloat16)[:, heads:2 * heads]
    means = kernels.chunk_means(k, segments)
    starts, counts = block_rows(segments, total)
    sums = kernels.block_sums(k.clone(), starts.flatten(), counts.flatten()).unflatten(0, starts.shape)
    assert sums.shape[1] == -(-chunk // SUM_BLOCK)
    assert torch.equal(kernels.means_from_block_sums(sums, chunk, k.dtype), means)
    exact = reference.chunk_means(k.double(), segments)
    assert ((means.double() - exact).abs() <= exact.abs() * 2 ** -8 + 1e-6).all()


@pytest.mark.parametrize("tokens, dtype", [(50000, torch.int32), (49999, torch.int64)], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("skewed", [False, True], ids=["uniform", "all on the first chunk"])
def test_routing(skewed, tokens, dtype, monkeypatch):
    monkeypatch.setattr(routing_kernels, "index_dtype", lambda number: dtype)
    heads, kv_heads, choices, num_chunks = 8, 2, 7, 700
    selected = torch.rand(tokens, heads, num_chunks, device="cuda").topk(choices, dim=2)[1].int()
    if skewed:
        selected[:, :, 0], selected[:, :, 1:] = 0, -1
    routing = route(selected, kv_heads, num_chunks)
    head = torch.arange(heads, device="cuda")[None, :, None] // (heads // kv_heads)
    row = torch.where(selected < 0, kv_heads * num_chunks, head * num_chunks + selected).flatten()
    counts = torch.bincount(row, minlength=kv_heads * num_chunks + 1)[:-1]
    assert routing.indices.dtype == dtype and torch.equal(routing.indptr.diff(), counts.to(dtype))
    used = int(counts.sum())
    indices = routing.indices[:used].long()
    assert torch.equal(indices, row.argsort(stable=True)[:used])
    assert all(torch.equal(route(selected, kv_heads, num_chunks).indices[:used], indices) for _ in range(3))
    again, tiles = route_in_tiles(selected, kv_heads, num_chunks, 64)
    assert torch.equal(again.indptr, routing.indptr) and torch.equal(again.indices[:used], routing.indices[:used])
    alone = make_tiles(routing, 64)
    assert all(torch.equal(getattr(alone, x), getattr(tiles, x)) for x in ("csr_row", "begin", "end", "indptr"))
    covered = torch.zeros(used + 1, dtype=dtype, device="cuda")
    keep = tiles.begin < tiles.end
    covered.scatter_add_(0, tiles.begin[keep].long(), torch.ones_like(tiles.begin[keep]))
    covered.scatter_add_(0, tiles.end[keep].long(), -torch.ones_like(tiles.end[keep]))
    assert (covered.cumsum(0)[:used] == 1).all()
    assert (tiles.end - tiles.begin)[keep].max() <= 64
    row = torch.searchsorted(routing.indptr, tiles.begin[keep], right=True) - 1
    assert torch.equal(row, tiles.csr_row[keep].long())
