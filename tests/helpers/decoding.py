"""Problems for the decoding tests, contiguous and paged, and the checks that interpreter and GPU share."""
import importlib

import torch

import comparison
from moba_megatron import kernels, reference
from moba_megatron.ops.decode import fill_chunk_means, moba_decode

stages = importlib.import_module("moba_megatron.kernels.decode")
oracle_stages = importlib.import_module("moba_megatron.reference.decode")

CASES = {
    "one sequence": dict(lengths=[131], chunk=16, topk=3),
    "gqa, ragged": dict(lengths=[83, 33], chunk=16, topk=4, heads=6, kv_heads=2),
    "mqa": dict(lengths=[100], chunk=16, topk=3, heads=3, kv_heads=1),
    "more heads than a program scores": dict(lengths=[65], chunk=16, topk=3, heads=20),
    "empty, one key, less than a chunk": dict(lengths=[0, 1, 15, 60], chunk=16, topk=3),
    "a chunk ended just before": dict(lengths=[65, 17], chunk=16, topk=3),
    "a chunk ends with the query": dict(lengths=[64, 32, 16], chunk=16, topk=3),
    "chunk 9": dict(lengths=[90, 73], chunk=9, topk=6),
    "chunk 100, several tiles": dict(lengths=[377], chunk=100, topk=3),
    "topk 1": dict(lengths=[70, 33], chunk=32, topk=1),
    "topk beyond the chunks": dict(lengths=[70], chunk=32, topk=6),
    "topk 13": dict(lengths=[90], chunk=5, topk=13),
    "many chunks": dict(lengths=[140], chunk=1, topk=5, heads=1),
    "D 24, DV 20": dict(lengths=[70], chunk=16, topk=3, dim=24, dim_v=20),
    "left padding": dict(lengths=[100, 33], chunk=16, topk=3, starts=[3, 41]),
    "pages": dict(lengths=[50, 33], chunk=16, topk=3, page=8),
    "pages that cut chunks, left padding": dict(lengths=[100, 0, 61], chunk=20, topk=3, page=12, starts=[5, 0, 17]),
    "fp16": dict(lengths=[100, 65], chunk=16, topk=3, dtype=torch.float16),
}


def make(lengths, chunk, topk, heads=2, kv_heads=1, dim=32, dim_v=None, dtype=torch.float32, starts=None, page=0,
         device="cpu", integers=None):
    """q, k_cache, v_cache, lengths, and keyword arguments that place the rows; unused rows are NaN.

    Caches are views as Transformers keeps them, [B, HK, S, D] in memory. Integers, where the means of chunks of them
    are exact, make scores exact and full of ties.
    """
    integers = chunk & (chunk - 1) == 0 if integers is None else integers
    batch, rows = len(lengths), max(n + s for n, s in zip(lengths, starts or [0] * len(lengths))) + 5

    def draw(*shape):
        x = torch.randn(*shape, device=device)
        return (x.round() if integers else x).to(dtype)

    q = draw(batch, heads, dim)
    k, v = draw(batch, kv_heads, rows, dim).transpose(1, 2), draw(batch, kv_heads, rows, dim_v or dim).transpose(1, 2)
    for b, n in enumerate(lengths):
        begin = starts[b] if starts else 0
        for x in (k, v):
            x[b, :begin] = torch.nan
            x[b, begin + n:] = torch.nan
    places = {}
    if starts:
        places["cache_starts"] = torch.tensor(starts, dtype=torch.int32, device=device)
    if page:
        k, v, places["block_table"] = paged(k, v, page)
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device), places


def paged(k, v, page):
    """Contiguous caches as pages in a random order, some of them unused, and the block table."""
    batch, rows = k.shape[:2]
    each = -(-rows // page)
    table = torch.randperm(batch * each + 3)[:batch * each].view(batch, each).to(k.device)
    result = []
    for x in (k, v):
        pages = x.new_full((batch * each + 3, page, *x.shape[2:]), torch.nan)
        padded = x.new_full((batch, each * page, *x.shape[2:]), torch.nan)
        padded[:, :rows] = x
        pages[table.flatten()] = padded.reshape(batch * each, page, *x.shape[2:])
        result.append(pages)
    return *result, table.int()


def empty_means(k, lengths, chunk, places):
    """A means cache of NaN for all rows that the cache may get."""
    table = places.get("block_table")
    rows = k.shape[1] * (1 if table is None else table.shape[1])
    return k.new_full((lengths.numel(), rows // chunk, *k.shape[2:]), torch.nan)


def filled_means(k, lengths, chunk, places, backend):
    """Means as they are before the step: of the chunks that were full without the last key."""
    means = empty_means(k, lengths, chunk, places)
    fill_chunk_means(k, means, torch.clamp(lengths - 1, min=0), chunk, backend=backend, **places)
    return means


def check(q, k, v, lengths, places, chunk, topk):
    """Means, selection, o and lse of the kernels: means to a rounding, selection exactly, values against fp64."""
    means = filled_means(k, lengths, chunk, places, "triton")
    expected = filled_means(k, lengths, chunk, places, "reference")
    o, lse = moba_decode(q, k, v, means, lengths, chunk, topk, backend="triton", return_lse=True, **places)
    selected = oracle_stages.decode_gate(q, k, expected, lengths, chunk, topk, **places)
    assert torch.equal(means.isnan(), expected.isnan())
    torch.testing.assert_close(means, expected, equal_nan=True, rtol=torch.finfo(k.dtype).eps, atol=1e-6)
    got = stages.decode_gate(q, k, means, lengths, chunk, topk, **places)
    assert torch.equal(got.sort(2)[0], selected.sort(2)[0])
    check_values(o, lse, q, k, v, selected, lengths, places, chunk)
    return o, lse


def check_values(o, lse, q, k, v, selected, lengths, places, chunk):
    """o and lse against fp64 over the given selection, with eager's error as the measure."""
    scale, filled = q.shape[2] ** -0.5, lengths > 0
    exact, eager = (oracle_stages.decode_attention(q.to(dtype), k.to(dtype), v.to(dtype), selected, lengths, chunk,
                                                   scale, **places) for dtype in (torch.float64, q.dtype))
    comparison.assert_as_good_as_eager(*(
        {"o": x[filled].double(), "lse": y[filled].double()} for x, y in ((o, lse), exact, eager)), q.dtype)
    assert not o[~filled].any() and (lse[~filled] == -torch.inf).all()


def assert_means_of_training(k, lengths, chunk):
    """fill_chunk_means gives the bits of the training kernels' chunk_means."""
    from moba_megatron.segments import Segments
    means = empty_means(k, lengths, chunk, {})
    for backend, module in (("triton", kernels), ("reference", reference)):
        fill_chunk_means(k, means, lengths, chunk, backend=backend)
        for b, n in enumerate(lengths.tolist()):
            cu = torch.tensor([0, n], dtype=torch.int32, device=k.device)
            expected = module.chunk_means(k[b, :n], Segments.from_cu_seqlens(cu, n, chunk))[:n // chunk]
            assert torch.equal(means[b, :n // chunk], expected)
