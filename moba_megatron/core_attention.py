"""Megatron's core attention by the name of 0.1; it is in `megatron/core_attention.py`."""
from .megatron.core_attention import MoBACoreAttention, get_iteration, set_iteration, set_observer  # noqa: F401
