"""Compiles what the stages would launch, for any architecture and without a GPU, and reports what each kernel needs.

The launchers themselves run, on meta tensors: a stand-in for Triton's driver names the architecture, and every launch
stops after compilation. So signatures, constexprs and launch options are exactly those of a real run.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from moba_megatron import kernels
from moba_megatron.inspect import kernels as statistics
from moba_megatron.kernels import copying, decode, launcher, sm90, tuning
from moba_megatron.kernels.host import cdiv
from moba_megatron.kernels.tuning_table import TABLE, is_gluon
from moba_megatron.segments import SUM_BLOCK, Segments

from .report import RESULTS, load

SHARED_LIMIT_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capabilities that the kernels are written for, and the shared memory that a block may have there."""
TENSOR_MEMORY_COLUMNS = 512
MULTIPROCESSORS = 132
"""Of the card that launchers are told they run on, where they ask; an H200's."""
ONE_OF_EACH_CLASS = (80, 86, 90, 100)
"""One card of each class of the tuning tables; 89 and 120 share 86's rows."""
BEYOND = {"chunk_size": 4096, "choices": 63}
"""Values that exceed every bound of a row's key in the tables."""
MORE_SHAPES = (86, 90)
"""The card with the least shared memory, and the one the kernels are tuned on."""
LEAST_SHARED_MEMORY = 86
GLUON_BLOCK = 128
"""Keys that a Gluon kernel keeps at a time."""


@dataclass(frozen=True)
class Problem:
    """What the public operator would be called with; sizes are those of a long sequence, since memory costs nothing."""

    head_dim: int
    chunk_size: int
    topk: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 1 << 17
    sequences: int = 2
    deterministic: bool = False
    lse_gradient: bool = False
    shared: bool = False
    """The query heads of a kv head choose together, and choices are given."""
    decode: bool = False
    beside: bool = False
    """What runs beside the stages: :func:`_run_beside`."""
    kernels: frozenset[str] | None = None
    """Those that are compiled, None for all."""

    def __str__(self) -> str:
        dims = "decode " * self.decode + "beside " * self.beside + f"D{self.head_dim}" + (
            f"/{self.head_dim_v}" if self.head_dim_v else "")
        return (f"{dims} chunk{self.chunk_size} topk{self.topk} {str(self.dtype)[6:]}"
                + " shared" * self.shared + " deterministic" * self.deterministic + " dlse" * self.lse_gradient)


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel and what it needs of the card.

    Shared memory of a block, stack and spill stores of a thread in bytes; registers of a thread; columns of tensor
    memory (Blackwell).
    """

    kernel: str
    capability: int
    shared: int
    registers: int
    stack: int
    spills: int
    tensor_memory: int
    config: str
    problem: str
    digest: str

    @property
    def fits(self) -> bool:
        return (self.shared <= SHARED_LIMIT_KIB[self.capability] * 1024
                and self.tensor_memory <= TENSOR_MEMORY_COLUMNS)


class _CompileOnlyDriver(DriverBase):
    """Stands where Triton expects the driver of a CUDA device; it knows the target and nothing else."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched or timed here")

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps compiled kernels by device: a device number for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self):
        raise NotImplementedError("nothing is launched or timed here")


@contextlib.contextmanager
def compiling(capability: int, dry: bool = False, only: Callable[[str], bool] = lambda kernel: True,
              known: dict[str, Compiled] = {}):
    """Within the block, ``kernel[grid](...)`` compiles for the architecture and launches nothing.

    Args:
        dry: do not even compile.
        only: whether a kernel, by name, is compiled; launches of others do nothing.
        known: what was compiled before, by digest, and is not compiled again.

    Yields:
        A list that fills with (kernel name, CompiledKernel, or Compiled if known, or None if dry), one for each launch.
    """
    compiled, found = [], []
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def compile_only(self, *args, grid, warmup, **kwargs):
        if not only(self.fn.__name__):
            return None
        found.clear()
        kernel = None if dry else run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, found[0] if found else kernel))
        return kernel

    def compile_what_is_new(self, key, signature, device, constexprs, options, attrs, warmup):
        source = self.ASTSource(self, signature, constexprs, attrs).hash()  # of the kernel and all that it calls
        compiler = self.device_caches[device][3].hash()  # with the version of ptxas
        made_of = source, capability, options.hash(), compiler, sorted(get_cache_invalidating_env_vars().items())
        digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]
        if digest in known:
            found.append(known[digest])
            return None
        kernel = do_compile(self, key, signature, device, constexprs, options, attrs, warmup)
        kernel.digest = digest
        return kernel

    major, minor = divmod(capability, 10)
    card = SimpleNamespace(major=major, minor=minor, multi_processor_count=MULTIPROCESSORS)
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_CompileOnlyDriver(capability))
    try:
        with (mock.patch.object(JITFunction, "run", compile_only),
              mock.patch.object(JITFunction, "_do_compile", compile_what_is_new),
              mock.patch.object(launcher, "_compile", lambda plan: None),  # the processes are enough
              mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
              mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: card)):
            yield compiled
    finally:
        driver._active = before


def run_stages(problem: Problem) -> None:
    """Every stage of forward and backward, or of decoding, on meta tensors."""
    if problem.decode:
        return _run_decode(problem)
    if problem.beside:
        return _run_beside(problem)

    def empty(heads, dim, dtype=problem.dtype):
        return torch.empty(problem.tokens, heads, dim, dtype=dtype, device="meta")

    dim_v = problem.head_dim_v or problem.head_dim
    q, k = empty(problem.heads, problem.head_dim), empty(problem.kv_heads, problem.head_dim)
    v = empty(problem.kv_heads, dim_v)
    cu_seqlens = torch.empty(problem.sequences + 1, dtype=torch.int32, device="meta")
    segments = Segments.from_cu_seqlens(cu_seqlens, problem.tokens, problem.chunk_size)
    kernels.bounded(replace(segments, packed=False), problem.tokens, problem.tokens)
    segments = kernels.bounded(segments, problem.tokens, problem.tokens)
    means = kernels.chunk_means(k, segments)
    if problem.topk > 1:
        scoring = kernels.group_queries(q, problem.kv_heads) if problem.shared else q
        selected = kernels.gate(scoring, means, segments, problem.topk)
        if problem.shared:
            selected = kernels.keep_earlier(selected, segments)
    else:
        selected = torch.empty(problem.tokens, problem.heads, 0, dtype=torch.int32, device="meta")
    scale = problem.head_dim ** -0.5
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, scale)
    dlse = torch.empty_like(lse) if problem.lse_gradient else None
    kernels.attention_bwd(torch.empty_like(o), dlse, q, k, v, o, lse, selected, segments, scale,
                          deterministic=problem.deterministic)
    blocks = torch.empty(64, dtype=torch.int32, device="meta")
    kernels.block_sums(k, blocks, blocks)


def _run_decode(problem: Problem) -> None:
    """The stages of decoding, on a contiguous cache, or for one query head a kv head on pages and with left padding."""
    batch, size, dim_v = problem.sequences, problem.chunk_size, problem.head_dim_v or problem.head_dim

    def empty(*shape, dtype=problem.dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, lengths = empty(batch, problem.heads, problem.head_dim), empty(batch, dtype=torch.int32)
    means = empty(batch, problem.tokens // size, problem.kv_heads, problem.head_dim)
    rows, places = (batch, problem.tokens), {}
    if problem.heads == problem.kv_heads:
        rows = batch * problem.tokens // 64, 64
        places = {"block_table": empty(batch, problem.tokens // 64, dtype=torch.int32), "cache_starts": lengths}
    k, v = (empty(*rows, problem.kv_heads, dim) for dim in (problem.head_dim, dim_v))
    decode.cache_means(k, means, lengths, size, **places)
    scoring = kernels.group_queries(q, problem.kv_heads) if problem.shared else q
    selected = decode.decode_gate(scoring, k, means, lengths, size, problem.topk, **places)
    decode.decode_attention(q, k, v, selected, lengths, size, problem.head_dim ** -0.5, **places)


def _run_beside(problem: Problem) -> None:
    """What context parallelism, key convolution and the inspection of the router launch beyond the stages."""
    tokens, heads, kv_heads, dim, size = (problem.tokens, problem.heads, problem.kv_heads, problem.head_dim,
                                          problem.chunk_size)
    empty = functools.partial(torch.empty, dtype=problem.dtype, device="meta")
    whole, fp32, long = (functools.partial(empty, dtype=x) for x in (torch.int32, torch.float32, torch.int64))
    q, k = empty(tokens, heads, dim), empty(tokens, kv_heads, dim)
    lse, selected = fp32(tokens, heads), whole(tokens, heads, problem.topk - 1)
    zigzag = Segments(whole(3), whole(2), whole(2), whole(2), tokens, tokens, size)  # two pieces of a sequence
    routing = kernels.route(selected, kv_heads, zigzag.num_chunks(tokens))
    apart = empty(tokens, heads, 2 * dim)[..., :dim]  # rows that do not lie one behind the other
    kernels.attention_fwd(apart, k, k, selected, zigzag, 1.0, routing=routing)
    kernels.attention_bwd(q, None, apart, k, k, q, lse, selected, zigzag, 1.0, routing=routing)
    kernels.means_from_block_sums(fp32(tokens // size, cdiv(size, SUM_BLOCK), kv_heads, dim), size, problem.dtype)
    width = dim * q.element_size() // copying._UNIT
    copying._copy_rows_kernel[(copying.BLOCKS,)](0, 0, tokens, width, 4 * width, 2 * width, copying._BLOCK,
                                                 copying.BLOCKS, num_warps=copying._WARPS)
    weight, cu_seqlens = empty(kv_heads, 4, dim), whole(problem.sequences + 1)
    for halo in (None, empty(problem.sequences, 3, kv_heads, dim)):
        kernels.key_convolution_fwd(k, weight, cu_seqlens, halo)
        kernels.key_convolution_bwd(k, k, weight, cu_seqlens, halo)
    row = long(128)
    statistics.counts(selected, long(tokens), 1, zigzag.num_chunks(tokens))
    statistics.recalls(q, k, selected, zigzag, 1.0, row, row, row, row)


def report(capability: int, problems: list[Problem], known: dict[str, Compiled] = {}) -> list[Compiled]:
    """Compiles every stage of every problem for an architecture; a kernel that several problems share counts once."""
    rows: dict[str, Compiled] = {}
    with tuning.forced(tuning.arch_of_capability(*divmod(capability, 10))):
        for problem in problems:
            kernels = problem.kernels
            with compiling(capability, only=lambda name: kernels is None or name in kernels, known=known) as compiled:
                run_stages(problem)
            for name, kernel in compiled:
                if kernel.digest not in rows:
                    rows[kernel.digest] = (kernel if isinstance(kernel, Compiled) else
                                           _describe(name, kernel, capability, problem))
    return [*rows.values()]


def _describe(name: str, kernel, capability: int, problem: Problem) -> Compiled:
    usage = _resource_usage(kernel.asm["cubin"])
    names = kernel.src.fn.arg_names
    blocks = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    config = " ".join(f"{name[6:]}={value}" for name, value in blocks.items() if name.startswith("BLOCK_"))
    config += f" warps={kernel.metadata.num_warps} stages={kernel.metadata.num_stages}"
    return Compiled(kernel=name, capability=capability, shared=kernel.metadata.shared, registers=usage["REG"],
                    stack=usage["STACK"], spills=_spills(kernel.asm["ptx"], capability) if usage["STACK"] else 0,
                    tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0, config=config,
                    problem=str(problem), digest=kernel.digest)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], check=True,
                              capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def _spills(ptx: str, capability: int) -> int:
    """Bytes of spill stores, from ptxas; asked only of kernels that have a stack frame."""
    ptxas = get_ptxas(capability) if inspect.signature(get_ptxas).parameters else get_ptxas()  # the one Triton runs
    arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        text = subprocess.run([ptxas.path, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"], check=True,
                              capture_output=True, text=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", text))


def problems_for(capability: int, head_dims: list[int] | None = None) -> list[Problem]:
    """What is compiled for an architecture: the usual head dims; for one card of each class whatever it takes to use
    every row of its tuning tables; for two of them further shapes; every head dim where shared memory is least."""
    if head_dims is not None:
        return [Problem(dim, size) for dim in head_dims for size in (128, 512, 2048)]
    problems = [Problem(128, 128), Problem(128, 512), Problem(64, 512), Problem(256, 512), Problem(128, 64),
                Problem(128, 512, decode=True), Problem(128, 512, beside=True),
                Problem(128, 128, topk=16, shared=True), Problem(128, 512, shared=True),
                Problem(128, 512, decode=True, shared=True),
                Problem(256, 100, heads=4, kv_heads=2, dtype=torch.float32, beside=True)]
    if capability in MORE_SHAPES:
        problems += [Problem(80, 512), Problem(96, 128), Problem(96, 512), Problem(192, 512, head_dim_v=128),
                     Problem(64, 128, topk=16),
                     Problem(128, 500, topk=3, heads=16, kv_heads=16, dtype=torch.float16),
                     Problem(128, 512, topk=64, deterministic=True, lse_gradient=True)]
    if capability == LEAST_SHARED_MEMORY:
        problems += [Problem(32, 512), Problem(256, 512, dtype=torch.float32, decode=True)]
    if capability in ONE_OF_EACH_CLASS:
        problems.append(Problem(192, 512, topk=64, heads=4, kv_heads=4, head_dim_v=128, dtype=torch.float16,
                                decode=True))
        problems += _problems_for_other_rows(capability, problems)
    return problems


def reachable_rows(arch: str) -> dict[tuple[str, str], dict[str, int]]:
    """The rows of the tuning tables that an architecture can get: (stage, repr of the row) -> a key that finds it."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for stage, rows in TABLE.items():
        values: dict[str, set[int]] = {"head_dim": {256}, "itemsize": {2, 4}, "chunk_size": {512}}
        for name, bound in (item for row in rows for item in row.upto.items()):
            values.setdefault(name, set()).update((bound, BEYOND.get(name, bound)))
        if any(is_gluon(row.config) for row in rows):
            values["gluon"] = {0, 1} if sm90.unusable() is None else {0}
        values.update({name: {value} for name, value in tuning.FIXED.items()})
        # the largest values first: they need the most of the card
        for chosen in itertools.product(*(sorted(some, reverse=True) for some in values.values())):
            key = dict(zip(values, chosen))
            row = next((row for row in rows if row.fits(arch, key)), None)
            if row is not None:
                found.setdefault((stage, repr(row)), key)
    return found


def stage_of(kernel: str) -> str:
    """The stage of the tuning table whose row a kernel gets, "" where it gets none."""
    return max((stage for stage in TABLE if kernel.startswith(f"_{stage}_")), key=len, default="")


def launches(problem: Problem, capability: int) -> set[tuple[str, str, str]]:
    """What a problem launches: (kernel, repr of its row of the tuning table, what else changes it); compiles nothing.

    A Gluon kernel is another program for each head dim, for chunks of one block of keys, of several, and where the last
    is ragged, and for rows of q that lie apart, which those beside the stages do; that of delta, with the gradient of
    lse; what runs beside the stages, for each dtype; and what reads choices, where heads share them.
    """
    record: list = []
    with (tuning.forced(tuning.arch_of_capability(*divmod(capability, 10)), record=record),
          compiling(capability, dry=True) as launched):
        run_stages(problem)
    rows, found = {stage: row for stage, _, row in record}, set()
    blocks, rest = divmod(problem.chunk_size, GLUON_BLOCK)
    for kernel in {name for name, _ in launched}:
        row, change = rows.get(stage_of(kernel)), ""
        if row and is_gluon(row.config):
            change = (f"D {problem.head_dim}, {min(blocks, 2)} blocks" + ", ragged" * bool(rest)
                      + ", apart" * problem.beside)
        elif stage_of(kernel) == "attention_bwd_delta" and problem.lse_gradient:
            change = "dlse"
        elif problem.beside and not row:
            change = str(problem.dtype)
        change += ", shared" * (problem.shared and kernel.startswith(("_attention", "_route", "_decode")))
        found.add((kernel, repr(row), change))
    return found


def used_rows(problem: Problem, capability: int) -> set[tuple[str, str]]:
    """The rows that a problem's launches get, as (stage, repr of the row); compiles nothing."""
    return {(stage_of(kernel), row) for kernel, row, _ in launches(problem, capability) if stage_of(kernel)
            and (problem.kernels is None or kernel in problem.kernels)}


def _problems_for_other_rows(capability: int, problems: list[Problem]) -> list[Problem]:
    used = set().union(*(used_rows(problem, capability) for problem in problems))
    added = []
    for row, key in reachable_rows(tuning.arch_of_capability(*divmod(capability, 10))).items():
        if row in used:
            continue
        dtype = torch.float32 if key["itemsize"] == 4 else torch.bfloat16
        earlier = key.get("choices", 7)
        others = key.get("gluon") == 0  # no Gluon kernel takes such heads, and the gate's not such a q
        problem = Problem(key["head_dim"] - 8 * (others and row[0] == "gate"), key["chunk_size"], topk=earlier + 1,
                          dtype=dtype, head_dim_v=key["head_dim"] // 2 if others else None)
        now = used_rows(problem, capability)
        if now - used:
            added.append(problem)
            used |= now
    return added


def covering(capability: int) -> list[Problem]:
    """Each launch of :func:`problems_for` once, in the problem of the largest head dim that it is a stage of."""
    seen, kept = set(), []
    for problem in sorted(problems_for(capability), key=lambda problem: (problem.beside, -problem.head_dim)):
        new = launches(problem, capability) - seen
        if new:
            kept.append(replace(problem, kernels=frozenset(kernel for kernel, *_ in new)))
            seen |= new
    return kept


def report_all(capabilities: list[int] | None = None, problems: Callable[[int], list[Problem]] = problems_for,
               workers: int = 2, known: dict[str, Compiled] = {}) -> tuple[list[Compiled], list[str], dict[int, set]]:
    """Compiles everything that ``problems`` lists for the capabilities, in worker processes; not what is known.

    Returns:
        The kernels; a line for each problem that did not compile; and for each capability the rows of the tuning
        table that were used, as (stage, repr of Row).
    """
    tasks = [(capability, problem) for capability in capabilities or SHARED_LIMIT_KIB
             for problem in problems(capability)]
    rows: dict[tuple, Compiled] = {}
    failures, used = [], {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [(task, pool.submit(report, task[0], [task[1]], known)) for task in tasks]
        for (capability, problem), future in futures:
            try:
                compiled = future.result()
            except Exception as error:  # a kernel that does not compile is a finding: the others are still reported
                failures.append(f"sm_{capability}, {problem}: {type(error).__name__}: {str(error).strip()[:600]}")
                continue
            used.setdefault(capability, set()).update(used_rows(problem, capability))
            for row in compiled:
                rows.setdefault((row.capability, row.digest), row)
    return sorted(rows.values(), key=lambda row: (row.capability, row.kernel, row.problem)), failures, used


def stored_path() -> Path:
    """The report for this Triton: kernels by what they are made of, so that only what has changed is compiled again."""
    return RESULTS / "compiled" / f"{triton.__version__}.json"


def load_stored() -> dict[str, Compiled]:
    path = stored_path()
    return {row["digest"]: Compiled(**row) for row in load(path)["rows"]} if path.exists() else {}


def store(rows: list[Compiled], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}]}}\n')


def as_text(rows: list[Compiled]) -> str:
    """The report as an aligned table."""
    lines = [["sm", "kernel", "shared KiB", "limit", "tensor memory", "registers", "stack", "spills", "config",
              "first problem", ""]]
    for row in rows:
        lines.append([str(row.capability), row.kernel, f"{row.shared / 1024:.1f}",
                      str(SHARED_LIMIT_KIB[row.capability]), str(row.tensor_memory or ""), str(row.registers),
                      str(row.stack), str(row.spills), row.config, row.problem, "" if row.fits else "DOES NOT FIT"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
