"""Key convolution's kernels under the interpreter: values and gradients against the reference in fp64."""
import pytest
import torch

from moba_megatron.kernels import key_convolution as module
from moba_megatron.ops import key_convolution

CASES = {
    "one run": dict(lengths=[70]),
    "ragged, empty": dict(lengths=[1, 0, 33, 2, 64]),
    "several programs a run": dict(lengths=[150, 40], rows=64),
    "five taps, halo": dict(lengths=[3, 50, 1, 33], taps=5, halo=True),
    "halo": dict(lengths=[2, 40], halo=True),
    "odd heads and dims": dict(lengths=[40, 9], heads=3, dim=48, halo=True),
    "fp16": dict(lengths=[40, 9], dtype=torch.float16, halo=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case, monkeypatch):
    lengths, taps, heads, dim = case["lengths"], case.get("taps", 3), case.get("heads", 2), case.get("dim", 16)
    dtype = case.get("dtype", torch.float32)
    monkeypatch.setattr(module, "ROWS", case.get("rows", module.ROWS))
    total = sum(lengths)
    k = torch.randn(heads, total, 2 * dim).to(dtype)[:, :, :dim].transpose(0, 1)  # strided
    weight = torch.randn(heads, taps, dim)
    halo = torch.randn(len(lengths), taps - 1, heads, dim).to(dtype) if case.get("halo") else None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    dout = torch.randn(total, heads, dim).to(dtype)
    results = {}
    for name, backend, wide in (("kernels", "triton", None), ("exact", "reference", torch.float64)):
        leaves = [x.detach().to(wide or x.dtype).requires_grad_() for x in (k, weight, halo) if x is not None]
        out = key_convolution(*leaves[:2], cu_seqlens, *leaves[2:], backend=backend)
        results[name] = [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]
    # a few fp32 operations and one rounding to the dtype; the weight's gradient is a sum over all rows
    bound = 2 * torch.finfo(dtype).eps + 2e-6
    for got, exact in zip(results["kernels"], results["exact"]):
        assert (got.double() - exact).abs().max() <= bound * max(1.0, exact.abs().max().item())


def test_nothing():
    k = torch.zeros(0, 2, 16, requires_grad=True)
    out = key_convolution(k, torch.zeros(2, 3, 16), torch.tensor([0, 0], dtype=torch.int32), backend="triton")
    assert out.shape == (0, 2, 16)
    out.sum().backward()
