"""The parts of `examples/pretrain_gpt.py`, one file each.

Importing it first silences what Megatron-Core says in each module and on each rank and nobody can act on.
"""
import warnings

for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "MimoModelConfig is experimental",
    "The .grad attribute of a Tensor that is not a leaf",
    "torch.distributed is disabled, unavailable or uninitialized",
    "The argument order of load has been changed",
    r"barrier\(\): using the device under current context",
    "invalid escape sequence",
):
    warnings.filterwarnings("ignore", message=_message)
warnings.filterwarnings("ignore", category=FutureWarning)
