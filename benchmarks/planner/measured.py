"""Figures that were measured on H200s and are not in the benchmark's JSON: calibration of links, and checks."""
from __future__ import annotations

K = 1024
MIB = 1 << 20

COLLECTIVES = (
    ("all_gather", 2, 256 * MIB, 1.05e-3),
    ("all_gather", 4, 256 * MIB, 2.5e-3),
    ("reduce_scatter", 2, 256 * MIB, 1.09e-3),
    ("reduce_scatter", 4, 256 * MIB, 2.5e-3),
    ("all_to_all", 2, 256 * MIB, 0.48e-3),
    ("all_to_all", 4, 256 * MIB, 0.7e-3),
)
"""NCCL on 2 and 4 H200s with NVLink: kind, ranks, bytes that each rank contributes, seconds."""

END_TO_END = (
    (1, 32 * K, None, 0.493, False),
    (1, 128 * K, None, 6.047, False),
    (2, 128 * K, "p2p", 3.102, True),
    (2, 128 * K, "a2a", 3.137, False),
    (4, 32 * K, "p2p", 0.199, False),
    (4, 128 * K, "p2p", 1.568, False),
    (4, 256 * K, "p2p", 5.853, False),
    (4, 32 * K, "all_gather", 0.165, False),
    (4, 128 * K, "all_gather", 1.753, True),
    (4, 256 * K, "all_gather", 6.564, False),
)
"""Full attention of Transformer Engine in Megatron-Core, the model 350m, one sequence, forward and backward without an
optimizer step, no recompute: GPUs (all context parallel), sequence, comm type, seconds a step, whether the planner's
constants were taken from this row (then it checks nothing)."""

GPT_FULL = ((32 * K, 0.4509), (128 * K, 5.9246))
"""The same by `benchmarks gpt` on one H200 (2026-11-22, fused SwiGLU, residuals and rotation): sequence,
seconds a step."""

STAGES = (
    (128 * K, 128, 8, 16, 16, "means", 0.165),
    (128 * K, 512, 8, 16, 16, "means", 0.22),
    (128 * K, 2048, 3, 16, 16, "means", 0.21),
    (128 * K, 128, 8, 16, 16, "gate", 2.13),
    (128 * K, 512, 8, 16, 16, "gate", 1.08),
    (512 * K, 128, 8, 16, 16, "gate", 22.3),
    (128 * K, 2048, 3, 16, 16, "gate", 0.42),
    (32 * K, 128, 8, 16, 16, "gate", 0.28),
    (128 * K, 128, 8, 16, 16, "route", 0.74),
    (512 * K, 128, 8, 16, 16, "route", 4.7),
    (128 * K, 128, 8, 16, 16, "sparse", 3.74),
    (512 * K, 128, 8, 16, 16, "sparse", 16.3),
    (128 * K, 128, 8, 16, 16, "own", 1.85),
    (128 * K, 512, 8, 16, 16, "own", 2.27),
    (128 * K, 2048, 3, 16, 16, "own", 3.33),
)
"""Stages timed alone while they were written (docs/kernel-notes.md, H200, heads of 128, bf16): sequence, chunk, topk,
heads, kv heads, stage, ms; without those that other kernels have replaced. Used until stored rows have
``stages_ms``."""
