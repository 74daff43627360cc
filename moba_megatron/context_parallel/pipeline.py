"""Attention over whole sequences on one rank, and what every schedule knows of the attention it computes."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..ops.backend import repeat
from ..ops.dense import dense_causal, dense_causal_bwd
from ..segments import Routing, Segments

Saved = list  # of tensors, of what the host knows, and of such lists
Grads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Pipeline:
    """How to attend, apart from where the rows are."""

    stages: ModuleType  # moba_megatron.kernels or moba_megatron.reference
    topk: int
    softmax_scale: float
    deterministic: bool
    may_be_dense: bool  # dense kernels (ops/dense.py) may take over where MoBA is causal attention
    workspace_mib: float | None = None  # limit of the kernels' scratch memory; None for the environment's

    def earlier(self, segments: Segments) -> int:
        """Earlier chunks that a query can select: no sequence has more than its bound says."""
        return min(self.topk - 1, max(0, (segments.max_seqlen_k - 1) // segments.chunk_size))

    def means(self, k: Tensor, segments: Segments) -> Tensor:
        """Chunk means ``[num_chunks, HK, D]`` of keys ``[S, HK, D]``."""
        def compute(k, *places):
            return self.stages.chunk_means(k, self._segments(key, places)),

        key, tensors = self._key(segments)
        return repeat(self.stages, ("means", key), compute, k, *tensors, workspace_mib=self.workspace_mib)[0]

    def choose(self, q: Tensor, keys: Tensor, segments: Segments, kv_rows: int | None = None
               ) -> tuple[Tensor, Routing]:
        """The selection and its lists, by all keys ``[S, HK, D]``; or, with ``kv_rows`` (S), by the chunk means."""
        def compute(q, keys, *places):
            segments = self._segments(key, places)
            means = self.stages.chunk_means(keys, segments) if kv_rows is None else keys
            selected = self.stages.gate(q, means, segments, self.earlier(segments) + 1)
            num_chunks = segments.num_chunks(keys.shape[0] if kv_rows is None else kv_rows)
            routing = self.stages.route(selected, keys.shape[1], num_chunks)
            return selected, routing.indices, routing.indptr

        key, tensors = self._key(segments)
        selected, *lists = repeat(self.stages, ("choose", kv_rows, key), compute, q, keys, *tensors,
                                  workspace_mib=self.workspace_mib)
        return selected, Routing(*lists)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None, routing: Routing | None,
               segments: Segments) -> tuple[Tensor, Saved]:
        """o, and lse, the selection and its lists for :meth:`attend_bwd`; causal attention without a selection."""
        if selected is None:
            selected = torch.empty(*q.shape[:2], 0, dtype=torch.int32, device=q.device)
        lists = (None, None) if routing is None else (routing.indices, routing.indptr)

        def compute(q, k, v, selected, indices, indptr, *places):
            routing = Routing(indices, indptr) if indices is not None else None
            return self.stages.attention_fwd(q, k, v, selected, self._segments(key, places), self.softmax_scale,
                                             routing)

        key, tensors = self._key(segments)
        o, lse = repeat(self.stages, ("attend", key), compute, q, k, v, selected, *lists, *tensors,
                        workspace_mib=self.workspace_mib)
        return o, [lse, selected, *lists]

    def attend_bwd(self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: Saved, segments: Segments,
                   kv_grad_dtype: torch.dtype, event: torch.cuda.Event | None = None) -> Grads:
        """dq, dk, dv; ``event`` is recorded when dk and dv are complete, which may be before dq."""
        lse, selected, indices, indptr = saved

        def compute(do, q, k, v, o, lse, selected, indices, indptr, *places):
            routing = Routing(indices, indptr) if indices is not None else None
            return self.stages.attention_bwd(do, None, q, k, v, o, lse, selected, self._segments(key, places),
                                             self.softmax_scale, deterministic=self.deterministic,
                                             kv_grad_dtype=kv_grad_dtype, routing=routing)

        key, tensors = self._key(segments)
        return repeat(self.stages, ("attend_bwd", kv_grad_dtype, key), compute, do, q, k, v, o, lse, selected, indices,
                      indptr, *tensors, workspace_mib=self.workspace_mib, event=event)

    def _key(self, segments: Segments) -> tuple[tuple, tuple[Tensor, ...]]:
        """What decides the launches besides tensors, and the tensors of segments."""
        s = segments
        return ((s.max_seqlen_q, s.max_seqlen_k, s.chunk_size, s.packed, s.exact, self.topk, self.softmax_scale,
                 self.deterministic), (s.cu_seqlens_q, s.cu_seqlens_k, s.seq_ids, s.offsets))

    @staticmethod
    def _segments(key: tuple, tensors: tuple[Tensor, ...]) -> Segments:
        """The segments again, of what :meth:`_key` gave."""
        return Segments(*tensors, *key[:5])


@dataclass(frozen=True)
class LocalAttention:
    """All rows of the sequences are here, as the inner part of a schedule that spreads heads."""

    pipeline: Pipeline
    segments: Segments

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """q ``[S, H, D]``, k ``[S, HK, D]``, v ``[S, HK, DV]`` in global order: o and what backward needs."""
        selected = routing = None
        if self.pipeline.earlier(self.segments):
            selected, routing = self.pipeline.choose(q, k, self.segments)
        else:
            dense = self._dense(dense_causal, q, k, v)
            if dense is not None:
                return dense[0], [q, k, v, *dense, q.new_empty(*q.shape[:2], 0, dtype=torch.int32), None, None]
        o, saved = self.pipeline.attend(q, k, v, selected, routing, self.segments)
        return o, [q, k, v, o, *saved]

    def forward_by_means(self, q: Tensor, means: Tensor, arrive: Callable[[], Sequence[Tensor]]
                         ) -> tuple[Tensor, Saved]:
        """As :meth:`forward`, with chunk means ``[num_chunks, HK, D]``; k and v are what ``arrive`` then waits for."""
        selected, routing = self.pipeline.choose(q, means, self.segments, q.shape[0])
        k, v = arrive()
        o, saved = self.pipeline.attend(q, k, v, selected, routing, self.segments)
        return o, [q, k, v, o, *saved]

    def backward(self, do: Tensor, saved: Saved, kv_grad_dtype: torch.dtype,
                 event: torch.cuda.Event | None = None) -> Grads:
        """dq, dk, dv; dk and dv in ``kv_grad_dtype``. As soon as these two are complete, ``event`` is recorded."""
        q, k, v, o, *rest = saved
        if rest[1].shape[2] == 0 and kv_grad_dtype == k.dtype:
            dense = self._dense(dense_causal_bwd, do, None, q, k, v, o, rest[0],
                                deterministic=self.pipeline.deterministic)
            if dense is not None:
                if event is not None:
                    event.record()
                return dense
        return self.pipeline.attend_bwd(do, q, k, v, o, rest, self.segments, kv_grad_dtype, event)

    def _dense(self, function, *tensors: Tensor, **options):
        """The result of a dense kernel, or None where they may not or cannot: topk 1 is a chunk, not the sequence."""
        s = self.segments
        if not self.pipeline.may_be_dense or s.max_seqlen_k > s.chunk_size:
            return None
        return function(*tensors, s.cu_seqlens_k, s.max_seqlen_k, self.pipeline.softmax_scale, exact=s.exact, **options)
