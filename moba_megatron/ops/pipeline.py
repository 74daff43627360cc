"""The pipeline of an attention: means and gate, or given chunks, route, attend and merge, or dense; and backward.

All that attends goes through it, checked: the operator, its custom-op form, context parallelism, prefill.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..segments import Routing, Segments
from .dense import dense_causal, dense_causal_bwd


@dataclass(frozen=True)
class Choice:
    """The chunks that queries chose, and for each chunk its queries."""

    # int32 `[T, H, choices]`, or `[T, HK, choices]` for groups of heads; of size 0 where every key is attended to
    selected: Tensor
    routing: Routing | None = None  # of `selected`; None where its size is 0


@dataclass(frozen=True)
class Saved:
    """What backward needs besides q, k and v: o ``[T, H, DV]``, lse ``[T, H]`` and the choice."""

    o: Tensor
    lse: Tensor
    choice: Choice


@dataclass(frozen=True)
class Pipeline:
    """How to attend, apart from where the rows are."""

    stages: ModuleType  # `moba_megatron.kernels`, `.torch_stages` or `.reference`
    topk: int  # chunks that a query attends to, its own included
    softmax_scale: float  # multiplies the scores
    deterministic: bool = False  # bitwise reproducible gradients
    may_be_dense: bool = False  # dense kernels (`ops/dense.py`) may take over where MoBA is causal attention
    workspace_mib: float | None = None  # limit of the kernels' scratch memory, MiB; None for the environment's
    untrusted: bool = False  # lengths come from outside, and are made safe on the device unless segments are `exact`
    shared: str = "head"  # `head`: each query head chooses; `group`: the query heads of a kv head choose together

    def earlier(self, segments: Segments) -> int:
        """Earlier chunks that a query can select: no sequence has more than its bound says."""
        return min(self.topk - 1, max(0, (segments.max_seqlen_k - 1) // segments.chunk_size))

    def select(self, q: Tensor, k: Tensor, segments: Segments) -> Tensor:
        """What :meth:`forward` chooses: int32 ``[T, H or HK, earlier]``."""
        return self.stages.call(_bounded_select, self, _rows(q), _rows(k), segments, workspace_mib=self.workspace_mib)

    def choose(self, q: Tensor, keys: Tensor, segments: Segments, kv_rows: int | None = None) -> Choice:
        """By all keys ``[S, HK, D]``; or, with ``kv_rows`` (S), by the chunk means."""
        keys = _rows(keys) if kv_rows is None else keys.contiguous()
        return self.stages.call(_choose, self, _rows(q), keys, segments, kv_rows, workspace_mib=self.workspace_mib)

    def given(self, selected: Tensor, heads: int, kv_heads: int, segments: Segments, kv_rows: int) -> Choice:
        """What :meth:`choose` gives, of given chunks as of :meth:`forward`."""
        return self.stages.call(_given, self, selected.contiguous(), heads, kv_heads, segments, kv_rows,
                                workspace_mib=self.workspace_mib)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, choice: Choice | None, segments: Segments
               ) -> tuple[Tensor, Saved]:
        """o ``[T, H, DV]``, and what backward wants; causal attention without a choice."""
        choice = choice or _no_choice(q)
        q = -q if self.softmax_scale < 0 else q
        o, lse = self.stages.call(_attend, self, _rows(q), _rows(k), _rows(v), choice, segments,
                                  workspace_mib=self.workspace_mib)
        return o, Saved(o, lse, choice)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, selected: Tensor | None = None
                ) -> tuple[Tensor, Saved]:
        """q ``[T, H, D]``, k ``[S, HK, D]``, v ``[S, HK, DV]``: o ``[T, H, DV]``, and what backward wants.
        ``selected``: given chunks, int32 ``[T, H or HK, n]`` with n of at least 1, of which nothing is known."""
        if selected is not None or self.earlier(segments):
            scaled = _rows(-q) if self.softmax_scale < 0 else None  # the running maximum is taken before the scale
            selected = selected if selected is None else selected.contiguous()
            o, lse, chosen, *lists = self.stages.call(_forward, self, _rows(q), _rows(k), _rows(v), scaled, segments,
                                                      selected, workspace_mib=self.workspace_mib)
            return o, Saved(o, lse, Choice(chosen, Routing(*lists, q.shape[1] // chosen.shape[1])))
        dense = self._dense(dense_causal, segments, q, k, v)
        return self.attend(q, k, v, None, segments) if dense is None else (dense[0], Saved(*dense, _no_choice(q)))

    def backward(self, do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, saved: Saved,
                 segments: Segments, kv_grad_dtype: torch.dtype | None = None,
                 event: torch.cuda.Event | None = None, out: Sequence[Tensor] | None = None) -> Sequence[Tensor]:
        """dq, dk, dv; dk and dv in ``kv_grad_dtype``, None for theirs. ``event`` is recorded when dk and dv are
        complete, maybe before dq. ``out``: memory for them, returned if used."""
        if not saved.choice.selected.shape[2] and kv_grad_dtype in (None, k.dtype):
            dense = self._dense(dense_causal_bwd, segments, do, dlse, q, k, v, saved.o, saved.lse,
                                deterministic=self.deterministic)
            if dense is not None:
                if event is not None:
                    event.record()
                return dense
        dlse = dlse if dlse is None else dlse.contiguous()
        return self.stages.call(_backward, self, *map(_rows, (do, q, k, v, saved.o)), dlse, saved.lse.contiguous(),
                                saved.choice, segments, kv_grad_dtype, workspace_mib=self.workspace_mib, event=event,
                                out=out)

    def bounded(self, segments: Segments, total_q: int, total_k: int) -> Segments:
        """Segments within so many rows of q and k, made so on the device."""
        return self.stages.bounded(segments, total_q, total_k) if self.untrusted else segments

    def _dense(self, function, segments: Segments, *tensors: Tensor | None, **options):
        """What a dense kernel yields, or None where none may or can."""
        if not (self.may_be_dense and segments.packed and segments.max_seqlen_k <= segments.chunk_size
                and self.softmax_scale > 0):  # others scale what they have masked with -inf
            return None
        total = tensors[0].shape[0]
        lengths = self.bounded(segments, total, total).cu_seqlens_k
        return function(*tensors, lengths, segments.max_seqlen_k, self.softmax_scale, exact=segments.exact, **options)


def _rows(x: Tensor) -> Tensor:
    """With contiguous rows: what the kernels read."""
    return x if x.stride(2) == 1 else x.contiguous()


def _no_choice(q: Tensor) -> Choice:
    return Choice(torch.empty(*q.shape[:2], 0, dtype=torch.int32, device=q.device))


def _select(pipeline: Pipeline, q, means, segments: Segments):
    scoring = pipeline.stages.group_queries(q, means.shape[1]) if pipeline.shared == "group" else q
    return pipeline.stages.gate(scoring, means, segments, pipeline.earlier(segments) + 1)


def _bounded_select(pipeline: Pipeline, q, k, segments: Segments):
    segments = pipeline.bounded(segments, q.shape[0], k.shape[0])
    return _select(pipeline, q, pipeline.stages.chunk_means(k, segments), segments)


def _choose(pipeline: Pipeline, q, keys, segments: Segments, kv_rows: int | None) -> Choice:
    stages = pipeline.stages
    means = stages.chunk_means(keys, segments) if kv_rows is None else keys
    selected = _select(pipeline, q, means, segments)
    num_chunks = segments.num_chunks(keys.shape[0] if kv_rows is None else kv_rows)
    return Choice(selected, stages.route(selected, keys.shape[1], num_chunks, q.shape[1] // selected.shape[1]))


def _given(pipeline: Pipeline, selected, heads: int, kv_heads: int, segments: Segments, kv_rows: int) -> Choice:
    selected = pipeline.stages.keep_earlier(selected, segments)
    num_chunks = segments.num_chunks(kv_rows)
    return Choice(selected, pipeline.stages.route(selected, kv_heads, num_chunks, heads // selected.shape[1]))


def _attend(pipeline: Pipeline, q, k, v, choice: Choice, segments: Segments):
    segments = pipeline.bounded(segments, q.shape[0], k.shape[0])
    return pipeline.stages.attention_fwd(q, k, v, choice.selected, segments, abs(pipeline.softmax_scale),
                                         choice.routing)


def _forward(pipeline: Pipeline, q, k, v, scaled, segments: Segments, selected):
    stages, segments = pipeline.stages, pipeline.bounded(segments, q.shape[0], k.shape[0])
    selected = (_select(pipeline, q, stages.chunk_means(k, segments), segments) if selected is None else
                stages.keep_earlier(selected, segments))
    arguments = q if scaled is None else scaled, k, v, selected, segments, abs(pipeline.softmax_scale)
    if hasattr(stages, "route_and_attend"):
        o, lse, routing = stages.route_and_attend(*arguments)
    else:
        routing = stages.route(selected, k.shape[1], segments.num_chunks(k.shape[0]), q.shape[1] // selected.shape[1])
        o, lse = stages.attention_fwd(*arguments, routing)
    return o, lse, selected, routing.indices, routing.indptr


def _backward(pipeline: Pipeline, do, q, k, v, o, dlse, lse, choice: Choice, segments: Segments,
              kv_grad_dtype: torch.dtype | None):
    segments = pipeline.bounded(segments, q.shape[0], k.shape[0])
    return pipeline.stages.attention_bwd(do, dlse, q, k, v, o, lse, choice.selected, segments, pipeline.softmax_scale,
                                         deterministic=pipeline.deterministic, kv_grad_dtype=kv_grad_dtype,
                                         routing=choice.routing)


def _backward_of_forward(results, pipeline: Pipeline, q, k, v, scaled, segments: Segments, selected):
    """What :func:`_forward` is followed by, for a gradient laid out as o and none of lse."""
    o, lse, chosen, *lists = results
    choice = Choice(chosen, Routing(*lists, q.shape[1] // chosen.shape[1]))
    _backward(pipeline, o, q, k, v, o, None, lse, choice, segments, None)


_forward.later = _backward_of_forward
