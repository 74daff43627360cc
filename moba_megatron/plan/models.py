"""Model shapes and the run's settings: what the command line says, as numbers."""
from dataclasses import dataclass
from functools import cached_property

from ..config import MoBAConfig
from ..flops import attention_flops, dense_attention_flops

VOCABULARY_MULTIPLE = 128  # Megatron pads the vocabulary to a multiple of this times the tensor parallel size
SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary")  # fields of a Model


def _at_least_one(settings, names: tuple[str, ...], of: str = "") -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ValueError(f"{of}{name} must be at least 1, got {getattr(settings, name)}")


@dataclass(frozen=True)
class Model:
    """A Llama-like transformer: RMSNorm, RoPE, grouped queries, SwiGLU, no biases."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # one of SwiGLU's two halves
    vocabulary: int
    tied: bool = False  # the output layer shares the embedding

    def __post_init__(self):
        _at_least_one(self, SIZES, "model ")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads = {self.kv_heads}, got {self.heads}")

    @property
    def matrix_parameters(self) -> int:
        """Of one layer: the weights that multiply tokens."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads) + 3 * self.hidden * self.ffn

    def padded_vocabulary(self, tensor_parallel: int = 1) -> int:
        multiple = VOCABULARY_MULTIPLE * tensor_parallel
        return -(-self.vocabulary // multiple) * multiple

    @property
    def parameters(self) -> int:
        """All of them, without the vocabulary's padding."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return self.layers * (self.matrix_parameters + 2 * self.hidden) + embeddings + self.hidden


MODELS = {  # 350m is the byte-level GPT of this project's measurements; the others have the sizes of the Llama 3 family
    "350m": Model(24, 1024, 8, 2, 128, 2816, 256, tied=True),
    "1b": Model(16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "8b": Model(32, 4096, 32, 8, 128, 14336, 128256),
    "70b": Model(80, 8192, 64, 8, 128, 28672, 128256)}


@dataclass(frozen=True)
class Run:
    """What is trained, whatever the layout."""

    model: Model  # its shape
    seqlen: int  # tokens of a sequence
    gpus: int  # in all
    batch: int  # sequences in a step
    moba: MoBAConfig  # chunk size, topk, dense layers
    distributed_optimizer: bool = True  # optimizer state is spread over data and context parallel ranks
    attention: str = "moba"  # `moba` or `full`
    iteration: int = 0  # of the step, for a schedule of topk

    def __post_init__(self):
        _at_least_one(self, ("seqlen", "gpus", "batch"))
        if self.attention not in ("moba", "full"):
            raise ValueError(f"attention must be moba or full, got {self.attention!r}")

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seqlen * self.batch

    @cached_property
    def layers(self) -> list[MoBAConfig | None]:
        """Chunk size and topk of each layer; None where it costs what full attention costs."""
        found = []
        for number in range(1, self.model.layers + 1):
            moba = self.moba.for_layer(number, self.model.layers).at_step(self.iteration)
            dense = (self.attention == "full" or self.seqlen <= moba.chunk_size * moba.topk
                     or moba.is_full_attention(number, self.model.layers))
            found.append(None if dense else moba)
        return found

    @cached_property
    def sparse_layers(self) -> list[MoBAConfig]:
        return [moba for moba in self.layers if moba is not None]

    def step_flops(self, dense: bool) -> float:
        """Operations of a step, forward and backward, without recompute, as Megatron-LM counts them; ``dense``: as if
        every layer attended fully, which is what MFU is usually quoted against."""
        m = self.model
        matrices = 6 * self.tokens * (m.layers * m.matrix_parameters + m.hidden * m.padded_vocabulary())
        full = dense_attention_flops(self.seqlen, m.heads, m.head_dim, m.head_dim)
        attention = [full if dense or moba is None else attention_flops(
            self.seqlen, m.heads, m.head_dim, m.head_dim, moba.chunk_size, moba.topk) for moba in self.layers]
        return matrices + self.batch * sum(attention)


def parse_size(text: str) -> int:
    """``4096``, ``128K`` (times 1024), ``1M`` (times 1024 squared); ValueError for anything else."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = 0.0
    if not value >= 1 or value % 1:
        raise ValueError(f"a size must be a number of tokens such as 4096, 128K or 1M, got {text!r}")
    return int(value)


def default_batch(seqlen: int) -> int:
    """Sequences of a step of about four million tokens, where the user names no batch size."""
    return max(1, (4 << 20) // seqlen)
