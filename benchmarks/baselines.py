"""Other implementations of attention, measured beside this one where the user has installed them."""
from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, int, int], Tensor]
"""``(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk) -> o``, all ``[T, H, D]``; topk counts the own chunk."""


class AbsentError(ValueError):
    """A package that would be measured is not installed, or does not import."""


@dataclass(frozen=True)
class Baseline:
    """One function of another package.

    Args:
        name: of its row.
        kind: ``moba`` or ``full`` (dense causal attention).
        module: where the function is; function: its name there.
        adapt: turns the function into an :data:`Attend`.
        source: where a reader finds it.
        needs: packages behind it whose version a reader wants to know.
    """

    name: str
    kind: str
    module: str
    function: str
    adapt: Callable[[Callable], Attend]
    source: str
    needs: tuple[str, ...] = ()

    def load(self) -> Attend:
        """The function.

        Raises:
            AbsentError: it cannot be imported; the message says why.
        """
        try:
            function = getattr(importlib.import_module(self.module), self.function)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            why = (str(error).strip().splitlines() or ["no message"])[0][:200]
            raise AbsentError(f"{self.module}.{self.function}: {type(error).__name__}: {why}") from error
        return self.adapt(function)

    def version(self) -> str:
        """Of the package and of what it needs, as far as they say one."""
        names = (self.module.split(".")[0], *self.needs)
        versions = ((name, getattr(importlib.import_module(name), "__version__", None)) for name in names)
        return ", ".join(f"{name} {version}" for name, version in versions if version)


def _same_order(function: Callable) -> Attend:
    """MoonshotAI's order of arguments, which others kept."""
    return lambda q, k, v, cu, longest, chunk, topk: function(q, k, v, cu, longest, chunk, topk)


def _batched(function: Callable) -> Attend:
    """The same, with a leading dimension of one."""
    return lambda q, k, v, cu, longest, chunk, topk: function(q[None], k[None], v[None], cu, longest, chunk, topk)[0]


def _flash_moba(function: Callable) -> Attend:
    return lambda q, k, v, cu, longest, chunk, topk: function(q, k, v, cu, cu, longest, longest, chunk, topk)


def _flash_attn_2(function: Callable) -> Attend:
    return lambda q, k, v, cu, longest, chunk, topk: function(q, k, v, cu, cu, longest, longest, causal=True)


def _flash_attn_4(function: Callable) -> Attend:
    def attend(q, k, v, cu, longest, chunk, topk):
        o = function(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, causal=True)
        return o[0] if isinstance(o, tuple) else o

    return attend


BASELINES = (
    Baseline("moonshot-moba", "moba", "moba.moba_efficient", "moba_attn_varlen", _same_order,
         "https://github.com/MoonshotAI/MoBA", ("flash_attn",)),
    Baseline("triton-moba", "moba", "triton_moba.triton_moba", "moba_attn_varlen_triton", _same_order,
         "https://github.com/ReyJerry/Triton-MoBA", ("flash_attn",)),
    Baseline("fla-moba", "moba", "fla.ops.moba", "parallel_moba", _batched,
         "https://github.com/fla-org/flash-linear-attention", ("flash_attn",)),
    Baseline("flash-moba", "moba", "flash_moba", "flash_moba_varlen_func", _flash_moba,
         "https://github.com/mit-han-lab/flash-moba"),
    Baseline("flash-attn-2", "full", "flash_attn", "flash_attn_varlen_func", _flash_attn_2,
         "https://github.com/Dao-AILab/flash-attention"),
    Baseline("flash-attn-4", "full", "flash_attn.cute", "flash_attn_varlen_func", _flash_attn_4,
         "https://github.com/Dao-AILab/flash-attention"),
)


def find(name: str) -> Baseline:
    """The baseline of this name.

    Raises:
        ValueError: there is none.
    """
    for baseline in BASELINES:
        if baseline.name == name:
            return baseline
    raise ValueError(f"a baseline must be one of {', '.join(baseline.name for baseline in BASELINES)}; got {name!r}")
