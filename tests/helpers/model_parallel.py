"""Megatron's process groups in the processes of a test that sets up one layout after another."""
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel


def initialize(*sizes, **options):
    """Those of ``parallel_state.initialize_model_parallel``, in place of all that were there before, and their seeds.

    Each group of gloo's keeps a thread that wakes up a hundred times a second, and a layout has dozens of them.
    """
    for group in tuple(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(*sizes, **options)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
