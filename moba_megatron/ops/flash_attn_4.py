"""flash-attn 4, where installed: called for packed sequences, after a check of its results on the device.

Called by name as in flash-attn-4 4.0.0b36; others raise, and so decline. o ``[T, H, DV]``; lse ``[H, T]``, ln, fp32.
"""
import functools
import importlib
import itertools
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.attention import attention_bwd, attention_fwd
from ..segments import Segments
from ..tensor_cache import is_capturing

logger = logging.getLogger("moba_megatron")
MODULES = "cutlass", "flash_attn.cute.interface"  # needed; the last has the functions
LENGTHS = (190, 0, 1, 131)
LIMITS = {"o": 0.02, "lse": 1e-3, "dq": 0.02, "dk": 0.02, "dv": 0.02}
"""Relative RMS errors: five bf16 roundings (2^-8) at worst, as between the project's kernels and the reference."""


class Variant(NamedTuple):
    """What decides its kernels, and so what is checked once."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    dim_v: int
    group: int  # q heads a kv head
    deterministic: bool = False
    with_dlse: bool = False


_checked: dict[Variant, bool] = {}


def fits(capability: tuple[int, int], variant: Variant) -> bool:
    """Whether its own checks let these sizes through on a card; sizes are multiples of 8, at most 256."""
    dim, same = variant.dim, variant.dim == variant.dim_v
    latent = (dim, variant.dim_v) == (192, 128)
    if capability[0] == 9:
        return same or latent and variant.group == 1
    return capability[0] in (10, 11) and (same and (dim <= 128 or dim == 256) or latent)


def usable(variant: Variant) -> bool:
    """Whether it is installed and computes the right thing, found out at its first use, not while others look on."""
    if variant not in _checked:
        if torch.compiler.is_compiling() or is_capturing(variant.device) or module() is None:
            return False
        problem = disagreement(variant)
        if problem:
            _decline(problem, f" ({variant.dtype}, head dim {variant.dim} and {variant.dim_v}, {variant.group} q heads "
                     f"a kv head, deterministic={variant.deterministic}, dlse={variant.with_dlse})")
        _checked[variant] = problem is None
    return _checked[variant]


@functools.lru_cache(maxsize=None)
def module() -> ModuleType | None:
    """The module with the functions; None where it is not installed, or, said in a warning, cannot be imported."""
    try:
        return [importlib.import_module(name) for name in MODULES][-1]
    except Exception as error:  # broken builds raise all kinds of errors
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if not any(f"{name}.".startswith(f"{missing}.") for name in MODULES):
            _decline(said(error))
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
            scale: float) -> tuple[Tensor, Tensor]:
    """o and lse of causal attention."""
    with torch.cuda.device_of(q):
        return module()._flash_attn_fwd(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            softmax_scale=scale, causal=True, return_lse=True)[:2]


def backward(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
             cu_seqlens: Tensor, max_seqlen: int, scale: float, deterministic: bool) -> tuple[Tensor, ...]:
    """dq, dk, dv; lse and dlse ``[H, T]``."""
    extra = {} if dlse is None else {"dlse": dlse}  # the first betas do not have it
    with torch.cuda.device_of(q):
        return module()._flash_attn_bwd(
            q, k, v, o, do, lse, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen, softmax_scale=scale, causal=True, deterministic=deterministic, **extra)[:3]


def disagreement(variant: Variant) -> str | None:
    """What is wrong with the results of a few hundred tokens, against the reference in fp64; None if nothing is."""
    device, dtype, dim, dim_v, group, deterministic, with_dlse = variant
    generator = torch.Generator(device).manual_seed(0)
    total, heads, scale = sum(LENGTHS), 2 * group, 0.7 * dim ** -0.5  # not its default scale

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    try:
        q, do = random(total, heads, dim).to(dtype), random(total, heads, dim_v).to(dtype)
        k, v = random(total, 2, dim + dim_v).to(dtype).split([dim, dim_v], 2)
        dlse = random(heads, total) if with_dlse else None
        bounds = torch.tensor((0, *itertools.accumulate(LENGTHS)), dtype=torch.int32, device=device)
        place = bounds, max(LENGTHS), scale
        o, lse = forward(q, k, v, *place)
        grads, again = (backward(do, dlse, q, k, v, o, lse, *place, deterministic) for _ in range(2))
        wide, dense = [x.double() for x in (q, k, v)], (  # one chunk holds everything
            torch.empty(total, heads, 0, dtype=torch.int32, device=device),
            Segments.from_cu_seqlens(bounds, max(LENGTHS), max(LENGTHS)), scale)
        results = attention_fwd(*wide, *dense)
        exact = *results, *attention_bwd(do.double(), None if dlse is None else dlse.t(), *wide, *results, *dense)
        for (name, limit), ours, expected in zip(LIMITS.items(), (o, lse.t(), *grads), exact, strict=True):
            error = float((ours.double() - expected).norm() / expected.norm())
            if not error <= limit:  # NaN too
                return f"the relative error of {name} is {error:.1e} in a check, at most {limit:.0e} expected"
        if deterministic and not all(map(torch.equal, grads, again)):
            return "deterministic gradients differ between two runs of a check"
    except Exception as error:  # another version's arguments, a build for other cards, a compiler that fails
        return said(error)
    return None


def _decline(problem: str, where: str = "") -> None:
    logger.warning("moba_megatron: dense causal attention goes on without flash-attn 4%s: %s", where, problem)


def said(error: Exception) -> str:
    """An error's kind, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
