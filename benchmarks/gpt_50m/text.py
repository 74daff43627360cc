"""Real text: files that the user names, or the Python sources of this machine; as bytes, or cut by a tokenizer."""
from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SEPARATOR = b"\0"
"""Between files; it occurs in no text."""
VALIDATION_SHARE = 50
"""One file in so many is kept for validation."""
LEAST_SHARE = 8 * VALIDATION_SHARE
"""Where these files hold no more than one byte in so many, the end of the text is kept in their place."""
AT_ONCE = 256
"""Texts that a tokenizer is given at once."""


def python_sources() -> list[Path]:
    """Every .py file of the standard library and the installed packages, in the order of their paths.

    Neighbours in a package stay neighbours, so that a long sequence holds things that belong together.
    """
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    return sorted({path for root in roots for path in root.rglob("*.py")})


def prepare(prefix: Path, files: list[Path] | None, most_bytes: int,
            encode: Callable[[list[str]], list[list[int]]] | None = None) -> tuple[Path, Path]:
    """Writes PREFIX.train.bin, PREFIX.validation.bin and what they are, PREFIX.json, unless they are there.

    A file is of the validation by the hash of its name and beginning, so that copies of it fall on one side.

    Args:
        prefix: where; directories are made.
        files: the texts, in order; None for the Python sources of this machine.
        most_bytes: stop after so many.
        encode: texts -> the tokens of each, below 65,536; None for bytes.

    Returns:
        the two paths; of uint8, with ``encode`` of uint16.

    Raises:
        ValueError: there is no text, or too little for a validation.
    """
    train, validation = prefix.with_name(prefix.name + ".train.bin"), prefix.with_name(prefix.name + ".validation.bin")
    about = prefix.with_name(prefix.name + ".json")
    if about.is_file():
        return train, validation
    parts: dict[Path, list[bytes]] = {train: [], validation: []}
    total, names = 0, []
    for path in python_sources() if files is None else files:
        if total >= most_bytes:
            break
        try:
            text = path.read_bytes()
        except OSError as error:
            if files is not None:
                raise ValueError(f"--text must name files that can be read: {error}") from error
            continue  # a dangling link among the installed packages
        kept = validation if zlib.crc32(path.name.encode() + text[:4096]) % VALIDATION_SHARE == 0 else train
        parts[kept].append(text.replace(SEPARATOR, b"") + SEPARATOR)
        total += len(text)
        names.append(f"{'train' if kept is train else 'validation'} {len(text)} {path.name}\n")
    if sum(map(len, parts[validation])) * LEAST_SHARE <= total:  # few files: the end of the text is the validation
        whole = b"".join(parts[train] + parts[validation])
        cut = len(whole) - len(whole) // VALIDATION_SHARE
        parts = {train: [whole[:cut]], validation: [whole[cut:]]}
    if not parts[train] or not parts[validation][0]:
        raise ValueError("--text must name files with text, got none")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    written = {path: _tokens(texts, encode) for path, texts in parts.items()}
    known = {"files": len(names), "bytes": total, "files_sha256": hashlib.sha256("".join(names).encode()).hexdigest()}
    for path, data in written.items():
        known[path.suffixes[-2][1:]] = {"tokens": len(data) // (2 if encode else 1),
                                        "sha256": hashlib.sha256(data).hexdigest()}
    for path, data in (written | {about: json.dumps(known).encode()}).items():
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")  # another process may be writing the same
        unfinished.write_bytes(data)
        unfinished.replace(path)
    return train, validation


def _tokens(texts: list[bytes], encode: Callable[[list[str]], list[list[int]]] | None) -> bytes:
    """What is stored of texts: themselves, or their tokens as uint16."""
    if encode is None:
        return b"".join(texts)
    words = [text.removesuffix(SEPARATOR).decode(errors="replace") for text in texts]
    ids = (x for i in range(0, len(words), AT_ONCE) for x in encode(words[i:i + AT_ONCE]))
    return np.concatenate([np.asarray(x, np.uint16) for x in ids]).tobytes()


class Windows:
    """Sequences of one length from a text, without overlap, in an order that the seed alone decides.

    The text lies on the device, one or two bytes a token, so that a batch costs the host nothing.
    """

    def __init__(self, path: Path, seq_length: int, device: torch.device, seed: int | None, wide: bool = False):
        """seed: None for the text's own order; wide: tokens are of uint16.

        Raises:
            ValueError: the text is shorter than one sequence.
        """
        text = np.fromfile(path, dtype=np.uint16 if wide else np.uint8)
        self.count = (len(text) - 1) // seq_length
        if self.count < 1:
            raise ValueError(f"--seq-length must leave {path.name} a sequence and its next byte: it holds {len(text)} "
                             f"tokens, got {seq_length}")
        self.text = torch.from_numpy(text.astype(np.int32) if wide else text).to(device)
        self.seq_length, self.seed = seq_length, seed
        self.within = torch.arange(seq_length + 1, device=device)
        self._epoch: tuple[int, Tensor] | None = None

    def batch(self, first: int, sequences: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, int64 ``[sequences * seq_length]``, of the sequences from number ``first`` on."""
        rows = self.rows(first, sequences)
        return rows[:, :-1].flatten(), rows[:, 1:].flatten()

    def rows(self, first: int, sequences: int) -> Tensor:
        """The same with each sequence's next token behind it, int64 ``[sequences, seq_length + 1]``."""
        numbers = torch.cat([self._order(n // self.count)[n % self.count:n % self.count + 1]
                             for n in range(first, first + sequences)])
        return self.text[(numbers * self.seq_length)[:, None] + self.within].long()

    def _order(self, epoch: int) -> Tensor:
        """The sequences' order in an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = torch.arange(self.count)
            if self.seed is not None:
                generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
                order = order[torch.randperm(self.count, generator=generator)]
            self._epoch = epoch, order.to(self.text.device)
        return self._epoch[1]
