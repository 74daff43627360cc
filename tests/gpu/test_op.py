"""The public operator on a GPU: values, gradients, compilation, checkpointing, graphs, determinism, memory, length."""
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import comparison
from benchmarks import oracle
from moba_megatron import moba_attn_varlen
from moba_megatron.kernels import launcher

pytestmark = pytest.mark.gpu
GIB = 2 ** 30

CASES = {
    "one sequence": dict(lengths=[1024], chunk=64, topk=3),
    "gqa": dict(lengths=[1024], chunk=128, topk=3, heads=8, kv_heads=2),
    "mqa": dict(lengths=[700], chunk=64, topk=4, heads=6, kv_heads=1),
    "packed, ragged, empty": dict(lengths=[0, 1, 17, 700, 0, 333], chunk=48, topk=3, kv_heads=2),
    "chunk not a power of two": dict(lengths=[1111], chunk=100, topk=4),
    "smallest chunk": dict(lengths=[600], chunk=16, topk=8),
    "257 chunks": dict(lengths=[257 * 16 - 5], chunk=16, topk=16, heads=2, kv_heads=1),
    "topk 64": dict(lengths=[2000], chunk=16, topk=64, heads=2, kv_heads=2),
    "own chunk only": dict(lengths=[512, 100], chunk=64, topk=1),
    "shorter than a chunk": dict(lengths=[100], chunk=512, topk=3),
    "every chunk fits: dense": dict(lengths=[512], chunk=128, topk=4),
    "large chunk": dict(lengths=[2500], chunk=700, topk=2),
    "D 4, DV 12": dict(lengths=[600], chunk=64, topk=3, dim=4, dim_v=12),
    "D 8": dict(lengths=[600], chunk=64, topk=3, dim=8),
    "D 8, chunk 512": dict(lengths=[1500], chunk=512, topk=2, dim=8),
    "fp32, D 8": dict(lengths=[600], chunk=16, topk=3, dim=8, dtype=torch.float32),
    "D 32": dict(lengths=[600], chunk=64, topk=3, dim=32),
    "D 80": dict(lengths=[600], chunk=64, topk=3, dim=80),
    "D 96": dict(lengths=[600], chunk=64, topk=3, dim=96),
    "D 128": dict(lengths=[1200], chunk=128, topk=3, dim=128),
    "D 128, chunk 512": dict(lengths=[3000], chunk=512, topk=3, dim=128, heads=2, kv_heads=1),
    "D 192, DV 128": dict(lengths=[600], chunk=64, topk=3, dim=192, dim_v=128),
    "D 256": dict(lengths=[600], chunk=64, topk=3, dim=256),
    "fp16": dict(lengths=[1000], chunk=64, topk=3, dtype=torch.float16),
    "fp16, D 128": dict(lengths=[1000], chunk=128, topk=3, dim=128, dtype=torch.float16),
    "fp32": dict(lengths=[700], chunk=64, topk=3, dtype=torch.float32),
    "fp32, D 128": dict(lengths=[700], chunk=128, topk=3, dim=128, dtype=torch.float32),
}


def make(lengths, chunk, topk, heads=4, kv_heads=4, dim=64, dim_v=None, dtype=torch.bfloat16):
    """q, k, v, do, dlse, and the arguments of the call that follow q, k, v."""
    total = sum(lengths)

    def normal(*shape):
        return torch.randn(total, *shape, device="cuda", dtype=dtype)

    q, k, v, do = normal(heads, dim), normal(kv_heads, dim), normal(kv_heads, dim_v or dim), normal(heads, dim_v or dim)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    return q, k, v, do, torch.randn(total, heads, device="cuda"), (cu_seqlens, max(lengths), chunk, topk)


def gradients(q, k, v, do, arguments, **options):
    """o, dq, dk, dv of the operator."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = moba_attn_varlen(*leaves, *arguments, backend="triton", **options)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(case, deterministic):
    comparison.check_operator(*make(**case), deterministic=deterministic)


@pytest.mark.parametrize("chunk, topk, tokens", [(16, 8, 1 << 16), (128, 8, 1 << 16), (512, 3, 1 << 15)],
                         ids=["4096 chunks", "512 chunks", "64 chunks"])
def test_selection_and_values_at_length(chunk, topk, tokens):
    q, k, v, do, _, arguments = make([tokens], chunk, topk, heads=4, kv_heads=2, dim=128)
    o, *grads = gradients(q, k, v, do, arguments)
    problem = oracle.Problem(q, k, v, do, comparison.selection(q, k, *arguments)[0], chunk, 128 ** -0.5)
    assert oracle.check_selection(problem, topk)["wrong"] == 0
    for name, error in oracle.check_values(problem, o, None, *grads).items():
        assert error["error"] <= error["limit"], f"{name}: {error}"


def test_views_of_a_fused_projection_give_the_same_bits():
    q, k, v, do, _, arguments = make([0, 500, 524], 64, 3, heads=4, kv_heads=2)
    fused = torch.cat((q, k, v), 1)
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    for a, b in zip(gradients(q, k, v, do, arguments, deterministic=True),
                    gradients(*views, do.transpose(0, 1).contiguous().transpose(0, 1), arguments, deterministic=True)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk, topk", [(128, 8), (512, 3)])
def test_twenty_deterministic_runs_are_bitwise_equal(chunk, topk):
    q, k, v, do, _, arguments = make([8000], chunk, topk, heads=8, kv_heads=2, dim=128)
    first = gradients(q, k, v, do, arguments, deterministic=True)
    for _ in range(19):
        for a, b in zip(first, gradients(q, k, v, do, arguments, deterministic=True)):
            assert torch.equal(a, b)


def test_calls_in_turn_give_what_each_gives_alone():
    """Launches are prepared where a call repeats an earlier one (kernels/launcher.py)."""
    q, k, v, do, _, arguments = make([300, 724], 64, 3, heads=4, kv_heads=2, dim=128)

    def shifted(x):  # no longer aligned to 16 bytes
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    calls = {
        "plain": (q, k, v, do, arguments),
        "unaligned": (*(shifted(x) for x in (q, k, v, do)), arguments),
        "q unaligned": (shifted(q), k, v, do, arguments),
        "other strides": (q.transpose(0, 1).contiguous().transpose(0, 1), k, v, do, arguments),
        "other lengths": (q, k, v, do, (torch.tensor([0, 1000, 1024], dtype=torch.int32, device="cuda"), 1000, 64, 3)),
        "other chunks": (q, k, v, do, (arguments[0], 724, 48, 4)),
    }
    alone = {}
    for name, call in calls.items():
        launcher._plans.clear()
        alone[name] = gradients(*call, deterministic=True)
    for _ in range(3):
        for name, call in calls.items():
            for a, b in zip(alone[name], gradients(*call, deterministic=True)):
                assert torch.equal(a, b), name


class Layer(torch.nn.Module):
    """A projection, the operator, and a projection back."""

    def __init__(self, arguments, deterministic=True):
        super().__init__()
        self.arguments, self.deterministic = arguments, deterministic
        self.qkv = torch.nn.Linear(256, (4 + 2 + 2) * 64, device="cuda", dtype=torch.bfloat16)
        self.out = torch.nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(1, (8, 64)).split((4, 2, 2), 1)
        o = moba_attn_varlen(q, k, v, *self.arguments, backend="triton", deterministic=self.deterministic)
        return x + self.out(o.flatten(1))


def _layer_and_input():
    arguments = (torch.tensor([0, 700, 1024], dtype=torch.int32, device="cuda"), 700, 64, 3)
    return Layer(arguments), torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16)


def _run(function, layer, x):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))


def test_torch_compile_in_one_graph():
    layer, x = _layer_and_input()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for eager, fused in zip(_run(layer, layer, x), _run(compiled, layer, x)):
        assert comparison.relative_error(fused, eager.double()) < 2e-2  # fused projections round elsewhere


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    layer, x = _layer_and_input()
    plain = _run(layer, layer, x)
    again = _run(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer, x) if not use_reentrant else \
        _reentrant(layer, x)
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


def _reentrant(layer, x):
    """The reentrant variant supports .backward() only."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = checkpoint(layer, x, use_reentrant=True)
    y.float().square().sum().backward()
    return y.detach(), x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("chunk, topk, dim", [(128, 8, 128), (512, 3, 128), (64, 3, 64), (64, 1, 64)])
def test_cuda_graph_of_forward_and_backward(chunk, topk, dim):
    """Captured once, replayed on fresh values and fresh sequence lengths, equal to eager bit for bit."""
    def fresh(lengths):
        return make(lengths, chunk, topk, heads=4, kv_heads=2, dim=dim)

    q, k, v, do, _, arguments = fresh([3000, 1000])
    arguments = (arguments[0], 4000, *arguments[2:])

    def run():
        return gradients(q, k, v, do, arguments, deterministic=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for lengths in ([3000, 1000], [1, 3999], [4000, 0], [2000, 2000]):
        for static, new in zip((q, k, v, do, arguments[0]), (*fresh(lengths)[:4], fresh(lengths)[5][0])):
            static.copy_(new)
        graph.replay()
        for a, b in zip(captured, run()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("chunk, topk", [(128, 8), (512, 3), (512, 1)])
def test_the_host_never_waits(chunk, topk, deterministic):
    q, k, v, do, _, arguments = make([3000, 0, 1096], chunk, topk, kv_heads=2, dim=128)
    gradients(q, k, v, do, arguments, deterministic=deterministic)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(q, k, v, do, arguments, deterministic=deterministic)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _extra_peak(q, k, v, do, arguments, **options):
    gradients(q, k, v, do, arguments, **options)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = gradients(q, k, v, do, arguments, **options)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("chunk, topk", [(128, 8), (512, 8)])
def test_peak_memory_respects_the_workspace_limit(monkeypatch, chunk, topk, deterministic):
    tokens, heads = 1 << 15, 16
    q, k, v, do, _, arguments = make([tokens], chunk, topk, heads=heads, kv_heads=heads, dim=128)
    indices = tokens * heads * (topk - 1) * 4
    peaks, results = {}, {}
    for mib in (64, 2048):
        monkeypatch.setenv("MOBA_WORKSPACE_MIB", str(mib))
        peaks[mib], results[mib] = _extra_peak(q, k, v, do, arguments, deterministic=deterministic)
        kept = sum(x.numel() * x.element_size() for x in results[mib]) + 4 * indices + 8 * tokens * heads * 4
        assert peaks[mib] <= kept + (mib << 20) + (64 << 20), f"{peaks[mib] / GIB:.2f} GiB at a limit of {mib} MiB"
    assert peaks[64] < peaks[2048]
    if deterministic:
        for a, b in zip(results[64], results[2048]):
            assert comparison.relative_error(a, b.double()) < 1e-2


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_dense_attention_takes_any_scale(scale):
    """Other implementations scale what they have masked with -inf."""
    q, k, v, *_, arguments = make([512], 512, 1)
    o = moba_attn_varlen(q, k, v, *arguments, softmax_scale=scale)
    want = moba_attn_varlen(*(x.double() for x in (q, k, v)), *arguments, softmax_scale=scale, backend="reference")
    assert comparison.relative_error(o, want) < 1e-2


def test_one_million_tokens():
    """1M tokens, 32:8 heads of 128, chunk 4096, topk 12: row, choice and element numbers exceed 2^31."""
    tokens, chunk, topk = 1 << 20, 4096, 12
    if torch.cuda.get_device_properties(0).total_memory < 100 * GIB:
        pytest.skip("needs about 80 GiB")
    q, k, v, do, _, arguments = make([tokens], chunk, topk, heads=32, kv_heads=8, dim=128)
    o, *grads = gradients(q, k, v, do, arguments)
    selected = comparison.selection(q, k, *arguments)[0]
    problem = oracle.Problem(q, k, v, do, selected, chunk, 128 ** -0.5)
    assert oracle.check_selection(problem, topk)["wrong"] == 0
    for name, error in oracle.check_values(problem, o, None, *grads, chunks=[230, 255]).items():
        assert error["error"] <= error["limit"], f"{name}: {error}"
