"""Distributed checkpoints through megatron.core.dist_checkpointing: save, find, resume, also at another parallel size.

    SAVE/latest_checkpointed_iteration.txt     the last complete checkpoint, as Megatron-LM writes it
    SAVE/iter_0000120/                         one checkpoint: sharded weights and optimizer state, and the common part
"""
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from moba_megatron.inspect.checkpoint import DESCRIPTION

from .agreement import SharedError

# What must agree between a checkpoint and the run that loads it, or the weights mean something else.
_ARCHITECTURE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                 "kv_channels", "rotary_base", "qk_layernorm", "untie_embeddings_and_output_weights",
                 "make_vocab_size_divisible_by")
# The distributed optimizer's flat buffers are cut anew for another data or context parallel size, but not for another
# tensor or pipeline parallel size.
_OPTIMIZER_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
_METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


def save_checkpoint(args, iteration: int, model, optimizer, scheduler) -> Path:
    """Writes the state after `iteration` steps; called by all ranks.

    Returns:
        the checkpoint's directory.
    """
    directory = Path(args.save) / f"iter_{iteration:07d}"
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    state = _sharded_state(args, model, optimizer, is_loading=False)
    state["scheduler"] = scheduler.state_dict()
    state["iteration"] = iteration
    state["run"] = {name: getattr(args, name)
                    for name in (*_ARCHITECTURE, *_OPTIMIZER_LAYOUT, "use_distributed_optimizer", "bf16")}
    state[DESCRIPTION] = args.model_description
    dist_checkpointing.save(state, str(directory))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        latest = _latest_file(args.save)
        partial = latest.with_suffix(".partial")
        partial.write_text(str(iteration))
        partial.replace(latest)
    torch.distributed.barrier()
    return directory


def latest_iteration(directory: str) -> int | None:
    """The iteration of the last complete checkpoint in the directory, None where there is none.

    Raises:
        ValueError: the directory's record of it is damaged, or the checkpoint that it names is missing.
    """
    latest = _latest_file(directory)
    if not latest.is_file():
        return None
    text = latest.read_text().strip()
    if not text.isdigit():
        raise ValueError(f"--load {directory}: {latest.name} must hold an iteration number, got {text!r}")
    if not (Path(directory) / f"iter_{int(text):07d}" / "metadata.json").is_file():
        raise ValueError(f"--load {directory}: {latest.name} names iteration {text}, but iter_{int(text):07d} "
                         "is missing or incomplete; write the number of a whole checkpoint into that file")
    return int(text)


def load_checkpoint(args, iteration: int, model, optimizer, scheduler) -> None:
    """Restores model, optimizer and schedule from the checkpoint of `iteration`; called by all ranks.

    Raises:
        SharedError: the checkpoint is of another architecture, or its optimizer cannot be cut as this run needs it.
    """
    directory = str(Path(args.load) / f"iter_{iteration:07d}")
    saved = dist_checkpointing.load_common_state_dict(directory)["run"]
    names = list(_ARCHITECTURE) + ["use_distributed_optimizer", "bf16"]
    if args.use_distributed_optimizer:
        names += _OPTIMIZER_LAYOUT
    for name in names:
        if saved[name] != getattr(args, name):
            raise SharedError(f"--load {args.load}: the checkpoint was written with --{name.replace('_', '-')} "
                              f"{saved[name]}, this run has {getattr(args, name)}: give the checkpoint's value")
    _allocate_optimizer_state(optimizer)
    state = dist_checkpointing.load(_sharded_state(args, model, optimizer, is_loading=True), directory)
    _unwrap(model).load_state_dict(state["model"])
    with torch.no_grad():  # fp32 weights are leaves that the distributed optimizer writes into
        optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    _restore_adam_step(optimizer, state["scheduler"]["num_steps"])


def _sharded_state(args, model, optimizer, is_loading: bool) -> dict:
    model_state = _unwrap(model).sharded_state_dict()
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_METADATA)
    return {"model": model_state, "optimizer": optimizer_state}


def _unwrap(model):
    """The GPTModel inside DistributedDataParallel and Float16Module, so that keys are those of any GPT checkpoint."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _allocate_optimizer_state(optimizer) -> None:
    """Lets torch's Adam make its moments: the distributed optimizer describes what it loads by what it has."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()


def _restore_adam_step(optimizer, updates: int) -> None:
    """Sets the count of updates, on which Adam's bias correction depends, in torch's Adam.

    The distributed optimizer keeps the local count instead of the checkpoint's, in one tensor that all parameters share
    and that each of them then advances.  Transformer Engine's Adam counts in its parameter groups, which are restored.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer):
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"] = torch.full_like(state["step"], updates)


def _latest_file(directory: str) -> Path:
    return Path(directory) / "latest_checkpointed_iteration.txt"
