"""The one place where a backend is chosen: Triton kernels or the reference, said once a process."""
from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Callable

import torch

from ..config import BACKENDS

logger = logging.getLogger("moba_megatron")


def check_backend(backend: str) -> None:
    """Raises ValueError unless it is the name of a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def get_stages(backend: str, device: torch.device) -> ModuleType:
    """``moba_megatron.kernels`` or ``.reference``, whose functions compute the stages; for ``auto`` kernels on CUDA.

    Raises:
        ValueError: backend is unknown, or Triton cannot run on this device.
        ImportError: Triton was asked for and is not installed.
    """
    check_backend(backend)
    return _stages(backend, torch.device(device).type)


def repeat(stages: ModuleType, options: tuple, compute: Callable[..., tuple[torch.Tensor, ...]],
           *tensors: torch.Tensor | None, workspace_mib: float | None = None,
           event: torch.cuda.Event | None = None) -> tuple[torch.Tensor, ...]:
    """``compute(*tensors)``; the kernels may take it that what it launches is decided by the options and the layouts.

    compute: calls the stages, and returns tensors that they have allocated.
    workspace_mib: bounds the kernels' scratch memory; None for MOBA_WORKSPACE_MIB. The reference launches nothing.
    event: recorded when dk and dv of an attention backward are complete, which may be before dq; or at the end.
    """
    if hasattr(stages, "repeat"):
        return stages.repeat(options, compute, *tensors, workspace_mib=workspace_mib, event=event)
    results = compute(*tensors)
    if event is not None:
        event.record()
    return results


@functools.lru_cache(maxsize=None)
def _stages(backend: str, device_type: str) -> ModuleType:
    name, reason = backend, "asked for"
    if backend == "auto":
        name = "triton" if device_type == "cuda" else "reference"
        reason = f"backend=auto on {device_type}"
    if name == "reference":
        from .. import reference as stages
    else:
        from .. import kernels as stages
        if device_type != "cuda" and not stages.INTERPRETED:
            raise ValueError(f"backend='triton' needs CUDA tensors, got a tensor on {device_type}: move the tensors to "
                             "a GPU, use backend='reference', or set TRITON_INTERPRET=1 before the first import")
    logger.info("moba_megatron: %s kernels on %s (%s)", name, device_type, reason)
    return stages
