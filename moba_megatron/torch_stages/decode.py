"""Decoding: the reference's, which reads only what is chosen."""
from ..reference.decode import cache_means, decode_attention, decode_gate

__all__ = ["cache_means", "decode_attention", "decode_gate"]
