"""MoBA for DeepSpeed: attention whose sequence is spread over ranks, by Ulysses or by the package's own schedule.

ZeRO of every stage works unchanged: MoBA has no parameters. ZeRO should shard over *all* ranks, those of a sequence
included, so ``deepspeed.initialize`` gets neither ``mpu`` nor ``mesh_param``. With ``mpu`` stages 0 to 2 add gradients
over the ranks of a sequence and stage 3 averages them, so no loss suits both; with ``mesh_param`` stages 0 to 2 do not
combine them at all (DeepSpeed 0.19.8).
"""
from .attention import METHODS, MoBAAttention, SequenceParallel, check_config, set_iteration
from .engine import init_distributed, load_checkpoint, mean_over_ranks

__all__ = ["METHODS", "MoBAAttention", "SequenceParallel", "check_config", "init_distributed", "load_checkpoint",
           "mean_over_ranks", "set_iteration"]
