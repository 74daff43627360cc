"""The parts of `examples/pretrain_gpt.py`, one file each.

Importing it first silences what Megatron-Core says in each module and on each rank and nobody can act on, and makes the
processes that a rank starts to write checkpoints end with it.
"""
import ctypes
import multiprocessing
import signal
import sys
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

if multiprocessing.current_process().name != "MainProcess" and sys.platform == "linux":
    # A helper of a checkpoint's writers, which imports the main module again: a rank that is killed cannot end it.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
