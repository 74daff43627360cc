"""Measuring: ``python -m moba_megatron.bench kernels | table | tune | compile``; ``--help`` explains each."""
