"""Runs the Gluon kernels for Hopper on the CPU: what they compute, and whether they wait as they must.

A kernel's source is loaded again with stand-ins for ``gluon.language``. Each group of warps is a thread; one of them
runs at a time, and at every barrier, copy and product a random one goes on. What is asynchronous on the card happens
late here: a copy to shared memory fills its place with NaN when it starts and lands some time later, a product reads
shared memory some time before it is waited for. Who waits for nobody reads NaN, who uses a product without waiting
raises, and when all wait for each other that is an error. Layouts, registers and fences mean nothing here.
"""
import ast
import contextlib
import importlib
import random
import sys
import threading
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import torch
from ptx import execute

from moba_megatron import kernels
from moba_megatron.kernels import sm90

UNSIGNED = {"uint32": 0xFFFFFFFF, "uint64": -1}
LOADER = 128
"""Threads of the group that copies: each arrives where a barrier hears of the end of its copies."""


class Value:
    """A scalar or a tensor in registers."""

    type = SimpleNamespace(layout=SimpleNamespace(parent=None))

    def __init__(self, data):
        self.data = torch.as_tensor(data)

    @property
    def shape(self):
        return tuple(self.data.shape)

    @property
    def dtype(self):
        return self.data.dtype

    def to(self, dtype):
        if dtype in UNSIGNED:
            return Value(self.data.long() & UNSIGNED[dtype])
        return Value(self.data.to(dtype))

    def __getitem__(self, at):
        return Value(self.data[at])

    def __bool__(self):
        return bool(self.data)

    def __index__(self):
        return int(self.data)

    __int__ = __index__

    def __neg__(self):
        return Value(-self.data)


def _data(x):
    return x.data if isinstance(x, Value) else x


def _quotient(a, b):
    return torch.div(a, b, rounding_mode="trunc")


def _operator(name, function):
    def forward(a, b):
        return NotImplemented if isinstance(b, (Pointer, Product)) else Value(function(a.data, _data(b)))

    def reflected(a, b):
        return Value(function(torch.as_tensor(b, dtype=a.dtype if isinstance(b, int) else None), a.data))

    setattr(Value, f"__{name}__", forward)
    setattr(Value, f"__r{name}__", reflected)


for _name, _function in {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "truediv": torch.div,
                         "floordiv": _quotient, "mod": torch.fmod, "and": torch.bitwise_and, "or": torch.bitwise_or,
                         "xor": torch.bitwise_xor, "lshift": torch.bitwise_left_shift,
                         "rshift": torch.bitwise_right_shift}.items():
    _operator(_name, _function)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", lambda a, b, compare=getattr(torch, _name): Value(
        compare(a.data, torch.as_tensor(_data(b)))))


class Pointer:
    """Addresses within a tensor's storage; what lies outside of it raises."""

    type = Value.type

    def __init__(self, flat, offset):
        self.flat, self.offset = flat, offset
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    @classmethod
    def of(cls, tensor):
        return cls(torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()), Value(tensor.storage_offset()))

    def __add__(self, offset):
        return Pointer(self.flat, self.offset + offset)

    __radd__ = __add__

    def __getitem__(self, at):
        return Pointer(self.flat, self.offset[at])

    def places(self, mask, shape=()):
        """Indices of all that ``mask`` lets through, and the mask, as wide as both."""
        offset = self.offset.data.long()
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.as_tensor(_data(mask)).bool()
        offset, mask, _ = torch.broadcast_tensors(offset, mask, torch.empty(shape))
        places = offset[mask]
        assert places.numel() == 0 or 0 <= places.min() and places.max() < self.flat.numel(), "outside of the tensor"
        return places, mask


class Shared:
    """A place in shared memory."""

    def __init__(self, data):
        self.data = data

    shape = property(lambda self: tuple(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def index(self, i):
        assert 0 <= i < self.data.shape[0]
        return Shared(self.data[int(i)])

    def slice(self, first, length, dim=0):
        return Shared(self.data.narrow(dim, int(first), length))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return Value(self.data.clone())

    def store(self, value):
        assert value.dtype == self.dtype and value.shape == self.shape
        self.data.copy_(value.data)


class Barrier:
    """A phase ends with its last arrival, or with the last byte that is expected."""

    def __init__(self):
        self.count, self.phase, self.missing, self.bytes = None, 0, 0, 0

    def arrive(self, number, expected=0):
        assert self.count is not None and number <= self.missing, "more arrivals than the barrier counts"
        self.missing -= number
        self.bytes += expected
        self.turn()

    def turn(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def ended(self, parity):
        return self.phase % 2 != parity


class Barriers:
    def __init__(self, number):
        self.each = [Barrier() for _ in range(number)]

    def index(self, i):
        assert 0 <= i < len(self.each)
        return self.each[int(i)]


class Product:
    """A sum that the matrix unit works on; it has no value until it was waited for."""

    type, value = Value.type, None

    def __init__(self, a, b, acc, use_acc):
        self.a = Value(a.data.clone()) if isinstance(a, Value) else a
        self.b, self.acc, self.use_acc = b, acc, use_acc

    def compute(self):
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc.data
        product = self.a.data.float() @ self.b.data.float()
        self.value = acc + product if self.use_acc else product
        assert self.value.shape == acc.shape


class Program:
    """One program's groups of warps, of which one runs at a time."""

    def __init__(self, number, programs, chance):
        self.number, self.programs, self.chance = number, programs, chance
        self.running, self.alive, self.error, self.changed = 0, [], None, threading.Condition()
        self.copies, self.landing, self.products = {}, [], {}  # by group: in order; by descriptor: in any; by group

    def run(self, groups):
        threads = [threading.Thread(target=self._group, args=(i, *x), daemon=True) for i, x in enumerate(groups)]
        self.alive = list(range(len(threads)))
        self.copies, self.products = ({i: [] for i in self.alive} for _ in range(2))
        self.running = self.chance.choice(self.alive)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        assert not any(self.copies.values()) and not self.landing, "a copy is under way when the program ends"
        assert not any(self.products.values()), "a product is under way when the program ends"

    def _group(self, number, function, arguments):
        _here.program, _here.group = self, number
        try:
            self._wait_for_turn(number)
            function(*arguments)
        except BaseException as error:
            self.error = self.error or error
        with self.changed:
            self.alive.remove(number)
            if self.alive:
                self.running = self.chance.choice(self.alive)
            self.changed.notify_all()

    def _wait_for_turn(self, number):
        with self.changed:
            self.changed.wait_for(lambda: self.error or self.running == number)
            if self.error:
                raise SystemExit

    def others(self):
        """Another group's turn, or this one's again; something that is under way may happen."""
        if self.chance.random() < 0.5:
            self.happen()
        with self.changed:
            self.running = self.chance.choice(self.alive)
            self.changed.notify_all()
        self._wait_for_turn(_here.group)

    def happen(self):
        """One thing that is under way, if there is any."""
        some = [queue for queue in (*self.copies.values(), *self.products.values()) if queue]
        number = self.chance.randrange(len(some) + len(self.landing)) if some or self.landing else -1
        if 0 <= number < len(some):
            it = some[number].pop(0)
            it.compute() if isinstance(it, Product) else it()
        elif number >= 0:
            self.landing.pop(number - len(some))()
        return number >= 0

    def wait(self, barrier, parity):
        tries = 0
        while not barrier.ended(parity):
            self.others()
            tries += 1
            if not self.happen() and tries > 2000:
                raise AssertionError(f"group {_here.group} waits for ever")


_here = threading.local()


def _wait_for_products(pending, deps):
    queue = _here.program.products[_here.group]
    while len(queue) > pending:
        queue.pop(0).compute()
    found = []
    for x in deps:
        assert not isinstance(x, Product) or x.value is not None, "used before it is waited for"
        found.append(Value(x.value) if isinstance(x, Product) else x)
    _here.program.others()
    return found[0] if len(found) == 1 else tuple(found)


def _multiply(a, b, acc, use_acc=True, is_async=False):
    assert is_async and a.shape[1] == b.shape[0]
    product = Product(a, b, acc, use_acc)
    _here.program.products[_here.group].append(product)
    _here.program.others()
    return product


def _load(pointer, mask=None, other=None):
    places, mask = pointer.places(mask)
    found = torch.full(mask.shape, 0 if other is None else other, dtype=pointer.flat.dtype)
    found[mask] = pointer.flat[places]
    return Value(found)


def _store(pointer, value, mask=None):
    value = Value(_data(value))
    places, mask = pointer.places(mask, value.shape)
    pointer.flat[places] = value.data.to(pointer.flat.dtype).expand(mask.shape)[mask]


def _atomic_add(pointer, value):
    found = _load(pointer)
    _store(pointer, found + value)
    return found


def _copy(smem, pointer, mask=None):
    places, mask = pointer.places(mask, smem.shape)
    smem.data.fill_(float("nan"))

    def land():
        found = torch.zeros(mask.shape, dtype=smem.dtype)
        found[mask] = pointer.flat[places]
        smem.data.copy_(found)

    _here.program.copies[_here.group].append(land)
    _here.program.others()


def _copy_arrive(barrier, increment_count):
    assert not increment_count
    _here.program.copies[_here.group].append(lambda: barrier.arrive(LOADER))
    _here.program.others()


def _copy_tile(descriptor, at, barrier, smem):
    smem.data.fill_(float("nan"))
    rows, columns = (range(int(first), int(first) + size) for first, size in zip(at, smem.shape))
    base = descriptor.base

    def land():
        tile = torch.zeros(smem.shape, dtype=smem.dtype)
        flat = Pointer.of(base)
        height, width = descriptor.shape
        inside = [max(0, min(x.stop, size) - x.start) for x, size in ((rows, height), (columns, width))]
        offset = (torch.arange(rows.start, rows.start + inside[0])[:, None] * descriptor.strides[0]
                  + torch.arange(columns.start, columns.start + inside[1])[None, :])
        tile[:inside[0], :inside[1]] = flat.flat[offset + flat.offset.data]
        smem.data.copy_(tile)
        barrier.bytes -= tile.numel() * tile.element_size()
        barrier.turn()

    _here.program.landing.append(land)
    _here.program.others()


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(shape[0])
    return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else -1 << 40, dtype=dtype))


def _init(barrier, count):
    barrier.count = barrier.missing = count


def _arrive(barrier, count):
    barrier.arrive(count)
    _here.program.others()


def _anything(*args, **named):
    return None


def _of_two(function):
    def of(a, b):
        a, b = _data(a), _data(b)
        dtype = next((x.dtype for x in (a, b) if isinstance(x, torch.Tensor)), None)
        return Value(function(*(x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=dtype)
                                for x in (a, b))))
    return of


def _where(condition, a, b):
    a, b = (_data(x) for x in (a, b))
    return Value(torch.where(torch.as_tensor(_data(condition)), a, b))


def _split(x):
    return Value(x.data[..., 0]), Value(x.data[..., 1])


def _inline_asm(ptx, constraints, operands, kinds, is_pure, pack):
    """32 elements, of each operand one, are the threads of a warp."""
    shape = torch.broadcast_shapes(*(x.shape for x in operands))
    inputs = [x.data.expand(shape).reshape(-1, 32).numpy() for x in operands]
    outputs = [np.empty_like(x) for x in inputs[:len(kinds)]]
    for warp in range(inputs[0].shape[0]):
        registers = {f"${len(kinds) + i}": x[warp] for i, x in enumerate(inputs)}
        execute(ptx, registers)
        for i, output in enumerate(outputs):
            output[warp] = registers[f"${i}"].view(output.dtype)
    return tuple(Value(torch.from_numpy(x).reshape(shape)) for x in outputs)


LANGUAGE = dict(
    constexpr=lambda x: x, static_range=range, static_assert=lambda holds, *why: _asserted(holds, *why),
    int32=torch.int32, int64=torch.int64, float16=torch.float16, float32=torch.float32, uint32="uint32",
    uint64="uint64", program_id=lambda axis: Value(torch.tensor(_here.program.number, dtype=torch.int32)),
    arange=lambda first, last, layout=None: Value(torch.arange(first, last, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
    num_programs=lambda axis: _here.program.programs, atomic_add=_atomic_add,
    load=_load, store=_store, where=_where, minimum=_of_two(torch.minimum), maximum=_of_two(torch.maximum),
    exp2=lambda x: Value(torch.exp2(x.data)), log2=lambda x: Value(torch.log2(x.data)),
    full=lambda shape, value, dtype, layout=None: Value(torch.full(shape, value, dtype=dtype)),
    max=lambda x, axis: Value(x.data.amax(axis)), min=lambda x, axis: Value(x.data.amin(axis)),
    abs=lambda x: Value(x.data.abs()), cdiv=lambda a, b: (a + b - 1) // b, split=_split,
    reshape=lambda x, shape: Value(x.data.reshape(tuple(shape))), inline_asm_elementwise=_inline_asm,
    permute=lambda x, order: Value(x.data.permute(order)), sum=lambda x, axis: Value(x.data.sum(axis)),
    convert_layout=lambda x, layout: x, allocate_shared_memory=_allocate,
    warp_specialize=lambda groups, warps, registers: _here.program.run(groups),
    SliceLayout=_anything, BlockedLayout=_anything, DotOperandLayout=_anything, NVMMADistributedLayout=_anything,
    SwizzledSharedLayout=_anything, NVMMASharedLayout=SimpleNamespace(get_default_for=_anything))
HOPPER = dict(
    mbarrier=SimpleNamespace(init=_init, wait=lambda barrier, parity: _here.program.wait(barrier, parity),
                             arrive=_arrive, expect=lambda barrier, size: barrier.arrive(1, size),
                             MBarrierLayout=lambda: "barriers"),
    async_copy=SimpleNamespace(async_load=_copy, mbarrier_arrive=_copy_arrive), tma=SimpleNamespace(
        async_load=_copy_tile), warpgroup_mma=_multiply, warpgroup_mma_wait=lambda num_outstanding, deps: (
        _wait_for_products(num_outstanding, deps)), fence_async_shared=_anything)


def _asserted(holds, *why):
    assert holds, why


class Kernel:
    """In a kernel's place: ``kernel[grid](...)`` runs it here."""

    def __init__(self, function):
        names = function.__code__.co_varnames[:function.__code__.co_argcount]
        self.fn, self.arg_names, self.chance, self.ran = function, list(names), None, None
        self.params = [SimpleNamespace(name=name, default=None, is_constexpr=name in function.__annotations__)
                       for name in names]
        self.__name__ = function.__name__

    def __call__(self, *args, **named):
        return self.fn(*args, **named)

    def __getitem__(self, grid):
        def start(*given, **named):
            named |= zip(self.arg_names, given)
            self.ran[self.__name__] += grid[0]
            for program in self.chance.sample(range(grid[0]), grid[0]):
                arguments = {p.name: _argument(named[p.name]) if not p.is_constexpr else named[p.name]
                             for p in self.params}
                _here.program = Program(program, grid[0], self.chance)
                self.fn(**arguments)

        return start


def _argument(x):
    if isinstance(x, torch.Tensor):
        return Pointer.of(x)
    return Value(torch.tensor(x, dtype=torch.int32 if abs(x) < 2 ** 31 else torch.int64)) if type(x) is int else x


def _jit(function=None, **_):
    if function is None:
        return _jit
    kernel = Kernel(function)
    return kernel if kernel.__name__.endswith("_kernel") else _with_fn(function)


def _with_fn(function):
    function.fn = function
    return function


class _Tuples(ast.NodeTransformer):
    """Gluon makes a tuple of a list."""

    def visit_ListComp(self, node):
        self.generic_visit(node)
        name = ast.Name("tuple", ast.Load())
        return ast.copy_location(ast.Call(name, [ast.GeneratorExp(node.elt, node.generators)], []), node)

    def visit_List(self, node):
        return ast.copy_location(ast.Tuple(self.generic_visit(node).elts, node.ctx), node)


@contextlib.contextmanager
def emulated(seed=0, changes=()):
    """Within the block the Gluon kernels run here, in whatever order ``seed`` says.

    ``changes``: replacements of text, (module, old, new), for kernels that are broken on purpose. Yields how many
    programs of each kernel ran, by its name.
    """
    ran: Counter[str] = Counter()
    language, hopper, triton_language = (ModuleType(name) for name in ("language", "hopper", "tl"))
    vars(language).update(LANGUAGE)
    vars(hopper).update(HOPPER)
    vars(triton_language).update(LANGUAGE)
    gluon = ModuleType("gluon")
    vars(gluon).update(jit=_jit, constexpr_function=lambda function: function, language=language)
    fake_triton = ModuleType("triton")
    vars(fake_triton).update(jit=_jit, language=triton_language, constexpr_function=_with_fn)
    chance, package = random.Random(seed), kernels.__name__
    stand_ins = {"triton.experimental.gluon": gluon, "triton.experimental.gluon.language": language,
                 "triton.experimental.gluon.language.nvidia.hopper": hopper}

    def load(name, more):
        text = Path(sm90.__file__).with_name(f"{name}.py").read_text()
        for of, old, new in changes:
            if of == name:
                assert text.count(old) == 1, f"{name} has not exactly one {old!r}"
                text = text.replace(old, new)
        module = ModuleType(f"{package}.{name}")
        module.__package__, module.__file__ = package, f"{name}.py"
        with mock.patch.dict(sys.modules, {**stand_ins, **more}):
            tree = ast.parse(text)
            if name.endswith("sm90"):
                tree = ast.fix_missing_locations(_Tuples().visit(tree))
            exec(compile(tree, f"{name}.py, emulated", "exec"), vars(module))
        for x in vars(module).values():
            if isinstance(x, Kernel):
                x.chance, x.ran = chance, ran
        return module

    helpers = load("jit_helpers", {"triton": fake_triton, "triton.language": triton_language})
    experimental = importlib.import_module("triton.experimental")
    with mock.patch.object(experimental, "gluon", gluon, create=True), (
            mock.patch.object(kernels, "jit_helpers", helpers, create=True)), (
            mock.patch.object(kernels, "gating", load("gating", {
                "triton": fake_triton, "triton.language": triton_language, f"{package}.jit_helpers": helpers}))):
        stand_ins[f"{package}.jit_helpers"] = helpers
        shared = load("jit_helpers_sm90", {})
        modules = {name: load(f"{name}_sm90", {f"{package}.jit_helpers_sm90": shared})
                   for name in ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv", "attention_diagonal",
                                "gating")}
    with mock.patch.object(sm90, "kernel_module", modules.__getitem__), mock.patch.object(sm90, "PROGRAMS", 1), (
            mock.patch.object(sm90, "takes", _takes)):
        yield ran


def _takes(*tensors):
    return (tensors[0].dtype.itemsize == 2 and (tensors[0].shape[2], tensors[-1].shape[2]) in sm90.HEAD_DIMS
            and all(stride % 8 == 0 for x in tensors for stride in sm90._strides(x)))
