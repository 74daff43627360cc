"""What symmetric memory asks of torch's private interface and of CUDA: arenas, copies and signals on two streams."""
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def new_arena(nbytes: int, device: torch.device) -> Tensor:
    """uint8; not from a pool, which would hand it out again while others have it mapped."""
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)


def addresses_of_all(arena: Tensor, group: dist.ProcessGroup) -> tuple[list[int], Any]:
    """Where this process sees every rank's arena, and what must be kept for that; collective."""
    from torch.distributed._symmetric_memory import rendezvous

    handle = rendezvous(arena, group.group_name)
    return list(handle.buffer_ptrs), handle


Copy = tuple[tuple[int, int], tuple[int, int], int, int]
"""To, from, rows and bytes of a row; an end is an address, and bytes from row to row."""


class CopyEngines:
    """Copies and signals of one GPU, on a stream for what others send and wait for and one for what stays here.

    An exchange that is not done ``timeout_s`` after it was issued ends the process.
    """

    def __init__(self, device: torch.device, timeout_s: float):
        from cuda.bindings import driver, runtime

        from ...kernels import copying  # needs Triton
        self._driver, self._runtime, self._kernels, self._timeout_s = driver, runtime, copying, timeout_s
        self._current: torch.cuda.Stream | None = None
        # of high priority: what they wait for must not stand behind kernels that were launched first
        self.remote, self.local = (torch.cuda.Stream(device, priority=-1) for _ in range(2))

    def begin(self, after: torch.cuda.Event | None) -> None:
        """What follows on both streams comes after ``after``, or else after what is on the current stream now.

        Where another stream was the current one before, all that it has to do comes before too: it may use arenas.
        """
        current = torch.cuda.current_stream()
        if self._current not in (None, current):
            current.wait_stream(self._current)
        self._current = current
        ready = current.record_event() if after is None else after
        self.remote.wait_event(ready)
        self.local.wait_event(ready)

    def end(self, what: str, finish: Callable[[], None] | None = None, keep: Any = None) -> torch.cuda.Event:
        """After everything issued so far, and ``finish``; watched by the name ``what``, keeps ``keep`` until then."""
        self.local.wait_event(self.remote.record_event())
        if finish is not None:
            with torch.cuda.stream(self.local):
                finish()
        done = self.local.record_event()
        _unfinished().append((time.monotonic() + self._timeout_s, done, what, keep))
        return done

    def attempt(self, arenas: Sequence[int], rank: int, zeros: int) -> None:
        """Does once what exchanges do, so that what this driver, GPU or Triton refuses is refused here, and waits.

        ``zeros``: the place of 32 bytes in every arena that are zeros, and stay it, as those at its start do.
        """
        for arena in arenas:
            self.signal(arena, 0)
            self.copy(self.remote, (arenas[rank] + zeros, 16), (arena + zeros + 16, 16), 1, 16)
        self.wait(self.local, arenas[rank], 0)
        self.place(self.local, (arenas[rank] + zeros, 16), (arenas[rank] + zeros + 16, 16), 1, 16)
        torch.cuda.synchronize()

    def copy(self, stream: torch.cuda.Stream, target: tuple, source: tuple, rows: int, width: int) -> None:
        """A :data:`Copy`."""
        _call(self._runtime.cudaMemcpy2DAsync, *target, *source, width, rows,
              self._runtime.cudaMemcpyKind.cudaMemcpyDefault, stream.cuda_stream)

    def place(self, stream: torch.cuda.Stream, target: tuple, source: tuple, rows: int, width: int) -> None:
        """One within this GPU, by a kernel of few blocks where it can: CUDA's own take all of the GPU."""
        if self._kernels.copyable(rows, width, *target, *source):
            self._kernels.copy_rows(source[0], target[0], rows, width, source[1], target[1], stream)
        else:
            self.copy(stream, target, source, rows, width)

    def signal(self, address: int, number: int) -> None:
        """Writes a number, mod 2^32, when everything before on the remote stream is done and seen by all GPUs."""
        _call(self._driver.cuStreamWriteValue32, self.remote.cuda_stream, address, number & 0xFFFFFFFF, 0)

    def wait(self, stream: torch.cuda.Stream, address: int, number: int) -> None:
        """The stream waits until the number at the address is this one, or up to 2^31 more."""
        _call(self._driver.cuStreamWaitValue32, stream.cuda_stream, address, number & 0xFFFFFFFF, 0)


def _call(function: Callable, *args) -> None:
    error, = function(*args)
    if int(error):
        raise RuntimeError(f"{function.__name__} failed with error {int(error)}")


@functools.lru_cache(maxsize=None)
def _unfinished() -> deque:
    """(deadline, event, what it is the end of, what to keep until then) of exchanges, which a thread watches."""
    exchanges: deque = deque()
    threading.Thread(target=_watch, args=(exchanges,), daemon=True, name="moba context parallel watch").start()
    return exchanges


def _watch(exchanges: deque) -> None:
    from cuda.bindings import runtime

    # a query from this thread must not spoil a CUDA graph that another one captures
    runtime.cudaThreadExchangeStreamCaptureMode(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
    while True:
        look(exchanges)
        time.sleep(0.5)


def look(exchanges: deque) -> None:
    """Forgets those that are done; ends the process where one is late, as NCCL would: streams would wait for ever."""
    for _ in range(len(exchanges)):
        deadline, done, what, keep = exchanges.popleft()
        if done.query():
            continue
        if time.monotonic() > deadline:
            print(f"moba_megatron: {what} was not done in time: another rank failed, hangs or is slower than the "
                  "process group's timeout. This process ends", file=sys.stderr, flush=True)
            os._exit(1)
        exchanges.append((deadline, done, what, keep))
