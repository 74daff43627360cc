"""A model for inspection from a checkpoint that says what it is: one process, forward only, CPU or one GPU.

examples/pretrain_gpt.py saves with each checkpoint (in its common part, under DESCRIPTION) what it takes to build the
model again, as plain values:

- ``transformer``: arguments of Megatron's TransformerConfig; activation_func by its name in torch.nn.functional
- ``gpt``: arguments of Megatron's GPTModel; ``moba``: fields of MoBAConfig
- ``tokenizer``: ByteLevel or HuggingFaceTokenizer

Another training script that saves the same can be inspected too.
"""
import contextlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.distributed.checkpoint.api import CheckpointException

from ..config import MoBAConfig
from ..megatron.host import megatron_version
from ..megatron.layer_specs import get_moba_layer_local_spec

DESCRIPTION = "model_description"
LATEST = "latest_checkpointed_iteration.txt"


@contextlib.contextmanager
def single_process(device: torch.device):
    """Megatron's process groups for one process; on a machine without a GPU the CPU is the current device."""
    stands_in = contextlib.nullcontext() if device.type != "cpu" else mock.patch.object(
        torch.cuda, "current_device", lambda: torch.device("cpu"))  # rotary embeddings move to the current CUDA device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        with stands_in:
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def find_checkpoint(directory: str | Path) -> Path:
    """The checkpoint in a directory of checkpoints (the last complete one), or the directory itself where it is one;
    ValueError where there is none."""
    directory = Path(directory)
    latest = directory / LATEST
    if latest.is_file():
        directory = directory / f"iter_{int(latest.read_text()):07d}"
    if not (directory / "metadata.json").is_file():
        raise ValueError(f"--load must be a distributed checkpoint of Megatron-Core, or a directory with {LATEST} and "
                         f"iter_* in it, got {directory}")
    return directory


def read_common(checkpoint: str | Path) -> dict:
    """The part of a checkpoint that is no tensor; ValueError where the installed Megatron-Core cannot read it, as one
    that a later release wrote. It is unpickled: the checkpoint must be trusted."""
    try:
        return dist_checkpointing.load_common_state_dict(str(checkpoint))
    except (CheckpointingException, CheckpointException, RuntimeError, KeyError, OSError, AttributeError) as error:
        # Megatron-Core 0.16 stumbles (AttributeError) over naming the file that is missing
        cause = error.__context__ if isinstance(error, AttributeError) and error.__context__ else error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ValueError(f"--load {checkpoint}: Megatron-Core {megatron_version()} cannot read its common part, which "
                         f"another release may have written: {reason}") from error


def read_description(checkpoint: Path) -> dict:
    """The description of the checkpoint's model, and under ``iteration`` the steps it was trained; ValueError where the
    checkpoint holds none."""
    common = read_common(checkpoint)
    if DESCRIPTION not in common:
        raise ValueError(f"{checkpoint} does not say what its model is (its common part has no {DESCRIPTION!r}): it "
                         "must be written by this version's examples/pretrain_gpt.py")
    return {**common[DESCRIPTION], "iteration": common["iteration"]}


def load_model(checkpoint: Path, description: dict, moba: MoBAConfig, device: torch.device) -> GPTModel:
    """The whole model with the checkpoint's weights, in evaluation mode; inside :func:`single_process`. On the CPU it
    computes in fp32, else in the dtype that it was trained in."""
    options = dict(description["transformer"])
    dtype = torch.bfloat16 if options.get("bf16") else torch.float32
    config = TransformerConfig(**{**options, "activation_func": getattr(F, options["activation_func"])},
                               use_cpu_initialization=True, perform_initialization=False, params_dtype=dtype,
                               bias_activation_fusion=False, masked_softmax_fusion=False)
    # torch's norms rather than Megatron's choice, which depends on what else is installed
    spec = get_moba_layer_local_spec(moba, qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = WrappedTorchNorm
    if config.qk_layernorm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = WrappedTorchNorm
    block = TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=WrappedTorchNorm)
    # without the head: nobody looks at logits, which would be seq_length x vocabulary
    model = GPTModel(config=config, transformer_layer_spec=block, post_process=False, **description["gpt"]).to(dtype)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))["model"])
    if device.type == "cpu":
        config.bf16, config.params_dtype = False, torch.float32
        model.float()
    return model.to(device).eval()


def tokenizer(name: str, path: str | None):
    """Something with ``encode`` and ``decode``: the text's UTF-8 bytes, or the Hugging Face tokenizer in a directory;
    ValueError where there is no such."""
    if name == "ByteLevel":  # half a character, and ids that are no bytes, become a replacement character
        return SimpleNamespace(encode=lambda text: list(text.encode("utf-8")), decode=lambda ids: bytes(
            min(i, 255) for i in ids).decode("utf-8", errors="replace"))
    if name != "HuggingFaceTokenizer":
        raise ValueError(f"the tokenizer of the checkpoint must be ByteLevel or HuggingFaceTokenizer, got {name!r}")
    if path is None or not Path(path).is_dir():
        raise ValueError("--tokenizer-model must be the directory of the checkpoint's Hugging Face tokenizer, "
                         f"got {path}")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("a Hugging Face tokenizer needs the package transformers: pip install -e '.[hf]'") from None
    found = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return SimpleNamespace(encode=lambda text: found(text, add_special_tokens=False)["input_ids"], decode=found.decode)
