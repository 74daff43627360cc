"""MoBA for Transformers: ``register_moba(MoBAConfig(...))``, then ``attn_implementation="moba"``."""
from .attention import moba_attention_forward, register_moba

__all__ = ["moba_attention_forward", "register_moba"]
