"""What a run will cost, before it is started: memory, time and communication of every way to split it over GPUs.

``python -m moba_megatron.plan --seq 1M --model 8b --gpus 64 --card h100`` prints the table. Inside, in the order in
which figures flow (bytes, seconds, operations throughout):

``cards`` (what a card can do, and who says so), ``models`` (shapes), ``measured`` (figures that are not in the
benchmark's JSON) -> ``attention_cost`` and ``calibration`` (time of MoBA by stage, fitted to this repository's JSON) ->
``links`` (time of a collective), ``exchange`` (bytes that context parallelism moves) -> ``layout``, ``memory``,
``step`` (one layout's step) -> ``search`` (all layouts) -> ``command`` (torchrun), ``pictures``, ``check``. Beside it
``routing``, ``simulate``, ``scenarios`` (what context parallelism moves, to 1024 ranks), ``measure`` (on real ranks).
"""
from .cards import CARDS, Card, find_card
from .models import MODELS, Model, Run, parse_size
from .search import plan
from .step import Prediction, predict

__all__ = ["CARDS", "MODELS", "Card", "Model", "Prediction", "Run", "find_card", "parse_size", "plan", "predict"]
