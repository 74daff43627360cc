"""Flags by the name of 0.1; they are in `megatron/arguments.py`."""
from .megatron.arguments import add_moba_arguments, config_from_args, config_from_environment  # noqa: F401
