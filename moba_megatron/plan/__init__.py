"""What a run will cost, before it is started: memory, time and communication of every way to split it over GPUs.

``python -m moba_megatron.plan --seq 1M --model 8b --gpus 64 --card h100`` prints the table. Inside, in the order in
which figures flow (bytes, seconds, operations throughout):

``hardware`` (what a card can do, and who says so), ``models`` (shapes) -> ``attention_cost`` (time of MoBA by stage,
with coefficients fitted to stored measurements) -> ``collectives`` (their time, and what context parallelism moves) ->
``layout``, ``memory``, ``step`` (one layout's step; all layouts) -> ``command`` (torchrun). The fit, its comparison
with measurements and a simulation are in ``benchmarks/planner``.
"""
from .hardware import CARDS, Card, find_card
from .models import MODELS, Model, Run, parse_size
from .step import Prediction, plan, predict

__all__ = ["CARDS", "MODELS", "Card", "Model", "Prediction", "Run", "find_card", "parse_size", "plan", "predict"]
