"""The one place where a backend is chosen: Triton kernels or plain torch, said once a process."""
import functools
import logging
from types import ModuleType

import torch

from ..config import BACKENDS

logger = logging.getLogger("moba_megatron")


def check_backend(backend: str) -> None:
    """Raises ValueError unless it is the name of a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def get_stages(backend: str, device: torch.device, deterministic: bool = False) -> ModuleType:
    """``moba_megatron.kernels``, ``.torch_stages`` or ``.reference``, whose functions compute the stages.

    ``auto`` is the kernels on CUDA, ``torch`` elsewhere; the reference is slow, and what the others are tested against.

    Raises:
        ValueError: backend is unknown, Triton cannot run on this device, or ``torch`` is not deterministic on it.
        ImportError: Triton was asked for and is not installed.
    """
    check_backend(backend)
    if deterministic and backend == "torch" and torch.device(device).type == "cuda":
        raise ValueError("deterministic must be False with backend='torch' on CUDA, where sums have no order, "
                         "got True: use backend='triton' or 'auto'")
    return _stages(backend, torch.device(device).type)


@functools.lru_cache(maxsize=None)
def _stages(backend: str, device_type: str) -> ModuleType:
    name, reason = backend, "asked for"
    if backend == "auto":
        name = "triton" if device_type == "cuda" else "torch"
        reason = f"backend=auto on {device_type}"
    if name == "reference":
        from .. import reference as stages
    elif name == "torch":
        from .. import torch_stages as stages
    else:
        from .. import kernels as stages
        if device_type != "cuda" and not stages.INTERPRETED:
            raise ValueError(f"backend='triton' needs CUDA tensors, got a tensor on {device_type}: move the tensors to "
                             "a GPU, use backend='torch', or set TRITON_INTERPRET=1 before the first import")
    logger.info("moba_megatron: %s kernels on %s (%s)", name, device_type, reason)
    return stages
