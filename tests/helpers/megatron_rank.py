"""A fixture for tests of one GPU: Megatron's process groups of a single rank, while a module's tests run."""
import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
