"""RoutingTrace: how often the queries of each chunk chose each earlier chunk, and the .npz file that keeps it. Needs
numpy alone, so that what simulates or draws routing need not have Megatron-Core."""
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FORMAT = 1
NUMBERS = ("chunk_size", "topk", "seq_length", "sequences", "num_heads", "num_kv_heads")


@dataclass(frozen=True)
class RoutingTrace:
    """Chosen chunks of one forward pass, by layer, head, chunk of the query and chosen chunk. Only earlier chunks are
    counted: every query attends to its own chunk too. ValueError, whose message says which, where a count lies outside
    of what the numbers allow."""

    chunk_size: int  # keys in a chunk
    topk: int  # chunks a query attends to, its own included
    seq_length: int  # tokens of each sequence
    num_heads: int  # query heads of the whole model
    num_kv_heads: int  # key/value heads; query head `h` uses `h // (num_heads // num_kv_heads)`
    # of each sparse layer, by its 1-based global number, the non-zero counts: `(index, count)`, int64 `[nnz]` each, by
    # the flat index `(head * N + query chunk) * N + chosen chunk`, ascending
    choices: Mapping[int, tuple[np.ndarray, np.ndarray]]
    sequences: int = 1  # sequences whose choices are added up
    about: Mapping = field(default_factory=dict)  # JSON values: the checkpoint, iteration, text, versions behind it

    def __post_init__(self):
        for name in NUMBERS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a routing trace must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads of a routing trace must be a multiple of num_kv_heads, got {self.num_heads} "
                             f"and {self.num_kv_heads}")
        queries, full = self.queries(), self.seq_length // self.chunk_size
        for layer in self.layers:
            head, query_chunk, chunk, count = self.pairs(layer)
            if head.size and (head.min() < 0 or head.max() >= self.num_heads):
                raise ValueError(f"layer {layer} of a routing trace must have {self.num_heads} heads")
            if (chunk >= np.minimum(query_chunk, full)).any():
                raise ValueError(f"layer {layer} of a routing trace must choose earlier, full chunks only")
            if (count < 1).any() or (count > queries[query_chunk]).any():
                raise ValueError(f"layer {layer} of a routing trace must count a chunk at most once a query")

    @classmethod
    def from_counts(cls, *, chunk_size: int, topk: int, seq_length: int, num_kv_heads: int, sequences: int = 1,
                    counts: Mapping[int, np.ndarray], about: Mapping | None = None) -> "RoutingTrace":
        """A trace of dense tables: for each layer integers ``[num_heads, N, N]``, N the number of chunks, ``[h, i, j]``
        the queries of chunk i whose head h chose chunk j. ValueError where there is no layer, or tables differ in shape
        or do not fit the numbers."""
        shapes = {np.shape(table) for table in counts.values()}
        n = -(-seq_length // chunk_size)
        if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[1:] != (n, n):
            raise ValueError(f"counts must hold at least one layer, each of shape [heads, {n}, {n}], got "
                             f"{ {layer: np.shape(table) for layer, table in counts.items()} }")
        flat = {int(layer): np.asarray(table, dtype=np.int64).ravel() for layer, table in counts.items()}
        choices = {layer: (index := np.flatnonzero(table), table[index]) for layer, table in flat.items()}
        return cls(chunk_size, topk, seq_length, shape[0], num_kv_heads, choices, sequences, about or {})

    @property
    def num_chunks(self) -> int:
        """Chunks of a sequence, N; the last may be shorter and is then never chosen."""
        return -(-self.seq_length // self.chunk_size)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that attend sparsely, ascending."""
        return tuple(sorted(self.choices))

    def pairs(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Head, chunk of the query, chosen chunk and number of queries: four int64 ``[nnz]``, sorted in this order."""
        index, count = self.choices[layer]
        row, chunk = np.divmod(index, self.num_chunks)
        head, query_chunk = np.divmod(row, self.num_chunks)
        return head, query_chunk, chunk, count

    def counts(self, layer: int) -> np.ndarray:
        """The dense table, int64 ``[num_heads, N, N]``: how many queries of chunk i chose chunk j."""
        index, count = self.choices[layer]
        table = np.zeros(self.num_heads * self.num_chunks ** 2, dtype=np.int64)
        table[index] = count
        return table.reshape(self.num_heads, self.num_chunks, self.num_chunks)

    def queries(self) -> np.ndarray:
        """Queries in each chunk, of all sequences together: int64 ``[N]``."""
        return np.minimum(self.chunk_size, np.arange(self.seq_length, 0, -self.chunk_size)) * self.sequences

    def shares(self, layer: int) -> np.ndarray:
        """Which share of the queries of a chunk attends to a chunk, its own (always 1) included: fp64 ``[H, N, N]``."""
        share = self.counts(layer) / self.queries()[None, :, None]
        share[:, np.arange(self.num_chunks), np.arange(self.num_chunks)] = 1
        return share


def save_trace(trace: RoutingTrace, path: str | Path) -> None:
    """Writes a compressed .npz: indices as first differences, integers as narrow as they fit."""
    def narrow(x: np.ndarray) -> np.ndarray:
        return x.astype(np.min_scalar_type(int(x.max(initial=0))))

    arrays = {name: np.int64(getattr(trace, name)) for name in NUMBERS}
    for layer in trace.layers:
        index, count = trace.choices[layer]
        arrays |= {f"layer_{layer}_steps": narrow(np.diff(index, prepend=0)), f"layer_{layer}_counts": narrow(count)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # a path without .npz stays what it is
        np.savez_compressed(file, format=np.int64(FORMAT), layers=np.array(trace.layers, dtype=np.int32),
                            about=np.array(json.dumps(dict(trace.about))), **arrays)


def load_trace(path: str | Path) -> RoutingTrace:
    """Reads what :func:`save_trace` wrote; ValueError where there is no such file, or it is none of these."""
    if not Path(path).is_file():
        raise ValueError(f"there is no routing trace {path}; make one with python -m moba_megatron.inspect --trace")
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["format"]) != FORMAT:
                raise ValueError(f"its format is {int(file['format'])}, this version reads {FORMAT}")
            numbers = {name: int(file[name]) for name in NUMBERS}
            choices = {int(layer): (np.cumsum(file[f"layer_{layer}_steps"], dtype=np.int64),
                                    file[f"layer_{layer}_counts"].astype(np.int64)) for layer in file["layers"]}
            return RoutingTrace(choices=choices, about=json.loads(str(file["about"])), **numbers)
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no routing trace of python -m moba_megatron.inspect --trace: {error}") from error
