"""What the 50M model can attend with: this package, torch's dense kernels, and other implementations of MoBA.

Every one is a function `(q, k, v, cu_seqlens, max_seqlen) -> o` of packed sequences of one length, `[tokens, heads,
head_dim]`; with key convolution it takes the filter behind them.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_megatron import MoBAConfig, moba_attn_varlen
from moba_megatron.ops import key_convolution

from .. import baselines

Attend = Callable[..., Tensor]
DENSE = {"full": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
         "full-flash": (SDPBackend.FLASH_ATTENTION,)}
"""Dense attention by name, and which of torch's kernels it is: the first of these that runs on the card."""
OWN = ("moba", "hybrid", *DENSE)
DENSE_LAYERS = {"hybrid": "last:3", **dict.fromkeys(DENSE, "all")}
"""The names that say by themselves which layers attend to everything."""
LABELS = {SDPBackend.CUDNN_ATTENTION: "cuDNN", SDPBackend.FLASH_ATTENTION: "flash attention 2",
          SDPBackend.EFFICIENT_ATTENTION: "torch's memory-efficient kernel", SDPBackend.MATH: "torch's plain kernel"}


@dataclass(frozen=True)
class Attention:
    """How the layers of a model attend.

    Args:
        layers: one function a layer.
        dense_backend: torch's kernel behind every dense layer, to be forced while training; None without dense layers.
        traceable: whether `torch.compile` can take the functions into its graphs.
        key_conv: one number a layer: taps of its key convolution, 0 without.
    """

    layers: tuple[Attend, ...]
    dense_backend: SDPBackend | None
    traceable: bool
    key_conv: tuple[int, ...] = ()

    @property
    def dense_label(self) -> str | None:
        """The dense kernel's name for a table."""
        return None if self.dense_backend is None else LABELS[self.dense_backend]


def names() -> list[str]:
    """What `--attention` takes: this package's and torch's, then the other packages' whether installed or not."""
    return [*OWN, *(baseline.name for baseline in baselines.BASELINES if baseline.kind == "moba")]


def build(name: str, layers: int, head_dim: int, chunk_size: int, topk: int, device: torch.device,
          full_attention_layers: str = "none", key_conv: int = 0) -> Attention:
    """The attention of every layer.

    Args:
        name: `moba`, `hybrid` (MoBA but for the last 3 layers), `full` (cuDNN where it runs, else flash attention 2),
            `full-flash`, or another implementation of MoBA that is installed.
        layers: number of layers.
        head_dim: size of a head; decides which dense kernel runs.
        chunk_size: keys in a chunk; topk: chunks a query attends to, its own included.
        device: where it will run.
        full_attention_layers: MoBAConfig's rule of dense layers, for ``moba``.
        key_conv: taps of the key convolution in MoBA layers, 3 or 5; 0: none.

    Raises:
        ValueError: the name is unknown, or does not go with a rule or a convolution. AbsentError: its package is not
            installed.
    """
    if name not in names():
        raise ValueError(f"--attention must be one of {', '.join(names())}; got {name!r}")
    for flag, given in (("--full-attention-layers", full_attention_layers != "none"), ("--key-conv", key_conv)):
        if given and name != "moba":
            raise ValueError(f"{flag} must be left out but for --attention moba, got it with {name}")
    if name not in OWN:
        return Attention((_by_baseline(baselines.find(name).load(), chunk_size, topk),) * layers, None, traceable=False)
    dense = dense_layers(name, layers, full_attention_layers)
    sparse = partial(_moba, chunk_size, topk)
    backend = first_that_runs(DENSE.get(name, DENSE["full"]), head_dim, device) if any(dense) else None
    taps = tuple(0 if d else MoBAConfig(key_conv=key_conv).key_conv for d in dense)
    return Attention(tuple(_dense if d else sparse for d in dense), backend, not key_conv, taps)


def dense_layers(name: str, layers: int, full_attention_layers: str = "none") -> list[bool]:
    """For each layer, whether it attends to everything."""
    config = MoBAConfig(full_attention_layers=DENSE_LAYERS.get(name, full_attention_layers))
    return [config.is_full_attention(number, layers) for number in range(1, layers + 1)]


def first_that_runs(backends: tuple[SDPBackend, ...], head_dim: int, device: torch.device) -> SDPBackend:
    """The first of torch's dense kernels that takes causal bf16 attention on this device; on the CPU the plain one.

    Raises:
        ValueError: none does.
    """
    if device.type != "cuda":
        return SDPBackend.MATH
    problems = []
    for backend in backends:
        x = torch.randn(1, 2, 128, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        try:
            with sdpa_kernel(backend):
                scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
        except RuntimeError as error:
            problems.append(f"{LABELS[backend]}: {str(error).strip().splitlines()[0]}")
        else:
            return backend
    raise ValueError("no dense attention kernel of torch runs on this card: " + "; ".join(problems))


def _moba(chunk_size: int, topk: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
          weight: Tensor | None = None) -> Tensor:
    if weight is not None:
        k = _key_convolution(k, weight, cu_seqlens)
    return moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk)


@torch.compiler.disable
def _key_convolution(k: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Outside of the compiled graphs, which do not take it."""
    return key_convolution(k, weight, cu_seqlens)


def _by_baseline(attend: Callable[..., Tensor], chunk_size: int, topk: int) -> Attend:
    """Other implementations, outside of the compiled graphs: they wait for the device, and want contiguous inputs."""

    @torch.compiler.disable
    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return attend(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, max_seqlen, chunk_size, topk)

    return run


def _dense(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention over sequences of one length, by whichever kernel the surroundings force."""
    q, k, v = (x.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)
