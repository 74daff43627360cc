"""Packed sequences in Megatron-LM's own pretrain_gpt.py, and stored: the same rows packed on one rank, packed over two,
and their sequences one by one. By hand, in this repository:

    PYTHONPATH=. python tests/megatron/packed_training.py --json packed.json path/to/Megatron-LM ...

Checkouts from 0.19 on, which need Transformers, on GPUs Transformer Engine too; of 0.16, the only line whose own
``--hybrid-context-parallel`` trains, that run, which needs six. On a CPU gloo, Megatron-Core's own
layers, fp32, and what Megatron-LM takes from a GPU, Transformer Engine or Python 3.12 for granted (``on_the_cpu``).
"""
import argparse
import functools
import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests/helpers")]
from benchmarks import packed, report  # noqa: E402
from moba_megatron import environment  # noqa: E402

GPU = torch.cuda.is_available()
ROW, CHUNK, TOPK, HEAD_DIM = (4096, 128, 4, 64) if GPU else (512, 16, 3, 16)
WORDS = 50
CUT = "MOBA_TEST_CUT"
STEP = re.compile(r"iteration +\d+/.*?lm loss: ([-\d.E+]+).*?grad norm: ([\d.]+)")
ERROR = re.compile(r"^(?:\[rank\d+\]: *)?(\w*(?:Error|Exception)\b.*)", re.M)
FRAME = re.compile(r'File "(.+)", line (\d+), in (\w+)')
# Adam with a usual epsilon takes a whole step for the last bit of a gradient.
LAYERS = f"""--num-layers 3 --hidden-size {4 * HEAD_DIM} --ffn-hidden-size {8 * HEAD_DIM} --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --kv-channels {HEAD_DIM} --seq-length {ROW}
    --max-position-embeddings {ROW} --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --init-method-std {0.8 * HEAD_DIM ** -0.5:.3f} --hidden-dropout 0 --lr 0.5 --adam-eps 1
    --global-batch-size 6 --train-iters 8 --calculate-per-token-loss --eval-iters 0 --eval-interval 1000
    --log-interval 1 --num-workers 0 --seed 1 --split 100,0,0 --no-gradient-accumulation-fusion
    --attention moba --moba-chunk-size {CHUNK} --moba-topk {TOPK}"""
ON = {True: "--transformer-impl transformer_engine", False: """--transformer-impl local --distributed-backend gloo
    --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion"""}
DATA = {
    "instructions": "--sft --data-path instructions.jsonl --tokenizer-type SFTTokenizer --tokenizer-model tokenizer",
    "multiples": "--sft --data-path multiples.jsonl --tokenizer-type SFTTokenizer --tokenizer-model tokenizer "
                 "--legacy-tokenizer",
    "documents": f"--dataloader-inter-document-masking --data-path documents --data-cache-path cache "
                 f"--tokenizer-type NullTokenizer --vocab-size {WORDS}"}


@dataclass(frozen=True)
class Run:
    """A run: of what data, on how many ranks, with which flags; whether rows are cut, and into what."""

    data: str
    ranks: int = 1
    flags: str = "--micro-batch-size 1"
    cut: str = ""


HYBRID = f"--micro-batch-size 1 --hybrid-context-parallel --rerun-mode disabled --max-seqlen-per-dp-cp-rank {ROW // 2}"
RUNS = {
    "instructions, one by one": Run("instructions", cut="sequences"),
    "instructions, not told apart": Run("instructions", cut="nowhere"),
    "instructions": Run("instructions"),
    "instructions, two rows a batch": Run("instructions", flags="--micro-batch-size 2"),
    **{f"instructions, {comm}": Run("instructions", 2, f"--micro-batch-size 1 --context-parallel-size 2 --cp-comm-type "
                                    f"{comm}") for comm in ("all_gather", "a2a")},
    "documents, one by one": Run("documents", cut="sequences"),
    "documents": Run("documents"),
    "--hybrid-context-parallel": Run("instructions", 2, HYBRID),
}
OLD = {f"multiples of 4{all_chunks}, {how}": Run("multiples", ranks, f"{flags} {topk}", cut)
       for all_chunks, topk in (("", ""), (" and all chunks", f"--moba-topk {ROW // CHUNK}"))
       for how, ranks, flags, cut in (("one by one", 1, "--micro-batch-size 1", "sequences"),
                                      ("--hybrid-context-parallel", 2, HYBRID, ""))}
"""What 0.16 runs: its data set does not pad conversations, to which it adds a token, nor cut rows that are too long."""
FEW = ["instructions, one by one", "instructions, not told apart", "instructions", "instructions, all_gather",
       "instructions, a2a"]
"""What runs in fp32 on GPUs, and there with further checkouts; everything does in bf16 with the first."""


def is_old(checkout: Path) -> bool:
    """Whether it is of the line 0.16 or before."""
    return (checkout / "megatron/legacy/fused_kernels").exists()


def rows_of_lengths() -> list[list[int]]:
    """Lengths of the conversations of each row: 1 token to the whole row; padded to multiples of 4 they still fit."""
    return [[ROW], [1] * 40 + [7] * 20, [1, ROW * 3 // 4, 2, 7, 5, ROW // 8 + 3], [ROW - 3],
            [ROW // 2 - 5, 1, ROW // 3], [ROW // 100 + 4, ROW - ROW // 16]]


def conversation(length: int, random) -> list[dict]:
    """Messages of ``length`` tokens: words to repeat backwards; below 4 tokens only a system message."""
    if length < 4:
        return [{"role": "system", "content": " ".join(f"w{random.randrange(WORDS)}" for _ in range(length - 1))}]
    words = [f"w{random.randrange(WORDS)}" for _ in range((length - 3) // 2)]
    more = ["w0"] * (length - 3 - 2 * len(words))
    return [{"role": "system", "content": ""}, {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": " ".join(words[::-1] + more)}]


def write_rows(path: Path, rows: list[list[int]], random) -> None:
    """Conversations of these lengths, a row a line."""
    with path.open("w") as file:
        for lengths in rows:
            messages = [message for length in lengths for message in conversation(length, random)]
            file.write(json.dumps({"messages": messages}) + "\n")


def make_data(folder: Path) -> None:
    """An instruction set and its tokenizer, and documents of 2 tokens to two rows."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(1)
    rows = rows_of_lengths()
    write_rows(folder / "instructions.jsonl", rows, draw)
    write_rows(folder / "multiples.jsonl", [[min(n // 4 * 4 + 3, ROW - 9) for n in row] for row in rows],
               random.Random(1))
    special = ["<SPECIAL_233>", "<SPECIAL_10>", "<SPECIAL_11>", "</s>"]  # of the format nemotron-h-aligned
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<SPECIAL_233>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|System|User|Assistant"), "removed")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<SPECIAL_233>",
                            additional_special_tokens=special[1:3]).save_pretrained(folder / "tokenizer")
    builder = IndexedDatasetBuilder(str(folder / "documents.bin"))
    for length in [2, 3, ROW * 2, 7, ROW - 1, ROW // 3, 4, 5, 2, ROW // 2, ROW // 5] * 10:
        builder.add_document(torch.tensor([draw.randrange(WORDS - 1) for _ in range(length)]), [length])
    builder.finalize(str(folder / "documents.idx"))


def on_the_cpu() -> None:
    """What Megatron-LM takes for granted: a GPU, ``typing.override`` (Python 3.12), and one function of Transformer
    Engine, which says what tokens of packed sequences a rank holds."""
    import typing

    if not hasattr(typing, "override"):
        typing.override = lambda function: function
    import megatron_on_cpu
    megatron_on_cpu.enable()
    torch.cuda.device_count = lambda: 1
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda device=None: 0)
    torch.cuda.get_device_properties = lambda device=None: argparse.Namespace(major=9, total_memory=1 << 30, name="CPU")
    import megatron.core.utils
    from megatron.training import training
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)

    class tex:
        @staticmethod
        def thd_get_partitioned_indices(cu_seqlens, total, size, rank):
            import gpt
            return gpt.local_positions(cu_seqlens.diff().tolist(), size, rank)

    megatron.core.utils.tex = tex
    if importlib.util.find_spec("megatron.legacy"):  # 0.16 compiles kernels
        from megatron.legacy import fused_kernels
        fused_kernels.load = lambda args: None
        from transformers import PreTrainedTokenizerFast  # it takes lists for granted, which Transformers 4 gave
        PreTrainedTokenizerFast.apply_chat_template = functools.partialmethod(
            PreTrainedTokenizerFast.apply_chat_template, return_dict=False)


def cut_rows(where: str) -> None:
    """Packed rows are not packed: each of its ``sequences`` goes through the model alone; or, cut ``nowhere``, the row
    does as one sequence, a control that the losses do depend on where sequences end."""
    from megatron.core.models.gpt import GPTModel

    whole = GPTModel.forward

    def forward(self, input_ids, position_ids, attention_mask, *args, labels=None, packed_seq_params=None, **kwargs):
        cuts = packed_seq_params.cu_seqlens_q.flatten().tolist() if where == "sequences" else [0, input_ids.shape[1]]
        kwargs.pop("loss_mask", None)  # of multi-token prediction
        return torch.cat([whole(self, input_ids[:, a:b], position_ids[:, a:b], None, *args, labels=labels[:, a:b],
                                **kwargs) for a, b in itertools.pairwise(cuts)], 1)

    GPTModel.forward = forward


def rank(argv: list[str]) -> int:
    """What a rank runs: ``moba_megatron.launch``."""
    if not GPU:
        on_the_cpu()
    if importlib.util.find_spec("datasets") is None:  # of Hugging Face; it reads a file of JSON lines
        sys.modules["datasets"] = module = type(sys)("datasets")
        module.load_dataset = lambda kind, data_files, split: [
            json.loads(line) for line in Path(data_files).read_text().splitlines()]
    if os.environ.get(CUT):
        cut_rows(os.environ[CUT])
    from moba_megatron import launch
    return launch.main(argv)


def train(checkout: Path, name: str, dtype: str, folder: Path, logs: Path, seconds: float) -> dict:
    """Runs one; its row of the result."""
    run, begin = (RUNS | OLD)[name], time.monotonic()
    log = logs / f"{checkout.name}-{dtype}-{re.sub('[^a-z]+', '_', name)}.log"
    flags = " ".join((LAYERS, ON[GPU], DATA[run.data], run.flags, "--bf16" if dtype == "bf16" else "")).split()
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [
        str(checkout), str(ROOT), os.environ.get("PYTHONPATH")])), "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": "1", CUT: run.cut,
        **({} if GPU else {"GLOO_SOCKET_IFNAME": "lo"})}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", str(run.ranks), __file__, str(checkout / "pretrain_gpt.py"), *flags]
    with log.open("w") as file:
        with subprocess.Popen(command, cwd=folder, env=environ, stdout=file, stderr=file) as process:
            try:
                status = process.wait(max(1, seconds))
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks
                status = f"not finished in {seconds:.0f} s"
    text = log.read_text(errors="replace")
    steps = [tuple(map(float, step)) for step in STEP.findall(text)]
    row = {"name": name, "checkout": checkout.name, "dtype": dtype, "ranks": run.ranks,
           "losses": [loss for loss, _ in steps], "grad_norms": [norm for _, norm in steps],
           "moba": re.findall(r"^> MoBA attention.*", text, re.M), "seconds": round(time.monotonic() - begin, 1)}
    if status:
        error = ERROR.search(text)
        where = FRAME.findall(text[:error.start()])[-1:] if error else []
        said = [error[1], *(f"{Path(file).name}:{line}, {function}" for file, line, function in where)] if error else []
        return row | {"status": "failed", "reason": "; ".join([f"status {status}", *said])}
    return row | {"status": "ok"}


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a run that must train did not."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT")
    p.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the result goes")
    p.add_argument("--logs", type=Path, metavar="FOLDER", help="where the runs' logs go")
    p.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (1)")
    p.add_argument("--budget", type=float, default=3600, metavar="S", help="seconds for everything (3600)")
    args = p.parse_args(argv)
    deadline = time.monotonic() + args.budget
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(args.parallel) as pool:
        folder, logs = Path(temporary), args.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        make_data(folder)  # imports Transformer Engine: it must load cuDNN before torch is asked for its version
        about = environment.describe(torch.device("cuda" if GPU else "cpu")) | {
            "command": environment.command("PYTHONPATH=. python tests/megatron/packed_training.py")}
        for checkout in args.checkouts:  # each rank 0 would
            subprocess.run(["make", "-s", "-C", str(checkout / "megatron/core/datasets"),
                            f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"], check=True)
        first, *others = checkouts = [checkout.resolve() for checkout in args.checkouts]
        jobs = [(checkout, name, "fp32") for checkout in checkouts for name in (OLD if is_old(checkout) else RUNS)]
        if GPU:
            jobs = [*((first, name, "fp32") for name in FEW), *((first, name, "bf16") for name in RUNS),
                    *((checkout, name, "bf16") for checkout in others for name in (*FEW, *list(RUNS)[-1:]))]
        rows = list(pool.map(lambda job: train(*job, folder, logs, deadline - time.monotonic()), jobs))
    return report.finish(args.json, {"environment": about, "rows": rows}, packed.TABLE)


if __name__ == "__main__":
    sys.exit(rank(sys.argv[1:]) if "RANK" in os.environ else main())
