"""What the Gluon kernels' barriers rely on in the code that Triton makes, and that the tests with sleeps can be built.

Needs no GPU; the tests with sleeps themselves are in tests/gpu/test_sm90_delays.py.
"""
import re

import pytest

from benchmarks import compile_report
from moba_megatron import kernels
from moba_megatron.kernels import sm90, tuning
from tests.gpu import test_sm90_delays as delays

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")
PROBLEMS = [compile_report.Problem(128, 128), compile_report.Problem(128, 512), compile_report.Problem(128, 320),
            compile_report.Problem(256, 512, heads=16, kv_heads=4), compile_report.Problem(128, 64, 16)]
READS_AND_WRITES = re.compile(r"\b(ld\.shared|st\.shared|ldmatrix|stmatrix|wgmma)")
ONE_ARRIVES = re.compile(r"mbarrier\.arrive\.(?!expect_tx)")


def compiled(problem):
    """PTX of a problem's Gluon kernels, by name."""
    with (tuning.forced("sm_90"),
          compile_report.compiling(90, only=lambda name: name.endswith("_sm90_kernel")) as kernels_of_sm90):
        compile_report.run_stages(problem)
    return {name: kernel.asm["ptx"] for name, kernel in kernels_of_sm90}


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_group_has_met_before_one_of_its_threads_arrives(problem):
    """mbarrier.arrive is one thread's: what the other 127 have read must lie before a barrier of their group; the warp
    that finds tiles is a group of its own, and arrives twice."""
    ptx = compiled(problem)
    assert "_attention_bwd_dkdv_sm90_kernel" in ptx
    for name, text in ptx.items():
        lines, arrivals, of_one_warp = text.splitlines(), 0, 0
        for i, line in enumerate(lines):
            if not ONE_ARRIVES.search(line) or "cp.async" in line:
                continue
            arrivals += 1
            earlier = next(x for x in reversed(lines[:i]) if re.search(r"\bbar\.(warp\.)?sync", x)
                           or READS_AND_WRITES.search(x))
            if re.search(r"\bbar\.warp\.sync\s+-1;", earlier):
                of_one_warp += 1
                continue
            assert re.search(r"\bbar\.sync\s+\d+, 128;", earlier), f"{name}, line {i}: {earlier} before {line}"
        assert of_one_warp == (2 if "diagonal" in name else 0), name
        assert arrivals >= 4, name  # two groups that give back rows and keys


def test_kernels_with_sleeps_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(delays, "SETTINGS", delays.gl.constexpr(1 << 40))  # an address: nothing is run
    monkeypatch.setattr(sm90, "kernel_module", delays.Modules(tmp_path).__getitem__)
    ptx = compiled(PROBLEMS[1])
    assert set(ptx) == {f"_{name}_sm90_kernel" for name in (*delays.test_sm90.ALL, "attention_fwd_diagonal",
                                                            "attention_bwd_dq_diagonal", "gate")}
    assert all(text.count("nanosleep") > 10 for text in ptx.values())


@pytest.mark.parametrize("kernel, case, changes", delays.BROKEN.values(), ids=delays.BROKEN.keys())
def test_what_is_broken_on_purpose_is_still_there(kernel, case, changes, tmp_path):
    broken = delays.build(f"{kernel}_sm90", tmp_path, changes)
    name = {"gating": "gate", "attention_diagonal": "attention_fwd_diagonal"}.get(kernel, kernel)
    assert f"_{name}_sm90_kernel" in vars(broken) and case in delays.ALL_CASES
