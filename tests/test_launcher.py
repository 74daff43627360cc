"""Recorded launches: what repeats is started from the record, whatever differs goes through Triton's own call.

What is replayed without its stages is in ``test_replay.py``; nothing is here.
"""
from types import SimpleNamespace

import pytest
import torch

from moba_megatron.kernels import launcher
from moba_megatron.kernels.workspace import workspace_limit


class Compiled:
    def __init__(self, log, name):
        self.log, self.name = log, name
        self.function, self.packed_metadata = f"{name}'s function", f"{name}'s metadata"
        self.metadata = SimpleNamespace(num_ctas=2, launch_cooperative_grid=0, name=name)  # which is not replayed

    def run(self, *args):
        self.log.append((self.name, args))


class Kernel:
    """As a JITFunction: ``kernel[grid](...)`` compiles and launches."""

    def __init__(self, log, *names, **defaults):
        self.log = log
        self.params = [SimpleNamespace(name=name, default=defaults.get(name)) for name in names]

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.log.append(("triton", grid, args, constants))
            return Compiled(self.log, f"compiled for {sorted(constants.items())}")
        return run


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(launcher, "_RECORDING", True)
    monkeypatch.setattr(launcher, "_records", {})


def call(kernel, x, grid=(4,), size=7, options=("forward",), **constants):
    def compute(x, _):
        launcher.launch(kernel, grid, x, size, **constants)
        return ()

    launcher.repeat(options, compute, x, None)


def test_the_second_call_is_started_from_the_record():
    log = []
    kernel = Kernel(log, "x", "size", "BLOCK", "FLAG", FLAG="default")
    x, y = torch.zeros(8), torch.ones(8)
    call(kernel, x, BLOCK=16, num_warps=4)
    call(kernel, y, grid=(5, 2), size=9, BLOCK=16, num_warps=4)
    assert [entry[0] for entry in log] == ["triton", "compiled for [('BLOCK', 16), ('num_warps', 4)]"]
    name = log[1][0]
    args = log[1][1]
    assert args[:9] == (5, 2, 1, "stream", f"{name}'s function", f"{name}'s metadata", None, None, None)
    assert args[9].data_ptr() == y.data_ptr() and args[10:] == (9, 16, "default")


@pytest.mark.parametrize("change", [
    "shape", "stride", "dtype", "alignment", "options", "constants", "kernel", "device", "workspace", "outside"])
def test_whatever_differs_goes_through_triton(change, monkeypatch):
    log = []
    kernel, x, options, constants = Kernel(log, "x", "size", "BLOCK"), torch.zeros(4, 4), ("forward",), {"BLOCK": 16}
    call(kernel, x, options=options, **constants)
    if change == "shape":
        x = torch.zeros(4, 5)
    elif change == "stride":
        x = torch.zeros(4, 4).t()
    elif change == "dtype":
        x = x.half()
    elif change == "alignment":
        x = torch.zeros(20)[1:17].view(4, 4)
    elif change == "options":
        options = ("backward",)
    elif change == "constants":
        constants = {"BLOCK": 32}
    elif change == "kernel":
        kernel = Kernel(log, "x", "size", "BLOCK")
    elif change == "device":
        launcher.driver.active.get_current_device = lambda: 1
    elif change == "workspace":
        monkeypatch.setenv("MOBA_WORKSPACE_MIB", "77")
    if change == "outside":
        launcher.launch(kernel, (4,), x, 7, **constants)
    else:
        call(kernel, x, options=options, **constants)
    assert [entry[0] for entry in log] == ["triton", "triton"]


def test_nothing_is_started_from_a_record_while_recording_is_off(monkeypatch):
    log = []
    kernel, x = Kernel(log, "x", "size", "BLOCK"), torch.zeros(8)
    call(kernel, x, BLOCK=16)
    monkeypatch.setattr(launcher, "_RECORDING", False)  # as bench.timing.kernel_times does
    call(kernel, x, BLOCK=16)
    assert [entry[0] for entry in log] == ["triton", "triton"]


def test_launches_of_a_call_are_kept_in_order_and_an_error_leaves_nothing_behind():
    log = []
    first, second = Kernel(log, "x", "A"), Kernel(log, "x", "B")
    x = torch.zeros(8)

    def both(fail=False):
        def compute(x):
            launcher.launch(first, (1,), x, A=1)
            if fail:
                raise RuntimeError("between")
            launcher.launch(second, (1,), x, B=2)
            return ()

        launcher.repeat(("two",), compute, x)

    with pytest.raises(RuntimeError, match="between"):
        both(fail=True)
    launcher.launch(second, (1,), x, B=2)  # not taken for the call's second launch
    both()
    both()
    names = [entry[0] for entry in log]
    assert names == ["triton", "triton", "compiled for [('A', 1)]", "triton", "compiled for [('A', 1)]",
                     "compiled for [('B', 2)]"]


def test_signatures_are_bounded(monkeypatch):
    monkeypatch.setattr(launcher, "MAX_SIGNATURES", 3)
    kernel = Kernel([], "x", "size", "BLOCK")
    for length in range(1, 9):
        call(kernel, torch.zeros(length), BLOCK=16)
        assert len(launcher._records) <= 3


def test_the_workspace_is_limited_within_the_block(monkeypatch):
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", "77")
    limits = []

    def inner():
        limits.append(workspace_limit())
        return ()

    def outer():
        limits.append(workspace_limit())
        launcher.repeat(("inner",), inner)
        limits.append(workspace_limit())
        return ()

    launcher.repeat(("outer",), outer, workspace_mib=5)
    assert limits == [5 << 20, 77 << 20, 5 << 20]
    assert workspace_limit() == 77 << 20
