"""TraceRecorder: a RoutingTrace of one forward pass, joined over all parallel ranks."""
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from .choices import Choices, look, sum_over_ranks
from .trace import RoutingTrace


class TraceRecorder:
    """An observer for :func:`~moba_megatron.inspect.choices.watching`: counts each layer's choices in its first run.
    Watch one forward pass on all ranks, then call :meth:`trace`. The sequences must have one length."""

    def __init__(self):
        self._tables: dict[int, Tensor] = {}
        self._numbers: dict[str, int] | None = None
        """What every layer and rank has in common, as RoutingTrace names it; None before a layer with a choice."""

    def __call__(self, module, q: Tensor, k: Tensor, segments, group=None, global_rows=None) -> None:
        layer = module.layer_number
        choices = None if layer in self._tables else look(module, q, k, segments, group, global_rows)
        if choices is None:
            return
        length, sequences = segments.max_seqlen_k, segments.num_sequences
        if length * sequences != choices.k.shape[0]:
            raise ValueError(f"a routing trace must be of sequences of one length, got {sequences} packed sequences of "
                             f"at most {length} and together {choices.k.shape[0]} tokens")
        numbers = {"chunk_size": segments.chunk_size, "topk": choices.topk, "seq_length": length,
                   "num_heads": module.config.num_attention_heads, "num_kv_heads": module.config.num_query_groups,
                   "sequences": sequences}
        if self._numbers not in (None, numbers):
            raise ValueError(f"a routing trace must have one chunk size and topk, got {self._numbers} and, in layer "
                             f"{layer}, {numbers}")
        self._numbers = numbers
        self._tables[layer] = _pair_counts(choices)

    def trace(self, about: Mapping | None = None) -> RoutingTrace:
        """The trace of all layers, heads and sequences; called by all ranks of the world, the same on all. ValueError
        where no layer had a choice, on any rank."""
        data_parallel, tensor_rank = 1, 0
        if parallel_state.model_parallel_is_initialized():
            data_parallel = parallel_state.get_data_parallel_world_size()
            tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        found = [(self._numbers, sorted(self._tables))]
        if dist.is_initialized():
            found *= dist.get_world_size()
            dist.all_gather_object(found, found[0])
        numbers = dict(next((n for n, _ in found if n), {}))
        if not numbers:
            raise ValueError("no layer has a choice: topk * chunk_size covers the sequence, or all layers are dense")
        size = -(-numbers["seq_length"] // numbers["chunk_size"])
        num_heads = numbers.pop("num_heads")
        counts = {}
        for layer in sorted({layer for _, layers in found for layer in layers}):
            table = torch.zeros(num_heads, size, size, dtype=torch.int64)
            if (mine := self._tables.get(layer)) is not None:
                table[tensor_rank * mine.shape[0]:][:mine.shape[0]] = mine
            counts[layer] = sum_over_ranks(table).numpy()
        numbers["sequences"] *= data_parallel
        return RoutingTrace.from_counts(counts=counts, about=about, **numbers)


def _pair_counts(choices: Choices) -> Tensor:
    """Int64 ``[H, N, N]``: local queries of a chunk that chose a chunk, numbered within their sequence, all added."""
    segments = choices.segments
    size = -(-segments.max_seqlen_k // segments.chunk_size)
    _, position = segments.query_positions(choices.q.shape[0])
    counts = choices.counts(position // segments.chunk_size, size)  # by the queries' own chunks
    first = segments.first_chunk()
    ids = torch.arange(choices.num_chunks, device=first.device)
    number = ids - first[torch.searchsorted(first, ids, right=True) - 1]  # N for the id that a sequence leaves unused
    return counts.new_zeros(counts.shape[0], size, size + 1).index_add_(2, number.clamp(max=size), counts)[..., :size]
