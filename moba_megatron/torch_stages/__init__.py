"""The stages in plain torch, doing the selected work alone: for the CPU, and accelerators that Triton does not serve.

``gate``, ``attention_fwd`` and ``attention_bwd`` are its own, the other stages are ``moba_megatron.reference``'s.
"""
from ..reference import *  # noqa: F403
from .attention import attention_bwd, attention_fwd  # noqa: F401
from .gating import gate  # noqa: F401
