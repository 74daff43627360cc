"""What a run will cost, before it is started: memory, time and communication of every way to split it over GPUs.

``python -m moba_megatron.plan --seq 1M --model 8b --gpus 64 --card h100`` prints the table. Inside, in the order in
which figures flow (bytes, seconds, operations throughout):

``hardware`` (what a card can do, and who says so), ``models`` (shapes) -> ``attention_cost`` and ``coefficients`` (time
of MoBA by stage, fitted to stored measurements) -> ``links`` (time of a collective), ``exchange`` (bytes that context
parallelism moves) -> ``layout``, ``memory``, ``step`` (one layout's step) -> ``search`` (all layouts) -> ``command``
(torchrun), ``picture``. The fit, its comparison with measurements and a simulation are in ``benchmarks/planner``.
"""
from .hardware import CARDS, Card, find_card
from .models import MODELS, Model, Run, parse_size
from .search import plan
from .step import Prediction, predict

__all__ = ["CARDS", "MODELS", "Card", "Model", "Prediction", "Run", "find_card", "parse_size", "plan", "predict"]
