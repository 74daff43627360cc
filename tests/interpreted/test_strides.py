"""Every kernel that takes strides, with tensors of more than 2^31 elements: the bits of the same call side by side.

The memory is reserved, and touched only where rows are. Without 64-bit offsets these tests end in segmentation faults.
"""
import contextlib
from types import SimpleNamespace

import pytest
import torch
from far_apart import HEAD, far_apart

import decoding
from moba_megatron import kernels, moba_attn_varlen
from moba_megatron.inspect import kernels as statistics
from moba_megatron.kernels import copying
from moba_megatron.ops import key_convolution
from moba_megatron.segments import Segments

LAYOUTS = {"heads far apart": (16, HEAD, 1), "tokens far apart": (2 ** 26 + 32, 16, 1),
           "columns far apart": (3, 1, 2 ** 28 + 3)}
"""Strides of ``[40, 3, 16]``."""


def assert_same(call, near, far):
    """The call gives equal tensors for tensors that are equal but for their strides."""
    results = [call(*tensors) for tensors in (near, far)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def normal(*shape, dtype=torch.float16):
    return torch.randn(*shape).to(dtype)


def lengths(*sizes):
    return torch.tensor([0, *sizes]).cumsum(0).int()


@pytest.mark.parametrize("chunk", [16, 100], ids=["sparse", "dense"])
@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
def test_attention(layout, chunk):
    """Means, gate, forward, backward with choices; or the diagonal chunk's kernels alone."""
    near = [normal(36, 3, 16) for _ in range(4)]
    far = [far_apart(x, *LAYOUTS[layout]) for x in near]

    def call(*tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        o, lse = moba_attn_varlen(*leaves, lengths(36), 36, chunk, 2, backend="triton", return_lse=True)
        return o, lse, *torch.autograd.grad((o, lse), leaves, (tensors[3], torch.ones_like(lse)))

    assert_same(call, near, far)


@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
def test_attention_over_chunks_of_several_tiles(layout):
    """dk and dv's kernel without partial dq, dq's own kernel, and the forward that streams keys."""
    near = [normal(84, 3, 16) for _ in range(4)]
    strides = LAYOUTS[layout] if layout == "heads far apart" else (2 ** 25 + 32, 16, 1)
    far = [far_apart(x, *strides) for x in near]

    def call(*tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        o = moba_attn_varlen(*leaves, lengths(84), 84, 40, 2, backend="triton")
        return o, *torch.autograd.grad(o, leaves, tensors[3])

    assert_same(call, near, far)


@pytest.mark.parametrize("strides", LAYOUTS.values(), ids=LAYOUTS)
def test_means(strides):
    k = normal(40, 3, 16)
    segments = Segments.from_cu_seqlens(lengths(40), 40, 16)
    starts, counts = torch.tensor([[0, 24], [16, 16]], dtype=torch.int32)
    assert_same(lambda k: (kernels.chunk_means(k, segments)[:2], kernels.block_sums(k, starts, counts)), [k],
                [far_apart(k, *strides)])


@pytest.mark.parametrize("strides", LAYOUTS.values(), ids=LAYOUTS)
def test_key_convolution(strides):
    weight, dout = normal(3, 3, 16), normal(40, 3, 16)

    def call(k):
        leaves = [k.detach().requires_grad_(), weight.requires_grad_()]
        out = key_convolution(*leaves, lengths(25, 15), backend="triton")
        return out, *torch.autograd.grad(out, leaves, dout)

    k = normal(40, 3, 16)
    assert_same(call, [k], [far_apart(k, *strides)])


PLACES = {"sequences far apart": (HEAD, 48, 16, 1), "heads far apart": (16 * 20, 16, HEAD, 1),
          "rows far apart": (48, 2 ** 27 + 32, 16, 1), "columns far apart": (3 * 20, 3, 1, 2 ** 28 + 3)}
"""Strides of ``[3, 20, 3, 16]``; of means ``[3, 2, 3, 16]``, contiguous in their last dimension, the first two."""


@pytest.mark.parametrize("name, paged", [*((name, False) for name in PLACES), ("sequences far apart", True),
                                         ("rows far apart", True)])
def test_decoding(name, paged):
    k, v, q, strides = normal(3, 20, 3, 16), normal(3, 20, 3, 16), normal(3, 3, 16), PLACES[name]
    cache_lengths = torch.tensor([17, 20, 9], dtype=torch.int32)
    places = {"block_table": torch.tensor([[2], [0], [1]], dtype=torch.int32)} if paged else {}

    def call(k, v, means_strides):
        means = torch.zeros(3, 2, 3, 16, dtype=torch.float16)
        if means_strides:
            means = far_apart(means, *means_strides)
        decoding.fill_chunk_means(k, means, cache_lengths - 1, 8, backend="triton", **places)
        o, lse = decoding.moba_decode(q, k, v, means, cache_lengths, 8, 2, return_lse=True, backend="triton", **places)
        return o, lse, means

    assert_same(call, (k, v, None), (far_apart(k, *strides), far_apart(v, *strides),
                                     strides if name in list(PLACES)[:2] else None))


def test_decoding_with_queries_far_apart():
    k, v, q = normal(3, 20, 1, 16), normal(3, 20, 1, 16), normal(3, 5, 16)
    cache_lengths, means = torch.tensor([17, 20, 9], dtype=torch.int32), torch.zeros(3, 2, 1, 16, dtype=torch.float16)
    decoding.fill_chunk_means(k, means, cache_lengths, 8, backend="triton")
    for strides in ((HEAD, 16, 1), (16, 2 ** 29, 1), (6, 1, 2 ** 28)):
        assert_same(lambda q: (decoding.moba_decode(q, k, v, means, cache_lengths, 8, 2, backend="triton"),), [q],
                    [far_apart(q, *strides)])


@pytest.mark.parametrize("strides", LAYOUTS.values(), ids=LAYOUTS)
def test_router_statistics(strides):
    q, k = normal(40, 3, 16), normal(40, 3, 16)
    segments = Segments.from_cu_seqlens(lengths(40), 40, 16)
    selected = kernels.gate(q, kernels.chunk_means(k, segments), segments, 2)
    rows = torch.arange(20, 40)
    places = rows, rows // 16, torch.zeros_like(rows), rows
    assert_same(lambda q, k: (statistics.recalls(q, k, selected, segments, 0.25, *places),), (q, k),
                (far_apart(q, *strides), far_apart(k, *strides)))


def test_copies_of_rows_far_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    x = torch.arange(3 * 8).view(3, 8)
    source, target = (far_apart(x * sign, HEAD, 1) for sign in (1, 0))
    copying.copy_rows(source.data_ptr(), target.data_ptr(), 3, 64, 8 * HEAD, 8 * HEAD,
                      SimpleNamespace(device="cpu", cuda_stream=0))
    assert torch.equal(target, x)
