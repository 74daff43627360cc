"""Context parallelism with the Triton stages: two ranks on gloo, every way of exchange, heads in two groups."""
import itertools

import torch
import torch.distributed as dist
from ranks import run_ranks

from moba_megatron.context_parallel import COMM_TYPES, Sequences, context_parallel_attention

LENGTHS = {"one sequence": (64,), "packed": (20, 40, 4)}
CASES = [*((comm_type, "packed") for comm_type in COMM_TYPES if comm_type != "selective"),  # which refuses them
         ("all_gather", "one sequence"), ("selective", "one sequence"),
         *((comm_type, "packed", lists) for comm_type, lists in (("all_gather", 2), ("a2a", 2), ("a2a", 4)))]


def both_backends(rank, size):
    """o, dq, dk and dv of this rank by case, of the kernels and of the reference."""
    alone = [dist.new_group([r]) for r in range(size)][rank]
    groups = {"a2a+all_gather": (dist.group.WORLD, alone)}
    return {case: [step(rank, size, groups.get(case[0], dist.group.WORLD), *case, backend)
                   for backend in ("triton", "reference")] for case in CASES}


def step(rank, size, group, comm_type, lengths, *lists_and_backend):
    """With a number of lists, given chunks: whatever numbers, for as many heads or kv heads."""
    *lists, backend = lists_and_backend
    generator, lengths = torch.Generator().manual_seed(rank), LENGTHS[lengths]
    rows, selected = sum(lengths) // size, None
    kv_heads = 2 if lists else 4
    leaves = [torch.randn(rows, heads, 16, generator=generator).requires_grad_() for heads in (4, kv_heads, kv_heads)]
    if lists:
        selected = torch.randint(-2, 8, (rows, *lists, 3), generator=generator, dtype=torch.int32)
    if len(lengths) == 1:
        sequences = Sequences.uniform(*lengths, 1, torch.device("cpu"))
    else:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
        sequences = Sequences.packed(cu_seqlens, max(lengths), sum(lengths))
    o = context_parallel_attention(*leaves, sequences, 16, 2, group, comm_type=comm_type, backend=backend,
                                   head_groups=2, selected=selected)
    return o.detach(), *torch.autograd.grad(o, leaves, torch.randn(o.shape, generator=generator))


def test_against_the_reference(tmp_path):
    for results in run_ranks(both_backends, 2, tmp_path):
        for case, (got, expected) in results.items():
            for x, wanted in zip(got, expected, strict=True):
                torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5, msg=lambda text: f"{case}: {text}")
