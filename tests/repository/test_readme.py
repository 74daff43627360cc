"""README.md and docs/: short, in the field's words, naming only what exists; their Python runs as it stands."""
import argparse
import os
import re

import pytest
import torch
from ranks import ROOT, run_program

from benchmarks import __main__ as benchmarks
from moba_megatron import MoBAConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(str(path.relative_to(ROOT)) for path in (
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("patches/*.md"),
    *ROOT.glob(".github/**/*.md")))
BLOCKS = [(page, block) for page in PAGES
          for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)]
INSIDERS = ("stretch", "milestone", "visitor", "throw-away", "stand-in", "slots", "measured before",
            "by hand", "travel", "yardstick", "deal out", "whichever is reckoned")
LOGS = ("docs/kernel-notes.md",)
"""Records of experiments: figures that no stored file holds are said to be such."""

MEGATRON = """
import os
import megatron_on_cpu
megatron_on_cpu.enable()
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
vocab_size, seq_length = 64, 32
config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=2, attention_dropout=0.0,
                           use_cpu_initialization=True)
{block}
tokens = torch.arange(seq_length)[None]
loss = model(tokens, tokens, None, labels=tokens)
assert loss.shape == (1, seq_length) and loss.isfinite().all()
dense = [layer.self_attention.core_attention.full_attention for layer in model.decoder.layers]
assert dense == [False, True, True, True], dense
"""

DEEPSPEED = """
import torch
from types import SimpleNamespace
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
layer_number, num_layers, mask = 1, 2, torch.ones(1, 1200)
tokens, engine = torch.arange(1200)[None], SimpleNamespace(backward=lambda loss: loss.backward())
x = torch.randn(1, 1200, 4, 16, requires_grad=True)
losses = torch.zeros(1, 1200)
{block}
assert parallel.size == 1 and torch.equal(tokens, torch.arange(1200)[None])
losses = attention(x, x, x).flatten(2).sum(-1)
engine.backward(mean_over_ranks(losses, mask))
assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
"""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    """A page without its fenced and indented code."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors_of(page: str) -> set[str]:
    """The anchors that GitHub and MkDocs give to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestReadme:
    def test_it_is_short_and_begins_with_a_picture(self):
        lines = README.splitlines()
        assert len(lines) <= 150
        assert any("<img" in line for line in lines[:12])

    def test_cells_are_short(self):
        cells = [cell.strip() for line in README.splitlines() if line.startswith("|")
                 for cell in line.strip("|").split("|")]
        assert max(map(len, cells)) <= 60, max(cells, key=len)

    def test_no_commit_and_no_goal(self):
        assert not re.findall(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7,40}\b", README)
        assert not re.findall(r"\b(must|stretch|goal)\b \|", README)

    def test_figures_in_pictures_texts_are_the_stored_ones(self):
        from benchmarks import report

        times = {(row["name"], row["tokens"]): row["ms"]["median"]
                 for row in report.load(report.RESULTS / "h200/comparison.json")["rows"] if "ms" in row}
        speeds = {row["name"]: row["tokens_per_s"] for n in (1, 2)
                  for row in report.load(report.RESULTS / f"h200/gpt-p{n}.json")["rows"] if row["status"] == "ok"}
        throughput, speed = re.findall(r'alt="([^"]*)"', README)
        assert [int(x) for x in re.findall(r"(\d+)K", throughput)[1:]] + [128] == [
            round(speeds[name] / 1e3) for name in ("128K/full", "128K/moba-512-8", "128K/full/p2p",
                                                   "128K/moba-512-8/all_gather")] + [128]
        assert [int(x) for x in re.findall(r"\b(\d+)\b", speed.split("takes")[1]) if x != "2"] == [
            round(times[name, 131072]) for name in ("moba_megatron", "moonshot-moba", "fla-moba", "cuDNN",
                                                    "flash attention 2")]

    def test_its_first_command_pays(self):
        """The first chunk size and topk that a reader copies are a row of the README's own table that gains."""
        size, topk = re.search(r"--moba-chunk-size (\d+) --moba-topk (\d+)", README).groups()
        row, = re.findall(rf"^\| {size}, {topk} \| ([\d.]+)x \| ([\d.]+)x \|$", README, re.M)
        assert float(row[0]) > 1.5 and float(row[1]) > 5

    def test_the_line_that_the_launcher_prints(self):
        line = f"    > {MoBAConfig(chunk_size=512, topk=8).describe()} (from --moba-* flags)\n"
        assert line in README


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_exist(page):
    text, folder = text_of(page), (ROOT / page).parent
    links = re.findall(r"\]\(((?!https?:|mailto:)[^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert page.startswith("docs/") <= target.is_relative_to(ROOT / "docs"), f"{link}: not on the site"
        if anchor:
            assert anchor in anchors_of(str(target.relative_to(ROOT))), link
    for path in re.findall(r"(?<![\w./])(?:launch|examples|patches|tests|benchmarks|moba_megatron|docs)/[\w/.-]+"
                           r"\.(?:sh|py|md|json|npz|html)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"-m ((?:moba_megatron|benchmarks)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", [page for page in PAGES if page not in LOGS])
def test_words_are_the_fields(page):
    found = [word for word in INSIDERS if word in prose_of(page).lower()]
    assert not found, found


def test_every_page_is_on_the_site():
    listed = re.findall(r"[\w-]+\.md", text_of("mkdocs.yml"))
    assert sorted(listed) == sorted(path.name for path in ROOT.glob("docs/*.md"))
    for name in set(listed) - {"index.md"}:
        assert f"docs/{name}" in README and f"({name})" in text_of("docs/index.md"), name


def test_operator_blocks():
    names = {}
    for _, block in BLOCKS:
        if "moba_attn_varlen" in block:
            exec(block, names)
    assert names["o"].shape == (3000, 8, 64)
    assert names["q"].grad.isfinite().all()
    if "output" in names:
        assert not torch.equal(names["o"], names["output"])


def test_router_block():
    """Chosen once for all heads of a kv head, and attended to."""
    [block] = [block for _, block in BLOCKS if "select_chunks" in block]
    names = {name: torch.randn(3000, heads, 64) for name, heads in (("q", 8), ("k", 2), ("v", 2))}
    names |= {"cu_seqlens": torch.tensor([0, 1000, 3000], dtype=torch.int32), "max_seqlen": 2000}
    exec(block, names)
    assert names["chosen"].shape == (3000, 2, 15) and names["o"].shape == (3000, 8, 64)


def test_megatron_selector_block(tmp_path):
    """Its layer attends to what it chooses, and its weights are the layer's."""
    pytest.importorskip("megatron.core")
    [block] = [block for _, block in BLOCKS if "class LowRank" in block]
    script = tmp_path / "block.py"
    script.write_text(MEGATRON[:MEGATRON.index("{block}")] + block + """
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
core = build_module(spec.submodules.self_attention.submodules.core_attention, config=config, layer_number=1,
                    attn_mask_type=AttnMaskType.causal, attention_type="self")
q = torch.randn(3000, 1, 2, 16)
chosen = core.selector(q[:, 0], q[:, 0], core._segments(q, q, None, False, core.moba_config)[0])
assert chosen.shape == (3000, 2, 15) and core(q, q, q).isfinite().all()
assert [name for name, _ in core.named_parameters()] == ["selector.down"]
""")
    done = run_program([script], {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"})
    assert done.returncode == 0, done.stderr


def test_transformers_selector_block(monkeypatch):
    """The first chunk counts."""
    pytest.importorskip("transformers")
    import huggingface_models as hf

    [block] = [block for _, block in BLOCKS if "def with_first" in block]
    small = block.replace("chunk_size=128, topk=16", "chunk_size=8, topk=3").replace("topk=15", "topk=2")
    names, ids = {}, hf.tokens(1, 90)
    exec(small, names)
    logits = hf.model()(ids).logits
    assert logits.isfinite().all()
    names["register_moba"](MoBAConfig(8, 3))
    assert not torch.equal(hf.model()(ids).logits, logits)
    exec(block, names)  # as it stands


def test_replay_block(tmp_path, monkeypatch):
    """A step of a small model of Transformers, in a folder of its own."""
    pytest.importorskip("transformers")
    import huggingface_models as hf

    from moba_megatron import register_moba

    [block] = [block for _, block in BLOCKS if "record_selection" in block]
    register_moba(MoBAConfig(8, 2))
    model, logits = hf.model(), []
    monkeypatch.chdir(tmp_path)
    exec(block, {"step": lambda: logits.append(model(hf.tokens(1, 40)).logits)})
    assert len(logits) == 2 and torch.equal(*logits) and (tmp_path / "choices.npz").stat().st_size


@pytest.mark.parametrize("page, block", [(page, block) for page, block in BLOCKS if "from_pretrained" in block])
def test_transformers_blocks(page, block, tmp_path):
    """The block with a small model of two layers in place of Llama-3.1-8B."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "path/to/Llama-3.1-8B" in block
    names = {}
    exec(block.replace("path/to/Llama-3.1-8B", str(tmp_path)), names)
    tokens = torch.arange(1400)[None] % 64
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with torch.no_grad():
        ours, theirs = names["model"](tokens).logits, dense(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)  # 8 chunks of 512 cover the sequence
    assert names["model"].config._attn_implementation == "moba"


@pytest.mark.parametrize("package, program, word, here", [
    ("megatron.core", MEGATRON, "GPTModel", {}),
    ("deepspeed", DEEPSPEED, "SequenceParallel",
     {"size=4": "size=1", "engine.backward(mean_over_ranks(losses, mask))": ""}),
], ids=["megatron", "deepspeed"])
def test_blocks_of_hosts(tmp_path, package, program, word, here):
    """A block in a process of its own, with what it says is yours put around it; ``here``: on one rank."""
    pytest.importorskip(package)
    [block] = [block for _, block in BLOCKS if word in block]
    for given, changed in here.items():
        assert given in block
        block = block.replace(given, changed)
    script = tmp_path / "block.py"
    script.write_text(program.replace("{block}", block))
    done = run_program([script], {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"})
    assert done.returncode == 0, done.stderr


def test_every_python_block_is_run_by_a_test():
    words = ("moba_attn_varlen", "select_chunks", "from_pretrained", "GPTModel", "SequenceParallel",
             "record_selection", "class LowRank", "def with_first")
    assert all(any(word in block for word in words) for _, block in BLOCKS)


BENCHMARKS = [(page, line.split("#")[0].split()[3:]) for page in PAGES
              for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
              if line.startswith("    python -m benchmarks ")]


@pytest.mark.parametrize("page, flags", BENCHMARKS, ids=lambda x: x if isinstance(x, str) else " ".join(x[:1]))
def test_commands_to_copy_have_all_that_they_need(page, flags, monkeypatch):
    """They are parsed to their end; nothing is measured."""
    parsed = []
    monkeypatch.setattr(benchmarks.ArgumentParser, "parse_args", lambda self, argv: parsed.append(
        argparse.ArgumentParser.parse_args(self, argv)) or parsed[-1])
    monkeypatch.setattr(benchmarks.environment, "need_device", lambda *_: (_ for _ in ()).throw(SystemExit(0)))
    with pytest.raises(SystemExit) as end:
        benchmarks.main(flags)
    assert end.value.code == 0 and parsed


def test_readme_has_such_a_command():
    assert "README.md" in [page for page, _ in BENCHMARKS]
