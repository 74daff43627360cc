"""The stages as Triton kernels, for CUDA tensors (or any tensor under TRITON_INTERPRET=1)."""
from triton import knobs

INTERPRETED = knobs.runtime.interpret
