"""Tests of launches and of compiling start kernels through a stand-in for Triton's driver."""
import importlib
from types import SimpleNamespace

import pytest
import torch
import triton
from stand_in_driver import CARD, Driver
from triton.runtime.jit import JITFunction

from moba_megatron import kernels
from moba_megatron.kernels import launcher, tuning
from moba_megatron.ops import backend


@pytest.fixture
def driver(monkeypatch):
    """A stand-in in place of Triton's driver, as for Hopper; what it compiled is forgotten after the test."""
    if kernels.INTERPRETED:
        pytest.skip("interpreted kernels are not launched")
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.compiler, "compile", driver.compile)
    monkeypatch.setattr(launcher, "_plans", {})
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(backend, "_stages", lambda name, device_type: kernels)
    monkeypatch.setattr(tuning, "_arch_of_device", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    yield driver
    for module in ("attention_bwd", "attention_bwd_dkdv", "attention_bwd_dq", "attention_fwd", "bounds", "chunk_means",
                   "gating", "gating_sm90", "routing", "attention_fwd_sm90", "attention_bwd_dq_sm90",
                   "attention_bwd_dkdv_sm90", "attention_diagonal_sm90", "decode"):
        for kernel in vars(importlib.import_module(f"moba_megatron.kernels.{module}")).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.pop(CARD, None)
