"""Addresses in kernels: a stride is multiplied in one place, in 64 bits. Read off the sources: none is left out.

What the kernels make of such strides is in tests/interpreted/test_strides.py, on a GPU in tests/gpu/test_strides.py.
"""
import ast
from pathlib import Path

import pytest

import moba_megatron

PACKAGE = Path(moba_megatron.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if ".jit" in path.read_text())


def jitted(path):
    """The functions of a file that Triton or Gluon compiles."""
    def is_jit(decorator):
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        return isinstance(called, ast.Attribute) and called.attr == "jit"

    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
            and any(map(is_jit, node.decorator_list))]


def narrow_products(function):
    """Lines where something is multiplied by a stride in whatever width it has; not where WIDE says that 32 bits do."""
    proved = {id(node) for branch in ast.walk(function) if isinstance(branch, ast.If)
              and isinstance(branch.test, ast.Name) and branch.test.id == "WIDE"
              for statement in branch.orelse for node in ast.walk(statement)}
    return sorted(node.lineno for node in ast.walk(function)
                  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and id(node) not in proved
                  and any(map(has_stride, (node.left, node.right))))


def has_stride(expression):
    """Whether a stride is in it; not as an argument of a call, which has widened it: ``_offset(i, stride) * 8``."""
    if isinstance(expression, ast.Call):
        return False
    return (isinstance(expression, ast.Name) and expression.id.startswith("stride")
            or any(map(has_stride, ast.iter_child_nodes(expression))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_strides_are_multiplied_by_the_helper_alone(path):
    found = {function.name: lines for function in jitted(path) if (lines := narrow_products(function))}
    assert found == ({"_offset": found.get("_offset")} if path.stem == "jit_helpers" else {}), (
        f"{path.name}: use _offset(index, stride) of jit_helpers, an int32 product wraps from 2^31 elements on")


def test_the_search_finds_what_it_looks_for():
    source = """
@triton.jit
def f(p, i, stride_t, stride_h, WIDE: tl.constexpr):
    a = p + i * stride_t
    b = p + (i // 2 * stride_h + 1)
    c = p + _offset(i, stride_t) * 8 + _offset(i * 2, stride_h)
    if WIDE:
        d = i.to(tl.int64) * stride_t
    else:
        d = i * stride_t
"""
    function, = (node for node in ast.parse(source).body)
    assert narrow_products(function) == [4, 5, 8]
    kernels = {function.name for path in FILES for function in jitted(path)}
    assert {"_gate_kernel", "_attention_bwd_dkdv_sm90_kernel", "_decode_gate_kernel", "_mass_kernel"} <= kernels
