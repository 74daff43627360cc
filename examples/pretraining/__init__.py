"""The parts of `examples/pretrain_gpt.py`: arguments, data, model, checkpointing, evaluation, selection, monitor.

Importing it first keeps Megatron-Core from saying at import, in each module and on each rank, what is not installed.
"""
import warnings

for _message in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)
