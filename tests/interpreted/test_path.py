"""The way of a query through the package: how many files and functions a call enters, device functions aside."""
import os
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from ranks import run_ranks
from triton.runtime.interpreter import InterpretedFunction

import moba_megatron
from moba_megatron import MoBAConfig
from moba_megatron.megatron.core_attention import MoBACoreAttention

PACKAGE = os.path.dirname(moba_megatron.__file__)


def entered(call) -> tuple[set[str], set[tuple[str, str, int]]]:
    """Files and functions of the package that a call enters."""
    modules = [module for name, module in sys.modules.items() if name.startswith("moba_megatron.")]
    kernels = {(x.fn.__code__.co_filename, x.fn.__name__) for module in modules for x in vars(module).values()
               if isinstance(x, InterpretedFunction)}
    functions = set()

    def look(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            functions.add((code.co_filename, code.co_name, code.co_firstlineno))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    functions = {x for x in functions if x[:2] not in kernels}
    return {x[0] for x in functions}, functions


def core_and_inputs(tokens, group=None):
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2,
                               attention_dropout=0.0)
    parallel = {}
    if group is not None:
        config.context_parallel_size = dist.get_world_size(group)
        parallel = {"pg_collection": SimpleNamespace(cp=group, tp=None), "cp_comm_type": "all_gather"}
    core = MoBACoreAttention(config, 1, AttnMaskType.causal, "self", moba_config=MoBAConfig(16, 2, backend="triton"),
                             **parallel)
    return core, [torch.randn(tokens, 1, heads, 16) for heads in (4, 2, 2)]


def test_one_device():
    core, qkv = core_and_inputs(64)
    core(*qkv, None)
    files, functions = entered(lambda: core(*qkv, None))
    listed = "\n".join(f"{file[len(PACKAGE):]} {name}" for file, name, _ in sorted(functions))
    assert len(files) <= 12 and len(functions) <= 60, listed


def _rank(rank, size):
    core, qkv = core_and_inputs(32, dist.group.WORLD)
    core(*qkv, None)
    files, functions = entered(lambda: core(*qkv, None))
    return len(files), len(functions)


def test_all_gather_on_two_ranks(tmp_path):
    for files, functions in run_ranks(_rank, 2, tmp_path):
        assert files <= 15 and functions <= 80, (files, functions)
