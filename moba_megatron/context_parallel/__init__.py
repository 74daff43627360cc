"""Context parallelism: each rank keeps two pieces of every sequence and attends to the gathered keys.

``layout`` says which rows a rank holds, ``comm`` moves tensors and detects ranks that disagree, ``attention`` is the
schedule with its gradient. Selection and result equal those of a single rank.
"""
from .attention import context_parallel_attention
from .comm import Agreement
from .layout import ZigzagLayout, check_zigzag, zigzag_packed, zigzag_uniform

__all__ = ["Agreement", "ZigzagLayout", "check_zigzag", "context_parallel_attention", "zigzag_packed", "zigzag_uniform"]
