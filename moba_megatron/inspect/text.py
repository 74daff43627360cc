"""Text to tokens and back, with the tokenizers of examples/prepare_data.py."""
from __future__ import annotations

from pathlib import Path


class Bytes:
    """Every byte of the UTF-8 text is a token."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        """A character that was cut in two, and ids that are no bytes, become a replacement character."""
        return bytes(i if i < 256 else 255 for i in ids).decode("utf-8", errors="replace")


def tokenizer(name: str, path: str | None):
    """Something with ``encode`` and ``decode``.

    Args:
        name: ByteLevel or HuggingFaceTokenizer.
        path: the directory of a Hugging Face tokenizer.

    Raises:
        ValueError: the name is unknown, or a Hugging Face tokenizer cannot be had.
    """
    if name == "ByteLevel":
        return Bytes()
    if name != "HuggingFaceTokenizer":
        raise ValueError(f"the tokenizer of the checkpoint must be ByteLevel or HuggingFaceTokenizer, got {name!r}")
    if path is None or not Path(path).is_dir():
        raise ValueError("--tokenizer-model must be the directory of the checkpoint's Hugging Face tokenizer, "
                         f"got {path}")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("a Hugging Face tokenizer needs the package transformers: pip install -e '.[hf]'") from None
    return _HuggingFace(AutoTokenizer.from_pretrained(path, local_files_only=True))


class _HuggingFace:
    def __init__(self, inner):
        self._inner = inner

    def encode(self, text: str) -> list[int]:
        return self._inner(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self._inner.decode(ids)
