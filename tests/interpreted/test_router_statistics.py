"""The router's statistics by the kernels under the interpreter: the counts of torch, the recall of fp64."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
from moba_megatron import MoBAConfig  # noqa: E402
from moba_megatron.inspect.choices import look  # noqa: E402
from moba_megatron.inspect.statistics import Places, tally  # noqa: E402
from moba_megatron.segments import Segments  # noqa: E402

CASES = {
    "one sequence": dict(lengths=[120]),
    "packed, short and empty ones": dict(lengths=[67, 7, 0, 50], chunk=16, topk=4),
    "fp16, D 80, chunk over a tile": dict(lengths=[320], chunk=100, topk=3, dim=80, dtype=torch.float16),
    "three heads a group, strided": dict(lengths=[64, 100], heads=6, dim=24, strided=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_agree_with_torch(case):
    lengths, chunk, topk = case["lengths"], case.get("chunk", 32), case.get("topk", 3)
    heads, dim, dtype = case.get("heads", 4), case.get("dim", 16), case.get("dtype", torch.float32)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    segments = Segments.from_cu_seqlens(cu_seqlens, max(lengths), chunk)
    torch.manual_seed(0)
    q, k = (torch.randn(n, sum(lengths), 2 * dim).to(dtype)[:, :, :dim].transpose(0, 1) for n in (heads, 2))
    if not case.get("strided"):
        q, k = q.contiguous(), k.contiguous()
    module = SimpleNamespace(layer_number=1, selector=None, softmax_scale=0.3,
                             moba_config=MoBAConfig(chunk_size=chunk, topk=topk, backend="triton"))
    choices = look(module, q, k, segments)
    assert choices.fused
    exact = dataclasses.replace(choices, q=q.double(), k=k.double(), fused=False)
    places = Places.of(choices, 50)
    mine, other = tally(choices, places), tally(exact, places)
    assert torch.equal(mine.chosen, other.chosen) and mine.chosen.sum() > 0
    assert mine.recall.dtype == torch.float32 and other.recall.dtype == torch.float64
    seen = places.weight > 0
    assert seen.any()
    # scores of at most 10 in magnitude, each with a relative error of a few dozen units of 2^-24
    assert (mine.recall - other.recall)[seen].abs().max() < 1e-4

    rows = torch.arange(sum(lengths)) % 4 - 1  # by groups, as a trace counts
    assert torch.equal(choices.counts(rows, 3), exact.counts(rows, 3))
