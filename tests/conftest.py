"""What every test runs under: one thread, fixed seeds, poisoned memory, the longest files first, no GPU tests without a
GPU."""
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("moba", deadline=None, derandomize=True, print_blob=True,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("moba")
torch.set_num_threads(1)  # two threads on the small shapes here only wait for each other


LONGEST = ("test_compile", "test_faults", "test_several_hosts", "test_examples", "test_deepspeed",
           "test_megatron_parallel", "test_sm90_barriers", "test_train_50m", "test_megatron_lm", "test_megatron_fsdp",
           "test_context_parallel", "test_checkpoints", "test_bench_distributed", "test_api", "test_wheel")
"""By CPU time, measured. Workers take whole files: one that starts a long one last leaves the others idle."""


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin hold NaN (integers: the largest value), so that a read before a write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def compiler():
    """torch.compile compiles: Megatron-Core on the CPU (``megatron_on_cpu``) turns it off for the whole process."""
    _compile_again()
    yield
    _compile_again()


def _compile_again():
    if "torch._dynamo" in sys.modules:  # importing it takes seconds, and where it is not, nothing was turned off
        torch.compiler.set_stance("default")
