"""A Llama of Transformers as a checkpoint of examples/pretrain_gpt.py, and back.

    python examples/huggingface_to_megatron/convert.py --huggingface MODEL --save CHECKPOINTS
    python examples/huggingface_to_megatron/convert.py --huggingface MODEL --load CHECKPOINTS --save FOLDER

MODEL is a folder of Transformers; on the way back its config.json and its tokenizer are taken. The checkpoint is
distributed: any tensor, pipeline or context parallel size loads it. `--bridge` converts by Megatron-Bridge. With
`--gguf FILE` MODEL is first made of a GGUF file (package gguf).
"""
import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import megatron_on_cpu
import pretraining  # noqa: F401  (first: it quietens Megatron-Core's import)
import torch

megatron_on_cpu.enable()  # before Megatron-Core is imported; does nothing where there is a GPU

import transformers  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from pretraining import checkpointing  # noqa: E402
from pretraining.arguments import parse_args  # noqa: E402
from pretraining.model import build_config, build_gpt, describe_model  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from weights import model_flags, to_huggingface, to_megatron  # noqa: E402

from moba_megatron.inspect.checkpoint import single_process  # noqa: E402

NO_TRAINING = ["--train-iters", "1", "--lr", "0", "--data-path", "none", "--loss-position-bins", "1"]
DENSE = ["--seq-length", "1024", "--attention", "full"]  # conversion sees no attention


def settings(huggingface: Path, *flags: str) -> tuple[AutoConfig, argparse.Namespace]:
    """config.json, and what examples/pretrain_gpt.py makes of its model's flags and these; nothing is trained."""
    config = AutoConfig.from_pretrained(huggingface)
    args = parse_args([*model_flags(config), *NO_TRAINING, *flags])
    args.model_description = describe_model(args, SimpleNamespace(vocab_size=config.vocab_size,
                                                                  name="HuggingFaceTokenizer"))
    return config, args


def convert_to_megatron(huggingface: Path, save: Path, bridge: bool) -> None:
    """Writes the weights as the checkpoint of step 0, and the model's flags, a line each."""
    config, args = settings(huggingface, *DENSE, "--save", str(save))
    if bridge:
        from bridge import load

        model = load(huggingface, args.moba_config)
    else:
        model = build_gpt(args, build_config(args))
        theirs = AutoModelForCausalLM.from_pretrained(huggingface, dtype=torch.float32).state_dict()
        fill(model, to_megatron(theirs, config))
    checkpointing.save_checkpoint(args, 0, model)
    (save / "flags.txt").write_text("\n".join(model_flags(config)) + "\n")


def convert_to_huggingface(load: Path, huggingface: Path, save: Path, bridge: bool) -> None:
    """Writes a folder that AutoModelForCausalLM reads, in fp32, with the tokenizer of ``huggingface``."""
    config, args = settings(huggingface, *DENSE, "--pretrained-checkpoint", str(load))
    model = build_gpt(args, build_config(args))
    checkpointing.load_weights(args, model)
    if bridge:
        from bridge import export

        weights = export(model, huggingface)
    else:
        weights = to_huggingface(model.state_dict(), config)
    found = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(found, weights)
    found.save_pretrained(save)
    AutoTokenizer.from_pretrained(huggingface).save_pretrained(save)


def unpack_gguf(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file, in fp32, and its tokenizer as a folder of Transformers."""
    where = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    if hasattr(transformers, "GgufConfig"):
        where["quantization_config"] = transformers.GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fill(model: GPTModel | torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Loads the weights; every parameter must be among them, and nothing else, but for one that is another's."""
    unfilled = model.load_state_dict(weights, strict=False)
    own = dict(model.named_parameters())  # names a shared parameter once
    missing = [name for name in unfilled.missing_keys if name in own]
    assert not missing and not unfilled.unexpected_keys, (missing, unfilled.unexpected_keys)


def main(argv=None) -> int:
    """0, or 2 with a message on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--huggingface", type=Path, required=True, help="a folder of Transformers")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="write it to --huggingface first")
    parser.add_argument("--load", type=Path, help="checkpoints to convert back; unset: convert to Megatron")
    parser.add_argument("--save", type=Path, required=True, help="where the result goes")
    parser.add_argument("--bridge", action="store_true", help="convert by Megatron-Bridge, see README.md")
    a = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if a.gguf is not None:
            unpack_gguf(a.gguf, a.huggingface)
        if not (a.huggingface / "config.json").is_file():
            raise ValueError(f"--huggingface must be a folder with a config.json, got {a.huggingface}")
        with single_process(device):
            tensor_parallel.model_parallel_cuda_manual_seed(0)
            if a.load is None:
                convert_to_megatron(a.huggingface, a.save, a.bridge)
            else:
                convert_to_huggingface(a.load, a.huggingface, a.save, a.bridge)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {a.save}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
