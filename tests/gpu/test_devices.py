"""Tensors on a GPU that is not the current one: launched there, on that GPU's own current stream. Needs two GPUs.

Each way runs three times (compiled, and twice prepared). Inputs are written behind a long wait on their GPU's stream: a
kernel on another stream would read what was there before.
"""
import functools

import pytest
import torch

import decoding
from moba_megatron import moba_attn_varlen
from moba_megatron.kernels import launcher
from moba_megatron.ops import get_stages, key_convolution, moba_attention
from moba_megatron.segments import uniform_segments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
TOKENS = 2048
SLEEP = 50_000_000
"""Clock cycles, about 30 ms."""


def sparse(q, k, v, weight):
    return moba_attn_varlen(q, k, v, lengths(q), TOKENS, 128, 3)


def sparse_sm90(q, k, v, weight):
    return moba_attn_varlen(q, k, v, lengths(q), TOKENS, 512, 3)


def dense(q, k, v, weight):
    return moba_attn_varlen(q, k, v, lengths(q), TOKENS, 512, 4)


def dense_one_length(q, k, v, weight):
    return moba_attention(q, k, v, uniform_segments(1024, 1024, 2, 1024, q.device), 1)


def convolved(q, k, v, weight):
    return key_convolution(k, weight, lengths(q))


def stages(q, k, v, weight):
    """The public stage functions, each called alone."""
    kernels = get_stages("auto", q.device)
    segments = uniform_segments(TOKENS, TOKENS, 1, 128, q.device)
    selected = kernels.gate(q.detach(), kernels.chunk_means(k.detach(), segments), segments, 3)
    o, _ = kernels.attention_fwd(q.detach(), k.detach(), v.detach(), selected, segments, 0.1)
    return o + q


def decode(q, k, v, weight):
    """One step over a cache of two sequences, whose means are filled before it."""
    caches = [x.detach().unflatten(0, (2, -1)) for x in (k, v)]
    seqlens = ints(q.device, 900, 1024)
    means = decoding.empty_means(caches[0], seqlens, 128, {})
    decoding.fill_chunk_means(caches[0], means, seqlens, 128)
    return decoding.moba_decode(q.detach()[:2], *caches, means, seqlens, 128, 3) + q[:2]


WAYS = [sparse, sparse_sm90, dense, dense_one_length, convolved, stages, decode]


@functools.cache
def ints(device, *values):
    return torch.tensor(values, dtype=torch.int32).to(device)


def lengths(x):
    """Made before the wait: a copy from the host would wait as well."""
    return ints(x.device, 0, 1500, TOKENS)


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, 4, 128), (TOKENS, 2, 128), (TOKENS, 2, 128), (2, 3, 128)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def call(way, device, current, late):
    """Results and gradients, on the CPU; with ``late`` the inputs come only after a wait on their GPU's stream."""
    values = [x.to(device) for x in inputs()]
    leaves = [torch.zeros_like(x).requires_grad_() for x in values]
    ints(device, 0, 1500, TOKENS), ints(device, 900, 1024)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    with torch.no_grad(), torch.cuda.device(device):
        if late:
            torch.cuda._sleep(SLEEP)
        for leaf, value in zip(leaves, values):
            leaf.copy_(value)
    with torch.cuda.device(current):
        o = way(*leaves)
        grads = torch.autograd.grad(o.float().square().sum(), leaves, allow_unused=True)
        assert torch.cuda.current_device() == current
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    return [x.cpu() for x in (o.detach(), *grads) if x is not None]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_tensors_device_is_not_the_current_one(way, monkeypatch):
    torch.use_deterministic_algorithms(False)  # cuDNN and flash attention 2 refuse; memory is not filled then
    monkeypatch.setattr(launcher, "_plans", {})
    torch.ones(4, device="cuda:0").to("cuda:1")  # peers from here on: a kernel on the wrong GPU would find the memory
    expected = call(way, torch.device("cuda:1"), 1, late=False)
    launcher._plans.clear()
    for _ in range(4):
        got = call(way, torch.device("cuda:1"), 0, late=True)
        # torch's own flash attention adds dq up in any order
        for x, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(x, wanted, rtol=2e-2, atol=2e-2)
            if "dense" not in way.__name__:
                assert torch.equal(x, wanted)
    assert {key[0].index for key in launcher._plans} <= {1}


def test_both_devices_in_turn(monkeypatch):
    """Plans of one device are not those of the other."""
    monkeypatch.setattr(launcher, "_plans", {})
    expected = call(sparse, torch.device("cuda:0"), 0, late=False)
    for turn in range(3):
        for device in (0, 1):
            for x, wanted in zip(call(sparse, torch.device("cuda", device), turn % 2, late=False), expected):
                assert torch.equal(x, wanted)
    assert {key[0].index for key in launcher._plans} == {0, 1}
