"""Megatron's FSDPs around attention and MLP, eager and compiled by inductor, on two GPUs: DDP's losses."""
import pytest
import torch
from fsdp_training import COMPILED, FSDPS, train
from ranks import run_ranks

pytest.importorskip("megatron.core")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Of losses, relative: gradients are added up in another order, and inductor keeps fp32 between fused operations."""


def everything(rank, size):
    found = {(dtype, wrapper): train(wrapper, rank, dtype, "inductor", head_dim=64, lr=2e-3)
             for dtype in TOLERANCE for wrapper in ("ddp", *FSDPS, *COMPILED)}
    for (dtype, wrapper), (losses, *_) in found.items():
        print(f"rank {rank} {dtype} {wrapper}: {' '.join(f'{x:.6f}' for x in losses)}", flush=True)
    return found


def test_losses_equal_ddp(tmp_path):
    for result in run_ranks(everything, 2, tmp_path, backend="nccl"):
        for (dtype, wrapper), (losses, parts, _, graphs) in result.items():
            expected, whole, *_ = result[dtype, "ddp"]
            assert losses == pytest.approx(expected, rel=TOLERANCE[dtype]), wrapper
            assert expected[-1] < 0.95 * expected[0], "it learns"
            assert wrapper == "ddp" or sum(parts.values()) < 0.6 * sum(whole.values())
            assert (graphs >= 4) == (wrapper in COMPILED), "attention and MLP of two layers"
