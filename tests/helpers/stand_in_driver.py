"""A stand-in for Triton's driver that notes what is started, and calls of the operator to start it with."""
import ctypes
import itertools
import threading
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget

from moba_megatron import moba_attn_varlen
from moba_megatron.ops import moba_attention
from moba_megatron.segments import Segments

CARD = 77
"""Number of the device that Triton takes the stand-in for: nothing compiled here is used elsewhere."""


class Driver:
    """Notes launches by ``kernel[grid](...)`` and by ``compiled[grid](...)`` in the same form."""

    def __init__(self):
        self.launches, self.prepared, self.stream, self.fault, self.launchers = [], 0, 5, None, []
        self.captured = {}  # launches on streams that are being captured: they do not run
        self.get_current_device = lambda: CARD
        self.get_current_stream = lambda device: self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src, metadata):
        self.launchers.append(src.fn.fn.__name__)

    def compile(self, src, **_):
        name = src.fn.fn.__name__
        kinds = list(src.signature.values())

        class Compiled(SimpleNamespace):
            def __getitem__(compiled, grid):  # noqa: N805
                def start(*args, stream):
                    if self.fault:
                        self.fault()
                    self.prepared += 1
                    assert not any(isinstance(x, torch.Tensor) for x in args)
                    self.note(name, kinds, grid, stream, args)

                return start

        return Compiled(src=src, metadata=SimpleNamespace(name=name), packed_metadata=None, function=None,
                        launch_metadata=lambda *_: None,
                        run=lambda x, y, z, stream, function, packed, *rest: self.note(
                            name, kinds, (x, y, z), stream, rest[3:]))

    def note(self, name, kinds, grid, stream, args):
        values = []
        for kind, arg in zip(kinds, args, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                values.append(("pointer", arg if isinstance(arg, int) else arg.data_ptr()))
            elif kind.startswith("tensordesc"):
                values += [("pointer", arg.base.data_ptr()), *map(int, (*arg.shape, *arg.strides))]
            else:
                values.append(ctypes.c_float(arg).value if kind == "fp32" else arg)
        self.captured.get(stream, self.launches).append((name, tuple(grid), stream, values))


class Cuda:
    """A stand-in for libcuda that captures what :class:`Driver` starts; a graph's start is noted as its launches.

    ``called``: names of the functions, but for the thread's mode; ``results``: what is not to succeed, by name.
    """

    def __init__(self, driver):
        self.driver, self.called, self.results, self.numbers = driver, [], {}, itertools.count(1 << 40)
        self.streams, self.graphs, self.execs, self.thread = set(), {}, {}, threading.local()

    def __getattr__(self, name):
        def function(*args):
            if name == "cuThreadExchangeStreamCaptureMode":
                mode, = args
                self.thread.mode, mode._obj.value = mode._obj.value, self.mode
                return 0
            assert self.mode == 2, name
            self.called.append(name)
            result = self.results.get(name, 0)
            getattr(self, f"_{name}")(*args, result == 0)
            return result

        if not name.startswith("cu"):
            raise AttributeError(name)
        return function

    @property
    def mode(self):
        return getattr(self.thread, "mode", 0)

    def _new(self, place, succeeds):
        place._obj.value = next(self.numbers) if succeeds else None
        return place._obj.value

    def _cuStreamCreate(self, place, flags, succeeds):
        assert flags == 1
        self.streams.add(self._new(place, succeeds))
        self.streams.discard(None)

    def _cuStreamDestroy_v2(self, stream, succeeds):
        assert stream.value not in self.driver.captured
        self.streams.remove(stream.value)

    def _cuStreamBeginCapture_v2(self, stream, mode, succeeds):
        assert mode == 2 and stream.value in self.streams
        if succeeds:
            self.driver.captured[stream.value] = []

    def _cuStreamEndCapture(self, stream, place, succeeds):
        launches, number = self.driver.captured.pop(stream.value), self._new(place, succeeds)
        if number:
            self.graphs[number] = launches

    def _cuGraphDestroy(self, graph, succeeds):
        del self.graphs[graph.value]

    def _cuGraphInstantiateWithFlags(self, place, graph, flags, succeeds):
        number = self._new(place, succeeds)
        if number:
            self.execs[number] = self.graphs[graph.value]

    def _cuGraphLaunch(self, executable, stream, succeeds):
        if succeeds:
            self.driver.launches += [(name, grid, stream.value or 0, values)
                                     for name, grid, _, values in self.execs[executable.value]]

    def _cuGraphExecDestroy(self, executable, succeeds):
        del self.execs[executable.value]


CASES = {
    "1 head": dict(lengths=[2048], heads=1, chunk=512),
    "gqa": dict(lengths=[2048], heads=8, kv_heads=2, chunk=512),
    "chunk 128: fused": dict(lengths=[2048], chunk=128),
    "cut lists": dict(lengths=[65536], heads=1, chunk=512),
    "groups of heads": dict(lengths=[2048], heads=8, kv_heads=4, chunk=512, workspace_mib=0.5),
    "groups of heads, fused": dict(lengths=[2048], heads=8, kv_heads=4, chunk=128, workspace_mib=0.5),
    "packed": dict(lengths=[700, 0, 1300, 48], chunk=128),
    "ragged chunk, portable": dict(lengths=[900], chunk=100, dim=80),
    "fp32": dict(lengths=[900], chunk=64, dtype=torch.float32),
    "gradient of lse": dict(lengths=[2048], chunk=512, return_lse=True),
    "parts of sequences": dict(lengths=[2048, 1024], chunk=256, parts=[(0, 256, 256), (1, 512, 128), (0, 1792, 256)]),
    "a negative scale": dict(lengths=[2048], chunk=512, softmax_scale=-1.0),
    "views of one projection": dict(lengths=[2048], chunk=512, projection=True),
}


def make(lengths, chunk, heads=4, kv_heads=None, dim=128, dtype=torch.bfloat16, parts=None, projection=False,
         **options):
    """A call's tensors, and the call: it takes them and gives results and gradients."""
    kv_heads = kv_heads or heads
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    total = sum(lengths)
    place = (cu, max(lengths), chunk)
    if parts:
        ids, offsets, sizes = (torch.tensor(x, dtype=torch.int32) for x in zip(*parts))
        cu_q = torch.cat((torch.zeros(1, dtype=torch.int32), sizes.cumsum(0).int()))
        place = Segments(cu_q, cu, ids, offsets, int(sizes.max()), max(lengths), chunk)
    rows = int(place.cu_seqlens_q[-1]) if parts else total
    q, do = (torch.zeros(rows, heads, dim, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(total, kv_heads, dim, dtype=dtype) for _ in range(2))
    if projection:
        q, k, v = torch.zeros(rows, 3, heads, dim, dtype=dtype).unbind(1)
    dlse = torch.zeros(rows, heads)

    def call(q, k, v, do, dlse):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if parts:
            got = moba_attention(*leaves, place, 3, backend="triton", **options)
        else:
            got = moba_attn_varlen(*leaves, *place, 3, backend="triton", **options)
        outs, douts = (got, (do, dlse)) if options.get("return_lse") else ((got,), (do,))
        return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, douts)]

    return (q, k, v, do, dlse), call


def cloned(tensors):
    """Copies elsewhere in memory, with the same strides."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in tensors]
