"""Skips these tests where Triton came without TRITON_INTERPRET=1. No bf16 here: the interpreter gets it wrong."""
from pathlib import Path

import pytest

from moba_megatron import kernels
from moba_megatron.kernels import launcher

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    """What a test changes in the stages must not stay in plans, nor may it find plans made without the change."""
    monkeypatch.setattr(launcher, "_plans", {})


def pytest_collection_modifyitems(items):
    if kernels.INTERPRETED:
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 before the first import of triton")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)
