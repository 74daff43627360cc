"""The same conversion by Megatron-Bridge 0.6, which knows many models; here its Llama.

Where Transformer Engine is not installed, `import megatron.bridge` fails (its LoRA layers need it, and it imports every
model that it knows). Then only what Llama needs is imported, with nothing in place of the LoRA layers.
"""
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from megatron.core.models.gpt import GPTModel

from moba_megatron import MoBAConfig, get_moba_layer_local_spec


def auto_bridge(huggingface: Path):
    """Bridge's AutoBridge for a folder of Transformers."""
    if importlib.util.find_spec("transformer_engine") is None and "megatron.bridge" not in sys.modules:
        _import_llama_alone()
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    return AutoBridge.from_hf_pretrained(str(huggingface))


def load(huggingface: Path, moba: MoBAConfig) -> GPTModel:
    """Megatron-Core's model with MoBA, as Bridge makes it of the folder, in fp32 and for one process."""
    bridge = auto_bridge(huggingface)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.transformer_layer_spec = get_moba_layer_local_spec(moba, normalization="RMSNorm")  # all that MoBA needs
    provider.params_dtype, provider.bf16, provider.fp16 = torch.float32, False, False
    if not torch.cuda.is_available():
        provider.use_cpu_initialization = True
        for fusion in ("gradient_accumulation_fusion", "bias_activation_fusion", "apply_rope_fusion",
                       "masked_softmax_fusion", "bias_dropout_fusion", "persist_layer_norm"):
            setattr(provider, fusion, False)
    provider.finalize()
    models = provider.provide_distributed_model(wrap_with_ddp=False, bf16=False, fp16=False,
                                                use_cpu_initialization=provider.use_cpu_initialization)
    bridge.load_hf_weights(models)
    return models[0]


def export(model: GPTModel, huggingface: Path) -> dict[str, torch.Tensor]:
    """The weights in Transformers' names. (Bridge's own `save_hf_pretrained` needs NVIDIA's ModelOpt.)"""
    return dict(auto_bridge(huggingface).export_hf_weights([model], cpu=True, show_progress=False))


def _import_llama_alone() -> None:
    place = Path(importlib.util.find_spec("megatron.bridge").submodule_search_locations[0])
    for name, folder in (("megatron.bridge", place), ("megatron.bridge.models", place / "models")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder)]
    lora = sys.modules["megatron.bridge.peft.lora_layers"] = ModuleType("megatron.bridge.peft.lora_layers")
    for name in ("LinearAdapter", "LoRALinear", "LoRATopKRouter", "TEFusedLoRALinear", "TELinearAdapter"):
        setattr(lora, name, type(name, (), {}))
    from megatron.bridge.models.llama import llama_bridge  # noqa: F401  (registers it)
