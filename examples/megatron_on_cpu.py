"""Lets Megatron-Core train on a machine without a GPU (CPU tensors, gloo): one file, active only after `enable()`.

Megatron-Core names the CUDA device in places where any device would do. On a machine that has a CUDA device this
module does nothing. On one that has none, `enable()` redirects exactly these places:

=========================================  ======================================================================
Megatron-Core asks for                     and gets
=========================================  ======================================================================
`torch.cuda.current_device()`              the CPU device. RoPE moves `inv_freq` there; TP layers, the gradient buffers
                                           of DDP and the pipeline's receive buffers are allocated there.
`device="cuda"`, `.cuda()`, `.to("cuda")`  CPU memory. The schedules' token counter, gradient clipping, the optimizer's
                                           overflow flag, dist-checkpoint's exchange of tensors between ranks.
`pin_memory=True`, `.pin_memory()`         ordinary memory. RoPE under context parallelism, data loading.
`Tensor.type() == "torch.cuda.*Tensor"`    "torch.cuda." in front of the CPU type. The mixed-precision and distributed
                                           optimizers sort parameters by this string, clipping asserts it.
`torch.cuda.get_rng_state` and friends     the CPU generator. The RNG tracker (`model_parallel_cuda_manual_seed`,
                                           dropout in tensor parallel regions) and activation recompute keep their
                                           meaning: dropout on CPU draws from that very generator.
streams, events, `synchronize`, nvtx       objects that do nothing. DDP's overlap, timers, p2p communication.
`jit_fuser` (`torch.compile`)              the plain function: no C++ compiler is needed, start-up is faster.
=========================================  ======================================================================

`torch.cuda.is_available()` stays False, so code that asks before it uses CUDA is not misled. The redirection of tensors
is a `TorchFunctionMode`, which is per thread: call `enable()` in the thread that trains (autograd runs CPU backward
there too).

Checked with torch 2.13, against megatron-core 0.13.0 to 0.19.2: TP, SP, CP, PP, recompute; against 0.16.1 also DDP with
overlap, the bf16 and fp32 optimizers, the distributed optimizer, clipping, dist-checkpoint save and load.

    import megatron_on_cpu
    megatron_on_cpu.enable()        # before the model is imported, so that jit_fuser is off in time
    torch.distributed.init_process_group(megatron_on_cpu.distributed_backend())
"""

import contextlib
import logging
import sys

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_enabled = False


def enable() -> bool:
    """Redirect Megatron-Core's CUDA calls to the CPU if this machine has no CUDA device.

    Safe to call more than once.

    Returns:
        True if the redirection is active, False on a machine with a CUDA device (nothing was changed).
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if not _enabled:
        _disable_jit_fuser()
        _redirect_rng()
        _redirect_devices_and_streams()
        _CudaMeansCpu().__enter__()
        _enabled = True
    return True


def distributed_backend() -> str:
    """The `torch.distributed` backend that fits the machine: "nccl" with a CUDA device, otherwise "gloo"."""
    return "nccl" if torch.cuda.is_available() else "gloo"


class _CudaMeansCpu(TorchFunctionMode):
    """Answers every torch call that names the CUDA device with CPU memory; all other calls pass through."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type:
            return _type(func, *args, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to:
            args = (args[0], *(_to_cpu(arg) for arg in args[1:]))
        return func(*args, **kwargs)


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _to_cpu(argument):
    return _CPU if _is_cuda(argument) else argument


def _type(func, tensor, dtype=None, *args, **kwargs):
    """`Tensor.type`: the query answers as a CUDA tensor would, a conversion converts on the CPU."""
    if dtype is None:
        return func(tensor).replace("torch.", "torch.cuda.", 1)
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.", 1)
    return func(tensor, dtype, *args, **kwargs)


class _Stream:
    """Stands for a CUDA stream or event: on the CPU every operation is complete when it returns."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return None

    synchronize = wait = wait_stream = wait_event = record = _nothing

    def record_event(self, event=None):
        return event if event is not None else _Stream()

    def query(self) -> bool:
        return True


def _do_nothing():
    """A new function that does nothing: TorchDynamo keeps rules by function and refuses one function in two places."""
    return lambda *args, **kwargs: None


def _redirect_devices_and_streams() -> None:
    stream = _Stream()
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.set_device = _do_nothing()
    torch.cuda.synchronize = _do_nothing()
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.default_stream = lambda device=None: stream
    torch.cuda.stream = lambda stream=None: contextlib.nullcontext()
    torch.cuda.Stream = _Stream
    torch.cuda.Event = _Stream
    torch.cuda.nvtx.range_push = _do_nothing()
    torch.cuda.nvtx.range_pop = _do_nothing()
    torch.Tensor.record_stream = _do_nothing()


def _redirect_rng() -> None:
    """One generator plays both parts, so a forked "CUDA" state governs what dropout and weight initialisation draw."""
    from megatron.core.tensor_parallel import random

    def get_state(device=None, **kwargs):
        return torch.default_generator.get_state()

    def set_state(new_state, device=None, **kwargs):
        torch.default_generator.set_state(new_state)

    def manual_seed(seed):
        torch.default_generator.manual_seed(seed)

    torch.cuda.manual_seed = manual_seed
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state
        module.set_rng_state = set_state
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # The tracker warns when the CPU generator moved inside a CUDA fork; here that is what a fork is for.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _disable_jit_fuser() -> None:
    """Megatron-Core decorates functions with `torch.compile` while it is imported: import it with that replaced."""

    def leave_as_it_is(model=None, **options):
        return model

    already_imported = "megatron.core.jit" in sys.modules
    torch_compile = torch.compile
    torch.compile = leave_as_it_is
    try:
        from megatron.core import jit

        jit.jit_fuser = leave_as_it_is
    finally:
        torch.compile = torch_compile
    if already_imported and hasattr(torch.compiler, "set_stance"):
        torch.compiler.set_stance("force_eager")
