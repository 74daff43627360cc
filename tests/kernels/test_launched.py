"""That the sanitizer's program knows every kernel: names, which were never launched, whose reports initcheck has."""
import importlib

import pytest

pytest.importorskip("triton.experimental.gluon")
from tests.gpu import initcheck, launched  # noqa: E402


def test_kernels_are_named_for_the_sanitizer():
    """launch/sanitize.sh picks kernels by ``_kernel`` in their names, warp-specialised ones by ``_sm90_kernel``."""
    kernels = launched.kernels()
    assert {name for _, name in kernels} == {name for _, name in launched.jit_functions() if name.endswith("_kernel")}
    names = {"_gate_kernel", "_mass_kernel", "_copy_rows_kernel", "_attention_fwd_sm90_kernel"}
    assert names <= {name for _, name in kernels}
    for module, name in kernels:
        assert name.endswith("_sm90_kernel") == module.endswith("_sm90"), f"{module}.{name}"


def test_a_kernel_that_was_not_launched_is_named(monkeypatch):
    for module, name in launched.kernels():
        function = getattr(importlib.import_module(module), name)
        done = {} if name in ("_copy_rows_kernel", "_attention_fwd_sm90_kernel") else {"signature": "compiled"}
        monkeypatch.setattr(function, "device_caches", {0: (done, {}, None, None, None)})
    assert launched.never_launched(sm90=False) == ["moba_megatron.kernels.copying._copy_rows_kernel"]
    assert launched.never_launched(sm90=True) == [
        "moba_megatron.kernels.attention_fwd_sm90._attention_fwd_sm90_kernel",
        "moba_megatron.kernels.copying._copy_rows_kernel"]


TORCH = """========= Uninitialized __global__ memory read of size 8 bytes
=========     at void at::native::vectorized_gather_kernel<(int)16, long>(char *, T2 *, bool)+0xa0
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f653d5fd400
========= 
"""
COPY = """========= Host API memory access error at host access to 0x7f653d5fde00 of size 32 bytes
=========     Uninitialized access to 0x7f653d5fde00 on access by cudaMemcpy source
========= 
"""
OWN = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at _copy_rows_kernel+0x560 in copying.py:40
=========     by thread (3,0,0) in block (1,0,0)
"""
WITHIN = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at (anonymous namespace)::help(float *)+0x20 in copying.py:20
=========         Device Frame: _copy_rows_kernel+0x80 in copying.py:40
"""
EXIT = "========= Target application returned an error\n"


@pytest.mark.parametrize("body, errors, clear, said", [
    ("", 0, True, "0 reports in the package's kernels or without a kernel, 0 in others"),
    (TORCH + COPY + TORCH, 3, True, "3 in others: at::native::vectorized_gather_kernel 2, cudaMemcpy source 1"),
    (TORCH + OWN + OWN, 3, False, "2 x Uninitialized __global__ memory read of size 4 bytes in _copy_rows_kernel"),
    (TORCH + WITHIN, 2, False, "in help in _copy_rows_kernel"),
    (TORCH, 2, False, "1 reports in the log, by its summary [2]: not decided"),
    (EXIT + TORCH, 2, False, "1 x Target application returned an error"),
])
def test_reports_of_initcheck_count_in_own_kernels(body, errors, clear, said):
    summary = f"========= ERROR SUMMARY: {errors} error{'s'[errors == 1:]}\n"
    log = f"========= COMPUTE-SANITIZER\ngqa\n{body}decoding\n{summary}"
    text, decided = initcheck.judge(log, {name for _, name in launched.jit_functions()})
    assert decided is clear and said in text
    text, decided = initcheck.judge(log.removesuffix(summary), set())
    assert not decided and "by its summary []: not decided" in text
