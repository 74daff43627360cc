"""Replayed calls: a stand-in for the CUDA driver reads what they launch, which is what Triton launches for the call.

Nothing is compiled and nothing runs: the operator goes through its launches on CPU tensors as for Hopper.
"""
import ctypes
import functools
import importlib
import logging
import re
import threading
from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moba_megatron import kernels, moba_attn_varlen
from moba_megatron.context_parallel.pipeline import Pipeline
from moba_megatron.kernels import launcher, replay, tuning
from moba_megatron.kernels.replay import plan_workspace
from moba_megatron.ops import backend, moba_attention
from moba_megatron.ops.decode import moba_decode
from moba_megatron.segments import Segments

CARD = 77
"""Number of the device that Triton takes the stand-in for: nothing compiled here is used elsewhere."""
SIZES = {"i32": 4, "i64": 8, "fp32": 4, "map": 128}


class Driver:
    """Takes launches from Triton's side and from the driver's, and notes both in the same form."""

    def __init__(self):
        self.launches, self.kernels, self.runs, self.stream, self.error = [], [], [], 5, 0
        self.get_current_device = lambda: CARD
        self.get_current_stream = lambda device: self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def compile(self, src, **_):
        """A kernel that knows its signature, whose number is its function."""
        described = [kind for kind in src.signature.values() if str(kind).startswith("tensordesc")]
        metadata = SimpleNamespace(name=src.fn.fn.__name__, num_ctas=1, launch_cooperative_grid=False,
                                   launch_pdl=False, global_scratch_size=0, profile_scratch_size=0,
                                   tensordesc_meta=[{}] * len(described) or None)
        kernel = SimpleNamespace(src=src, metadata=metadata, packed_metadata=(4, 1, 1000 + len(self.kernels)),
                                 function=1 + len(self.kernels), launch_metadata=lambda *_: None)
        kinds = [kind for kind in src.signature.values() if kind != "constexpr"]
        kernel.run = lambda x, y, z, stream, function, packed, *rest: self.note(
            function, (x, y, z), stream, packed[0] * 32, packed[2],
            [arg for arg, kind in zip(rest[3:], src.signature.values(), strict=True) if kind != "constexpr"])
        self.kernels.append((metadata.name, kinds))
        self.runs.append(kernel)
        return kernel

    def note(self, function, grid, stream, threads, shared, args):
        name, kinds = self.kernels[function - 1]
        values = []
        for kind, arg in zip(kinds, args, strict=True):
            if kind.startswith("*"):
                values.append(("pointer", arg.data_ptr()))
            elif kind.startswith("tensordesc"):
                values += [("pointer", arg.base.data_ptr()), *map(int, (*arg.shape, *arg.strides))]
            else:
                values.append(ctypes.c_float(arg).value if kind == "fp32" else arg)
        self.launches.append((name, grid, stream, threads, shared, values))

    def cuLaunchKernelEx(self, config, function, parameters, extra):  # noqa: N802
        config = replay._LaunchConfig.from_address(config)
        name, kinds = self.kernels[function - 1]
        addresses = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_uint64))
        values, at = [], 0
        for kind in kinds:
            if kind.startswith("*"):
                values.append(("pointer", ctypes.c_uint64.from_address(addresses[at]).value))
            elif kind.startswith("tensordesc"):
                rank = re.search(r"\[([^]]*)\]", kind).group(1).count(",") + 1
                assert addresses[at] % 64 == 0
                values.append(("pointer", ctypes.c_uint64.from_address(addresses[at]).value))
                values += [ctypes.c_int32.from_address(addresses[at + 1 + i]).value for i in range(rank)]
                values += [ctypes.c_int64.from_address(addresses[at + 1 + rank + i]).value for i in range(rank)]
                at += 2 * rank
            else:
                values.append(replay._SCALARS[kind].from_address(addresses[at]).value)
            at += 1
        assert [ctypes.c_uint64.from_address(addresses[at + i]).value for i in (0, 1)] == [0, 0]  # Triton's scratch
        assert (config.block_y, config.block_z, config.num_attributes, extra) == (1, 1, 0, None)
        self.launches.append((name, (config.grid_x, config.grid_y, config.grid_z), config.stream or 0,
                              config.block_x, config.shared_bytes, values))
        return self.error

    @staticmethod
    def cuTensorMapReplaceAddress(tensor_map, address):  # noqa: N802
        ctypes.c_uint64.from_address(tensor_map).value = address
        return 0


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    if kernels.INTERPRETED:
        pytest.skip("interpreted kernels are not launched")
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.compiler, "compile", driver.compile)
    monkeypatch.setattr(replay, "cuda_driver", lambda: driver)
    monkeypatch.setattr(replay, "encode_map", lambda descriptor, metadata: bytes(128))
    monkeypatch.setattr(launcher, "_records", {})
    monkeypatch.setattr(backend, "_stages", lambda name, device_type: kernels)
    monkeypatch.setattr(tuning, "_arch_of_device", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    yield driver
    for module in ("attention_bwd", "attention_fwd", "bounds", "chunk_means", "gating", "routing", "attention_fwd_sm90",
                   "attention_bwd_dq_sm90", "attention_bwd_dkdv_sm90", "decode"):
        for kernel in vars(importlib.import_module(f"moba_megatron.kernels.{module}")).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.pop(CARD, None)


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


def make_decode(paged=False):
    """As :func:`make`, for a decoding step."""
    lengths = torch.tensor([900, 1024], dtype=torch.int32)
    shape = (32, 64) if paged else (2, 1024)
    k, v = (torch.zeros(*shape, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    table = torch.arange(32, dtype=torch.int32).view(2, 16) if paged else None

    def call(q, k, v, means):
        return moba_decode(q, k, v, means, lengths, 128, 3, block_table=table, backend="triton", return_lse=True)

    return (torch.zeros(2, 8, 128, dtype=torch.bfloat16), k, v, torch.zeros(2, 8, 2, 128, dtype=torch.bfloat16)), call


def make_rank():
    """As :func:`make`, for two segments of one sequence on a rank of context parallelism."""
    (q, k, v, do, _), _ = make([4096], chunk=512)
    cu_q, cu_k, ids, offsets = (torch.tensor(x, dtype=torch.int32)
                                for x in ([0, 512, 1024], [0, 4096], [0, 0], [512, 3072]))
    segments = Segments(cu_q, cu_k, ids, offsets, 512, 4096, 512)
    pipeline = Pipeline(kernels, 3, 0.1, False, False)

    def call(q, k, v, do):
        selected, routing = pipeline.choose(q, k, segments)
        o, saved = pipeline.attend(q, k, v, selected, routing, segments)
        return selected, routing.indices, o, saved[0], *pipeline.attend_bwd(do, q, k, v, o, saved, segments,
                                                                         torch.float32)

    return (q[:1024], k, v, do[:1024]), call


def replays():
    """Of each signature, in order."""
    return [record.replay for record in launcher._records.values()]


def cloned(tensors):
    """Copies elsewhere in memory, with the same strides."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in tensors]


def assert_same(launches, ordinary, moved: dict[int, int]):
    """Names, grids, sizes and scalars agree, and each pointer of one stands wherever its counterpart stands.

    moved: address in ``ordinary`` -> address in ``launches``, as far as known; completed.
    """
    assert [x[0] for x in launches] == [x[0] for x in ordinary]
    for (name, *launch, got), (_, *expected, want) in zip(launches, ordinary):
        assert launch == expected, name
        assert len(got) == len(want), name
        for i, (a, b) in enumerate(zip(got, want)):
            if isinstance(b, tuple):
                assert moved.setdefault(b[1], a[1]) == a[1], (name, i)
            else:
                assert a == b, (name, i)


@pytest.mark.parametrize("made", [*(functools.partial(make, **case) for case in CASES.values()), make_decode,
                                  functools.partial(make_decode, paged=True), make_rank],
                         ids=[*CASES, "decode", "decode from pages", "a rank of context parallelism"])
def test_a_replay_launches_what_triton_does(made, driver, monkeypatch):
    tensors, call = made()
    for _ in range(2):
        call(*tensors)
    assert all(replays())
    others = cloned(tensors)
    driver.launches.clear()
    for _ in range(2):  # the second with all tensors where they were in the call before
        got = call(*others)
    replayed, middle = driver.launches, len(driver.launches) // 2
    assert [x[:2] for x in replayed[:middle]] == [x[:2] for x in replayed[middle:]]
    driver.launches = []
    monkeypatch.setattr(launcher, "_RECORDING", False)
    allocations, empty = [], torch.empty  # kept, so that each has its own address
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: (allocations.append(empty(*args, **kwargs)),
                                                                 allocations[-1])[1])
    want = call(*tensors)
    moved = {b.data_ptr(): a.data_ptr() for a, b in zip((*others, *got), (*tensors, *want))}
    moved[0] = 0
    assert_same(replayed[middle:], driver.launches, moved)
    assert len(driver.launches) == middle
    check_scratch(driver.launches, allocations, moved)


def check_scratch(launches, tensors, moved):
    """No two allocations that are used between each other's first and last use share memory in the replay."""
    spans = {}
    for at, (*_, values) in enumerate(launches):
        for value in values:
            if isinstance(value, tuple):
                for number, x in enumerate(tensors):
                    if x.numel() and x.data_ptr() == value[1]:
                        spans[number] = (spans.get(number, (at,))[0], at, moved[value[1]], x.nbytes)
    assert spans
    for number, (first, last, address, size) in spans.items():
        for other, (its_first, its_last, its_address, its_size) in spans.items():
            if number != other and its_first <= last and first <= its_last:
                assert its_address + its_size <= address or address + size <= its_address


class Event:
    """An event that notes how many launches there were before it."""

    def __init__(self, driver):
        self._driver, self.at = driver, []

    def record(self):
        self.at.append(len(self._driver.launches))


@pytest.mark.parametrize("name, topk", [(name, 3) for name in (
    "1 head", "gqa", "chunk 128: fused", "cut lists", "groups of heads", "groups of heads, fused", "packed", "fp32"
)] + [("gqa", 1)])
def test_the_event_is_where_dk_and_dv_are_complete(name, topk, driver):
    """Recorded right behind the last kernel that writes them, whichever way the call goes."""
    case = CASES[name]
    (q, k, v, do, _), _ = make(**case)
    cu = torch.tensor([0, *case["lengths"]]).cumsum(0).int()
    segments = Segments.from_cu_seqlens(cu, max(case["lengths"]), case["chunk"])
    pipeline = Pipeline(kernels, topk, 0.1, False, False, case.get("workspace_mib"))
    selected, routing = pipeline.choose(q, k, segments) if topk > 1 else (None, None)
    o, saved = pipeline.attend(q, k, v, selected, routing, segments)
    for way in ("ordinary", "traced", "replayed", "replayed without", "replayed"):
        driver.launches.clear()
        event = Event(driver)
        _, *grads = pipeline.attend_bwd(do, q, k, v, o, saved, segments, torch.float32,
                                      None if way == "replayed without" else event)
        addresses = {("pointer", x.data_ptr()) for x in grads}
        writing = [i for i, (*_, values) in enumerate(driver.launches)
                   if addresses & {x for x in values if isinstance(x, tuple)}]
        assert event.at == ([] if way == "replayed without" else [writing[-1] + 1]), way
        assert writing[-1] < len(driver.launches) - 1, "dq comes after it"
        assert len(writing) > 1 or name not in ("cut lists", "groups of heads, fused")
        assert replays()[-1] is not None or way == "ordinary"


def test_an_event_that_is_not_mentioned_is_at_the_end(driver):
    """A forward call says nothing of it."""
    (q, k, v, _, _), _ = make(**CASES["1 head"])
    segments = Segments.from_cu_seqlens(torch.tensor([0, 2048], dtype=torch.int32), 2048, 512)
    for _ in range(3):
        driver.launches.clear()
        event = Event(driver)
        kernels.repeat(("gate",), lambda q, k, cu: (kernels.gate(q, kernels.chunk_means(k, segments), segments, 3),),
                       q, k, segments.cu_seqlens_k, event=event)
        assert driver.launches and event.at == [len(driver.launches)]


def test_memory_that_is_free_again_is_used_again():
    sizes, spans = {0: 1000, 1: 5000, 2: 900, 3: 10}, {0: (0, 1), 1: (1, 3), 2: (2, 3), 3: (0, 3)}
    offsets, total = plan_workspace(sizes, spans)
    assert offsets[0] == offsets[2] and all(x % replay.ALIGNMENT == 0 for x in offsets.values())
    assert total == max(offsets[n] + sizes[n] for n in sizes) < sum(sizes.values())


def test_the_stream_is_taken_at_each_call(driver):
    tensors, call = make(**CASES["1 head"])
    for stream in (5, 5, 5, 9, 9, 0):
        driver.stream = stream
        driver.launches.clear()
        call(*tensors)
        assert {x[2] for x in driver.launches} == {stream}


@pytest.mark.parametrize("why", ["a hook", "another thread's first call", "another thread is at it"])
def test_the_ordinary_path_takes_over(why, driver, monkeypatch):
    tensors, call = make(**CASES["1 head"])
    for _ in range(2):
        call(*tensors)
    through_triton = []
    for kernel in driver.runs:
        kernel.run = lambda *args, run=kernel.run: (through_triton.append(1), run(*args))[1]
    call(*tensors)
    assert not through_triton
    if why == "a hook":
        monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])
        call(*tensors)
    elif why == "another thread is at it":
        for replay in replays():
            replay._lock.acquire()
        call(*tensors)
        for replay in replays():
            replay._lock.release()
    else:
        thread = threading.Thread(target=call, args=tensors)
        thread.start()
        thread.join()
    forward, backward = (len(replay._launches) for replay in replays())
    thread_has_context = why == "another thread's first call"  # once its forward has gone through Triton
    assert len(through_triton) == forward + (0 if thread_has_context else backward)


def test_an_unknown_operation_is_not_replayed(driver, caplog):
    """-q for a negative scale: the compiled kernels are kept, as before."""
    caplog.set_level(logging.DEBUG, "moba_megatron")
    tensors, call = make(**CASES["1 head"], softmax_scale=-1.0)
    for _ in range(3):
        call(*tensors)
    assert [x is None for x in replays()] == [True, False]
    assert caplog.text.count("a call is not replayed: aten.neg.default") == 1


def test_an_error_within_the_traced_call_keeps_no_replay(driver, monkeypatch):
    tensors, call = make(**CASES["1 head"])
    call(*tensors)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "route", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*tensors)
    assert not any(replays())
    call(*tensors)
    assert all(replays())


FAULTS = ("cuLaunchKernelEx", "cuTensorMapReplaceAddress", "Trace.add", "Trace.replay", "encode_map")


def break_at(name, number, error, driver, monkeypatch):
    """Call ``number`` of a function of the preparation or of the driver raises; the others do their work."""
    owner = {"Trace.add": replay.Trace, "Trace.replay": replay.Trace, "encode_map": replay}.get(name, driver)
    name = name.rpartition(".")[2]
    real, calls = getattr(owner, name), []

    def broken(*args):
        calls.append(1)
        if len(calls) == number:
            raise error
        return real(*args)

    monkeypatch.setattr(owner, name, broken)
    return calls


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_falls_back_to_triton(name, driver, monkeypatch, caplog):
    tensors, call = make(**CASES["1 head"])
    call(*tensors)
    if name.startswith("cu"):
        call(*tensors)
    with monkeypatch.context() as patch:
        assert break_at(name, 2 if name == "cuLaunchKernelEx" else 1, OSError("a fault"), driver, patch) == []
        call(*cloned(tensors))
    assert "any more: OSError: a fault" in caplog.text
    assert sum(record.faulty for record in launcher._records.values()) == 1
    assert_ordinary_launches(call, tensors, driver, monkeypatch, calls=3)


def test_an_error_of_the_driver_falls_back_to_triton(driver, monkeypatch, caplog):
    tensors, call = make(**CASES["1 head"])
    for _ in range(2):
        call(*tensors)
    driver.error = 719
    assert_ordinary_launches(call, tensors, driver, monkeypatch, calls=2)
    assert caplog.text.count("the CUDA driver refused a launch: error 719") == 2


def assert_ordinary_launches(call, tensors, driver, monkeypatch, calls=1):
    """The last of some calls launches what one without any record does, with its own tensors' addresses."""
    inputs = {x.data_ptr() for x in tensors}

    def last_launches():
        driver.launches = []
        call(*tensors)
        return [(name, *launch, [value if not isinstance(value, tuple) else
                                 value[1] if value[1] in inputs else "scratch" for value in values])
                for name, *launch, values in driver.launches]

    for _ in range(calls):
        got = last_launches()
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_RECORDING", False)
        assert got == last_launches()
    assert {x.data_ptr() for x in tensors[:4]} <= {value for *_, values in got for value in values}


@pytest.mark.parametrize("name", ["cuTensorMapReplaceAddress", "cuLaunchKernelEx", "_pack", "Trace.add"])
def test_an_interrupt_leaves_nothing_half_written(name, driver, monkeypatch):
    """A's addresses were the last, B's are being written, the call is interrupted, and A comes again as it was."""
    tensors, call = make(**CASES["1 head"])
    others, number, interrupted = cloned(tensors), 0, True
    for _ in range(3 if name != "Trace.add" else 1):
        call(*tensors)
    while interrupted:
        number += 1
        with monkeypatch.context() as patch:
            if name == "_pack":
                for prepared in filter(None, replays()):
                    patch.setattr(prepared, "_pack", lambda *args, real=prepared._pack: (
                        real(*args), (_ for _ in ()).throw(KeyboardInterrupt()))[0])
                calls = [1] * number
            else:
                calls = break_at(name, number, KeyboardInterrupt(), driver, patch)
            try:
                call(*others)
            except KeyboardInterrupt:
                pass
            interrupted = len(calls) >= number and not (name == "_pack" and number > 1)
        assert_ordinary_launches(call, tensors, driver, monkeypatch)
    assert number > 1


@pytest.mark.parametrize("change", ["strides", "alignment", "dtype", "length", "option"])
def test_another_signature_is_traced_anew(change, driver):
    case = dict(CASES["1 head"])
    (q, k, v, do, dlse), call = make(**case)
    call(q, k, v, do, dlse)
    before = len(launcher._records)
    if change == "strides":
        k = torch.zeros(2048, 1, 256, dtype=k.dtype)[..., :128]
    elif change == "alignment":
        k = torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    else:
        case |= {"dtype": dict(dtype=torch.float16), "length": dict(lengths=[2049]),
                 "option": dict(softmax_scale=0.5)}[change]
        (q, k, v, do, dlse), call = make(**case)
    call(q, k, v, do, dlse)
    assert len(launcher._records) == before + 2
