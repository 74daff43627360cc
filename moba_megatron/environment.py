"""What the tools say and store alike: where they ran (device, versions, commit, command), aligned columns, JSON."""
import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

from . import __version__


def use_device(name: str) -> torch.device:
    """The device of this name, made the current one: events and graphs are the current device's."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def need_device(parser: argparse.ArgumentParser, device: str, only_cuda: bool = False) -> None:
    """Ends with status 2 and one line where a measurement's device is not here, rather than run for hours elsewhere."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("it measures on a CUDA device, and torch sees none here"
                     + "; --device cpu tries it out all the same" * (not only_cuda))


def describe(device: torch.device) -> dict[str, str | int | None]:
    """What a reader needs to judge or repeat a measurement."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {"device": properties.name if cuda else platform.processor() or platform.machine(),
            "capability": f"{properties.major}.{properties.minor}" if cuda else None,
            "device_memory_gib": round(properties.total_memory / 2 ** 30, 1) if cuda else None,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
            "cuda": torch.version.cuda, "cudnn": _cudnn_version() if cuda else None, "torch": torch.__version__,
            "triton": triton.__version__, "python": platform.python_version(), "moba_megatron": __version__,
            "commit": commit(), "command": command(), "when": datetime.now(timezone.utc).strftime("%Y-%m-%d")}


def _cudnn_version() -> int | None:
    """torch's; None where another library loaded another cuDNN first, which torch then refuses."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError:
        return None


def command(program: str | None = None) -> str:
    """How this process was started: the program as a reader calls it (``python -m MODULE``), then its arguments."""
    # an absolute path means nothing on another machine: its name alone
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv]
    if program is None:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        program = "python " + (f"-m {spec.name.removesuffix('.__main__')}" if spec else words[0])
    return " ".join((program, *words[1:]))


def commit() -> str | None:
    """MOBA_COMMIT where it is set (a copy of the files, without their repository or inside another one), else the
    commit of this checkout, with "+" if files differ from it."""
    if os.environ.get("MOBA_COMMIT"):
        return os.environ["MOBA_COMMIT"]
    git = "git", "-C", str(Path(__file__).parent)
    head = _output(*git, "rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if _output(*git, "status", "--porcelain", "-uno") else "")


def line(about: dict) -> str:
    """One line for the head of a table."""
    named = [f"{label} {about[label.lower()]}" for label in ("driver", "torch", "triton", "cuDNN", "commit")
             if about[label.lower()]]
    return ", ".join((about["device"], *named, about["when"]))


def _output(*command: str) -> str | None:
    try:
        text = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(text.strip().splitlines()), None)


def as_text(lines: list[dict[str, str]]) -> str:
    """Aligned columns."""
    if not lines:
        return "(no rows)"
    rows = [dict(zip(lines[0], lines[0])), *lines]  # the first of names
    widths = {name: max(len(row[name]) for row in rows) for name in lines[0]}
    return "\n".join("  ".join(row[name].ljust(width) for name, width in widths.items()).rstrip() for row in rows)


def save(path: Path, result: dict) -> None:
    """Writes JSON, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
