"""Retrieval: copying a block from a given distance, and recalling the values of keys; a share of training, and a test.

Both overwrite parts of a sequence of text, so that what lies between stays text. Everything is decided by seeds and
numbers: runs that see the same text see the same tasks, and a run that goes on after a stop sees what it would have.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .text import Windows

BLOCK = 64
"""Tokens of a block that is copied."""
CUE = 8
"""Of the second occurrence, the tokens that tell which block it is: they do not count."""
COPIES = 4
"""Blocks, at most, that a training sequence copies."""
SHORTEST = 256
"""Distance, from start to start."""
PAIRS = (8, 16, 32, 64)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the list of pairs begins: 0 at the sequence's start, 1 just before the questions."""
QUESTIONS = 16
"""Keys, at most, that are asked for at a sequence's end."""
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)


@dataclass
class Edits:
    """What is written over a sequence: tokens at places, and of which answer each is (-1: of none)."""

    places: list[int]
    tokens: list[int]
    answers: list[int]

    @classmethod
    def none(cls) -> "Edits":
        return cls([], [], [])

    def write(self, place: int, tokens, answer: int = -1, after: int = 0) -> None:
        """Tokens from a place on; all but the first ``after`` of them belong to ``answer``."""
        self.places += range(place, place + len(tokens))
        self.tokens += map(int, tokens)
        self.answers += [-1] * after + [answer] * (len(tokens) - after)


@dataclass(frozen=True)
class Tasks:
    """The tasks in the alphabet of a model.

    Args:
        seq_length: tokens of a sequence; with the next token behind it one more can be written.
        symbols: tokens that random blocks are made of, ``[n]``.
        encode: bytes -> tokens.
    """

    seq_length: int
    symbols: np.ndarray
    encode: Callable[[bytes], list[int]]

    @classmethod
    def of_bytes(cls, seq_length: int) -> "Tasks":
        return cls(seq_length, LETTERS, list)

    def distances(self) -> list[int]:
        """256, 512, ... and the longest that fits."""
        longest = self.seq_length + 1 - BLOCK
        doubled = itertools.takewhile(lambda d: d < longest - BLOCK, (SHORTEST << i for i in range(32)))
        return [*doubled, longest - BLOCK // 2]

    def copying(self, rng: np.random.Generator, distances: list[int]) -> Edits:
        """Random blocks, each twice at its distance, as many of them as find room."""
        edits, taken = Edits.none(), np.zeros(self.seq_length + 1, bool)
        for i, distance in enumerate(distances):
            first = int(rng.integers(0, self.seq_length + 2 - BLOCK - distance))
            places = first, first + distance
            if any(taken[place:place + BLOCK].any() for place in places):
                continue
            block = rng.choice(self.symbols, BLOCK)
            edits.write(places[0], block)
            edits.write(places[1], block, i, after=CUE)
            for place in places:
                taken[place:place + BLOCK] = True
        return edits

    def recall(self, rng: np.random.Generator, pairs: int, depth: float) -> Edits:
        """A list of ``@key:value`` at a depth, and ``?key:value`` for some of the keys at the sequence's end.

        Raises:
            ValueError: they do not fit.
        """
        keys, values = set(), [bytes(rng.choice(LETTERS, 4)) for _ in range(pairs)]
        while len(keys) < pairs:
            keys.add(bytes(rng.choice(LETTERS, 4)))
        keys = sorted(keys)
        rng.shuffle(keys)
        listed = self.encode(b"".join(b"@%s:%s\n" % pair for pair in zip(keys, values)))
        asked = []
        for i in rng.permutation(pairs)[:QUESTIONS]:
            asked += [(self.encode(b"?%s:" % keys[i]), -1), (self.encode(values[i]), int(i)), (self.encode(b"\n"), -1)]
        begin = self.seq_length + 1 - sum(len(tokens) for tokens, _ in asked)
        if begin < len(listed):
            raise ValueError(f"seq_length must hold {pairs} pairs and their questions, got {self.seq_length}")
        edits = Edits.none()
        edits.write(round(depth * (begin - len(listed))), listed)
        for tokens, answer in asked:
            edits.write(begin, tokens, answer)
            begin += len(tokens)
        return edits

    def fitting_pairs(self) -> list[int]:
        """Those of PAIRS that leave half of the sequence to text, at least the fewest (8)."""
        def length(pairs):
            return len(self.encode(b"@q7xk:3vzp\n")) * (pairs + min(pairs, QUESTIONS))

        return [pairs for pairs in PAIRS if pairs == PAIRS[0] or 2 * length(pairs) <= self.seq_length]

    def random(self, rng: np.random.Generator) -> Edits:
        """One of the tasks, for training: distances, pairs and depth at random."""
        if rng.random() < 0.5:
            return self.recall(rng, int(rng.choice(self.fitting_pairs())), rng.random())
        distances = self.distances()
        spread = rng.uniform(np.log(distances[0]), np.log(distances[-1]), COPIES)
        return self.copying(rng, np.exp(spread).astype(int).tolist())

    def cells(self) -> dict[tuple[str, str], Callable[[np.random.Generator], Edits]]:
        """The test: (task, what is varied) -> an example of it."""
        found = {("copying", str(d)): lambda rng, d=d: self.copying(rng, [d]) for d in self.distances()}
        for pairs, depth in itertools.product(self.fitting_pairs(), DEPTHS):
            found["recall", f"{pairs}@{depth:g}"] = lambda rng, pairs=pairs, depth=depth: self.recall(rng, pairs, depth)
        return found


class Mixed:
    """Windows of text, with a task in a share of its sequences."""

    def __init__(self, windows: Windows, tasks: Tasks, share: float, seed: int):
        self.windows, self.tasks, self.share, self.seed = windows, tasks, share, seed

    def batch(self, first: int, sequences: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Windows.batch`."""
        examples = []
        for number in range(first, first + sequences):
            rng = np.random.default_rng((self.seed, number))
            examples.append(self.tasks.random(rng) if rng.random() < self.share else Edits.none())
        rows = overwritten(self.windows.rows(first, sequences), examples)
        return rows[:, :-1].flatten(), rows[:, 1:].flatten()


def overwritten(rows: Tensor, examples: list[Edits]) -> Tensor:
    """Rows ``[n, S + 1]`` with an example written over each, in place."""
    width = rows.shape[1]
    places = [i * width + place for i, example in enumerate(examples) for place in example.places]
    if places:
        edits = torch.tensor([places, [token for example in examples for token in example.tokens]])
        if rows.is_cuda:  # from pinned memory, so that the host does not wait for the step before
            edits = edits.pin_memory().to(rows.device, non_blocking=True)
        rows.view(-1)[edits[0]] = edits[1]
    return rows


def evaluate(tasks: Tasks, windows: Windows, predict: Callable[[Tensor], Tensor], batch: int,
             sequences: int) -> dict[str, dict[str, float]]:
    """How much of each cell is answered rightly, each token given those before it.

    Args:
        windows: the text around the tasks.
        predict: tokens int64 ``[batch * S]`` -> the likeliest next tokens ``[batch * S]``.
        batch: sequences at once.
        sequences: of each cell, at least; rounded up to whole batches.

    Returns:
        ``copying``: distance -> share of the block's tokens (but the first 8). ``recall``: "pairs@depth" -> share of
        the values all of whose tokens are right.
    """
    found: dict[str, dict[str, float]] = {}
    number = 0
    for cell, ((task, name), example) in enumerate(tasks.cells().items()):
        right: list[bool] = []
        for first in range(0, sequences, batch):
            rng = np.random.default_rng((cell, first))
            examples = [example(rng) for _ in range(batch)]
            rows = overwritten(windows.rows(number, batch), examples)
            number += batch
            hits = (predict(rows[:, :-1].flatten()).view(batch, -1) == rows[:, 1:]).cpu().numpy()
            for hit, edits in zip(hits, examples):
                right += _answered(hit, edits, whole=task == "recall")
        found.setdefault(task, {})[name] = round(float(np.mean(right)), 4)
    return found


def _answered(hit: np.ndarray, edits: Edits, whole: bool) -> list[bool]:
    """Of each answer whether all of its tokens are hit, or of each token; ``hit[t]`` is of the token at place t + 1."""
    places, answers = np.asarray(edits.places), np.asarray(edits.answers)
    groups = [places[answers == answer] for answer in np.unique(answers[answers >= 0])]
    each = [hit[group - 1] for group in groups]
    return [bool(x.all()) for x in each] if whole else [bool(value) for x in each for value in x]
