"""Recorded launches: what repeats is started from the record, whatever differs goes through Triton's own call.

What is replayed without its stages is in ``test_replay.py``; nothing is here.
"""
import contextlib
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
        self.params = [SimpleNamespace(name=name, default=defaults.get(name), is_constexpr=name.isupper())
                       for name in names]

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


def test_nor_where_the_environment_turns_it_off(monkeypatch):
    log = []
    kernel, x = Kernel(log, "x", "size", "BLOCK"), torch.zeros(8)
    for setting in ("1", "0"):
        monkeypatch.setenv("MOBA_PREPARED_LAUNCHES", setting)
        call(kernel, x, BLOCK=16)
    assert [entry[0] for entry in log] == ["triton", "triton"]
    monkeypatch.delenv("MOBA_PREPARED_LAUNCHES")
    call(kernel, x, BLOCK=16)
    assert log[2][0] != "triton"


class OnCard(SimpleNamespace):
    """As a tensor on a CUDA device, as far as a launch looks at it."""

    def __init__(self, number):
        super().__init__(device=torch.device("cuda", number), shape=(8,), dtype=torch.float32, data_ptr=lambda: 4096,
                         stride=lambda: (1,), detach=lambda: self)


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Recorded or not, within a call or outside; afterwards the current device is what it was."""
    current = [0]

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launcher.driver.active, "get_current_device", lambda: current[0])
    monkeypatch.setattr(launcher.driver.active, "get_current_stream", lambda number: f"stream of {number}")
    log = []
    kernel = Kernel(log, "x", "size", "BLOCK")
    real = Kernel.__getitem__
    monkeypatch.setattr(Kernel, "__getitem__", lambda self, grid: (log.append(current[0]), real(self, grid))[1])
    for number in (1, 0, 1):
        launcher.launch(kernel, (4,), OnCard(number), 7, BLOCK=16)
        call(kernel, OnCard(number), BLOCK=16)
        assert current == [0]
    assert [x for x in log if isinstance(x, int)] == [1, 1, 0, 0, 1]
    assert [entry[1][3] for entry in log if isinstance(entry, tuple) and entry[0] != "triton"] == ["stream of 1"]
    assert [key[0] for key in launcher._records] == [1, 0]


def test_a_fault_of_a_recorded_launch_goes_through_triton(caplog):
    log = []
    kernel, x = Kernel(log, "x", "size", "BLOCK"), torch.zeros(8)
    call(kernel, x, BLOCK=16)
    record, = launcher._records.values()
    record.launches[0].compiled.run = lambda *args: 1 / 0
    for _ in range(3):
        call(kernel, x, BLOCK=16)
    assert [entry[0] for entry in log] == ["triton"] * 4
    assert caplog.text.count("prepared launches of a call are not used any more: ZeroDivisionError") == 1


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
    assert not any(vars(launcher._current).get(name) for name in launcher._STATE)
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
