"""Short messages among processes of a host, through a file that all of them map: what the host must know of others.

Every rank has a box that it alone writes. Boxes have room for several messages, by number: a rank posts number n + 1
only after it has read everybody's n, so nobody still reads what it writes over.
"""
from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable

_HEADER = struct.Struct("<QII")  # number, bytes, checksum
_ROOM = 4
BOX_BYTES = 16384  # of a message with its header, at most


class Mail:
    """The boxes of a group, in ``memory`` of :meth:`bytes_needed` bytes that all ranks share, zeros at first."""

    def __init__(self, rank: int, size: int, memory, timeout_s: float):
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._memory = memoryview(memory)

    @staticmethod
    def bytes_needed(size: int) -> int:
        return size * _ROOM * BOX_BYTES

    def post(self, number: int, message: bytes) -> None:
        """Leaves a message for all others; numbers are 1, 2, ... on every rank."""
        at = self._box(self._rank, number)
        if len(message) > BOX_BYTES - _HEADER.size:
            raise ValueError(f"message must have at most {BOX_BYTES - _HEADER.size} bytes, got {len(message)}")
        self._memory[at + _HEADER.size:at + _HEADER.size + len(message)] = message
        _HEADER.pack_into(self._memory, at, number, len(message), _checksum(number, message))

    def take_back(self, number: int) -> None:
        """Removes this rank's message, which is of no use any more."""
        _HEADER.pack_into(self._memory, self._box(self._rank, number), 0, 0, 0)

    def read(self, number: int, rank: int, what: str, look: Callable[[], None] = lambda: None) -> bytes:
        """Another rank's message, which is part of ``what``; looks while it waits whether waiting makes sense."""
        at, deadline = self._box(rank, number), None
        while True:
            found, length, checksum = _HEADER.unpack_from(self._memory, at)
            if found == number and length <= BOX_BYTES - _HEADER.size:
                message = bytes(self._memory[at + _HEADER.size:at + _HEADER.size + length])
                if checksum == _checksum(number, message):  # all of it is here, in whatever order it was seen
                    return message
            now = time.monotonic()
            deadline = now + self._timeout_s if deadline is None else deadline
            if now > deadline:
                raise RuntimeError(f"{what}: rank {rank} of {self._size} did not come within {self._timeout_s:.0f} s: "
                                   "it failed, hangs or is slower than the process group's timeout")
            look()
            time.sleep(0 if now < deadline - self._timeout_s + 0.002 else 50e-6)

    def _box(self, rank: int, number: int) -> int:
        return (rank * _ROOM + number % _ROOM) * BOX_BYTES


def _checksum(number: int, message: bytes) -> int:
    return zlib.crc32(message, number & 0xFFFFFFFF)
