"""The public operator: MoBA over packed sequences or query segments, as torch custom operators with a gradient."""
import functools
from typing import Literal, overload

import torch
from torch import Tensor

from ..segments import Routing, Segments, index_dtype
from ..tensor_cache import is_unobserved
from . import validation
from .backend import check_backend, get_stages
from .pipeline import Choice, Pipeline, Saved


@overload
def moba_attn_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, moba_chunk_size: int,
                     moba_topk: int, *, softmax_scale: float | None = ..., deterministic: bool = ...,
                     backend: str = ..., return_lse: Literal[False] = ..., workspace_mib: float | None = ...,
                     shared: str = ...) -> Tensor: ...


@overload
def moba_attn_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, moba_chunk_size: int,
                     moba_topk: int, *, softmax_scale: float | None = ..., deterministic: bool = ...,
                     backend: str = ..., return_lse: Literal[True], workspace_mib: float | None = ...,
                     shared: str = ...) -> tuple[Tensor, Tensor]: ...


def moba_attn_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, moba_chunk_size: int,
                     moba_topk: int, *, softmax_scale: float | None = None, deterministic: bool = False,
                     backend: str = "auto", return_lse: bool = False, workspace_mib: float | None = None,
                     shared: str = "head") -> Tensor | tuple[Tensor, Tensor]:
    """Mixture of Block Attention over packed sequences, causal, with gradients for q, k and v.

    For each query and head: softmax over the keys, at or before the query, of its own chunk and of the
    ``moba_topk - 1`` earlier chunks with the largest ``<q, mean key>``. Ties go to the later chunk; no gradient flows
    through the selection. Where ``max_seqlen <= moba_topk * moba_chunk_size`` this is causal attention.

    A NaN or inf in a row of k or v makes NaN of the rows that attend to it. The kernels, as FlashAttention's, may
    spread it to other rows of its sequence in the same tile of up to 128 rows, before it or in the next chunk, which
    multiply it by 0; torch's backends do not. A chunk whose score is NaN or -inf is not selected.

    Under ``torch.autocast`` q, k and v of one dtype are computed in it; of several, all are cast to autocast's dtype as
    for ``scaled_dot_product_attention`` (fp64 never is). First derivatives only, by reverse mode; ``vmap`` loops.

    Args:
        q: ``[T, H, D]``, bf16, fp16, fp32 or fp64 (fp64: not by Triton); any strides.
        k: ``[T, HK, D]``, H a multiple of HK (GQA, MQA without repeating).
        v: ``[T, HK, DV]``.
        cu_seqlens: int32 ``[B + 1]`` on q's device, non-decreasing from 0; chunks start with each sequence. Rows from
            ``cu_seqlens[-1]`` on give o 0, lse -inf, and take no gradient. On CUDA, where values are not looked at,
            others than these are bounded: nothing is read or written outside of the tensors.
        max_seqlen: upper bound of a sequence's length, tokens.
        moba_chunk_size: keys in a chunk, at least 1 (Triton: at least 16).
        moba_topk: chunks a query attends to, its own included, at least 1.
        softmax_scale: multiplies the scores; None for ``1/sqrt(D)``. The gate is not scaled.
        deterministic: bitwise reproducible gradients; an error with backend ``torch`` on CUDA.
        backend: ``auto`` (Triton on CUDA, plain torch elsewhere), ``triton``, ``torch`` or ``reference``.
        return_lse: also return the log-sum-exp of the attended scores, differentiable.
        workspace_mib: limit of the Triton kernels' scratch memory, MiB; None for the environment's
            ``MOBA_WORKSPACE_MIB``, else 1024. Less memory, more passes over fewer heads each.
        shared: ``head``: each query head chooses; ``group``: the query heads of a kv head choose together, by the sum
            of their scores, taken as ``<sum of their q, mean key>`` with the sum rounded to q's dtype.

    Returns:
        o ``[T, H, DV]`` in q's dtype; with return_lse also lse ``[T, H]``, natural log, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; the message names it.

    Source: arXiv 2502.13189, section 2.2.
    """
    q, k, v = validation.cast_under_autocast(q, k, v)
    segments = _check_packed(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, "moba_chunk_size")
    validation.check_whole("moba_topk", moba_topk, 1)
    return _attend(q, k, v, segments, moba_topk, softmax_scale, deterministic, backend, return_lse, workspace_mib,
                   shared)


@overload
def moba_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, topk: int, *,
                   softmax_scale: float | None = ..., deterministic: bool = ..., backend: str = ...,
                   return_lse: Literal[False] = ..., workspace_mib: float | None = ..., shared: str = ...
                   ) -> Tensor: ...


@overload
def moba_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, topk: int, *,
                   softmax_scale: float | None = ..., deterministic: bool = ..., backend: str = ...,
                   return_lse: Literal[True], workspace_mib: float | None = ..., shared: str = ...
                   ) -> tuple[Tensor, Tensor]: ...


def moba_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, topk: int, *,
                   softmax_scale: float | None = None, deterministic: bool = False, backend: str = "auto",
                   return_lse: bool = False, workspace_mib: float | None = None, shared: str = "head"
                   ) -> Tensor | tuple[Tensor, Tensor]:
    """MoBA for query segments over packed keys: what :func:`moba_attn_varlen` is made of.

    Args:
        q: ``[T, H, D]``, the local queries.
        k: ``[S, HK, D]``, all keys of the sequences that the queries belong to.
        v: ``[S, HK, DV]``.
        segments: places the queries among the keys and holds the chunk size.
        topk: chunks a query attends to, its own included.
        softmax_scale, deterministic, backend, return_lse, workspace_mib, shared: as :func:`moba_attn_varlen`.

    Returns, Raises: as :func:`moba_attn_varlen`.
    """
    q, k, v = validation.cast_under_autocast(q, k, v)
    validation.check_qkv(q, k, v)
    validation.check_whole("topk", topk, 1)
    segments = validation.check_segments(segments, q.shape[0], k.shape[0], q.device)
    return _attend(q, k, v, segments, topk, softmax_scale, deterministic, backend, return_lse, workspace_mib, shared)


def sparse_attn_varlen(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                       chunk_size: int, *, softmax_scale: float | None = None, deterministic: bool = False,
                       backend: str = "auto", return_lse: bool = False, workspace_mib: float | None = None
                       ) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to each query's own chunk, causal, and to given earlier ones, over packed sequences.

    Of what :func:`select_chunks` selects this is :func:`moba_attn_varlen`, bit for bit, unless ``max_seqlen <= topk *
    chunk_size``, where that is causal attention. Gradients for q, k and v; none for the choice.

    Args:
        q, k, v, cu_seqlens, max_seqlen: as :func:`moba_attn_varlen`.
        selected: int32 ``[T, H, n]``, or ``[T, HK, n]`` for all query heads of a kv head; any strides. The chunk ``i``
            of sequence ``b`` has the id ``cu_seqlens[b] // chunk_size + b + i``, -1 stands for none. What is not an
            earlier chunk of the query's sequence, or is there already, is ignored, on the device, without a look from
            the host; with ``MOBA_CHECK_INPUTS=1`` it is an error.
        chunk_size: keys in a chunk, at least 1 (Triton: at least 16).
        softmax_scale, deterministic, backend, return_lse, workspace_mib: as :func:`moba_attn_varlen`.

    Returns, Raises: as :func:`moba_attn_varlen`.
    """
    q, k, v = validation.cast_under_autocast(q, k, v)
    segments = _check_packed(q, k, v, cu_seqlens, max_seqlen, chunk_size, "chunk_size")
    return sparse_attention(q, k, v, selected, segments, softmax_scale=softmax_scale, deterministic=deterministic,
                            backend=backend, return_lse=return_lse, workspace_mib=workspace_mib)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, selected: Tensor, segments: Segments, *,
                     softmax_scale: float | None = None, deterministic: bool = False, backend: str = "auto",
                     return_lse: bool = False, workspace_mib: float | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`sparse_attn_varlen`, for query segments over packed keys as of :func:`moba_attention`; ids are by
    ``segments.cu_seqlens_k``. Args, Returns, Raises: as these."""
    q, k, v = validation.cast_under_autocast(q, k, v)
    validation.check_qkv(q, k, v)
    segments = validation.check_segments(segments, q.shape[0], k.shape[0], q.device)
    validation.check_selected(selected, q, k, segments)
    chosen = selected if segments.max_seqlen_k > segments.chunk_size and selected.shape[2] else None  # nothing earlier
    return _attend(q, k, v, segments, 1 if chosen is None else selected.shape[2] + 1, softmax_scale, deterministic,
                   backend, return_lse, workspace_mib, "head", chosen)


def select_chunks(q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, chunk_size: int, topk: int, *,
                  shared: str = "head", backend: str = "auto") -> Tensor:
    """The earlier chunks that :func:`moba_attn_varlen` attends to, for :func:`sparse_attn_varlen`. No gradient.

    Args:
        q, k, cu_seqlens, max_seqlen, backend, shared: as :func:`moba_attn_varlen`.
        chunk_size: keys in a chunk, at least 1.
        topk: chunks a query attends to, its own included, at least 1.

    Returns:
        int32 ``[T, H, topk - 1]``, with ``shared="group"`` ``[T, HK, topk - 1]``: ids of chunks as of
        :func:`sparse_attn_varlen`, best first, of equals the later first, -1 where fewer exist.

    Raises:
        TypeError, ValueError: as :func:`moba_attn_varlen`.
    """
    q, k = validation.cast_under_autocast(q, k)
    segments = _check_packed(q, k, k, cu_seqlens, max_seqlen, chunk_size, "chunk_size")
    return select_for_segments(q, k, segments, topk, shared=shared, backend=backend)


def select_for_segments(q: Tensor, k: Tensor, segments: Segments, topk: int, *, shared: str = "head",
                        backend: str = "auto") -> Tensor:
    """As :func:`select_chunks`, for query segments over packed keys and :func:`sparse_attention`."""
    q, k = validation.cast_under_autocast(q, k)
    validation.check_qkv(q, k, k)
    segments = validation.check_segments(segments, q.shape[0], k.shape[0], q.device)
    q, k = q.detach(), k.detach()
    validation.check_whole("topk", topk, 1)
    check_backend(backend)
    run = _run_selection if is_unobserved(q, k) else _selection
    return run(q, k, *_flat(segments), topk, backend, validation.check_shared(shared))


def _check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, chunk_size: int,
                  name: str) -> Segments:
    validation.check_qkv(q, k, v)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"k must have q's {q.shape[0]} tokens, got {k.shape[0]}: for queries over other keys use "
                         "moba_megatron.ops.moba_attention with Segments")
    validation.check_whole(name, chunk_size, 1)
    cu_seqlens = validation.check_cu_seqlens(cu_seqlens, max_seqlen, q.shape[0], q.device)
    return Segments.from_cu_seqlens(cu_seqlens, max_seqlen, chunk_size)


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, topk: int, softmax_scale: float | None,
            deterministic: bool, backend: str, return_lse: bool, workspace_mib: float | None, shared: str,
            selected: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """What the public operators share: the checks of the options, and the custom operator."""
    scale = validation.check_scale(softmax_scale, q.shape[2])
    validation.check_flag("deterministic", deterministic)
    validation.check_flag("return_lse", return_lse)
    validation.check_workspace(workspace_mib)
    check_backend(backend)
    validation.check_shared(shared)
    if selected is None and segments.max_seqlen_k <= topk * segments.chunk_size:  # every earlier chunk is chosen
        *start, _, packed, exact = _flat(segments)
        segments, topk = Segments(*start, max(1, segments.max_seqlen_k), packed, exact), 1  # causal, one chunk
    options = (topk, scale, deterministic, backend, workspace_mib, shared)
    compiling, forward_mode = torch.compiler.is_compiling(), torch.autograd.forward_ad._current_level >= 0
    if is_unobserved(q, k, v, *() if selected is None else (selected,)):
        o, lse = _Attention.apply(q, k, v, segments, selected, options)
    elif compiling or not (forward_mode or torch._C._are_functorch_transforms_active()):
        if compiling and (forward_mode or _differentiates()):
            raise NotImplementedError("torch.compile of a torch.func transform with derivatives, or under "
                                      "forward_ad.dual_level, over MoBA attention is not implemented: compile what is "
                                      "inside of it, or use torch.autograd")
        o, lse, *_ = _forward(q, k, v, *_flat(segments), *options, selected)
    else:  # a custom operator drops tangents without a word, these Functions refuse them
        o, lse, *_ = _TransformedAttention.apply(q, k, v, *_flat(segments), *options, selected)
    return (o, lse) if return_lse else o


def _differentiates() -> bool:
    """Whether a transform of torch.func that takes derivatives is active."""
    kinds = torch._C._functorch.TransformType
    return any(layer.key() in (kinds.Grad, kinds.Jvp) for layer in torch._C._functorch.get_interpreter_stack() or ())


_differentiates._dynamo_marked_constant = True  # a compiler asks while it traces


def causal_attn_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
                       softmax_scale: float | None = None, deterministic: bool = False, backend: str = "auto",
                       return_lse: bool = False, workspace_mib: float | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Dense causal attention over packed sequences: MoBA with one chunk as long as the longest sequence.

    On CUDA ``backend="auto"`` takes flash attention where it fits (``ops/dense.py``), as it does wherever MoBA is
    causal attention; cuDNN wants lengths known to be equal: ``moba_attention`` with ``segments.uniform_segments``.
    ``triton`` always takes the project's own kernels.

    Args, Returns, Raises: as :func:`moba_attn_varlen`.
    """
    validation.check_whole("max_seqlen", max_seqlen, 0)
    return moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, max(1, max_seqlen), 1, softmax_scale=softmax_scale,
                            deterministic=deterministic, backend=backend, return_lse=return_lse,
                            workspace_mib=workspace_mib)


def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seq_ids: Tensor,
                   offsets: Tensor, max_seqlen_q: int, max_seqlen_k: int, chunk_size: int, packed: bool, exact: bool,
                   topk: int, softmax_scale: float, deterministic: bool, backend: str, workspace_mib: float | None,
                   shared: str, selected: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, lse, and the integers that backward wants: the selection, and its routing's indices and indptr."""
    segments = Segments(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, max_seqlen_q, max_seqlen_k, chunk_size, packed,
                        exact)
    pipeline = _pipeline(q.device, topk, softmax_scale, deterministic, backend, workspace_mib, shared)
    o, saved = pipeline.forward(q, k, v, segments, selected)
    lists = saved.choice.routing
    indices, indptr = (lists.indices, lists.indptr) if lists else (torch.empty(0, dtype=torch.int32, device=q.device)
                                                                   for _ in range(2))
    return o, saved.lse, saved.choice.selected, indices, indptr


def _flat(segments: Segments) -> tuple:
    """Segments as the custom operators take them; four tensors come first."""
    s = segments
    return (s.cu_seqlens_q, s.cu_seqlens_k, s.seq_ids, s.offsets, s.max_seqlen_q, s.max_seqlen_k, s.chunk_size,
            s.packed, s.exact)


@functools.lru_cache(maxsize=64)
def _pipeline(device: torch.device, topk: int, softmax_scale: float, deterministic: bool, backend: str,
              workspace_mib: float | None, shared: str) -> Pipeline:
    return Pipeline(get_stages(backend, device, deterministic), topk, softmax_scale, deterministic, backend == "auto",
                    workspace_mib, untrusted=True, shared=shared)


_forward = torch.library.custom_op("moba_megatron::attention_fwd", _attention_fwd, mutates_args=())


@_forward.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, max_seqlen_q, max_seqlen_k, chunk_size, packed, exact,
      topk, softmax_scale, deterministic, backend, workspace_mib, shared, selected):
    earlier = min(topk - 1, max(0, (max_seqlen_k - 1) // chunk_size)) if selected is None else selected.shape[2]
    lists = k.shape[1] if shared == "group" and earlier else q.shape[1]
    lists = lists if selected is None else selected.shape[1]
    choices = q.shape[0] * lists * earlier
    csr_rows = k.shape[1] * (k.shape[0] // chunk_size + cu_seqlens_k.shape[0] - 1) + 1 if earlier else 0
    wide, lse_dtype = index_dtype(q.shape[0] * q.shape[1] * earlier), torch.promote_types(q.dtype, torch.float32)
    return (q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[:2], dtype=lse_dtype),
            q.new_empty(q.shape[0], lists, earlier, dtype=torch.int32), q.new_empty(choices, dtype=wide),
            q.new_empty(csr_rows, dtype=wide))


def _attention_bwd(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
                   selected: Tensor, indices: Tensor, indptr: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                   seq_ids: Tensor, offsets: Tensor, max_seqlen_q: int, max_seqlen_k: int, chunk_size: int,
                   packed: bool, exact: bool, topk: int, softmax_scale: float, deterministic: bool, backend: str,
                   workspace_mib: float | None, shared: str) -> tuple[Tensor, Tensor, Tensor]:
    segments = Segments(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, max_seqlen_q, max_seqlen_k, chunk_size, packed,
                        exact)
    routing = Routing(indices, indptr, q.shape[1] // selected.shape[1]) if selected.shape[2] else None
    pipeline = _pipeline(q.device, topk, softmax_scale, deterministic, backend, workspace_mib, shared)
    return pipeline.backward(do, dlse, q, k, v, Saved(o, lse, Choice(selected, routing)), segments)


_backward = torch.library.custom_op("moba_megatron::attention_bwd", _attention_bwd, mutates_args=())


@_backward.register_fake
def _(do, dlse, q, k, v, o, lse, selected, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _run_selection(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seq_ids: Tensor, offsets: Tensor,
                   max_seqlen_q: int, max_seqlen_k: int, chunk_size: int, packed: bool, exact: bool, topk: int,
                   backend: str, shared: str) -> Tensor:
    segments = Segments(cu_seqlens_q, cu_seqlens_k, seq_ids, offsets, max_seqlen_q, max_seqlen_k, chunk_size, packed,
                        exact)
    selected = _pipeline(q.device, topk, 1.0, False, backend, None, shared).select(q, k, segments)
    beyond = topk - 1 - selected.shape[2]
    return torch.nn.functional.pad(selected, (0, beyond), value=-1) if beyond else selected


_selection = torch.library.custom_op("moba_megatron::select_chunks", _run_selection, mutates_args=())


@_selection.register_fake
def _(q, k, *arguments):
    return q.new_empty(q.shape[0], (k if arguments[-1] == "group" else q).shape[1], arguments[9] - 1, dtype=torch.int32)


@_selection.register_vmap
def _(info, in_dims, *args):
    (selected,), (dim,) = _looped(lambda *x: (_selection(*x),), info, in_dims, args)
    return selected, dim


def _looped(call, info, in_dims, args) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What ``vmap`` makes of a function that returns several tensors: one call after the other."""
    def at(i):
        return (x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims))

    if info.batch_size == 0:  # the shapes come from a call on zeros
        one = (x if dim is None else x.new_zeros(x.movedim(dim, 0).shape[1:]) for x, dim in zip(args, in_dims))
        results = tuple(x.new_empty(0, *x.shape) for x in call(*one))
    else:
        results = tuple(map(torch.stack, zip(*(call(*at(i)) for i in range(info.batch_size)))))
    return results, (0,) * len(results)


def _setup_context(ctx, inputs, output):
    q, k, v, *arguments = inputs
    ctx.save_for_backward(q, k, v, *output, *arguments[:4])
    ctx.constants = arguments[4:15]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _unobserved_bwd(do, dlse, q, *arguments):
    """The operator, or where nothing looks on its work alone."""
    unobserved = is_unobserved(do, q) and (dlse is None or is_unobserved(dlse))
    return (_attention_bwd if unobserved else _backward)(do, dlse, q, *arguments)


def _gradients(backward, ctx, do, dlse):
    q, k, v, o, lse, *integers = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    return *backward(do, dlse, q, k, v, o, lse, *integers, *ctx.constants), *(None,) * 16


_forward.register_autograd(lambda ctx, do, dlse, *_: _gradients(_backward, ctx, do, dlse), setup_context=_setup_context)


class _Attention(torch.autograd.Function):
    """The custom operators without their dispatch."""

    @staticmethod
    def forward(ctx, q, k, v, segments, selected, options):
        inputs = q, k, v, *_flat(segments), *options, selected
        output = _attention_fwd(*inputs)
        _setup_context(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx, do, dlse):
        return _gradients(_AttentionBackward.apply if torch.is_grad_enabled() else _unobserved_bwd, ctx, do, dlse)[:6]

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("forward-mode differentiation (torch.func.jvp, jacfwd, hessian, forward_ad) of MoBA "
                                  "attention is not implemented: use torch.func.vjp, jacrev or torch.autograd")


class _Transformed(torch.autograd.Function):
    """What the Functions that torch.func may transform share."""

    @classmethod
    def vmap(cls, info, in_dims, *args):
        return _looped(cls.apply, info, in_dims, args)

    jvp = staticmethod(_Attention.jvp)


class _TransformedAttention(_Transformed):
    @staticmethod
    def forward(q, k, v, *arguments):
        return (_attention_fwd if is_unobserved(q, k, v) else _forward)(q, k, v, *arguments)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx, do, dlse, *_):
        return _gradients(_AttentionBackward.apply, ctx, do, dlse)


class _AttentionBackward(_Transformed):
    @classmethod
    def vmap(cls, info, in_dims, *args):
        if info.batch_size:
            return super().vmap(info, in_dims, *args)
        shapes = (x.shape if dim is None else x.movedim(dim, 0).shape[1:] for x, dim in zip(args[2:5], in_dims[2:5]))
        return tuple(args[2].new_empty(0, *shape) for shape in shapes), (0, 0, 0)

    forward = staticmethod(_unobserved_bwd)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("second derivatives of MoBA attention are not implemented")
