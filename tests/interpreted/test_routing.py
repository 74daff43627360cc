"""Routing under the interpreter: every choice once, in the right row, in order; tiles cover every row once."""
import pytest
import torch

from moba_megatron import reference
from moba_megatron.kernels import routing
from moba_megatron.kernels.routing import make_tiles, route, route_in_tiles, token_groups

CASES = {
    "uniform": dict(tokens=100, heads=2, kv_heads=2, choices=3, num_chunks=7),
    "gqa": dict(tokens=133, heads=4, kv_heads=2, choices=7, num_chunks=40),
    "group of three": dict(tokens=65, heads=6, kv_heads=2, choices=2, num_chunks=5),
    "mqa": dict(tokens=50, heads=4, kv_heads=1, choices=9, num_chunks=70),
    "one choice": dict(tokens=1, heads=1, kv_heads=1, choices=1, num_chunks=1),
    "more chunks than a step is wide": dict(tokens=40, heads=1, kv_heads=1, choices=4, num_chunks=1100),
    "everybody picks the first chunk": dict(tokens=150, heads=2, kv_heads=2, choices=3, num_chunks=9, skewed=True),
    "nobody picks any": dict(tokens=30, heads=2, kv_heads=1, choices=2, num_chunks=4, none=True),
}


def choose(tokens, heads, kv_heads, choices, num_chunks, skewed=False, none=False):
    selected = torch.randint(-1, num_chunks, (tokens, heads, choices), dtype=torch.int32)
    if skewed:
        selected[:, :, 0] = 0
    return selected.fill_(-1) if none else selected


@pytest.mark.parametrize("groups", [1, 3, 1000], ids=lambda n: f"{n} groups at most")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_stable_sort(case, groups, monkeypatch):
    monkeypatch.setattr(routing, "PROGRAMS", groups * case["kv_heads"])
    selected = choose(**case)
    expected = reference.route(selected, case["kv_heads"], case["num_chunks"])
    result = route(selected, case["kv_heads"], case["num_chunks"])
    assert torch.equal(result.indptr, expected.indptr)
    assert torch.equal(result.indices[:expected.indptr[-1]], expected.indices[:expected.indptr[-1]])


@pytest.mark.parametrize("block", [16, 48, 4096])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tiles_cover_each_row_once(case, block):
    """And are the same, made with the routing or by themselves."""
    result, tiles = route_in_tiles(choose(**case), case["kv_heads"], case["num_chunks"], block)
    alone = make_tiles(result, block)
    for name in ("csr_row", "begin", "end", "indptr"):
        assert torch.equal(getattr(alone, name), getattr(tiles, name))
    starts = result.indptr.tolist()
    covered = torch.zeros(starts[-1], dtype=torch.int32)
    for tile, (row, begin, end) in enumerate(zip(tiles.csr_row.tolist(), tiles.begin.tolist(), tiles.end.tolist())):
        if begin < end:
            assert starts[row] <= begin and end <= starts[row + 1] and end - begin <= block
            assert tiles.indptr[row] <= tile < tiles.indptr[row + 1]
            covered[begin:end] += 1
    assert (covered == 1).all()
    assert tiles.csr_row.numel() == result.indices.numel() // block + result.num_csr_rows >= tiles.indptr[-1]


def test_no_choices_at_all():
    result, tiles = route_in_tiles(torch.empty(10, 2, 0, dtype=torch.int32), 2, 3, 64)
    assert result.indices.numel() == 0 and result.indptr.tolist() == [0] * 7
    assert (tiles.begin >= tiles.end).all()


@pytest.mark.parametrize("tokens, kv_heads, num_chunks", [(1 << 20, 32, 8193), (1 << 17, 16, 1025), (8192, 1, 17)])
def test_counters_stay_small(tokens, kv_heads, num_chunks):
    limit = (64 << 20) // (4 * kv_heads * num_chunks)
    groups, size = token_groups(tokens, 10, min(routing.PROGRAMS // kv_heads, limit))
    assert groups * size >= tokens > (groups - 1) * size
    assert groups * kv_heads * num_chunks * 4 <= 64 << 20


def test_numbers_of_choices_beyond_32_bits():
    """The entries' dtype follows from the shape; meta tensors hold no memory."""
    tokens, heads, choices = 1 << 21, 32, 63
    assert tokens * heads * choices >= 2 ** 31
    assert routing.index_dtype(tokens * heads * choices) == torch.int64
    assert routing.index_dtype((1 << 20) * heads * choices) == torch.int32
