"""The hooks by the name that applied patches import; they are in `megatron/patching.py`."""
from .megatron.patching import *  # noqa: F403
