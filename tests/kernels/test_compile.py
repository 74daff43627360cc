"""Every row of the tuning table, compiled ahead of time for every card, as benchmarks/results/compiled has it for
this Triton; what that does not have, as after a change of a kernel, is compiled here, and a kernel of each card again.

`python -m benchmarks compile --store` refreshes it. Needs no GPU.

Not under TRITON_INTERPRET: the interpreter's tests run in processes of their own (tests/interpreted).
"""
import importlib
import inspect
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton

import moba_megatron
from benchmarks import compile_report
from moba_megatron import kernels
from moba_megatron.kernels import host, sm90, tuning
from moba_megatron.kernels.tuning_table import TABLE

pytestmark = [pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1"),
              pytest.mark.skipif(torch.version.hip is not None, reason="uses the CUDA tools of Triton's wheel")]
needs_gluon = pytest.mark.skipif(kernels.INTERPRETED or bool(sm90.unusable()),
                                 reason="Hopper's kernels are not for this Triton")
MOST_SPILLS = 2048
"""Bytes a thread. fp32 at head dim 256 spills 1.7 KB at its smallest tile; a tile that is too large spills many."""
SPILL_MORE = {"_mass_kernel": 8_500}
"""Tiles that were never tuned: the router's statistics in fp32 at head dim 256."""
if triton.__version__.startswith("3.9."):  # the same tiles of these cost its compiler up to 2.7 and 9.1 KB
    SPILL_MORE |= {"_gate_kernel": 2_800, "_mass_kernel": 9_200}


@pytest.fixture(scope="module")
def report():
    known = compile_report.load_stored()
    rows, failures, used = compile_report.report_all(None, compile_report.covering, os.cpu_count(), known)
    print(compile_report.as_text([row for row in rows if row.digest not in known]))
    return rows, failures, used


def test_everything_compiles(report):
    rows, failures, _ = report
    assert not failures, "\n".join(failures)
    assert {row.capability for row in rows} == set(compile_report.SHARED_LIMIT_KIB)


def again(capability):
    """A problem whose kernels are compiled again: those for Hopper, else the sparse forward of the smallest heads."""
    problems = compile_report.covering(capability)
    if capability == 90:
        return next(x for x in problems if (x.head_dim, x.chunk_size) == (128, 512))
    kernel = "_attention_fwd_sparse_kernel"
    smallest = min((x for x in problems if kernel in x.kernels), key=lambda x: x.head_dim)
    return replace(smallest, kernels=frozenset([kernel]))


@pytest.mark.parametrize("capability", compile_report.SHARED_LIMIT_KIB)
def test_what_is_stored_is_what_compiling_gives(capability):
    known = compile_report.load_stored()
    if not known:
        pytest.skip("nothing is stored for this Triton")
    rows = compile_report.report(capability, [again(capability)])
    assert rows and (capability != 90 or sm90.unusable() or sum("sm90" in row.kernel for row in rows) == 6)
    for row in rows:
        if row.digest in known:
            assert replace(row, problem="") == replace(known[row.digest], problem="")


def jit_functions() -> list[tuple[str, tuple[str, ...]]]:
    """Every function of the package that Triton compiles: its name, and those that it uses."""
    found, package = [], Path(moba_megatron.__file__).parent
    for path in package.rglob("*.py"):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if re.search(r"^@(triton|gluon)\.jit", path.read_text(), re.MULTILINE) and (
                "sm90" not in name or not sm90.unusable()):
            found += [(x.fn.__name__, x.fn.__code__.co_names) for x in vars(importlib.import_module(name)).values()
                      if isinstance(x, triton.runtime.jit.JITFunction) and x.fn.__module__ == name]
    return found


def test_what_no_kernel_calls_is_named_a_kernel():
    """By which the test below tells what is launched from what kernels call."""
    functions = jit_functions()
    called = {name for _, names in functions for name in names}
    assert all((name in called) != name.endswith("_kernel") for name, _ in functions)


@pytest.mark.parametrize("capability", compile_report.SHARED_LIMIT_KIB)
def test_every_kernel_of_the_package_is_compiled(report, capability):
    kernels = {name for name, _ in jit_functions() if name.endswith("_kernel")}
    assert len(kernels) > 30 and {name for name in kernels if "sm90" not in name or capability == 90} == {
        row.kernel for row in report[0] if row.capability == capability}


def test_everything_fits_the_card(report):
    too_large = [row for row in report[0] if not row.fits]
    assert not too_large, "\n" + compile_report.as_text(too_large)


def test_nothing_spills_much(report):
    spilled = [row for row in report[0] if row.spills > SPILL_MORE.get(row.kernel, MOST_SPILLS)]
    assert not spilled, "\n" + compile_report.as_text(spilled)


@pytest.mark.parametrize("capability, head_dim, head_dim_v", [(90, 128, 64), (80, 256, 256)])
def test_ieee_products_spill_no_more(monkeypatch, capability, head_dim, head_dim_v):
    """Operands of IEEE products lie in registers from where they are loaded on."""
    monkeypatch.setattr(host, "FP32_PRODUCTS", "ieee")
    monkeypatch.setitem(tuning.FIXED, "ieee", 1)
    rows = compile_report.report(capability, [compile_report.Problem(
        head_dim, 512, head_dim_v=head_dim_v, dtype=torch.float32,
        kernels=frozenset(f"_attention_{name}_kernel" for name in (
            "fwd_sparse", "fwd_diagonal", "bwd_dkdv", "bwd_dq", "bwd_dq_diagonal")))])
    assert len(rows) == 5 and all(row.spills <= MOST_SPILLS for row in rows), "\n" + compile_report.as_text(rows)


@needs_gluon
def test_kernels_of_sm90_leave_their_loops_to_registers(report):
    """384 threads have 168 registers each (512 have 128); what does not fit lies outside the loops that multiply: of
    forward and dq, addresses that their loaders read again for each piece of a list. Lists of groups take 12 bytes
    more."""
    most = {"_attention_fwd_sm90_kernel": 8, "_gate_sm90_kernel": 0, "_attention_bwd_dq_sm90_kernel": 20,
            "_attention_bwd_dkdv_sm90_kernel": 256, "_attention_fwd_diagonal_sm90_kernel": 32,
            "_attention_bwd_dq_diagonal_sm90_kernel": 32}
    rows = [row for row in report[0] if row.kernel in most]
    assert {row.kernel for row in rows} == set(most) and {row.capability for row in rows} == {90}
    assert all(row.registers <= 168 for row in rows)
    most_of_one_tile = 240 if triton.__version__.startswith("3.9.") else 160
    spilled = [row for row in rows if "chunk512" in row.problem
               and row.spills > most[row.kernel] + 12 * row.problem.endswith("shared")
               or "chunk128" in row.problem and row.spills > most_of_one_tile]
    assert not spilled, "\n" + compile_report.as_text(spilled)


@pytest.mark.parametrize("capability", compile_report.ONE_OF_EACH_CLASS)
def test_every_row_of_the_tuning_table_is_compiled(report, capability):
    rows = compile_report.reachable_rows(tuning.arch_of_capability(*divmod(capability, 10)))
    unused = set(rows) - report[2][capability]
    assert not unused, f"no launch for sm_{capability} looks these rows up:\n" + "\n".join(map(str, sorted(unused)))


class Everything(dict):
    """Takes every kernel for known, and notes its digest."""

    def __contains__(self, digest):
        self[digest] = compile_report.Compiled("", 86, 0, 0, 0, 0, 0, "", "", digest)
        return True


def test_what_is_stored_is_found_wherever_triton_is_installed(tmp_path, monkeypatch):
    def digests():
        compile_report.report(86, [compile_report.Problem(64, 128)], known := Everything())
        return set(known)

    here = digests()
    library = Path(triton.backends.nvidia.compiler.__file__).parent / "lib" / "libdevice.10.bc"
    monkeypatch.setenv("TRITON_LIBDEVICE_PATH", str(shutil.copy(library, tmp_path / "elsewhere.bc")))
    for module in list(vars(kernels).values()):
        for kernel in vars(module).values() if inspect.ismodule(module) else ():
            if isinstance(kernel, triton.runtime.jit.JITFunction):
                kernel.device_caches.clear()
    assert len(here) > 10 and digests() == here


@needs_gluon
def test_a_kernel_for_hopper_that_does_not_compile_is_reported(monkeypatch):
    kernel = sm90.kernel_module("attention_fwd")._attention_fwd_sm90_kernel

    def fail(*args):
        raise ValueError("no such layout")

    monkeypatch.setattr(kernel, "_do_compile", fail)
    kernel.device_caches.clear()
    with pytest.raises(ValueError, match="no such layout"):
        compile_report.report(90, [compile_report.Problem(128, 512)], Everything())


@needs_gluon
def test_no_row_of_the_tuning_table_is_hidden_by_those_before_it():
    reachable = set()
    for version in (305, 308, 309):
        with mock.patch.dict(tuning.FIXED, triton=version):
            reachable = reachable.union(*(compile_report.reachable_rows(arch) for arch in tuning.ARCHS))
    rows = {(stage, repr(row)) for stage, listed in TABLE.items() for row in listed}
    interpreter = {(stage, repr(row)) for stage, listed in TABLE.items() for row in listed
                   if row.archs == tuning.INTERPRETER}
    assert rows - interpreter <= reachable


def test_a_launch_is_compiled_and_not_run():
    with compile_report.compiling(86) as compiled:
        k = torch.empty(4096, 2, 64, dtype=torch.bfloat16, device="meta")
        assert kernels.block_sums(k, *torch.empty(2, 8, dtype=torch.int32, device="meta")).shape == (8, 2, 64)
    assert compiled and all(kernel.asm["cubin"] for _, kernel in compiled)
