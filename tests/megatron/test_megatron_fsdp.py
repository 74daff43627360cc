"""Megatron's FSDPs and distributed optimizer with MoBA and its key convolution, eager and compiled: DDP's losses, its
weight decay. gloo.
"""
import pytest
import torch
from fsdp_training import COMPILED, FILTERS, FSDPS, WRAPPERS, train
from ranks import run_ranks
from torch.overrides import TorchFunctionMode

pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("stands for GPUs with the CPU, which needs a machine without one", allow_module_level=True)


class NoCudaDevice(TorchFunctionMode):
    """Without a GPU the current device's name is "cpu", and Megatron-FSDP puts "cuda:" before it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], str) and args[0] == "cuda:cpu":
            return torch.device("cpu")
        return func(*args, **(kwargs or {}))


def everything(rank, size):
    with NoCudaDevice():
        return {wrapper: train(wrapper, rank) for wrapper in WRAPPERS}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("wrapper", WRAPPERS[1:])
def test_losses_equal_ddp(results, wrapper):
    for result in results:
        losses, parts, _, graphs = result[wrapper]
        expected, whole, *_ = result["ddp"]
        assert losses == pytest.approx(expected, rel=1e-5)  # fp32; gradients are added up in another order
        assert expected[-1] < 0.95 * expected[0], "it learns"
        assert wrapper not in FSDPS + COMPILED or sum(parts.values()) < 0.6 * sum(whole.values())
        assert (graphs >= 4) == (wrapper in COMPILED), "attention and MLP of two layers"


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weight_decay_spares_the_key_convolution(results, wrapper):
    filters = sum(n for result in results for name, n in result[wrapper][1].items() if "key_convolution" in name)
    decayed = set.union(*(result[wrapper][2] for result in results))
    assert filters >= FILTERS and any("linear_qkv.weight" in name for name in decayed)
    assert not [name for name in decayed if "key_convolution" in name]
