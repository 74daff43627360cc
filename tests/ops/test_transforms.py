"""The operator under torch.func, second and batched gradients, and the FLOP counter: right, or refused by name."""
import oracle
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moba_megatron import moba_attn_varlen
from moba_megatron.ops import causal_attn_varlen, moba_attention
from moba_megatron.ops.decode import moba_decode
from moba_megatron.segments import Segments

LENGTHS, CHUNK, TOPK = (13, 0, 1, 6), 4, 2
TOTAL, H, HK, D, DV = sum(LENGTHS), 4, 2, 3, 5
CU = torch.tensor([0, *LENGTHS]).cumsum(0).int()


def make(*batch):
    return [torch.randn(*batch, TOTAL, heads, dim, dtype=torch.float64) for heads, dim in ((H, D), (HK, D), (HK, DV))]


def attend(q, k, v):
    return moba_attn_varlen(q, k, v, CU, 13, CHUNK, TOPK)


def loss(q, k, v):
    return (attend(q, k, v) * torch.arange(DV)).square().sum()


def gradients(q, k, v):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(loss(*leaves), leaves)


def assert_all_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_grad():
    qkv = make()
    assert_all_close(torch.func.grad(loss, argnums=(0, 1, 2))(*qkv), gradients(*qkv))
    assert_all_close([torch.func.grad(lambda v: loss(qkv[0], qkv[1], v))(qkv[2])], gradients(*qkv)[2:])


def test_vjp_and_jacrev():
    """Of the output, linear in v: the Jacobian times v is the output."""
    q, k, v = make()
    o, pullback = torch.func.vjp(attend, q, k, v)
    do = torch.randn_like(o)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert_all_close(pullback(do), torch.autograd.grad(attend(*leaves), leaves, do))
    jacobian = torch.func.jacrev(attend, argnums=2)(*(x.detach() for x in (q, k, v)))
    torch.testing.assert_close(torch.tensordot(jacobian, v.detach(), 3), o)


@pytest.mark.parametrize("in_dims", ((0, 0, 0), (0, None, 1), (None, None, 2)))
def test_vmap(in_dims):
    q, k, v = (x if dim is None else x.movedim(0, dim) for x, dim in zip(make(3), in_dims))
    q, k, v = (x[0] if dim is None else x for x, dim in zip((q, k, v), in_dims))
    each = [[x if dim is None else x.select(dim, i) for x, dim in zip((q, k, v), in_dims)] for i in range(3)]
    torch.testing.assert_close(torch.vmap(attend, in_dims)(q, k, v), torch.stack([attend(*x) for x in each]))
    assert_all_close(torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims)(q, k, v),
                     map(torch.stack, zip(*(gradients(*x) for x in each))))


def test_gradients_of_a_vmap():
    leaves = [x.requires_grad_() for x in make(2)]
    got = torch.autograd.grad(torch.vmap(loss)(*leaves).sum(), leaves)
    assert_all_close(got, map(torch.stack, zip(*(gradients(*x) for x in zip(*leaves)))))


def test_batched_gradients():
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    leaves = [x.requires_grad_() for x in make()]
    o = attend(*leaves)
    do = torch.randn(3, *o.shape, dtype=o.dtype)
    got = torch.autograd.grad(o, leaves, do, is_grads_batched=True, retain_graph=True)
    assert_all_close(got, map(torch.stack, zip(*(torch.autograd.grad(o, leaves, x, retain_graph=True) for x in do))))


FORWARD_MODE = {
    "jvp": lambda q, k, v: torch.func.jvp(attend, (q, k, v), (q, k, v)),
    "jvp of v": lambda q, k, v: torch.func.jvp(lambda v: attend(q, k, v), (v,), (v,)),
    "jacfwd": lambda q, k, v: torch.func.jacfwd(attend, argnums=1)(q, k, v),
    "hessian": lambda q, k, v: torch.func.hessian(loss)(q, k, v),
    "vmap of jvp": lambda q, k, v: torch.vmap(lambda t: torch.func.jvp(lambda v: attend(q, k, v), (v,), (t,)))(v[None]),
    "jvp of vmap": lambda q, k, v: torch.func.jvp(lambda v: torch.vmap(lambda v: attend(q, k, v))(v), (v[None],),
                                                  (v[None],)),
    "dual numbers": lambda q, k, v: _dual(q, k, v),
    "compiled": lambda q, k, v: torch.compile(lambda v: torch.func.jvp(lambda v: attend(q, k, v), (v,), (v,)),
                                              backend="eager")(v),
    "linearize": lambda q, k, v: torch.func.linearize(lambda v: attend(q, k, v), v),
    "dual numbers, counted": lambda q, k, v: _counted_dual(q, k, v),
    "dual numbers, compiled": lambda q, k, v: _dual(q, k, v, torch.compile(attend, backend="eager")),
    "dual numbers, compiled before": lambda q, k, v: _dual(q, k, v, _compiled(q, k, v)),
}


def _dual(q, k, v, attend=attend):
    with torch.autograd.forward_ad.dual_level():
        attend(q, k, torch.autograd.forward_ad.make_dual(v, v))


def _counted_dual(q, k, v):
    with FlopCounterMode(display=False):
        _dual(q, k, v)


def _compiled(q, k, v):
    compiled = torch.compile(attend, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
    return compiled


@pytest.mark.parametrize("call", FORWARD_MODE.values(), ids=FORWARD_MODE.keys())
def test_forward_mode_is_refused_by_name(call):
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation .* of MoBA attention"):
        call(*make())


def test_constants_beside_dual_numbers_are_not_refused():
    qkv = make()
    with torch.autograd.forward_ad.dual_level(), FlopCounterMode(display=False):
        got = attend(*qkv)
    torch.testing.assert_close(got, attend(*qkv))


def _decode(q, k=torch.randn(1, 8, HK, D)):
    return moba_decode(q, k, k, k[:, :2].clone(), torch.tensor([8], dtype=torch.int32), CHUNK, TOPK)


FORWARD_MODE_OF_DECODE = {
    "jvp": lambda q: torch.func.jvp(_decode, (q,), (q,)),
    "jvp, compiled": lambda q: torch.func.jvp(torch.compile(_decode, backend="eager"), (q,), (q,)),
    "linearize": lambda q: torch.func.linearize(_decode, q),
    "dual numbers": lambda q: _dual(None, None, q, lambda q, k, dual: _decode(dual)),
}


@pytest.mark.parametrize("call", FORWARD_MODE_OF_DECODE.values(), ids=FORWARD_MODE_OF_DECODE.keys())
def test_forward_mode_of_decode_is_refused_by_name(call):
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation .* of moba_decode"):
        call(torch.randn(1, H, D))


@pytest.mark.parametrize("in_dims", ((0, 0, 0), (None, None, 2)))
def test_vmap_over_nothing(in_dims):
    q, k, v = (x.movedim(0, dim) if dim is not None else x[0] for x, dim in zip(make(1), in_dims))
    q, k, v = (x if dim is None else x.narrow(dim, 0, 0) for x, dim in zip((q, k, v), in_dims))
    assert torch.vmap(attend, in_dims)(q, k, v).shape == (0, TOTAL, H, DV)
    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims)(q, k, v)
    assert [x.shape for x in got] == [(0, TOTAL, heads, dim) for heads, dim in ((H, D), (HK, D), (HK, DV))]


@pytest.mark.parametrize("dynamic", (None, True))
def test_scales_of_a_compiled_operator(dynamic):
    """A compiler that has seen two makes the scale symbolic."""
    torch._dynamo.reset()
    qkv = make()

    def scaled(q, k, v, scale):
        return moba_attn_varlen(q, k, v, CU, 13, CHUNK, TOPK, softmax_scale=scale)

    compiled = torch.compile(scaled, backend="eager", fullgraph=True, dynamic=dynamic)
    for scale in (0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(*qkv, scale), scaled(*qkv, scale))


SECOND = {
    "grad of grad": lambda q, k, v: torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v).sum())(q),
    "jacrev of jacrev": lambda q, k, v: torch.func.jacrev(torch.func.jacrev(loss))(q, k, v),
    "create_graph": lambda q, k, v: torch.autograd.grad(loss(q.requires_grad_(), k, v), q, create_graph=True)[0].sum()
    .backward(),
}


@pytest.mark.parametrize("call", SECOND.values(), ids=SECOND.keys())
def test_second_derivatives_are_refused_by_name(call):
    with pytest.raises(RuntimeError, match="second derivatives of MoBA attention are not implemented"):
        call(*make())


def test_compiled_transforms():
    """vmap compiles; derivatives by torch.func run eagerly, or say that they do not compile."""
    torch._dynamo.reset()
    qkv = make(2)
    compiled = torch.compile(torch.vmap(attend), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv), torch.vmap(attend)(*qkv))
    q, k, v = (x[0] for x in qkv)
    assert_all_close(torch.compile(torch.func.grad(loss, argnums=(0, 1, 2)), backend="aot_eager")(q, k, v),
                     gradients(q, k, v))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="over MoBA attention is not implemented"):
        torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(q, k, v)


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def pairs_of(lengths, chunk, topk, q, k):
    """Attended pairs over all heads by the oracle's own mask, and the pairs that the gate must score."""
    mask = oracle.mask_of(oracle.select(q, k, lengths, chunk, topk), lengths, q.shape[1], chunk)
    earlier = [p // chunk for n in lengths for p in range(n)]
    return int(mask.sum()), q.shape[1] * sum(n for n in earlier if n > topk - 1 > 0)


@pytest.mark.parametrize("topk", (1, 2, 3, 9))
def test_flops_are_those_of_the_attended_pairs(topk):
    q, k, v = (x.requires_grad_() for x in make())
    attended, scored = pairs_of(LENGTHS, CHUNK, topk, q, k)
    if topk * CHUNK >= max(LENGTHS):
        scored = 0
    forward = 2 * attended * (D + DV) + 2 * scored * D
    assert counted(lambda: moba_attn_varlen(q, k, v, CU, 13, CHUNK, topk)) == forward
    both = forward + 2 * attended * (3 * D + 2 * DV)
    assert counted(lambda: moba_attn_varlen(q, k, v, CU, 13, CHUNK, topk).sum().backward()) == both
    o = moba_attn_varlen(q, k, v, CU, 13, CHUNK, topk).sum()  # not watched
    assert counted(o.backward) == both - forward


def test_flops_of_dense_attention_and_of_parts_of_sequences():
    q, k, v = make()
    pairs = H * sum(n * (n + 1) // 2 for n in LENGTHS)
    assert counted(lambda: causal_attn_varlen(q, k, v, CU, 13)) == 2 * pairs * (D + DV)
    whole = counted(lambda: moba_attn_varlen(q[:13], k[:13], v[:13], torch.tensor([0, 13]), 13, CHUNK, TOPK))
    parts = 0
    for begin, end in ((0, 5), (5, 13)):
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (end - begin, 13))
        place = Segments(cu_q, cu_k, cu_q[:1], cu_q[:1] + begin, end - begin, 13, CHUNK)
        parts += counted(lambda: moba_attention(q[begin:end], k[:13], v[:13], place, TOPK))
    assert parts == whole


def test_flops_of_fake_tensors_are_those_of_full_sequences():
    cu = torch.arange(3, dtype=torch.int32) * 13
    with FakeTensorMode() as mode:
        q, k, v, fake_cu = (mode.from_tensor(x) for x in (*(torch.randn(26, h, 3) for h in (4, 2, 2)), cu))
        fake = counted(lambda: moba_attn_varlen(q, k, v, fake_cu, 13, CHUNK, TOPK))
    q, k, v = (torch.randn(26, h, 3) for h in (4, 2, 2))
    assert fake == counted(lambda: moba_attn_varlen(q, k, v, cu, 13, CHUNK, TOPK)) > 0
