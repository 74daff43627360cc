"""Chunk means under the interpreter: near the exact mean, and the same bits from block sums made elsewhere."""
import pytest
import torch

from moba_megatron import kernels, reference
from moba_megatron.reference.chunk_means import block_rows
from moba_megatron.segments import Segments

CASES = {
    "chunk a multiple of the block": dict(lengths=[3, 0, 128, 389, 1, 256], chunk=128),
    "chunk not a multiple": dict(lengths=[333, 100], chunk=100),
    "chunk below a block": dict(lengths=[50, 17, 16], chunk=17),
    "long chunk": dict(lengths=[1300], chunk=640, heads=1),
    "D 80, fp16": dict(lengths=[200], chunk=64, dim=80, dtype=torch.float16),
    "D 96, three heads": dict(lengths=[200], chunk=64, heads=3, dim=96),
    "no full chunk": dict(lengths=[20], chunk=64),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_means_and_block_sums(case):
    lengths, chunk = case["lengths"], case["chunk"]
    heads, dim, dtype = case.get("heads", 2), case.get("dim", 32), case.get("dtype", torch.float32)
    segments = Segments.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), chunk)
    k = torch.randn(heads, sum(lengths), 2 * dim).to(dtype)[:, :, :dim].transpose(0, 1)  # strided
    means = kernels.chunk_means(k, segments)
    exact = reference.chunk_means(k.double(), segments)
    # a chain of at most chunk additions in fp32, then one rounding to k's dtype
    bound = chunk * 2 ** -24 * k.double().abs().max() + exact.abs() * torch.finfo(dtype).eps
    assert ((means.double() - exact).abs() <= bound).all()
    starts, counts = block_rows(segments, k.shape[0])
    sums = kernels.block_sums(k.contiguous(), starts.flatten(), counts.flatten()).unflatten(0, starts.shape)
    assert torch.equal(kernels.means_from_block_sums(sums, chunk, dtype), means)


def test_no_runs():
    assert kernels.block_sums(torch.randn(5, 2, 16), torch.empty(0).int(), torch.empty(0).int()).shape == (0, 2, 16)
