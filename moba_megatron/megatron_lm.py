"""The hooks by the name that applied patches import; they are in `megatron/patching.py`."""
from .megatron.patching import (  # noqa: F401
    core_attention_for,
    moba_arguments,
    moba_core_attention,
    moba_flops,
    moba_hybrid_stack,
    moba_model_check,
)
