"""flash-attn 4, where installed, as a dense kernel: values, determinism, graphs."""
import pytest
import torch

import comparison
from moba_megatron.ops import flash_attn_4
from moba_megatron.ops.dense import dense_causal, dense_causal_bwd
from moba_megatron.ops.flash_attn_4 import Variant
from moba_megatron.segments import Segments

pytestmark = pytest.mark.gpu

CASES = {
    "ragged": dict(lengths=[500, 0, 1024, 3, 0]),
    "gqa": dict(lengths=[700, 333], heads=8, kv_heads=2),
    "mqa, D 64": dict(lengths=[700, 333], heads=6, kv_heads=1, dim=64),
    "D 80, fp16": dict(lengths=[1000, 24], dim=80, dtype=torch.float16),
    "D 192, DV 128": dict(lengths=[900, 100], dim=192, dim_v=128),
    "D 256": dict(lengths=[900, 100], dim=256),
}


def make(lengths, heads=4, kv_heads=4, dim=128, dim_v=None, dtype=torch.bfloat16):
    """q, k, v, do; k and v are views of one projection; and cu_seqlens, max_seqlen, scale."""
    dim_v = dim_v or dim
    q, kv, do = (torch.randn(sum(lengths), *shape, device="cuda").to(dtype)
                 for shape in ((heads, dim), (kv_heads, dim + dim_v), (heads, dim_v)))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    return q, kv[..., :dim], kv[..., dim:], do, (cu_seqlens, max(lengths), 0.11)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The only dense kernel; skipped where it is not installed."""
    if flash_attn_4.module() is None:
        pytest.skip("flash-attn 4 is not installed")
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("MOBA_DENSE", "fa4")


def skip_unless_it_fits(q, k, v, **options):
    variant = Variant(q.device, q.dtype, q.shape[2], v.shape[2], q.shape[1] // k.shape[1], **options)
    if not flash_attn_4.fits(torch.cuda.get_device_capability(), variant):
        pytest.skip("flash-attn 4 does not take these sizes on this card")


@pytest.mark.parametrize("with_dlse", [False, True], ids=["o", "o and lse"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_good_as_eager(case, with_dlse):
    q, k, v, do, place = make(**case)
    skip_unless_it_fits(q, k, v, with_dlse=with_dlse)
    dlse = torch.randn(q.shape[:2], device="cuda") if with_dlse else None
    o, lse = dense_causal(q, k, v, *place)
    grads = dense_causal_bwd(do, dlse, q, k, v, o, lse, *place)
    mask = comparison.dense_mask(q.new_empty(*q.shape[:2], 0).int(),
                                 Segments.from_cu_seqlens(*place[:2], place[1]), q.shape[0], q.shape[0])
    exact, eager = (comparison.attend(q, k, v, do, dlse, mask, place[2], dtype) for dtype in (torch.float64, q.dtype))
    got = dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *grads)))
    assert all(x.is_contiguous() for x in got.values())
    comparison.assert_as_good_as_eager(got, exact, eager, q.dtype)


def test_deterministic_gradients():
    q, k, v, do, place = make(lengths=[4000, 1, 2000], heads=8, kv_heads=2)
    skip_unless_it_fits(q, k, v, deterministic=True)
    o, lse = dense_causal(q, k, v, *place)
    first, *others = (dense_causal_bwd(do, None, q, k, v, o, lse, *place, deterministic=True) for _ in range(20))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other))


def test_in_a_graph():
    """What has been checked and compiled is captured, and replayed on other inputs."""
    q, k, v, do, place = make(lengths=[1000, 500])
    skip_unless_it_fits(q, k, v)

    def compute():
        o, lse = dense_causal(q, k, v, *place)
        return o, lse, *dense_causal_bwd(do, None, q, k, v, o, lse, *place, deterministic=False)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        compute()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = compute()
    q.normal_(), do.normal_()
    graph.replay()
    for name, ours, eager in zip(("o", "lse", "dq", "dk", "dv"), captured, compute()):
        assert comparison.relative_error(ours, eager.double()) < 0.01, name  # dq's sums in another order
