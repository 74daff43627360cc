"""What a run will cost, before it is started: memory, time and communication of every way to split it over GPUs.

``python -m moba_megatron.plan --seq 1M --model 8b --gpus 64 --card h100`` prints the table. Inside figures (bytes,
seconds, operations) flow from ``hardware`` and ``models`` through ``attention_cost``, ``collectives``, ``layout`` and
``memory`` to ``step`` and ``command``. The fit, its comparison with measurements and a simulation are in
``benchmarks/planner``.
"""
from .hardware import CARDS, Card, find_card
from .models import MODELS, Model, Run, parse_size
from .step import Prediction, plan, predict

__all__ = ["CARDS", "MODELS", "Card", "Model", "Prediction", "Run", "find_card", "parse_size", "plan", "predict"]
