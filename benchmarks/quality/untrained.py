"""A pretrained dense model that attends by MoBA without training: what each chunk size, topk and layer rule costs."""
from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from moba_megatron import environment

from .. import report
from ..gpt_50m import pretrained, text
from ..gpt_50m.loop import POSITION_BINS
from .pages import STORED
from .variants import LENGTHS, Variant, grid


def add_untrained(subcommands) -> None:
    p = subcommands.add_parser("untrained", help="a pretrained model attends by MoBA, without training")
    add = p.add_argument
    add("--pretrained", type=Path, required=True, metavar="GGUF", help="the model, or a folder of Transformers'")
    add("--text", nargs="+", type=Path, metavar="PATH", help="texts, or folders of them; default: this machine's "
        "Python sources")
    add("--texts", type=int, default=32, help="use so many that are long enough, each from its start (32)")
    add("--lengths", nargs="+", type=int, default=list(LENGTHS), help="tokens (2048 8192)")
    add("--variants", nargs="+", metavar="NAME", help="full, moba-64-4, moba-64-4-every:6 (a grid of them)")
    add("--seconds", type=float, default=float("inf"), help="begin nothing after so many; the same command goes on")
    add("--threads", type=int, help="threads of torch on a CPU")
    add("--json", type=Path, default=STORED["untrained"], metavar="PATH", help="written anew after each variant")
    p.set_defaults(run=run_untrained)


def run_untrained(arguments: argparse.Namespace) -> int:
    """Measures what is not in the file yet; 0."""
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = pretrained.load_model(arguments.pretrained).to(device).eval()
    tokenizer = pretrained.load_tokenizer(arguments.pretrained)
    about = {"pretrained": arguments.pretrained.name, "parameters": sum(p.numel() for p in model.parameters())}
    rows = report.load(arguments.json)["rows"] if arguments.json.is_file() else []
    for length in arguments.lengths:
        names, tokens = read(arguments.text or text.python_sources(), tokenizer, length, arguments.texts)
        of = {"tokens": length, "texts": names, "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}
        for name in arguments.variants or grid(length):
            same = of | {"variant": name}
            if any(same.items() <= row.items() for row in rows):
                continue
            if time.perf_counter() - begin > arguments.seconds:
                break
            start = time.perf_counter()
            variant = Variant.of(name)
            model.set_attn_implementation(pretrained.implementation(
                variant.attention, variant.chunk_size, variant.topk, variant.full_attention_layers))
            rows.append(same | losses(model, tokens.to(device)) | {"wall_s": round(time.perf_counter() - start, 1)})
            report.save(arguments.json, {"environment": environment.describe(device), **about, "rows": rows})
            print(f"{length} {name}: {sum(rows[-1]['losses']) / len(names):.4f}, {rows[-1]['wall_s']} s", flush=True)
    return 0


def read(files: list[Path], tokenizer: pretrained.Tokenizer, length: int, most: int) -> tuple[list[str], Tensor]:
    """Names of the first texts of ``length + 1`` tokens and more, and these tokens, int64 ``[texts, length + 1]``.

    Raises:
        ValueError: there is none.
    """
    names, found = [], []
    for path in (inner for path in files for inner in (sorted(path.iterdir()) if path.is_dir() else [path])):
        if len(found) == most:
            break
        if path.is_dir() or path.stat().st_size <= length:  # a token is a byte at least, nearly always
            continue
        words = path.read_text(encoding="utf-8", errors="replace")
        ids, = tokenizer.encode([words[:16 * length]])
        if len(ids) > length + 1:
            names.append(path.name)
            found.append(ids[:length + 1])
    if not found:
        raise ValueError(f"--text must name texts of more than {length} tokens, got {' '.join(map(str, files[:3]))}")
    return names, torch.tensor(found)


def losses(model: torch.nn.Module, tokens: Tensor) -> dict[str, list[float]]:
    """``losses`` of each text, ``trailing`` of its last part of 16, and their mean ``by_position``; nats a token."""
    found = []
    for row in tokens:
        with torch.no_grad(), torch.autocast(row.device.type, torch.bfloat16, enabled=row.is_cuda):
            logits = model(row[None, :-1], use_cache=False).logits[0]
        each = [functional.cross_entropy(part.float(), target, reduction="none")
                for part, target in zip(logits.split(1024), row[1:].split(1024))]
        found.append(torch.cat(each).double().view(POSITION_BINS, -1).mean(1).cpu())
    table = torch.stack(found)  # [texts, bins]
    return {"losses": [round(x, 5) for x in table.mean(1).tolist()],
            "trailing": [round(x, 5) for x in table[:, -1].tolist()],
            "by_position": [round(x, 5) for x in table.mean(0).tolist()]}
