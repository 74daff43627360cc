"""examples/llama.py: a few steps of training and its generation, and a model from a path."""
import huggingface_models as hf
import llama
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.mark.parametrize("decode", ["dense", "moba"])
def test_trains_and_generates(decode, capsys):
    llama.main(["--device", "cpu", "--steps", "3", "--seconds", "600", "--seq-length", "150", "--batch-tokens", "300",
                "--moba-chunk-size", "16", "--decode", decode, "--prompt", "import os\n", "--max-new-tokens", "4"])
    lines = capsys.readouterr().out.splitlines()
    before, after = (float(line.split()[1]) for line in lines if line.startswith("validation:"))
    assert after < before and any(line.startswith("step 3: ") for line in lines)
    assert "import os" in lines


def test_packed_batch():
    """Sequences fill the row exactly, and no label asks for a first byte."""
    batch = llama.packed_batch([b"a" * 70, b"b" * 300], 256, 100, "cpu", llama.random.Random(0))
    bounds = batch["cu_seq_lens_q"].tolist()
    assert batch["input_ids"].shape == (1, 256) and bounds[0] == 0 and bounds[-1] == 256
    assert max(b - a for a, b in zip(bounds, bounds[1:])) == batch["max_length_q"] <= 100
    assert (batch["labels"][0] == -100).nonzero()[:, 0].tolist() == bounds[:-1]


def test_model_from_a_path(tmp_path, capsys):
    hf.model(dtype=torch.float32).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    llama.main(["--device", "cpu", "--model", str(tmp_path), "--prompt", "w5 w6 w7", "--max-new-tokens", "4",
                "--moba-chunk-size", "4", "--moba-topk", "2"])
    printed = capsys.readouterr().out.split()
    assert printed[-7:-4] == ["w5", "w6", "w7"] and all(word.startswith("w") for word in printed[-4:])
