"""examples/huggingface_to_megatron: a tiny Llama goes the whole way, and what it cannot carry is refused."""
import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import ROOT, run_program, torchrun
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
)

FOLDER = ROOT / "examples/huggingface_to_megatron"
sys.path.insert(0, str(FOLDER))
import journey  # noqa: E402
from weights import model_flags, to_huggingface, to_megatron  # noqa: E402


def run(words):
    """A command of the journey in a fork."""
    program, *arguments = words
    if program == "torchrun":
        done = torchrun(arguments[1], str(Path(arguments[2]).relative_to("examples").with_suffix("")), *arguments[3:])
    else:
        done = run_program([ROOT / arguments[0], *arguments[1:]], {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def save(folder):
    """A tiny Llama of 3 key/value heads with a tokenizer of words; its logits are large enough to tell."""
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, vocab_size=61, max_position_embeddings=256, initializer_range=0.4, pad_token_id=0,
        bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_there_and_back(tied):
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=6, vocab_size=50, tie_word_embeddings=tied)
    weights = LlamaForCausalLM(config).state_dict()
    there = to_megatron(weights, config)
    padded = {name: torch.nn.functional.pad(x, (0, 0, 0, 14)) if x.shape[0] == 50 else x for name, x in there.items()}
    back = to_huggingface(padded, config)
    assert back.keys() == weights.keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(back[name], weights[name]) for name in back)


@pytest.mark.parametrize("config, text", [
    (LlamaConfig(attention_bias=True), "attention_bias of config.json must be False .* got True"),
    (LlamaConfig(mlp_bias=True), "mlp_bias of config.json must be False .* got True"),
    (LlamaConfig(hidden_act="gelu"), "hidden_act of config.json must be 'silu' .* got 'gelu'"),
    (LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type .* 'default' .* got 'linear'"),
    (LlamaConfig(rope_theta=10000.5), "rope_theta of config.json must be 10000 .* got 10000.5"),
    (GPT2Config(), "model_type of config.json must be 'llama' .* got 'gpt2'"),
    (MistralConfig(), "model_type of config.json must be 'llama' .* got 'mistral'")],
    ids=["attention_bias", "mlp_bias", "hidden_act", "rope_scaling", "rope_theta", "gpt2", "mistral"])
def test_what_the_conversion_does_not_carry(config, text):
    with pytest.raises(ValueError, match=text):
        model_flags(config)


def test_the_whole_way(tmp_path, capsys):
    """Both conversions keep every logit, two ranks' training changes them and learns, and the result generates."""
    save(tmp_path / "model")
    texts = []
    for i in range(4):
        texts.append(tmp_path / f"{i}.txt")
        texts[-1].write_text(" ".join(f"w{2 + (i + j * j) % 7}" for j in range(600)))
    flags = {"--huggingface": tmp_path / "model", "--output": tmp_path / "out", "--moba-chunk-size": 8,
             "--moba-topk": 2, "--compare-length": 96, "--seq-length": 64, "--train-iters": 8, "--eval-iters": 2,
             "--lr": "1e-2", "--split": "50,50,0", "--max-new-tokens": 4, "--prompt": "w5 w6"}
    journey.main([*(str(word) for item in flags.items() for word in item), "--text", *map(str, texts)], run)
    result = json.loads((tmp_path / "out/journey.json").read_text())
    for name, logits in result["logits"].items():
        assert logits["places_apart"] == 0 and logits["largest_difference"] < 1e-4 < logits["largest_logit"], name
    losses = [result["logits"][name]["loss_megatron"] for name in ("imported_full", "imported_moba")]
    assert abs(losses[0] - losses[1]) > 1e-3  # sparse attention is another function
    assert len(result["losses"]) == 8 and result["validations"]["8"] < result["validations"]["0"] - 0.1
    assert result["generated"].split()[:2] == ["w5", "w6"] and len(result["generated"].split()) == 6
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
                     for name in ("model", "out/exported"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_bad_input(tmp_path):
    done = run_program([FOLDER / "convert.py", "--huggingface", tmp_path, "--save", tmp_path / "out"],
                       {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "must be a folder with a config.json" in done.stderr


def test_what_the_page_says_is_stored():
    bridge, own = (json.loads((ROOT / f"benchmarks/results/cpu/huggingface_{name}.json").read_text())
                   for name in ("bridge", "own"))
    for result in (bridge, own):
        assert all(logits["places_apart"] == 0 for logits in result["logits"].values())
        assert len(result["losses"]) == result["settings"]["train_iters"]
    largest = [max(x["logits"][name]["largest_difference"] for x in (bridge, own) for name in names)
               for names in (("imported_full", "imported_moba"), ("exported_moba",))]
    imported, exported = (f"{x:.1e}".replace("e-0", "e-") for x in largest)
    page = " ".join((ROOT / "docs/megatron.md").read_text().split())
    for text in (f"by more than {imported}", f"within {exported}",
                 f"from {bridge['validations']['0']:.2f} to {bridge['validations']['100']:.2f} nats",
                 f"Bridge {bridge['environment']['megatron-bridge']}, Megatron-Core "
                 f"{bridge['environment']['megatron-core']}",
                 f"Megatron-Core {own['environment']['megatron-core']}, {own['settings']['train_iters']} steps"):
        assert text in page, text
