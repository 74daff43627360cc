"""Real text as bytes: files that the user names, or the Python sources of this machine; a byte is a token."""
from __future__ import annotations

import os
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SEPARATOR = b"\0"
"""Between files; it occurs in no text."""
VALIDATION_SHARE = 50
"""One file in so many is kept for validation."""


def python_sources() -> list[Path]:
    """Every .py file of the standard library and the installed packages, in the order of their paths.

    Neighbours in a package stay neighbours, so that a long sequence holds things that belong together.
    """
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    return sorted({path for root in roots for path in root.rglob("*.py")})


def prepare(prefix: Path, files: list[Path] | None, most_bytes: int) -> tuple[Path, Path]:
    """Writes PREFIX.train.bin and PREFIX.validation.bin unless they are there.

    Args:
        prefix: where; directories are made.
        files: the texts, in order; None for the Python sources of this machine.
        most_bytes: stop after so many.

    Returns:
        the two paths.

    Raises:
        ValueError: there is no text, or too little for a validation.
    """
    train, validation = prefix.with_name(prefix.name + ".train.bin"), prefix.with_name(prefix.name + ".validation.bin")
    if train.is_file() and validation.is_file():
        return train, validation
    parts: dict[Path, list[bytes]] = {train: [], validation: []}
    total = 0
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
    if not parts[validation]:  # few files: the end of the text is the validation
        whole = b"".join(parts[train])
        cut = len(whole) - len(whole) // VALIDATION_SHARE
        parts = {train: [whole[:cut]], validation: [whole[cut:]]}
    if not parts[train] or not parts[validation][0]:
        raise ValueError("--text must name files with text, got none")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for path, texts in parts.items():
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")  # another process may be writing the same
        unfinished.write_bytes(b"".join(texts))
        unfinished.replace(path)
    return train, validation


class Windows:
    """Sequences of one length from a text, without overlap, in an order that the seed alone decides.

    The text lies on the device, a byte a token, so that a batch costs the host nothing.
    """

    def __init__(self, path: Path, seq_length: int, device: torch.device, seed: int | None):
        """seed: None for the text's own order.

        Raises:
            ValueError: the text is shorter than one sequence.
        """
        text = np.fromfile(path, dtype=np.uint8)
        self.count = (len(text) - 1) // seq_length
        if self.count < 1:
            raise ValueError(f"--seq-length must leave {path.name} a sequence and its next byte: it holds {len(text)} "
                             f"bytes, got {seq_length}")
        self.text = torch.from_numpy(text).to(device)
        self.seq_length, self.seed = seq_length, seed
        self.within = torch.arange(seq_length + 1, device=device)
        self._epoch: tuple[int, Tensor] | None = None

    def batch(self, first: int, sequences: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, int64 ``[sequences * seq_length]``, of the sequences from number ``first`` on."""
        numbers = torch.cat([self._order(n // self.count)[n % self.count:n % self.count + 1]
                             for n in range(first, first + sequences)])
        rows = self.text[(numbers * self.seq_length)[:, None] + self.within].long()
        return rows[:, :-1].flatten(), rows[:, 1:].flatten()

    def _order(self, epoch: int) -> Tensor:
        """The sequences' order in an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = torch.arange(self.count)
            if self.seed is not None:
                generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
                order = order[torch.randperm(self.count, generator=generator)]
            self._epoch = epoch, order.to(self.text.device)
        return self._epoch[1]
