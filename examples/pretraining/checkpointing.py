"""Distributed checkpoints through megatron.core.dist_checkpointing: save, find, resume, also at another parallel size.

    SAVE/latest_checkpointed_iteration.txt     the last complete checkpoint, as Megatron-LM writes it
    SAVE/iter_0000120/                         one checkpoint: sharded weights and optimizer state, and the common part
    SAVE/iter_0000120/files.json               the size of each of its files, written last
    SAVE/iter_0000240.partial/                 one that is being written, or was when the run ended
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException

from moba_megatron.inspect.checkpoint import DESCRIPTION, read_common
from moba_megatron.megatron.checkpoint_flags import MODEL_FLAGS, compare_flags

from .agreement import RunError, SharedError, gather, lost_rank, on_all_ranks, on_first_rank

# What must agree between a checkpoint and the run that loads it, or the weights mean something else.
_ARCHITECTURE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                 "kv_channels", "rotary_base", "qk_layernorm", "untie_embeddings_and_output_weights",
                 "make_vocab_size_divisible_by")
# The distributed optimizer's flat buffers are cut anew for another data or context parallel size, but not for another
# tensor or pipeline parallel size.
_OPTIMIZER_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
_FILES = "files.json"
LATEST = "latest_checkpointed_iteration.txt"
_METADATA = {"distrib_optim_sharding_type": "dp_reshardable"}


def save_checkpoint(args, iteration: int, model, optimizer=None, scheduler=None) -> Path:
    """Writes the state after `iteration` steps, without an optimizer the weights alone; called by all ranks.

    It is written beside its place and moved there whole, so that a run may end at any moment of it.

    Returns:
        the checkpoint's directory.

    Raises:
        RunError: it could not be written; earlier checkpoints are as they were.
        RuntimeError: another rank is lost.
    """
    directory = Path(args.save) / f"iter_{iteration:07d}"
    partial = directory.with_suffix(".partial")
    on_first_rank(_make_empty, partial)
    state = {"model": _unwrap(model).sharded_state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=False, metadata=_METADATA)
        state["scheduler"] = scheduler.state_dict()
    state["iteration"] = iteration
    state["run"] = {name: getattr(args, name)
                    for name in (*_ARCHITECTURE, *_OPTIMIZER_LAYOUT, *MODEL_FLAGS, "train_iters",
                                 "use_distributed_optimizer", "bf16")}
    state[DESCRIPTION] = args.model_description
    try:
        dist_checkpointing.save(state, str(partial))
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and lost_rank(error, args.distributed_timeout_minutes):
            raise
        free = shutil.disk_usage(args.save).free / 2 ** 30
        raise RunError(f"the checkpoint of step {iteration} could not be saved in {args.save}, where {free:.1f} GiB "
                       f"are free: {_reason(error)}. Checkpoints before it are whole: resume with --load") from error
    torch.distributed.barrier()
    on_first_rank(_publish, partial, directory, iteration)
    return directory


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _reason(error: BaseException) -> str:
    """The causes of a failed save: the first rank knows those of all, the others only their own."""
    if isinstance(error, CheckpointException):
        found = [f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items())]
        return "; ".join(found) or "rank 0 says why"
    return str(error)


def _publish(partial: Path, directory: Path, iteration: int) -> None:
    """Makes a whole checkpoint the last one."""
    write_sizes(partial)
    if directory.exists():  # damaged, or of a run that ended before it named it
        shutil.rmtree(directory)
    partial.rename(directory)
    name_last(directory.parent / LATEST, str(iteration))


def write_sizes(directory: Path) -> None:
    """Notes the sizes of a checkpoint's files beside them, when all are written."""
    sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.name != _FILES}
    (directory / _FILES).write_text(json.dumps(sizes, indent=1))


def name_last(latest: Path, text: str) -> None:
    """Writes the file that names the last checkpoint, at once or not at all."""
    new = latest.with_suffix(".partial")
    new.write_text(text)
    new.replace(latest)


def last_whole_checkpoint(directory: str, latest: str = LATEST, part: str = "metadata.json",
                          flag: str = "--load") -> tuple[int | None, str | None]:
    """The checkpoint to resume from.

    Args:
        latest: name of the file that names the last one, by its iteration or its directory.
        part: without which a checkpoint is incomplete.
        flag: that gave the directory.

    Returns:
        its iteration, None where there is none; and a warning where a later one is damaged.

    Raises:
        ValueError: the directory's record of the last one is damaged, or no checkpoint is whole.
    """
    if not (Path(directory) / latest).is_file():
        return None, None
    text = (Path(directory) / latest).read_text().strip().removeprefix("iter_")
    if not text.isdigit():
        raise ValueError(f"{flag} {directory}: {latest} must hold an iteration number, got {text!r}")
    problem = _damage(directory, int(text), part)
    if problem is None:
        return int(text), None
    earlier = {int(path.name[5:]) for path in Path(directory).glob("iter_" + "[0-9]" * 7)}
    for iteration in sorted((n for n in earlier if n < int(text)), reverse=True):
        if _damage(directory, iteration, part) is None:
            return iteration, f"{flag} {directory}: {problem}; going back to iter_{iteration:07d}, the last whole one"
    raise ValueError(f"{flag} {directory}: {problem}, and there is no whole checkpoint before it")


def agreed_checkpoint(directory: str, flag: str = "--load") -> int | None:
    """The iteration of :func:`last_whole_checkpoint`, whose warning rank 0 prints; called by all ranks.

    Raises:
        SharedError: there is none that is whole, or the ranks see different checkpoints.
    """
    whole, warning = on_all_ranks(last_whole_checkpoint, directory, LATEST, "metadata.json", flag)
    found = gather(whole)
    if warning and torch.distributed.get_rank() == 0:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if len(set(found)) > 1:
        raise SharedError(f"{flag} {directory}: the ranks see different checkpoints, {found}; every machine must see "
                          "the same directory")
    return whole


def _damage(directory: str, iteration: int, part: str) -> str | None:
    """What is wrong with a checkpoint, None where all its files are there and as long as they were."""
    place = Path(directory) / f"iter_{iteration:07d}"
    if not (place / part).exists():
        return f"{place.name} is missing or incomplete"
    if not (place / _FILES).is_file():  # of a writer that keeps no such list
        return None
    for name, size in json.loads((place / _FILES).read_text()).items():
        found = (place / name).stat().st_size if (place / name).is_file() else None
        if found != size:
            return f"{place.name} is damaged: {name} has {found or 'no'} bytes, {size} were written"
    return None


def load_checkpoint(args, iteration: int, model, optimizer, scheduler) -> None:
    """Restores model, optimizer and schedule from the checkpoint of `iteration`; called by all ranks.

    Raises:
        SharedError: the checkpoint is of another architecture, has weights that this run would drop, its optimizer
            cannot be cut as this run needs it, or this Megatron-Core cannot read it.
    """
    directory = str(Path(args.load) / f"iter_{iteration:07d}")
    names = [*_ARCHITECTURE, "use_distributed_optimizer", "bf16"]
    if args.use_distributed_optimizer:
        names += _OPTIMIZER_LAYOUT
    _compare(args, directory, names, f"--load {args.load}")
    _allocate_optimizer_state(optimizer)
    model_state = _unwrap(model).sharded_state_dict()
    optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=_METADATA)
    state = dist_checkpointing.load({"model": model_state, "optimizer": optimizer_state}, directory)
    _unwrap(model).load_state_dict(state["model"])
    with torch.no_grad():  # fp32 weights are leaves that the distributed optimizer writes into
        optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    _restore_adam_step(optimizer, state["scheduler"]["num_steps"])


def load_weights(args, model) -> None:
    """Restores the model alone, from --pretrained-checkpoint, in the dtype of this run; called by all ranks.

    Raises:
        SharedError: there is no checkpoint, or not the same on all ranks, it is of another architecture, or it has
            weights that this run would drop.
    """
    place = f"--pretrained-checkpoint {args.pretrained_checkpoint}"
    iteration = agreed_checkpoint(args.pretrained_checkpoint, "--pretrained-checkpoint")
    if iteration is None:
        raise SharedError(f"{place} must be a directory of checkpoints with {LATEST} in it, and has none")
    directory = str(Path(args.pretrained_checkpoint) / f"iter_{iteration:07d}")
    _compare(args, directory, _ARCHITECTURE, place)
    model = _unwrap(model)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, directory)
    model.load_state_dict(state["model"])


def _compare(args, directory: str, names, place: str) -> None:
    """Raises SharedError where the checkpoint's run had other flags of these names, or MoBA's do not fit."""
    saved = on_all_ranks(read_common, directory)["run"]
    for name in names:
        if saved[name] != getattr(args, name):
            raise SharedError(f"{place}: the checkpoint was written with --{name.replace('_', '-')} {saved[name]}, "
                              f"this run has {getattr(args, name)}: give the checkpoint's value")
    try:
        compare_flags(args, argparse.Namespace(**saved))
    except ValueError as error:
        raise SharedError(f"{place}: {error}") from None


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
