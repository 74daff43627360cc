"""Layers of multi-token prediction: here they follow the model's, by whatever number a release of Megatron builds them.

Up to 0.15 each gets the number of its pipeline stage's first layer, in 0.16 those behind the model's last, from 0.17 on
1, 2, ... again. ``--moba-full-attention-layers last:N`` means the last layers of the model and those behind them.
"""
from __future__ import annotations

import functools
import inspect

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_building: list[int] = []


@functools.lru_cache(maxsize=1)
def watch_multi_token_prediction() -> None:
    """Has Megatron's layers of multi-token prediction say when they are built; to be called before any is."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    original = MultiTokenPredictionLayer.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(self, *args, **kwargs):
        _building.append(signature.bind(self, *args, **kwargs).arguments.get("layer_number", 1))
        try:
            original(self, *args, **kwargs)
        finally:
            _building.pop()

    MultiTokenPredictionLayer.__init__ = build


def global_layer_number(config: TransformerConfig, layer_number: int) -> int:
    """Megatron's number for an attention layer that is being built, or the one behind the model's layers."""
    return config.num_layers + _building[-1] if _building else layer_number


def within_multi_token_prediction(model: list[torch.nn.Module]) -> set[int]:
    """``id()`` of every module within a layer of multi-token prediction."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    return {id(module) for part in model for layer in part.modules() if isinstance(layer, MultiTokenPredictionLayer)
            for module in layer.modules()}
