"""The public operators as a user meets them: refusals, and their place in torch (compile, checkpoint, gradcheck)."""
import dataclasses
import inspect
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moba_megatron
from moba_megatron import moba_attn_varlen, moba_attn_varlen_triton
from moba_megatron.moba_triton import moba_attn_varlen_triton as by_module_path
from moba_megatron.ops import causal_attn_varlen, get_stages, key_convolution, moba_attention
from moba_megatron.ops.decode import fill_chunk_means, moba_decode
from moba_megatron.segments import Segments

T, H, HK, D, DV = 24, 4, 2, 8, 6
RANDOM = torch.Generator().manual_seed(1)
GOOD = {"q": torch.randn(T, H, D, generator=RANDOM), "k": torch.randn(T, HK, D, generator=RANDOM),
        "v": torch.randn(T, HK, DV, generator=RANDOM),
        "cu_seqlens": torch.tensor([0, 10, 24], dtype=torch.int32), "max_seqlen": 14, "chunk_size": 4, "topk": 2}


def call_moba(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk, **options):
    return moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk, **options)


def call_triton(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk):
    return moba_attn_varlen_triton(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk)


def call_triton_by_keyword(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk):
    return by_module_path(q=q, k=k, v=v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, moba_chunk_size=chunk_size,
                          moba_topk=topk)


def call_dense(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk, **options):
    return causal_attn_varlen(q, k, v, cu_seqlens, max_seqlen, **options)


def call_segments(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk, **options):
    return moba_attention(q, k, v, Segments.from_cu_seqlens(cu_seqlens, max_seqlen, chunk_size), topk, **options)


EVERY_ENTRY = (call_moba, call_triton, call_triton_by_keyword, call_dense, call_segments)
PACKED_ENTRIES = EVERY_ENTRY[:4]
WITH_CHUNKS = EVERY_ENTRY[:3] + EVERY_ENTRY[4:]
WITH_OPTIONS = (call_moba, call_dense, call_segments)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def refusal(error, call, *parts):
    with pytest.raises(error) as raised:
        call()
    for part in parts:
        assert part in str(raised.value), f"{part!r} is not in: {raised.value}"


WRONG_TENSORS = {
    "q is not a tensor": (dict(q=[1.0]), TypeError, "q must be a torch.Tensor", "list"),
    "k is None": (dict(k=None), TypeError, "k must be a torch.Tensor", "NoneType"),
    "q has a batch dimension": (dict(q=torch.randn(1, T, H, D)), ValueError, "q must have 3 dimensions",
                                "[tokens, heads, head_dim]", "(1, 24, 4, 8)"),
    "v is flat": (dict(v=torch.randn(T, HK * DV)), ValueError, "v must have 3 dimensions", "(24, 12)"),
    "q is integer": (dict(q=torch.ones(T, H, D, dtype=torch.int32)), TypeError, "q must be bfloat16", "torch.int32"),
    "q is complex": (dict(q=torch.ones(T, H, D, dtype=torch.complex64)), TypeError, "q must be", "complex64"),
    "k of another dtype": (dict(k=torch.randn(T, HK, D).bfloat16()), TypeError, "k must have q's dtype torch.float32",
                           "torch.bfloat16"),
    "v of another dtype": (dict(v=torch.randn(T, HK, DV).double()), TypeError, "v must have q's dtype torch.float32",
                           "torch.float64"),
    "k on another device": (dict(k=torch.empty(T, HK, D, device="meta")), ValueError, "k must be on q's device cpu",
                            "meta"),
    "v on another device": (dict(v=torch.empty(T, HK, DV, device="meta")), ValueError, "v must be on q's device cpu",
                            "meta"),
    "v has fewer tokens": (dict(v=torch.randn(T - 1, HK, DV)), ValueError, "v must have k's tokens and heads (24, 2)",
                           "(23, 2)"),
    "v has other heads": (dict(v=torch.randn(T, 1, DV)), ValueError, "v must have k's tokens and heads (24, 2)",
                          "(24, 1)"),
    "k has another head_dim": (dict(k=torch.randn(T, HK, D + 1)), ValueError, "k must have q's head_dim 8", "got 9"),
    "heads do not divide": (dict(q=torch.randn(T, 3, D)), ValueError,
                            "q's heads must be a positive multiple of k's heads",
                            "3 and 2"),
    "more kv heads than heads": (dict(q=torch.randn(T, 1, D)), ValueError, "positive multiple of k's heads", "1 and 2"),
    "no heads": (dict(q=torch.randn(T, 0, D)), ValueError, "positive multiple", "0 and 2"),
    "no head_dim": (dict(q=torch.randn(T, H, 0), k=torch.randn(T, HK, 0)), ValueError, "head_dim must be at least 1",
                    "0 for q and k"),
}
WRONG_LENGTHS = {
    "a list": (dict(cu_seqlens=[0, 24]), TypeError, "cu_seqlens must be a torch.Tensor", "list"),
    "float": (dict(cu_seqlens=torch.tensor([0., 24.])), TypeError, "cu_seqlens must be int32", "torch.float32"),
    "bool": (dict(cu_seqlens=torch.tensor([False, True])), TypeError, "cu_seqlens must be int32", "torch.bool"),
    "two dimensions": (dict(cu_seqlens=ints(0, 24)[None]), ValueError, "cu_seqlens must have 1 dimension", "(1, 2)"),
    "no sequence": (dict(cu_seqlens=ints(0)), ValueError, "cu_seqlens must have shape [sequences + 1]", "(1,)"),
    "empty": (dict(cu_seqlens=ints()), ValueError, "cu_seqlens must have shape [sequences + 1]", "(0,)"),
    "another device": (dict(cu_seqlens=ints(0, 24).to("meta")), ValueError, "cu_seqlens must be on q's device cpu",
                       "meta"),
    "starts after 0": (dict(cu_seqlens=ints(1, 24)), ValueError,
                       "cu_seqlens must run from 0 to the number of tokens 24",
                       "got 1 to 24"),
    "negative": (dict(cu_seqlens=ints(-4, 24)), ValueError, "cu_seqlens must run from 0", "got -4 to 24"),
    "negative inside": (dict(cu_seqlens=ints(0, -5, 24)), ValueError, "cu_seqlens must not decrease",
                        "got 0 then -5 at index 1"),
    "ends late": (dict(cu_seqlens=ints(0, 10, 25)), ValueError, "cu_seqlens must run from 0", "got 0 to 25"),
    "decreases": (dict(cu_seqlens=ints(0, 14, 10, 24)), ValueError, "cu_seqlens must not decrease",
                  "got 14 then 10 at index 2"),
    "max_seqlen too small": (dict(max_seqlen=13), ValueError, "max_seqlen must be at least the longest", "14 tokens",
                             "got 13"),
    "max_seqlen negative": (dict(max_seqlen=-1), ValueError, "max_seqlen must be at least 0", "got -1"),
    "max_seqlen beyond int32": (dict(max_seqlen=2 ** 70), ValueError, "max_seqlen must be below 2^31", str(2 ** 70)),
    "max_seqlen float": (dict(max_seqlen=14.0), TypeError, "max_seqlen must be an int", "14.0", "float"),
    "max_seqlen bool": (dict(max_seqlen=True), TypeError, "max_seqlen must be an int", "True", "bool"),
    "max_seqlen text": (dict(max_seqlen="14"), TypeError, "max_seqlen must be an int", "'14'", "str"),
    "max_seqlen tensor": (dict(max_seqlen=torch.tensor(14)), TypeError, "max_seqlen must be an int", "Tensor",
                          ".item()"),
    "int64, ends late": (dict(cu_seqlens=ints(0, 28, dtype=torch.int64)), ValueError, "cu_seqlens must run",
                         "0 to 28"),
}
WRONG_CHUNKS = {
    "chunk 0": (dict(chunk_size=0), ValueError, "chunk_size must be at least 1", "got 0"),
    "chunk negative": (dict(chunk_size=-4), ValueError, "chunk_size must be at least 1", "got -4"),
    "chunk beyond int64": (dict(chunk_size=2 ** 70), ValueError, "chunk_size must be below 2^31", str(2 ** 70)),
    "chunk beyond int32": (dict(chunk_size=2 ** 31), ValueError, "chunk_size must be below 2^31", str(2 ** 31)),
    "topk beyond int32": (dict(topk=2 ** 70), ValueError, "topk must be below 2^31", str(2 ** 70)),
    "chunk float": (dict(chunk_size=4.0), TypeError, "chunk_size must be an int", "4.0", "float"),
    "chunk bool": (dict(chunk_size=True), TypeError, "chunk_size must be an int", "True", "bool"),
    "chunk None": (dict(chunk_size=None), TypeError, "chunk_size must be an int", "None"),
    "topk 0": (dict(topk=0), ValueError, "topk must be at least 1", "got 0"),
    "topk negative": (dict(topk=-2), ValueError, "topk must be at least 1", "got -2"),
    "topk float": (dict(topk=2.0), TypeError, "topk must be an int", "2.0", "float"),
    "topk bool": (dict(topk=True), TypeError, "topk must be an int", "True", "bool"),
}
WRONG_OPTIONS = {
    "scale nan": (dict(softmax_scale=math.nan), ValueError, "softmax_scale must be finite", "nan"),
    "scale inf": (dict(softmax_scale=-math.inf), ValueError, "softmax_scale must be finite", "-inf"),
    "scale beyond all floats": (dict(softmax_scale=10 ** 400), ValueError, "softmax_scale must be finite"),
    "scale text": (dict(softmax_scale="0.1"), TypeError, "softmax_scale must be a float or None", "'0.1'"),
    "scale bool": (dict(softmax_scale=True), TypeError, "softmax_scale must be a float or None", "True"),
    "backend unknown": (dict(backend="cuda"), ValueError, "backend must be one of auto, triton, torch, ",
                        "'cuda'"),
    "backend None": (dict(backend=None), ValueError, "backend must be one of", "None"),
    "workspace text": (dict(workspace_mib="64"), TypeError, "workspace_mib must be a number of MiB or None", "'64'"),
    "workspace beyond all floats": (dict(workspace_mib=10 ** 400), ValueError, "workspace_mib must be a positive"),
    "workspace zero": (dict(workspace_mib=0), ValueError, "workspace_mib must be a positive number", "0"),
    "deterministic text": (dict(deterministic="no"), TypeError, "deterministic must be True or False", "'no'"),
    "return_lse number": (dict(return_lse=1), TypeError, "return_lse must be True or False", "1"),
}


def product(entries, wrong):
    return [pytest.param(entry, changed, error, parts, id=f"{entry.__name__}: {name}")
            for entry in entries for name, (changed, error, *parts) in wrong.items()]


@pytest.mark.parametrize("entry, changed, error, parts", (
    *product(EVERY_ENTRY, WRONG_TENSORS), *product(PACKED_ENTRIES, WRONG_LENGTHS), *product(WITH_CHUNKS, WRONG_CHUNKS),
    *product(WITH_OPTIONS, WRONG_OPTIONS)))
def test_wrong_argument_is_named(entry, changed, error, parts):
    refusal(error, lambda: entry(**{**GOOD, **changed}), *parts)


@pytest.mark.parametrize("entry", PACKED_ENTRIES)
def test_queries_and_keys_must_be_as_many(entry):
    refusal(ValueError, lambda: entry(**{**GOOD, "q": torch.randn(T - 4, H, D)}), "k must have q's 20 tokens", "got 24",
            "Segments")


def test_triton_needs_a_gpu():
    if get_stages("triton", "cuda").INTERPRETED:
        pytest.skip("the interpreter runs on the CPU")
    refusal(ValueError, lambda: call_moba(**GOOD, backend="triton"), "backend='triton' needs CUDA tensors", "cpu",
            "backend='torch'")


TAIL = Segments(ints(0, 3, 7), ints(0, 10, 24), ints(1, 0), ints(5, 6), 4, 14, 4)  # 7 queries among 24 keys


@pytest.mark.parametrize("changed, error, parts", [pytest.param(*case, id=name) for name, case in {
    "not segments": (None, TypeError, ("segments must be", "Segments", "tuple")),
    "int64": (dict(offsets=ints(5, 6, dtype=torch.int64)), TypeError, ("segments.offsets must be int32", "int64")),
    "a list": (dict(seq_ids=[1, 0]), TypeError, ("segments.seq_ids must be a torch.Tensor", "list")),
    "two dimensions": (dict(cu_seqlens_k=ints(0, 24)[None]), ValueError,
                       ("segments.cu_seqlens_k must have 1 dimension", "(1, 2)")),
    "another device": (dict(seq_ids=ints(1, 0).to("meta")), ValueError, ("segments.seq_ids must be on q's device",
                                                                         "meta")),
    "queries end late": (dict(cu_seqlens_q=ints(0, 3, 8)), ValueError,
                         ("segments.cu_seqlens_q must run from 0 to the number of tokens 7", "0 to 8")),
    "rows behind": (dict(cu_seqlens_q=ints(0, 3, 6), exact=True), ValueError,
                    ("segments.exact must be False where rows lie behind the last sequence", "6 of 7 queries")),
    "queries decrease": (dict(cu_seqlens_q=ints(0, 8, 7)), ValueError, ("segments.cu_seqlens_q must not decrease",
                                                                        "8 then 7")),
    "keys end late": (dict(cu_seqlens_k=ints(0, 10, 25)), ValueError,
                      ("segments.cu_seqlens_k must run from 0 to the number of tokens 24", "0 to 25")),
    "max_seqlen_q": (dict(max_seqlen_q=3), ValueError, ("segments.max_seqlen_q must be at least", "4 tokens", "got 3")),
    "max_seqlen_k": (dict(max_seqlen_k=13), ValueError, ("segments.max_seqlen_k must be at least", "14 tokens",
                                                         "got 13")),
    "too few offsets": (dict(offsets=ints(5)), ValueError, ("segments.offsets must have one entry", "2 segments",
                                                            "got 1")),
    "too many ids": (dict(seq_ids=ints(1, 0, 1)), ValueError, ("segments.seq_ids must have one entry", "2 segments",
                                                               "got 3")),
    "no such sequence": (dict(seq_ids=ints(2, 0)), ValueError, ("segments.seq_ids must be in 0..1",
                                                                "got 2 at index 0")),
    "negative sequence": (dict(seq_ids=ints(1, -1)), ValueError, ("segments.seq_ids must be in 0..1",
                                                                  "got -1 at index 1")),
    "negative offset": (dict(offsets=ints(-1, 6)), ValueError, ("segments.offsets must be 0 or more", "position -1")),
    "beyond the sequence": (dict(offsets=ints(5, 7)), ValueError,
                            ("segments.offsets", "segment 1 has 4 queries from position 7, sequence 0 has 10 keys")),
    "chunk 0": (dict(chunk_size=0), ValueError, ("segments.chunk_size must be at least 1", "got 0")),
    "chunk beyond int64": (dict(chunk_size=2 ** 70), ValueError, ("segments.chunk_size must be below 2^31",)),
    "max_seqlen beyond int64": (dict(max_seqlen_k=2 ** 70), ValueError, ("segments.max_seqlen_k must be below 2^31",)),
    "chunk float": (dict(chunk_size=4.0), TypeError, ("segments.chunk_size must be an int", "4.0")),
    "not packed": (dict(packed=True), ValueError, ("segments.packed must be False", "whole sequence")),
    "packed, other number": (dict(packed=True, cu_seqlens_q=ints(0, 7), seq_ids=ints(0), offsets=ints(0),
                                  max_seqlen_q=7),
                             ValueError, ("segments.packed must be False", "1 segments of 2 sequences")),
}.items()])
def test_wrong_segments_are_named(changed, error, parts):
    segments = (1, 2) if changed is None else dataclasses.replace(TAIL, **changed)
    refusal(error, lambda: moba_attention(GOOD["q"][:7], GOOD["k"], GOOD["v"], segments, 2), *parts)


def test_packed_segments_over_other_keys_are_named():
    """Segments that are the sequences themselves, which end before both tensors do: any row number fits both."""
    cu = ints(0, 5)
    segments = Segments(cu, cu, ints(0), ints(0), 5, 5, 4, packed=True)
    refusal(ValueError, lambda: moba_attention(GOOD["q"][:7], GOOD["k"], GOOD["v"], segments, 2),
            "segments.packed must be False", f"got True with 7, {T}")


@pytest.mark.parametrize("entry", EVERY_ENTRY)
def test_good_arguments_pass(entry):
    o = entry(**GOOD)
    assert o.shape == (T, H, DV) and o.dtype == torch.float32 and o.isfinite().all()
    if entry is not call_segments:
        assert torch.equal(entry(**{**GOOD, "cu_seqlens": GOOD["cu_seqlens"].long()}), o)
    if entry is not call_dense:
        assert torch.equal(o, call_moba(**GOOD))


@pytest.mark.parametrize("max_seqlen", (14, 15, 24, 1000))
def test_max_seqlen_may_be_a_loose_bound(max_seqlen):
    assert torch.equal(call_moba(**{**GOOD, "max_seqlen": max_seqlen}), call_moba(**GOOD))
    torch.testing.assert_close(call_dense(**{**GOOD, "max_seqlen": max_seqlen}), call_dense(**GOOD))


@pytest.mark.parametrize("lengths", ((0,), (0, 0)), ids=str)
def test_no_tokens(lengths):
    leaves = [torch.empty(0, h, d, requires_grad=True) for h, d in ((H, D), (HK, D), (HK, DV))]
    o, lse = moba_attn_varlen(*leaves, torch.tensor((0, *lengths)).int(), 0, 4, 2, return_lse=True)
    assert o.shape == (0, H, DV) and lse.shape == (0, H)
    o.sum().backward()
    assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]


def test_meta_tensors_give_shapes():
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in GOOD.items()}
    o, lse = call_moba(**meta, return_lse=True)
    assert o.device.type == "meta" and o.shape == (T, H, DV) and lse.shape == (T, H)


def convolve(q, k, v, cu_seqlens, **_):
    return key_convolution(k, k.new_ones(HK, 3, D), cu_seqlens)


def decode(q, k, v, **_):
    k_cache, v_cache = k[None].contiguous(), v[None].contiguous()
    means, lengths = k.new_zeros(1, 6, HK, D), k.new_full((1,), T, dtype=torch.int32)
    fill_chunk_means(k_cache, means, lengths, 4)
    return moba_decode(q[-1:], k_cache, v_cache, means, lengths, 4, 2)


@pytest.mark.parametrize("entry", (*EVERY_ENTRY, convolve, decode))
def test_fake_tensors_and_a_default_device(entry):
    """Within their mode and outside of it; with gradients; a default device is not where anything goes."""
    expected = entry(**GOOD)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in GOOD.items()}
        inside = entry(**fakes)
    outside = entry(**{**fakes, "v": fakes["v"].requires_grad_()})
    for fake in (inside, outside):
        assert (fake.shape, fake.stride(), fake.dtype) == (expected.shape, expected.stride(), expected.dtype)
    if entry is not decode and outside.requires_grad:
        assert torch.autograd.grad(outside.sum(), fakes["v"])[0].shape == GOOD["v"].shape
    with torch.device("meta"):
        assert torch.equal(entry(**GOOD), expected)


@pytest.mark.parametrize("grad_of", ("q", "k", "v"))
def test_gradient_of_one_input_alone(grad_of):
    inputs = {**GOOD, grad_of: GOOD[grad_of].clone().requires_grad_()}
    call_moba(**inputs).square().sum().backward()
    leaves = {name: GOOD[name].clone().requires_grad_() for name in "qkv"}
    call_moba(**{**GOOD, **leaves}).square().sum().backward()
    assert torch.equal(inputs[grad_of].grad, leaves[grad_of].grad)


def test_second_derivative_is_refused():
    q = GOOD["q"].clone().requires_grad_()
    dq, = torch.autograd.grad(call_moba(**{**GOOD, "q": q}).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


def test_gradcheck():
    """Finite differences; every gate score is further from the next than the step moves it, so the selection holds."""
    lengths, chunk, step = (11, 7), 3, 1e-6
    q, k, v = (torch.randn(18, h, d, dtype=torch.float64) for h, d in ((4, 3), (2, 3), (2, 2)))
    for rows in ((0, 11), (11, 18)):
        keys = k[slice(*rows)]
        means = keys[:len(keys) // chunk * chunk].unflatten(0, (-1, chunk)).mean(1).repeat_interleave(2, 1)
        score = torch.einsum("thd,chd->thc", q[slice(*rows)], means)
        gap = score.sort(2)[0].diff(dim=2)
        assert gap.min() > 100 * step * max(q.abs().max(), k.abs().max())
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    leaves = [x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in (q, k, v)]
    assert not leaves[0].is_contiguous()
    assert torch.autograd.gradcheck(
        lambda q, k, v: moba_attn_varlen(q, k, v, cu_seqlens, 11, chunk, 2, softmax_scale=0.7, return_lse=True), leaves,
        eps=step, atol=1e-7, rtol=1e-6, fast_mode=False)


def operator_arguments(requires_grad=True):
    qkv = [GOOD[name].clone().requires_grad_(requires_grad) for name in "qkv"]
    whole = Segments.from_cu_seqlens(GOOD["cu_seqlens"], 14, 4)
    return *qkv, whole.cu_seqlens_q, whole.cu_seqlens_k, whole.seq_ids, whole.offsets, 14, 14, 4, True, False


def test_opcheck_forward():
    torch.library.opcheck(torch.ops.moba_megatron.attention_fwd.default,
                          (*operator_arguments(), 2, 0.3, False, "reference", None, "head", None))


@pytest.mark.parametrize("with_dlse", (False, True))
def test_opcheck_backward(with_dlse):
    q, k, v, *segments = operator_arguments(requires_grad=False)
    o, lse, *integers = torch.ops.moba_megatron.attention_fwd(q, k, v, *segments, 2, 0.3, False, "reference",
                                                              64.0, "group", None)
    arguments = (torch.randn_like(o), torch.randn_like(lse) if with_dlse else None, q, k, v, o, lse, *integers,
                 *segments, 2, 0.3, False, "reference", 64.0, "group")
    torch.library.opcheck(torch.ops.moba_megatron.attention_bwd.default, arguments)


class Attention(torch.nn.Module):
    """A fused projection, strided q, k and v, MoBA, an output projection."""

    def __init__(self, use_lse):
        super().__init__()
        self.qkv = torch.nn.Linear(16, (H + HK) * D + HK * DV)
        self.out = torch.nn.Linear(H * DV, 16)
        self.use_lse = use_lse

    def forward(self, x, cu_seqlens, max_seqlen):
        q, k, v = (part.unflatten(1, (heads, -1)) for part, heads in
                   zip(self.qkv(x).split((H * D, HK * D, HK * DV), 1), (H, HK, HK)))
        o = moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, 4, 2, return_lse=self.use_lse)
        return self.out(o[0].flatten(1)) + o[1].sum(1, keepdim=True) if self.use_lse else self.out(o.flatten(1))


def assert_same_training_step(model, other, x, cu_seqlens, max_seqlen):
    results = []
    for forward in (model, other):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf, cu_seqlens, max_seqlen)
        y.square().sum().backward()
        results.append((y, leaf.grad, *(p.grad.clone() for p in model.parameters())))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic, use_lse", ((False, False), (True, True), (None, True)),
                         ids=("static", "dynamic, lse", "automatic, lse"))
def test_compile_without_graph_breaks(dynamic, use_lse):
    torch._dynamo.reset()
    model = Attention(use_lse)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ((10, 14), (3, 20, 8), (33,)):
        cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
        assert_same_training_step(model, compiled, torch.randn(sum(lengths), 16), cu_seqlens, max(lengths))


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpoint(use_reentrant):
    model = Attention(use_lse=True)

    def recomputed(*args):
        return torch.utils.checkpoint.checkpoint(model, *args, use_reentrant=use_reentrant)

    assert_same_training_step(model, recomputed, torch.randn(T, 16), GOOD["cu_seqlens"], 14)


def test_compiled_checkpoint():
    torch._dynamo.reset()
    model = Attention(use_lse=False)

    def recomputed(*args):
        return torch.utils.checkpoint.checkpoint(model, *args, use_reentrant=False)

    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    assert_same_training_step(model, compiled, torch.randn(T, 16), GOOD["cu_seqlens"], 14)


def test_deterministic_gives_the_same_bits():
    results = []
    for _ in range(2):
        leaves = {name: GOOD[name].clone().requires_grad_() for name in "qkv"}
        call_moba(**{**GOOD, **leaves}, deterministic=True).square().sum().backward()
        results.append([leaves[name].grad for name in "qkv"])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_triton_moba_signature():
    parameters = inspect.signature(moba_attn_varlen_triton).parameters
    assert list(parameters) == ["q", "k", "v", "cu_seqlens", "max_seqlen", "moba_chunk_size", "moba_topk"]
    assert all(p.default is p.empty for p in parameters.values())
    assert moba_attn_varlen_triton is by_module_path is moba_megatron.moba_attn_varlen_triton


def test_triton_moba_usage():
    """The call as its README shows it: fp16, as many kv heads as heads, keywords after v, chunk 1024, topk 2."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 2500, 2, 16, device=device, dtype=torch.float16)
    cu_seqlens = torch.tensor([0, 2300, 2500], device=device, dtype=torch.int32)
    output = moba_attn_varlen_triton(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=2300, moba_chunk_size=1024, moba_topk=2)
    assert output.shape == q.shape and output.dtype == torch.float16 and output.device == q.device
    assert torch.equal(output, moba_attn_varlen_triton(q, k, v, cu_seqlens, 2300, 1024, 2))


def test_public_names_resolve():
    for name in ("MoBAConfig", "moba_attn_varlen", "moba_attn_varlen_triton", "select_chunks", "sparse_attn_varlen",
                 "chunk_mass", "RecordedSelection", "record_selection", "replay_selection"):
        assert name in moba_megatron.__all__ and getattr(moba_megatron, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        moba_megatron.nonsense
