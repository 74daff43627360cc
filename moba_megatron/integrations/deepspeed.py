"""``moba_megatron.deepspeed`` by the name of 0.1, which goes in 0.3."""
import warnings

from ..deepspeed import *  # noqa: F403

warnings.warn("moba_megatron.integrations.deepspeed is deprecated: import moba_megatron.deepspeed",
              DeprecationWarning, stacklevel=2)
