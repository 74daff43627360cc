"""Full causal attention by cuDNN, the dense yardstick, timed in the same process as MoBA."""
from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .cases import BACKWARD_FLOPS, Case

CUDNN_FLOPS = 540e12
"""What cuDNN reached on the H200 at 128K tokens; used to guess how long a run would take."""


def expected_ms(case: Case) -> float:
    """A guess, from the number of operations, of one forward and backward."""
    return 1e3 * 2 * case.head_dim * case.heads * case.tokens ** 2 * (1 + BACKWARD_FLOPS) / CUDNN_FLOPS


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Callable[[], object]:
    """A call that computes full causal attention of one sequence ``[T, H, D]`` and its gradients.

    Where this cuDNN refuses grouped heads, keys and values are repeated beforehand, outside of what is timed.
    """
    q, k, v, do = (x.detach()[None].transpose(1, 2) for x in (q, k, v, do))
    group = q.shape[1] // k.shape[1]

    def runner(k: Tensor, v: Tensor, grouped: bool) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def run():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                o = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=grouped)
            return torch.autograd.grad(o, leaves, do)

        return run

    run = runner(k, v, grouped=group > 1)
    if group > 1:
        try:
            run()
        except RuntimeError:
            run = runner(k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), grouped=False)
    return run
