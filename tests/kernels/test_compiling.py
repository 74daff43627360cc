"""Compiling before a first launch: side by side, backward's kernels during forward, errors where they belong."""
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
from stand_in_driver import CASES, cloned, make
from triton.runtime import _async_compile

from moba_megatron import kernels, moba_attn_varlen
from moba_megatron.kernels import launcher, routing

pytestmark = pytest.mark.usefixtures("driver")


def test_a_first_call_compiles_its_kernels_side_by_side(driver, monkeypatch):
    """Each once, and as many at a time as there are cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    together, compile, names = threading.Barrier(4), driver.compile, []

    def at_once(src, **options):
        names.append(src.hash())
        if len(names) <= 4:  # of the forward pass's kernels
            together.wait(30)  # raises BrokenBarrierError where they come one by one
        return compile(src, **options)

    monkeypatch.setattr(triton.compiler, "compile", at_once)
    tensors, call = make(**CASES["gqa"])
    call(*tensors)
    assert len(names) == len(set(names)) > 8
    call(*cloned(tensors))
    launcher._plans.clear()
    before = len(names)
    call(*tensors)
    assert driver.prepared and len(names) == before


def forward_and_backward(tensors, **case):
    """o of ``make(**case)``'s call, and a function that gives the gradients."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    length = case["lengths"][0]
    cu = torch.tensor([0, length], dtype=torch.int32)
    o = moba_attn_varlen(q, k, v, cu, length, case["chunk"], 3, backend="triton")
    return o, lambda: torch.autograd.grad(o, (q, k, v), tensors[3])


def test_a_first_forward_has_backwards_kernels_compiled(driver, monkeypatch):
    """Forward does not wait for them, backward does; what starts each is made in the threads too, once."""
    compile, names, let = driver.compile, [], threading.Event()

    def noted(src, **options):
        assert threading.current_thread() is not threading.main_thread()
        names.append(src.fn.fn.__name__)
        if "bwd" in names[-1]:
            assert let.wait(30)
        return compile(src, **options)

    monkeypatch.setattr(triton.compiler, "compile", noted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    o, backward = forward_and_backward(make(**CASES["gqa"])[0], **CASES["gqa"])
    assert names[0].startswith("_attention_bwd_dkdv_"), "it takes the longest"
    begun = len(names)
    threading.Timer(0.2, let.set).start()
    backward()
    assert let.is_set() and len(names) == begun and sorted(driver.launchers) == sorted(names)


def test_a_forward_without_gradient_has_its_own_kernels_compiled_alone(driver, monkeypatch):
    compile, names = driver.compile, []
    monkeypatch.setattr(triton.compiler, "compile", lambda src, **options: (
        names.append(src.fn.fn.__name__), compile(src, **options))[1])
    q, k, v = make(**CASES["gqa"])[0][:3]
    moba_attn_varlen(q, k, v, torch.tensor([0, 2048], dtype=torch.int32), 2048, 512, 3, backend="triton")
    assert names and not any("bwd" in name for name in names)


def test_an_error_of_a_kernel_compiled_early_is_backwards(driver, monkeypatch):
    """Each time, until there is none; then nothing is compiled again."""
    compile, full, names = driver.compile, [True], []

    def faulty(src, **options):
        names.append(src.fn.fn.__name__)
        if full[0] and src.fn.fn.__name__ == "_attention_bwd_delta_kernel":
            raise OSError("no space is left")
        return compile(src, **options)

    monkeypatch.setattr(triton.compiler, "compile", faulty)
    for full[0] in (True, True, False, False):
        o, backward = forward_and_backward(make(**CASES["gqa"])[0], **CASES["gqa"])
        if full[0]:
            with pytest.raises(OSError, match="no space is left"):
                backward()
        else:
            backward()
    assert driver.prepared
    for _ in range(2):
        names.clear()
        launcher._plans.clear()
        forward_and_backward(make(**CASES["gqa"])[0], **CASES["gqa"])[1]()
    assert not names


def test_a_backward_that_cannot_be_planned_early_leaves_forward_alone(driver, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "attention_bwd", lambda *_, **__: 1 / 0)
        o, backward = forward_and_backward(make(**CASES["gqa"])[0], **CASES["gqa"])
        assert o.shape == (2048, 8, 128) and launcher._building.plan is None
    backward()


def test_what_is_python_of_compiling_comes_one_by_one(driver, monkeypatch):
    """The longest first: it does not share its core with the others."""
    compile, running, most = driver.compile, [], []

    def busy(src, **options):
        running.append(src)
        most.append(len(running))
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        running.remove(src)
        time.sleep(0.3)  # other threads' turn
        return compile(src, **options)

    monkeypatch.setattr(triton.compiler, "compile", busy)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    forward_and_backward(make(**CASES["gqa"])[0], **CASES["gqa"])[1]()
    assert most[:3] == [1, 1, 1]


def test_ranks_of_a_host_share_its_cores(driver, monkeypatch):
    compile, running, most = driver.compile, [], []

    def slow(src, **options):
        running.append(src)
        most.append(len(running))
        time.sleep(0.1)
        running.remove(src)
        return compile(src, **options)

    monkeypatch.setattr(triton.compiler, "compile", slow)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    tensors, call = make(**CASES["gqa"])
    call(*tensors)
    assert max(most) == 2


def test_what_is_no_function_of_tritons_is_launched_as_it_is(driver, monkeypatch):
    """As an autotuner around a kernel: the others are compiled side by side, and nothing is prepared."""
    started = []

    class Around:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*args, **named):
                started.append(self.kernel[grid](*args, **named))

            return run

    tensors, call = make(**CASES["gqa"])
    with monkeypatch.context() as patch:
        patch.setattr(routing, "_route_place_kernel", Around(routing._route_place_kernel))
        call(*tensors)
        call(*cloned(tensors))
    assert len(started) == 2 and all(started)


def test_an_error_of_the_compiler_is_the_launchs(driver, monkeypatch):
    compile = driver.compile

    def faulty(src, **options):
        if src.fn.fn.__name__ == "_route_place_kernel":
            raise RuntimeError("no register is left")
        return compile(src, **options)

    monkeypatch.setattr(triton.compiler, "compile", faulty)
    tensors, call = make(**CASES["gqa"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no register is left"):
            call(*tensors)
    assert _async_compile.active_mode.get() is None


def test_what_the_compiler_meets_once_is_not_kept(driver, monkeypatch):
    """A full disk, say: the next call compiles again."""
    compile, full = driver.compile, [True]

    def faulty(src, **options):
        if full[0] and src.fn.fn.__name__ == "_route_place_kernel":
            raise OSError("no space is left")
        return compile(src, **options)

    monkeypatch.setattr(triton.compiler, "compile", faulty)
    tensors, call = make(**CASES["gqa"])
    with pytest.raises(OSError, match="no space is left"):
        call(*tensors)
    full[0] = False
    call(*tensors)
    call(*tensors)
    assert driver.prepared


def test_a_kernel_that_another_thread_compiles_is_prepared(driver, monkeypatch, caplog):
    """Two first calls at once: the second one finds kernels that are not there yet."""
    compile, begun = driver.compile, threading.Event()

    def slow(src, **options):
        if src.fn.fn.__name__ == "_route_place_kernel":
            begun.set()
            time.sleep(0.5)
        return compile(src, **options)

    monkeypatch.setattr(triton.compiler, "compile", slow)
    tensors, call = make(**CASES["gqa"])
    first = threading.Thread(target=call, args=tensors)
    first.start()
    assert begun.wait(30)
    call(*cloned(tensors))
    first.join()
    for _ in range(2):
        driver.launches, driver.prepared = [], 0
        call(*tensors)
    assert driver.prepared == len(driver.launches) and not caplog.text


def test_within_a_users_own_mode_of_compiling(driver, caplog):
    tensors, call = make(**CASES["gqa"])
    with ThreadPoolExecutor(2) as pool, triton.AsyncCompileMode(pool) as mode:
        call(*tensors)
        assert _async_compile.active_mode.get() is mode
    driver.launches = []
    call(*cloned(tensors))
    assert driver.prepared == len(driver.launches) > 0 and not caplog.text
