"""Measuring: ``python -m moba_megatron.bench kernels | table | tune | compile``; each subcommand explains itself by --help."""
