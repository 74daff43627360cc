"""Attention over sequences whose rows are spread over ranks: the public function, schedules by name, the gradient."""
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import get_stages, validation
from ..ops.pipeline import Choice, Pipeline, Saved
from ..segments import Routing
from .all_gather import AllGatherAttention
from .all_to_all import AllToAllAttention, LocalAttention
from .layout import Sequences
from .selective import SelectiveAttention
from .transport.collective_check import note_failure

COMM_TYPES = ("all_gather", "a2a", "a2a+all_gather", "selective")
"""How ranks communicate, by Megatron's ``cp_comm_type``; ``allgather`` is understood too."""

Groups = dist.ProcessGroup | Sequence[dist.ProcessGroup]


def canonical_comm_type(name: str) -> str:
    """One of COMM_TYPES; ValueError, which lists them, where the type is not supported."""
    canonical = name.replace("allgather", "all_gather") if isinstance(name, str) else name
    if canonical not in COMM_TYPES:
        raise ValueError(f"cp_comm_type must be one of {', '.join(COMM_TYPES)} for MoBA attention, got {name!r}")
    return canonical


def context_parallel_attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, chunk_size: int, topk: int,
                               group: Groups, *, comm_type: str = "all_gather", head_groups: int | None = None,
                               softmax_scale: float | None = None, deterministic: bool = False,
                               backend: str = "auto", workspace_mib: float | None = None,
                               shared: str = "head", selected: Tensor | None = None) -> Tensor:
    """MoBA over sequences whose rows are spread over the ranks of a group, with gradients for q, k and v.

    The inputs must fit together on all ranks, as after a :class:`~.transport.collective_check.CollectiveCheck`.
    Selection and result equal those of one rank: chunk means bit for bit, o and gradients up to the order of sums.

    Args:
        q: ``[T, H, D]``, this rank's rows of every sequence in zigzag order.
        k: ``[T, HK, D]``.
        v: ``[T, HK, DV]``.
        sequences: the whole sequences, ``T * P`` rows, each a multiple of ``2 P`` long.
        chunk_size, topk: as ``moba_chunk_size`` and ``moba_topk`` of :func:`moba_megatron.moba_attn_varlen`.
        group: the context parallel group; for ``a2a+all_gather`` two groups: of ranks in a row (heads are exchanged
            among them), and of the ranks with the same place in each of those (keys are gathered among them).
        comm_type: one of COMM_TYPES.
        head_groups: groups of kv heads that travel and are computed one after the other; None: by size.
        softmax_scale, deterministic, backend, workspace_mib: as there.
        shared: as there; ``group``: not by ``selective``, and by ``a2a`` where ranks get whole groups of heads.
        selected: given chunks, as of :func:`moba_megatron.ops.sparse_attention`, in place of the gate's; ``topk`` and
            ``shared`` have no meaning then.

    Returns:
        o ``[T, H, DV]``, what a single rank would compute for these rows.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or heads cannot be dealt out.
    """
    q, k, v = validation.cast_under_autocast(q, k, v)
    validation.check_qkv(q, k, v)
    validation.check_whole("chunk_size", chunk_size, 1)
    validation.check_whole("topk", topk, 1)
    validation.check_flag("deterministic", deterministic)
    validation.check_workspace(workspace_mib)
    if head_groups is not None:
        validation.check_whole("head_groups", head_groups, 1)
    if selected is not None:
        validation.check_selected(selected, q, k, None)
        topk, shared = selected.shape[2] + 1, "head" if selected.shape[1] == q.shape[1] else "group"
    if sequences.max_seqlen <= (topk if selected is None else 1) * chunk_size:
        # every earlier chunk is chosen, or there is none: causal attention, one chunk
        chunk_size, topk = max(chunk_size, sequences.max_seqlen), 1
    if topk == 1:
        selected = None
    if shared != "head":
        validation.check_shared(shared)
    scale = validation.check_scale(softmax_scale, q.shape[2])
    pipeline = Pipeline(get_stages(backend, q.device, deterministic), topk, scale, deterministic, backend == "auto",
                        workspace_mib, shared=shared)
    if comm_type not in COMM_TYPES:
        comm_type = canonical_comm_type(comm_type)
    check_groups(group, comm_type, q.shape[1], k.shape[1], shared if topk > 1 else "head")
    ranks = group[0].size() * group[1].size() if isinstance(group, Sequence) else group.size()
    rows, wanted = (q.shape[0], k.shape[0], v.shape[0]), sequences.total // ranks
    if rows != (wanted, wanted, wanted):
        raise ValueError(f"q, k and v must have the {wanted} rows of one of {ranks} ranks, got {rows}")
    schedule = make_schedule(comm_type, pipeline, sequences, chunk_size, group, head_groups)
    return _ContextParallelAttention.apply(q, k, v, schedule, group, selected)


def check_groups(group: Groups, comm_type: str, heads: int, kv_heads: int, shared: str = "head") -> None:
    """Raises ValueError or TypeError unless communication type, heads and who shares a choice suit the group(s)."""
    hierarchical = comm_type == "a2a+all_gather"
    if hierarchical and not (isinstance(group, Sequence) and len(group) == 2):
        got = f"{len(group)} groups" if isinstance(group, Sequence) else type(group).__name__
        raise ValueError(f"group must be two groups, inner and outer, for cp_comm_type {comm_type!r}, got {got}: pass "
                         "two sizes to --hierarchical-context-parallel-sizes")
    if not hierarchical and isinstance(group, Sequence):
        raise TypeError(f"group must be one group for cp_comm_type {comm_type!r}, got {len(group)}")
    size = group[0].size() if hierarchical else group.size()
    if "a2a" in comm_type and kv_heads % size and (size % kv_heads or heads % size):
        raise ValueError(
            f"cp_comm_type {comm_type!r} exchanges heads among {size} ranks: key's heads must be a multiple of {size}, "
            f"or divide it with query's heads a multiple of {size}; got {heads} query and {kv_heads} key heads (after "
            "tensor parallelism). Use cp_comm_type all_gather, or fewer ranks for the exchange")
    if "a2a" in comm_type and shared == "group" and kv_heads % size:
        raise ValueError(f"selection must be 'head' for cp_comm_type {comm_type!r} where {size} ranks share {kv_heads} "
                         "key heads, got 'group': no rank has a whole group's queries. Use all_gather")
    if shared == "group" and comm_type == "selective":
        raise ValueError("selection must be 'head' for cp_comm_type 'selective', got 'group': not implemented. Use "
                         "all_gather or a2a")


def make_schedule(comm_type: str, pipeline: Pipeline, sequences: Sequences, chunk_size: int, group: Groups,
                  head_groups: int | None) -> AllGatherAttention | AllToAllAttention:
    """The schedule of a communication type: ``forward(q, k, v)`` and ``backward(do, saved, kv_grad_dtype)``; ValueError
    where the type cannot serve such sequences."""
    if comm_type == "selective" and sequences.batch is None:
        raise ValueError("cp_comm_type 'selective' needs sequences of one length, got packed sequences: which chunks a "
                         "rank holds would be known on the device only. Use all_gather or a2a")
    if comm_type == "a2a+all_gather":
        group, outer = group
        layout = sequences.zigzag(outer.size(), dist.get_rank(outer), chunk_size)
        inner = AllGatherAttention(pipeline, layout, outer, head_groups)
        sequences, head_groups = sequences.part(outer.size()), 1  # the slower part is pipelined
    size, rank = group.size(), dist.get_rank(group)
    if comm_type in ("all_gather", "selective"):
        schedule = AllGatherAttention if comm_type == "all_gather" else SelectiveAttention
        return schedule(pipeline, sequences.zigzag(size, rank, chunk_size), group, head_groups)
    chunks, length, device = None, sequences.max_seqlen, sequences.cu_seqlens.device
    if comm_type == "a2a":
        inner = LocalAttention(pipeline, sequences.whole(chunk_size))
        if pipeline.earlier(inner.segments) and sequences.batch == 1 and length % (2 * size * chunk_size) == 0:
            chunks = (Sequences.uniform(length // size, 1, device).whole(chunk_size),
                      Sequences.uniform(length // chunk_size, 1, device).rows(size, rank))
    return AllToAllAttention(inner, sequences.rows(size, rank), group, head_groups, chunks)


class _ContextParallelAttention(torch.autograd.Function):
    """Runs a schedule and keeps what its backward asks for."""

    @staticmethod
    def forward(ctx, q, k, v, schedule, group, selected):
        try:
            o, saved = schedule.forward(q, k, v, selected)
        except BaseException as error:
            note_failure(group, error)
            raise
        tensors: list[Tensor] = []
        ctx.saved = _replaced(saved, tensors)
        ctx.schedule, ctx.group, ctx.kv_dtype = schedule, group, k.dtype
        ctx.save_for_backward(*tensors)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        saved = _replaced(ctx.saved, ctx.saved_tensors)
        try:
            return *ctx.schedule.backward(do.contiguous(), saved, ctx.kv_dtype), None, None, None
        except BaseException as error:
            note_failure(ctx.group, error)
            raise


class _Place(int):
    """Of a tensor among those that autograd saves."""


def _replaced(saved, tensors: Sequence[Tensor]):
    """Nested lists, named tuples and what the pipeline saves, with places among ``tensors`` for tensors, which are
    added to them; or with tensors for places."""
    if isinstance(saved, Tensor):
        tensors.append(saved)
        return _Place(len(tensors) - 1)
    if isinstance(saved, _Place):
        return tensors[saved]
    pipelines = isinstance(saved, (Saved, Choice, Routing))
    if not (pipelines or isinstance(saved, list) or hasattr(saved, "_make")):
        return saved
    values = []
    for x in vars(saved).values() if pipelines else saved:
        values.append(_replaced(x, tensors))
    return values if isinstance(saved, list) else type(saved)(*values)
