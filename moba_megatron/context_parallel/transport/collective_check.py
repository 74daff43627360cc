"""The header by which the ranks of a group notice that one of them got different or bad input."""
import functools
from collections import deque
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ...tensor_cache import cached_tensors, is_unobserved, remembered
from .comm import Pending, abandon, all_gather, members_a_node

_FIRST = 6  # values of cu_seqlens that an error shows
_FACTS = 7 + _FIRST
_MOST_UNREAD = 64
READ_LATER = ("cuda",)  # devices whose messages the host need not read at once
_side_stream = functools.lru_cache(maxsize=None)(torch.cuda.Stream)  # one a device


class CollectiveCheck:
    """Checks inputs on every rank of a group, so that a rank with bad input ends all ranks rather than hanging them.

    Inside the ``with`` block a rank checks its own input and sets ``signature`` to a text of everything that the
    following collectives depend on (shapes, dtypes, chunk size). At its end the ranks exchange that text, or the text
    of the error that was raised, in a message of fixed size. Values on the device go with it: :meth:`compare_lengths`.

    Cost: an all-gather of some 600 bytes a call. With gloo the host reads it at once, with NCCL only where the
    signature is not the one that the calls before foretell (the first calls, another length). Otherwise neither the
    host nor the compute stream waits: a side stream copies the message to pinned memory, and it is looked at when the
    next call begins. Ranks that agreed so far foretell the same, so where they differ now all but one signature's ranks
    read at once, and raise before a collective of another size begins; the rest raise at their next call, or while they
    wait for another rank's host. On CUDA collectives may then be under way that never end: let the process end. In a
    CUDA graph under capture nothing is exchanged.

    Raises:
        ValueError: at the end of the block or the beginning of a later one, with the same text on every rank, where a
            rank raised TypeError or ValueError in the block or where signatures or lengths differ.
    """

    HEADER_BYTES = 512  # of the text
    MOST_CHANGES = 256
    """What a group remembers of the order of signatures; beyond it forgets all, on every rank at the same call."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.signature, self._lengths = group, "", None

    def __enter__(self) -> "CollectiveCheck":
        self.look(self.group)
        return self

    def __exit__(self, exc_type, error, traceback) -> bool:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing or error is not None and not isinstance(error, (TypeError, ValueError)):
            return False
        text, members = "!" + str(error) if error is not None else self.signature, members_a_node(self.group)
        if error is None and members > 1:  # how rows travel between nodes depends on it
            text += f", {members} ranks a node"
        if _failures:
            text = _text_of_failure(self.group) or text
        on_host = dist.get_backend(self.group) == "gloo" or not torch.cuda.is_available()
        device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
        message = _header(text, self.HEADER_BYTES, self.HEADER_BYTES + 8 * _FACTS, device)
        if self._lengths is not None and error is None:
            facts = _facts_of_lengths(*self._lengths, self.group.size()).to(device)
            message = torch.cat((message[:self.HEADER_BYTES], facts.view(torch.uint8)))
        headers = all_gather(message, self.group, "collective check")
        calls = _groups.get(self.group) or _groups.setdefault(self.group, _Calls())
        foretold = calls.after.get(calls.runs, calls.runs[2])  # the next signature, if all is as before
        if error is None and self.signature == foretold and device.type in READ_LATER:
            calls.unread.append((*_read_later(headers, device), message))
        else:
            self.look(self.group, wait=True)  # ranks that failed then are not here
            _check(self.group, headers.wait(), error)
        calls.add(self.signature)
        return False

    def compare_lengths(self, cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
        """Has packed sequences' lengths checked and compared: on the device, once for all layers of a batch.
        ``cu_seqlens``: int32 or int64 ``[B + 1]``, from 0 to ``total``, the tokens of all ranks; each length a multiple
        of twice the group's size and at most ``max_seqlen``."""
        self._lengths = cu_seqlens, max_seqlen, total

    @classmethod
    def look(cls, group: dist.ProcessGroup | None = None, wait: bool = False) -> None:
        """Raises ValueError where messages that are here by now, or with ``wait`` all, show that ranks disagree. In all
        groups by default: who waits in one may do so since another one's ranks disagreed."""
        for each in list(_groups) if group is None else [group]:
            unread = _groups[each].unread if each in _groups else ()
            while unread and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                event, rows, *_ = unread[0]
                if wait or len(unread) > _MOST_UNREAD:
                    event.synchronize()
                if not event.query():
                    break
                unread.popleft()
                _check(each, rows)


class _Calls:
    """A group's calls so far: as long as the ranks agree, the same on all of them."""

    def __init__(self):
        self.runs: tuple = None, 0, None, 0  # the last two signatures that differ, and how many calls in a row had each
        self.after: dict[tuple, str] = {}  # what came after such runs the last time, where it was another signature
        self.unread: deque = deque()  # messages on their way, the oldest first

    def add(self, signature: str) -> None:
        last, times = self.runs[2:]
        if signature == last:
            self.after.pop(self.runs, None)
            self.runs = *self.runs[:2], last, times + 1
            return
        if len(self.after) >= CollectiveCheck.MOST_CHANGES:
            self.after.clear()
        self.after[self.runs] = signature
        self.runs = last, times, signature, 1


_groups: WeakKeyDictionary[dist.ProcessGroup, _Calls] = WeakKeyDictionary()
_failures: list[tuple[set[int], str]] = []  # of schedules: ranks that are to hear of it, and what it was


def note_failure(group: dist.ProcessGroup | Sequence[dist.ProcessGroup], error: BaseException) -> None:
    """Has a schedule's error here reach the other ranks: they do not wait for it, and raise by their next call but one;
    by exchanges in symmetric memory. Collectives of the group's library that others have begun never end."""
    for each in group if isinstance(group, Sequence) else [group]:
        if abandon(each):
            _failures.append((set(dist.get_process_group_ranks(each)),
                              f"!attention failed before, in the middle of a call: {type(error).__name__}: {error}"))


def _text_of_failure(group: dist.ProcessGroup) -> str | None:
    """What failed here among ranks of the group, once."""
    ranks = set(dist.get_process_group_ranks(group))
    texts = [text for failed, text in _failures if failed <= ranks]
    _failures[:] = [x for x in _failures if not x[0] <= ranks]
    return texts[0] if texts else None


def _check(group: dist.ProcessGroup, rows: Tensor, error: Exception | None = None) -> None:
    """Raises ValueError unless every rank's message is good and says the same; the group then begins anew."""
    texts, facts, problems, text_bytes = [], [], [], CollectiveCheck.HEADER_BYTES
    for row in rows.view(group.size(), -1).cpu():
        text = bytes(row[:text_bytes].tolist()).rstrip(b"\0").decode("utf-8", "ignore")
        lengths = row[text_bytes:].view(torch.int64).tolist()
        problem = text[1:] if text.startswith("!") else ""
        if any(lengths) and not problem:
            problem = _problem_of_lengths(lengths, group.size())
        texts.append(text)
        facts.append(lengths)
        problems.append(problem)
    alike = texts.count(texts[0]) == facts.count(facts[0]) == len(texts)
    if any(problems) or not alike:
        _groups.pop(group, None)
        abandon(group)
    if any(problems):
        raise ValueError("; ".join(f"context parallel rank {rank}: {problem}"
                                   for rank, problem in enumerate(problems) if problem)) from error
    if not alike:
        each = "; ".join(f"rank {rank}: {t}{_text_of_lengths(f)}" for rank, (t, f) in enumerate(zip(texts, facts)))
        raise ValueError("all ranks of a context parallel group must call attention with the same shapes, dtypes "
                         f"and MoBA settings, got {each}. Check the lengths that the data loader gives each rank")


def _facts_of_lengths(cu_seqlens: Tensor, max_seqlen: int, total: int, size: int) -> Tensor:
    """int64: total, sequences, max_seqlen, checksum, last; place (-1: none) and value of a bad length; first values."""
    stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream if cu_seqlens.is_cuda else None

    def build() -> Tensor:
        cu = cu_seqlens.long()
        lengths = cu.diff()
        bad = (lengths % (2 * size) != 0) | (lengths < 0) | (lengths > max_seqlen)
        at = bad.int().argmax(0, keepdim=True)
        mixed = (cu + 1) * -7046029254386353131
        checksum = ((mixed ^ (mixed >> 29)) * (2 * torch.arange(cu.numel(), device=cu.device) + 1)).sum(0, keepdim=True)
        host = [cu.new_full((1,), x) for x in (total, lengths.numel(), max_seqlen)]  # filled: nothing is copied
        first = torch.nn.functional.pad(cu[:_FIRST], (0, max(0, _FIRST - cu.numel())))
        return torch.cat((*host, checksum, cu[-1:], torch.where(bad.any(), at, -1), lengths.gather(0, at), first))

    key = "facts", max_seqlen, total, size, stream
    return remembered(cu_seqlens, key, build) if is_unobserved(cu_seqlens) else build()


def _problem_of_lengths(facts: list[int], size: int) -> str:
    total, _, max_seqlen, _, last, at, length, first, *_ = facts
    if first != 0 or last != total:
        return (f"cu_seqlens must run from 0 to the tokens of all context parallel ranks, {total}, got {first} to "
                f"{last}")
    if at < 0 or not total:
        return ""
    if length < 0:
        return f"cu_seqlens must not decrease, got length {length} of packed sequence {at}"
    if length > max_seqlen:
        return f"max_seqlen must be at least the longest sequence, got {max_seqlen}, packed sequence {at} has {length}"
    return (f"the length of packed sequence {at} must be a multiple of 2 * context_parallel_size = {2 * size}, got "
            f"{length}: pad each packed sequence")


def _text_of_lengths(facts: list[int]) -> str:
    total, number, max_seqlen, checksum, *_ = facts
    if not total:
        return ""
    values = facts[-_FIRST:][:number + 1]
    return (f", {number} sequences, max_seqlen {max_seqlen}, cu_seqlens {values}{'...' if number >= _FIRST else ''} "
            f"(checksum {checksum % 2 ** 64:x})")


@cached_tensors
def _header(text: str, text_bytes: int, size: int, device: torch.device) -> Tensor:
    return torch.tensor(list(text.encode()[:text_bytes].ljust(size, b"\0")), dtype=torch.uint8, device=device)


def _read_later(headers: Pending, device: torch.device) -> tuple[torch.cuda.Event, Tensor, Tensor]:
    """When the messages are here, where, and what must be kept until then: its memory must not be used again."""
    with torch.cuda.stream(_side_stream(device)):
        rows = headers.wait()
        copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        copy.copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return event, copy, rows
