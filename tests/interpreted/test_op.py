"""The public operator on interpreted kernels: against fp64, and its gradient against finite differences."""
import importlib

import pytest
import torch

import comparison
from moba_megatron import moba_attn_varlen
from moba_megatron.kernels.workspace import head_groups

CASES = {
    "one sequence, gqa": dict(lengths=[150], chunk=32, topk=3, heads=4, kv_heads=2),
    "packed, ragged, empty": dict(lengths=[0, 1, 17, 90, 0, 40], chunk=16, topk=3),
    "chunk not a power of two": dict(lengths=[131], chunk=20, topk=3),
    "own chunk only": dict(lengths=[70, 30], chunk=32, topk=1),
    "every chunk fits: dense": dict(lengths=[60], chunk=20, topk=3),
    "more than 32 chunks": dict(lengths=[16 * 35 + 3], chunk=16, topk=3, heads=1, kv_heads=1),
    "D 24, DV 16, mqa": dict(lengths=[100], chunk=32, topk=2, heads=3, kv_heads=1, dim=24, dim_v=16),
    "fp16": dict(lengths=[120], chunk=32, topk=3, dtype=torch.float16),
}


def make(lengths, chunk, topk, heads=2, kv_heads=1, dim=16, dim_v=None, dtype=torch.float32):
    total = sum(lengths)

    def normal(*shape):
        return torch.randn(total, *shape).to(dtype)

    q, k, v, do = normal(heads, dim), normal(kv_heads, dim), normal(kv_heads, dim_v or dim), normal(heads, dim_v or dim)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return q, k, v, do, torch.randn(total, heads), (cu_seqlens, max(lengths), chunk, topk)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(case):
    comparison.check_operator(*make(**case))


def test_gradient_against_finite_differences():
    """Along one random direction for each input; the selection, which has no gradient, must stay the same meanwhile."""
    q, k, v, do, dlse, arguments = make([50], chunk=16, topk=2)
    step, inputs = 2e-2, dict(q=q, k=k, v=v)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def loss(q, k, v):
        o, lse = moba_attn_varlen(q, k, v, *arguments, backend="triton", return_lse=True)
        return (o.double() * do).sum() + (lse.double() * dlse).sum()

    grads = dict(zip(inputs, torch.autograd.grad(loss(*leaves), leaves)))
    inputs = {name: x.detach() for name, x in inputs.items()}
    chosen = comparison.selection(inputs["q"], inputs["k"], *arguments)[0].sort(2).values
    for name, x in inputs.items():
        direction = torch.randn_like(x)
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            moved = {**inputs, name: x + sign * step * direction}
            assert torch.equal(comparison.selection(moved["q"], moved["k"], *arguments)[0].sort(2).values, chosen)
            values.append(loss(**moved))
        slope = ((values[0] - values[1]) / (2 * step)).item()
        # the rounding of fp32 results over the step, and the third derivative
        assert (grads[name] * direction).sum().item() == pytest.approx(slope, abs=2e-3, rel=2e-3), name


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_upstream_gradient_of_lse_alone(deterministic):
    q, k, v, _, dlse, arguments = make([60], chunk=16, topk=3)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grads = []
    for backend in ("triton", "reference"):
        _, lse = moba_attn_varlen(*leaves, *arguments, backend=backend, return_lse=True, deterministic=deterministic)
        grads.append(torch.autograd.grad(lse, leaves, dlse))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_workspace_argument_bounds_the_heads_of_a_pass(monkeypatch):
    q, k, v, do, _, arguments = make([100], chunk=32, topk=2, heads=4, kv_heads=4)
    groups = []
    for name in ("attention_fwd", "attention_bwd"):
        module = importlib.import_module(f"moba_megatron.kernels.{name}")
        monkeypatch.setattr(module, "head_groups", lambda *args: groups.append(head_groups(*args)) or groups[-1])
    results = []
    for workspace_mib in (None, 0.001):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = moba_attn_varlen(*leaves, *arguments, backend="triton", workspace_mib=workspace_mib)
        results.append([o, *torch.autograd.grad(o, leaves, do)])
    assert [len(g) for g in groups] == [1, 1, 4, 4]
    for a, b in zip(*results):
        assert torch.equal(a, b)
