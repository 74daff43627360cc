"""``moba_megatron.huggingface`` by the name of 0.1, which goes in 0.3."""
import warnings

from ..huggingface import *  # noqa: F403

warnings.warn("moba_megatron.integrations.huggingface is deprecated: import moba_megatron.huggingface",
              DeprecationWarning, stacklevel=2)
