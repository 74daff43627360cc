"""How close is close enough: the error of an eager computation in the same precision sets the limit."""
import oracle
import torch

from moba_megatron import kernels, moba_attn_varlen
from moba_megatron.segments import Segments


def dense_mask(selected, segments, total_q, total_k):
    """The mask ``[H, T, S]`` that a selection amounts to: selected chunks and the own one, same sequence, causal."""
    size = segments.chunk_size
    q_sequence, q_position = segments.query_positions(total_q)
    k_sequence, k_position = segments.key_positions(total_k)
    k_chunk = segments.first_chunk()[k_sequence] + k_position // size
    q_chunk = segments.first_chunk()[q_sequence] + q_position // size
    chosen = torch.zeros(total_q, selected.shape[1], segments.num_chunks(total_k) + 1, dtype=torch.bool,
                         device=selected.device)
    chosen.scatter_(2, torch.where(selected < 0, chosen.shape[2] - 1, selected).long(), True)
    chosen[:, :, -1] = False
    chosen.scatter_(2, q_chunk[:, None, None].expand(-1, selected.shape[1], 1), True)
    causal = (q_sequence[:, None] == k_sequence[None]) & (k_position[None] <= q_position[:, None])
    return (chosen[:, :, k_chunk] & causal[:, None]).movedim(1, 0)


def attend(q, k, v, do, dlse, mask, scale, dtype):
    """o, lse, dq, dk, dv of dense masked attention computed in ``dtype``, as fp64."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    o, lse = oracle.attend(q, k, v, mask, scale)
    loss = (o * do.to(dtype)).sum()
    if dlse is not None:
        loss = loss + (lse * dlse.to(dtype)).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (x.detach().double() for x in (o, lse, *grads))))


def relative_error(x, exact):
    """``|x - exact| / |exact|``; of two zeros, 0."""
    difference, size = (x.double() - exact).norm(), exact.norm()
    return (difference / size if size > 0 else difference).item()


def assert_as_good_as_eager(got, exact, eager, dtype):
    """Every result within twice the eager computation's error against fp64, plus one rounding to its dtype.

    Args:
        got, exact, eager: name -> tensor; eager was computed in ``dtype``, exact in fp64.
        dtype: of the inputs.
    """
    errors = {}
    for name, x in got.items():
        assert not x.isnan().any(), f"{name} has NaN"
        error = relative_error(x, exact[name])
        limit = 2 * relative_error(eager[name], exact[name]) + torch.finfo(dtype).eps
        errors[name] = f"{error:.2e} (limit {limit:.2e})"
        assert error <= limit, f"{name} is wrong: {errors}"
    return errors


def selection(q, k, cu_seqlens, max_seqlen, chunk, topk):
    """What the kernels' gate chooses, and the segments."""
    segments = Segments.from_cu_seqlens(cu_seqlens, max_seqlen, chunk)
    return kernels.gate(q, kernels.chunk_means(k, segments), segments, topk), segments


def check_operator(q, k, v, do, dlse, arguments, **options):
    """o, lse, dq, dk, dv of the Triton operator against fp64 attention over what its gate chose."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, lse = moba_attn_varlen(*leaves, *arguments, backend="triton", return_lse=True, **options)
    grads = torch.autograd.grad((o, lse), leaves, (do, dlse))
    selected, segments = selection(q.detach(), k.detach(), *arguments)
    mask = dense_mask(selected, segments, q.shape[0], k.shape[0])
    exact, eager = (attend(q, k, v, do, dlse, mask, q.shape[2] ** -0.5, dtype) for dtype in (torch.float64, q.dtype))
    assert_as_good_as_eager(dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *grads))), exact, eager, q.dtype)
