"""The parts of `examples/pretrain_gpt.py`: arguments, data, model, checkpointing, evaluation, selection, monitor.

Importing it first silences what Megatron-Core says in each module and on each rank and nobody can act on.
"""
import warnings

for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
):
    warnings.filterwarnings("ignore", message=_message)
warnings.filterwarnings("ignore", category=FutureWarning)
