"""That the sanitizer's program knows every kernel: their names, and which of them were never launched."""
import importlib

import pytest

pytest.importorskip("triton.experimental.gluon")
from gpu import launched  # noqa: E402


def test_kernels_are_named_for_the_sanitizer():
    """launch/sanitize.sh picks kernels by ``_kernel`` in their names, and the warp-specialised ones by ``_hopper``."""
    kernels = launched.kernels()
    assert {name for _, name in kernels} == {name for _, name in launched.jit_functions() if name.endswith("_kernel")}
    assert {"_gate_kernel", "_mass_kernel", "_copy_rows_kernel", "_hopper_fwd_kernel"} <= {name for _, name in kernels}
    for module, name in kernels:
        assert ("_hopper" in name) == module.startswith("moba_megatron.kernels.hopper_"), f"{module}.{name}"


def test_a_kernel_that_was_not_launched_is_named(monkeypatch):
    for module, name in launched.kernels():
        function = getattr(importlib.import_module(module), name)
        done = {} if name in ("_copy_rows_kernel", "_hopper_fwd_kernel") else {"signature": "compiled"}
        monkeypatch.setattr(function, "device_caches", {0: (done, {}, None, None, None)})
    assert launched.never_launched(hopper=False) == ["moba_megatron.kernels.copying._copy_rows_kernel"]
    assert launched.never_launched(hopper=True) == ["moba_megatron.kernels.copying._copy_rows_kernel",
                                                    "moba_megatron.kernels.hopper_fwd._hopper_fwd_kernel"]
