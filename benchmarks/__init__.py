"""Measuring, from a checkout: ``python -m benchmarks --help`` lists the subcommands."""
import os
from pathlib import Path

ROOT = Path(__file__).parent.parent


def child_environment() -> dict[str, str]:
    """This process's variables, with the checkout where a child finds ``benchmarks`` from any folder."""
    paths = str(ROOT), os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
