"""A call of an operator as a list of prepared launches: what repeats it needs no Python of the stages.

One call with a signature runs under a :class:`Trace`, which notes every launch with its arguments, and where each
pointer comes from: an input, a result, or scratch memory. A :class:`Replay` of it allocates the results and one
workspace, writes the pointers into the prepared arguments and hands them to the CUDA driver. Whatever a trace does not
know (another operation of torch than an allocation or a slice, a launch with attributes) makes the call one that is
not replayed.
"""
from __future__ import annotations

import ctypes
import struct
import threading

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..cuda_driver import cuda_driver

ALIGNMENT = 512
"""Of scratch tensors within the workspace, bytes: that of torch's own allocations."""
TENSOR_MAP_BYTES = 128
_SCALARS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_SLICES = (torch.ops.aten.slice.Tensor,)


class NotReplayable(Exception):
    """A launch or a result that only the ordinary path knows how to make."""


class _LaunchConfig(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [(name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z",
                                                   "shared_bytes")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("num_attributes", ctypes.c_uint)]


class Trace(TorchDispatchMode):
    """Watches the operations and launches of one call; ``inputs`` are aliases of the call's tensors, each its own."""

    def __init__(self, tensors: tuple[Tensor | None, ...]):
        super().__init__()
        self.inputs = [x if x is None else x.detach() for x in tensors]
        self._views = {id(x): (x, i) for i, x in enumerate(self.inputs) if x is not None}  # kept: an id stays its own
        self._allocations: dict[int, int] = {}  # by address, the latest
        self._sizes: list[int] = []
        self._launches: list[tuple[object, tuple[int, ...], list]] = []
        self._event: int | None = None  # launches before it
        self._reason = ""
        try:
            getattr(cuda_driver(), "cuTensorMapReplaceAddress")  # the latest of what is called here
        except (OSError, AttributeError) as error:
            self.refuse(str(error))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format:
            if result.numel():
                self._allocations[result.data_ptr()] = len(self._sizes)
                self._sizes.append(result.nbytes)
        elif function in _SLICES:
            if id(args[0]) in self._views:
                self._views[id(result)] = result, self._views[id(args[0])][1]
        else:
            self.refuse(str(function))
        return result

    def refuse(self, reason: str) -> None:
        """The call is not to be replayed."""
        self._reason = self._reason or reason

    def add(self, compiled, grid: tuple[int, ...], args: tuple) -> None:
        """Notes a launch: the compiled kernel, and the values of all its parameters in order."""
        if self._reason:
            return
        try:
            self._launches.append((compiled, grid, self._arguments(compiled, args)))
        except NotReplayable as error:
            self.refuse(str(error))

    def record_event(self) -> None:
        """Notes the first place of the event among the launches."""
        if self._event is None:
            self._event = len(self._launches)

    def replay(self, results: tuple[Tensor, ...]) -> "Replay":
        """The traced call, to be repeated.

        Raises:
            NotReplayable: it did something that is not known here.
        """
        if self._reason:
            raise NotReplayable(self._reason)
        places = [self._allocations.get(x.data_ptr()) if x.numel() else None for x in results]
        for x, place in zip(results, places):
            if not x.is_contiguous() or x.numel() and (place is None or self._sizes[place] != x.nbytes):
                raise NotReplayable("a result that is not an allocation of its own")
        if len(set(places) - {None}) != sum(x.numel() > 0 for x in results):
            raise NotReplayable("a result that is returned twice")
        return Replay(len(self.inputs), self._launches, self._sizes, places, results, self._event)

    def _arguments(self, compiled, args: tuple) -> list[tuple]:
        """(type, value) of each argument as the kernel takes them; a pointer's value says where it comes from."""
        metadata = compiled.metadata
        if (metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl
                or metadata.global_scratch_size or metadata.profile_scratch_size):
            raise NotReplayable(f"launch attributes or scratch of {metadata.name}")
        described = iter(getattr(metadata, "tensordesc_meta", None) or ())
        kinds = tuple(compiled.src.signature.values())
        if len(kinds) != len(args):
            raise NotReplayable(f"{len(args)} values for the {len(kinds)} parameters of {metadata.name}")
        arguments: list[tuple] = []
        for kind, value in zip(kinds, args):
            if kind == "constexpr":
                continue
            if str(kind).startswith("tensordesc"):
                arguments += self._described(value, next(described, None))
            elif str(kind).startswith("*"):
                arguments.append(("pointer", self._source(value)) if value.data_ptr() else (ctypes.c_int64, 0))
            elif kind in _SCALARS:
                arguments.append((_SCALARS[kind], value))
            else:
                raise NotReplayable(f"an argument of type {kind} for {metadata.name}")
        return arguments

    def _described(self, descriptor, metadata: dict | None) -> list[tuple]:
        """A tensor descriptor's arguments: the map that the driver encodes, then shape and strides."""
        if metadata is None:
            raise NotReplayable("a descriptor without a map")
        encoded = encode_map(descriptor, metadata)
        return [("map", (encoded, self._source(descriptor.base))), *((ctypes.c_int32, n) for n in descriptor.shape),
                *((ctypes.c_int64, n) for n in descriptor.strides)]

    def _source(self, x: Tensor) -> tuple[str, int, int]:
        """Where a pointer comes from: ("input", number, bytes behind its first), ("own", allocation, bytes)."""
        if id(x) in self._views:
            number = self._views[id(x)][1]
            return "input", number, x.data_ptr() - self.inputs[number].data_ptr()
        base = x.untyped_storage().data_ptr()
        if base not in self._allocations:
            raise NotReplayable("a pointer to memory that neither came in nor was allocated here")
        return "own", self._allocations[base], x.data_ptr() - base


def encode_map(descriptor, metadata: dict) -> bytes:
    """The CUtensorMap that Triton makes of a descriptor, after a check that only its address depends on the tensor.

    Raises:
        NotReplayable: with another address the driver's own exchange of it gives another map than Triton.
    """
    from types import SimpleNamespace

    from triton.backends.nvidia.driver import make_tensordesc_arg

    def encode(address: int):
        fields = {name: getattr(descriptor, name, None) for name in ("shape", "strides", "padding",
                                                                     "round_f32_to_tf32")}
        made = make_tensordesc_arg(SimpleNamespace(base=SimpleNamespace(data_ptr=lambda: address), **fields), metadata)
        end = id(made[0]) + type(made[0]).__basicsize__  # of Triton's PyCUtensorMap, whose last bytes are the map
        return ctypes.string_at(end - TENSOR_MAP_BYTES, TENSOR_MAP_BYTES)

    address = descriptor.base.data_ptr()
    encoded, other = encode(address), address ^ (1 << 20)
    exchanged = _aligned_copy(encoded)
    if (cuda_driver().cuTensorMapReplaceAddress(exchanged.address, other)
            or ctypes.string_at(exchanged.address, TENSOR_MAP_BYTES) != encode(other)):
        raise NotReplayable("a tensor map whose address cannot be exchanged")
    return encoded


class _aligned_copy:
    """Bytes in memory of their own, at a multiple of 128."""

    def __init__(self, content: bytes):
        self._memory = ctypes.create_string_buffer(len(content) + 128)
        self.address = -(-ctypes.addressof(self._memory) // 128) * 128
        ctypes.memmove(self.address, content, len(content))


class Replay:
    """Prepared launches of a call. One thread at a time uses their memory; others take the ordinary path meanwhile."""

    def __init__(self, num_inputs: int, launches: list, sizes: list[int], places: list[int | None],
                 results: tuple[Tensor, ...], event: int | None):
        self._lock = threading.Lock()
        self._stream: int | None = 0
        self._results = [(tuple(x.shape), x.stride(), x.dtype) for x in results]
        offsets, self.workspace_bytes = plan_workspace(*_lifetimes(launches, sizes, places))
        sources = {("own", place): (num_inputs + i, 0) for i, place in enumerate(places) if place is not None}
        workspace = num_inputs + len(places)
        sources |= {("own", number): (workspace, offset) for number, offset in offsets.items()}
        sources |= {("input", i): (i, 0) for i in range(num_inputs)}
        self._slots: dict[tuple[int, int], int] = {}  # (number among inputs, results, workspace; bytes) -> its place
        self._kept: list = []
        prepared = [self._prepare(compiled, grid, arguments, sources) for compiled, grid, arguments in launches
                    if all(grid)]
        self._before_event = sum(all(grid) for _, grid, _ in launches[:event])
        self._pointers = (ctypes.c_uint64 * max(1, len(self._slots)))()
        self._pack = struct.Struct(f"{len(self._slots)}Q").pack_into
        self._from = list(self._slots)
        self._maps: list[tuple[int, int]] = []  # address of a map, the slot with its tensor's address
        self._configs, self._launches = [], []
        for function, config, arguments in prepared:
            self._configs.append(config)
            parameters = self._parameters(arguments)
            self._launches.append((ctypes.addressof(config), function, parameters))
        self._last: list[int] = []

    def run(self, addresses: list[int], device: torch.device, stream: int,
            event: torch.cuda.Event | None = None) -> tuple[Tensor, ...] | None:
        """Starts the launches on a stream: the results, or None, and nothing has been started, where another thread is
        at it. ``addresses`` are the inputs', 0 for one that is None; RuntimeError: the driver refuses a launch.
        """
        results = [torch.empty_strided(shape, strides, dtype=dtype, device=device)
                   for shape, strides, dtype in self._results]
        workspace = torch.empty_strided((self.workspace_bytes,), (1,), dtype=torch.uint8, device=device)
        sources = [*addresses, *[x.data_ptr() for x in results], workspace.data_ptr()]
        pointers = [sources[number] + offset for number, offset in self._from]
        if not self._lock.acquire(blocking=False):
            return None
        try:
            driver = cuda_driver()
            if pointers != self._last:
                self._last = []  # an interrupt may come before all are written
                self._pack(self._pointers, 0, *pointers)
                for address, slot in self._maps:
                    if error := driver.cuTensorMapReplaceAddress(address, pointers[slot]):
                        raise RuntimeError(f"the CUDA driver refused a tensor map's address: error {error}")
                self._last = pointers
            if stream != self._stream:
                self._stream = None
                for config in self._configs:
                    config.stream = stream
                self._stream = stream
            if event is None:
                _start(driver, self._launches)
            else:
                _start(driver, self._launches[:self._before_event])
                event.record()
                _start(driver, self._launches[self._before_event:])
        finally:
            self._lock.release()
        return tuple(results)

    def _slot(self, source: tuple[str, int, int], sources: dict) -> int:
        number, offset = sources[source[:2]]
        return self._slots.setdefault((number, offset + source[2]), len(self._slots))

    def _prepare(self, compiled, grid: tuple[int, ...], arguments: list[tuple], sources: dict) -> tuple:
        """The function, its launch configuration, and its arguments with slots in place of sources of pointers."""
        warps, _, shared = compiled.packed_metadata
        config = _LaunchConfig(*grid, *(1,) * (3 - len(grid)), 32 * warps, 1, 1, shared)
        placed = []
        for kind, value in arguments:
            if kind == "pointer":
                value = self._slot(value, sources)
            elif kind == "map":
                value = value[0], self._slot(value[1], sources)
            placed.append((kind, value))
        return compiled.function, config, placed

    def _parameters(self, arguments: list[tuple]) -> int:
        """The address of the array of the arguments' addresses, Triton's two pointers to scratch memory last."""
        addresses = []
        for kind, value in (*arguments, (ctypes.c_void_p, None), (ctypes.c_void_p, None)):
            if kind == "pointer":
                addresses.append(ctypes.addressof(self._pointers) + 8 * value)
            elif kind == "map":
                self._kept.append(_aligned_copy(value[0]))
                addresses.append(self._kept[-1].address)
                self._maps.append((addresses[-1], value[1]))
            else:
                self._kept.append(kind(value))
                addresses.append(ctypes.addressof(self._kept[-1]))
        self._kept.append((ctypes.c_void_p * len(addresses))(*addresses))
        return ctypes.addressof(self._kept[-1])


def _start(driver: ctypes.CDLL, launches: list[tuple[int, int, int]]) -> None:
    launch = driver.cuLaunchKernelEx
    for config, function, parameters in launches:
        if error := launch(config, function, parameters, None):
            raise RuntimeError(f"the CUDA driver refused a launch: error {error}")


def _lifetimes(launches: list, sizes: list[int], places: list[int | None]) -> tuple[dict[int, int],
                                                                                    dict[int, tuple[int, int]]]:
    """Bytes of each scratch allocation, and the first and last launch that use it."""
    spans: dict[int, tuple[int, int]] = {}
    for at, (_, _, arguments) in enumerate(launches):
        for kind, value in arguments:
            source = value if kind == "pointer" else value[1] if kind == "map" else ("", 0, 0)
            if source[0] == "own" and source[1] not in places:
                spans[source[1]] = spans.get(source[1], (at, at))[0], at
    return {number: sizes[number] for number in spans}, spans


def plan_workspace(sizes: dict[int, int], spans: dict[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Offsets of tensors in one block of memory, and its size: those in use at the same time do not overlap.

    ``sizes``: bytes of each; ``spans``: first and last step that uses each.
    """
    offsets: dict[int, int] = {}
    for number in sorted(sizes, key=sizes.get, reverse=True):
        first, last = spans[number]
        taken = sorted((offsets[n], offsets[n] + sizes[n]) for n in offsets
                       if spans[n][0] <= last and first <= spans[n][1])
        offset = 0
        for begin, end in taken:
            if offset + sizes[number] <= begin:
                break
            offset = max(offset, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets[number] = offset
    return offsets, max((offsets[n] + sizes[n] for n in sizes), default=0)
