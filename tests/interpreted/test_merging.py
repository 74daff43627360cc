"""The kernel that merges returned parts, in the interpreter, against plain torch in fp64."""
import pytest
import torch

from moba_megatron.experimental.chunk_attention import add_partials, merge_partials
from moba_megatron.kernels import merging


@pytest.mark.parametrize("tokens, heads, topk, dim, dtype, share", [
    (33, 2, 3, 16, torch.float32, 0.5), (5, 3, 1, 24, torch.float16, 1.0), (70, 1, 7, 128, torch.float32, 0.1),
    (9, 4, 4, 80, torch.float16, 0.0), (1, 1, 2, 8, torch.float32, 1.0)])
def test_parts_are_merged(tokens, heads, topk, dim, dtype, share):
    generator = torch.Generator().manual_seed(tokens)
    there = torch.rand(tokens, heads, topk, generator=generator) < share
    number = int(there.sum())
    places = torch.full(there.shape, -1, dtype=torch.int32)
    places[there] = torch.randperm(number, generator=generator).int()
    o, parts = (torch.randn(*shape, dim, generator=generator).to(dtype) for shape in ((tokens, heads), (number,)))
    lse, lse_parts = (30 * torch.randn(*shape, generator=generator) for shape in ((tokens, heads), (number,)))
    outs = torch.full((2, tokens, heads + 2, dim), torch.nan, dtype=dtype)  # others' heads beside
    merged = torch.full_like(lse, torch.nan)
    merging.merge_parts(o, lse, parts, lse_parts, places, outs[0, :, 1:-1], merged)
    merging.add_parts(o, parts, places, outs[1, :, 1:-1])
    wide = [x.double() for x in (o, lse, parts, lse_parts)]
    expected = torch.empty(2, *o.shape, dtype=torch.float64)
    torch.testing.assert_close(merged.double(), merge_partials(*wide, places, expected[0], False), rtol=1e-6, atol=1e-5)
    add_partials(wide[0], wide[2], places, expected[1], False)
    for out, wanted in zip(outs, expected):
        tolerance = 2e-6 if dtype == torch.float32 else 6e-4
        assert (out[:, 1:-1].double() - wanted).norm() <= tolerance * wanted.norm()
        assert out[:, 0].isnan().all() and out[:, -1].isnan().all()
