"""The README's Python, run as it stands."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moba_megatron import MoBAConfig

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)

MEGATRON = """
import os
import megatron_on_cpu
megatron_on_cpu.enable()
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
vocab_size, seq_length = 64, 32
config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=2, attention_dropout=0.0,
                           use_cpu_initialization=True)
{block}
tokens = torch.arange(seq_length)[None]
loss = model(tokens, tokens, None, labels=tokens)
assert loss.shape == (1, seq_length) and loss.isfinite().all()
dense = [layer.self_attention.core_attention.full_attention for layer in model.decoder.layers]
assert dense == [False, True, True, True], dense
"""


@pytest.mark.parametrize("page, config", [
    ("README.md", dict(chunk_size=4096, topk=12, full_attention_layers="last:3")),
    ("examples/megatron_lm/README.md", dict(chunk_size=512, topk=3)),
])
def test_the_line_that_the_launcher_prints(page, config):
    assert f"    > {MoBAConfig(**config).describe()} (from --moba-* flags)\n" in (ROOT / page).read_text()


def test_operator_blocks():
    operator = [block for block in BLOCKS if "moba_attn_varlen" in block]
    names = {}
    for block in operator:
        exec(block, names)
    assert names["o"].shape == names["output"].shape == (3000, 8, 64)
    assert names["q"].grad.isfinite().all()
    assert not torch.equal(names["o"], names["output"])


def test_megatron_block():
    pytest.importorskip("megatron.core")
    [block] = [block for block in BLOCKS if "GPTModel" in block]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                   "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    subprocess.run([sys.executable, "-c", MEGATRON.replace("{block}", block)], env=environment, check=True, timeout=120)


def test_names_that_the_readme_mentions_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text) + re.findall(r"(?:launch|examples)/\w+\.(?:sh|py)", text):
        assert (ROOT / path).exists(), path
