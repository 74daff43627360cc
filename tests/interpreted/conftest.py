"""The kernels under Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreted``, a process of its own, else
skipped. No bf16 here: the interpreter gets it wrong.
"""
import functools
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
from triton.language.core import is_builtin
from triton.runtime import interpreter

from moba_megatron import kernels
from moba_megatron.kernels import launcher

HERE = Path(__file__).parent


@functools.cache
def _builtins(package) -> list[str]:
    """Names in a package of the language that a launch replaces; asked first at a launch, before they are."""
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _without_waste(monkeypatch) -> None:
    """A third of the interpreter's time changes nothing: it lists the language's members at every call of a device
    function, works out checks of overflow that it then drops, and makes one table at every use of a dtype."""
    listed = SimpleNamespace(**vars(inspect))
    listed.getmembers = lambda package: [(name, getattr(package, name)) for name in _builtins(package)]
    monkeypatch.setattr(interpreter, "inspect", listed)
    of_any = interpreter._get_np_dtype
    of_scalar = functools.cache(of_any)
    monkeypatch.setattr(interpreter, "_get_np_dtype", lambda dtype: (
        of_scalar(dtype.scalar) if type(dtype.scalar) is triton.language.dtype else of_any(dtype)))  # else a pointer
    options = interpreter.interpreter_builder.options
    assert not options.debug  # with it the checks would be made
    monkeypatch.setattr(interpreter.interpreter_builder, "options", type(options)(sanitize_overflow=False))


@pytest.fixture(scope="session", autouse=True)
def interpreter_without_waste():
    with pytest.MonkeyPatch.context() as monkeypatch:
        if kernels.INTERPRETED:
            _without_waste(monkeypatch)
        yield


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
