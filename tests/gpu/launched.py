"""Which kernels the package has, and which of them this process never launched, for the sanitizer's program."""
from __future__ import annotations

import ast
import importlib
from pathlib import Path

import moba_megatron

PACKAGE = Path(moba_megatron.__file__).parent
JIT = ("triton.jit", "gluon.jit")


def jit_functions() -> dict[tuple[str, str], ast.FunctionDef]:
    """Every function of the package that Triton compiles, by its module and name."""
    functions = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(x).startswith(JIT) for x in node.decorator_list):
                functions[module, node.name] = node
    return functions


def kernels() -> set[tuple[str, str]]:
    """Those of them that no other one names: what is launched."""
    functions = jit_functions()
    named = {x.id for node in functions.values() for x in ast.walk(node) if isinstance(x, ast.Name)}
    return {(module, name) for module, name in functions if name not in named}


def never_launched(sm90: bool) -> list[str]:
    """Kernels that Triton has compiled for no device so far.

    Args:
        sm90: whether the Gluon kernels are in use here; where they are not, they are left out.
    """
    missing = []
    for module, name in sorted(kernels()):
        if sm90 or not name.endswith("_sm90_kernel"):
            caches = getattr(importlib.import_module(module), name).device_caches
            if not any(compiled for compiled, *_ in caches.values()):
                missing.append(f"{module}.{name}")
    return missing
