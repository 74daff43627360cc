"""Exchanges by copy engines without any: driver calls on host memory, in one process in any order, and among processes.

The stand-in reads the same structures that the CUDA driver would, so what is tested is which bytes go where, in what
order they may be written, and that nothing waits for what comes after it.
"""
import ctypes
import itertools
import math
import mmap
import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import tests.context_parallel.test_context_parallel as cp
from moba_megatron.context_parallel import Sequences, all_to_all, context_parallel_attention, record_waits
from moba_megatron.context_parallel.transport import exchange as exchange_module
from moba_megatron.context_parallel.transport.copy_engines import CopyEngines, _MemoryOperation, _Rectangle
from moba_megatron.context_parallel.transport.mail import Mail
from moba_megatron.context_parallel.transport.moves import Copy, exchange_of, pair_of, plan_exchange
from moba_megatron.context_parallel.transport.peers import Peers, peers_for


class HostDriver:
    """Driver calls as closures for ``enqueue(stream, ready, run)``; an operation runs once it is ready."""

    def __init__(self, enqueue):
        self._enqueue = enqueue

    def cuMemcpy3DBatchAsync_v2(self, number, address, flags, stream):
        forms = list((_Rectangle * number).from_buffer_copy((_Rectangle * number).from_address(address)))
        assert all(x.source.pitch >= x.width <= x.target.pitch and x.depth == 1 for x in forms)
        random.shuffle(forms)  # a batch has no order

        def run():
            for x in forms:
                for row in range(x.height):
                    ctypes.memmove(x.target.pointer + row * x.target.pitch, x.source.pointer + row * x.source.pitch,
                                   x.width)

        self._enqueue(stream, lambda: True, run)
        return 0

    def cuStreamBatchMemOp_v2(self, stream, number, address, flags):
        for x in (_MemoryOperation * number).from_address(address):
            at, value = ctypes.c_uint32.from_address(x.address), x.value
            if x.operation == 1:
                self._enqueue(stream, lambda at=at, value=value: (at.value - value) & 0x80000000 == 0, lambda: None)
            else:
                self._enqueue(stream, lambda: True, lambda at=at, value=value: setattr(at, "value", value))
        return 0


class Done:
    """A handle whose copies are done, or not yet."""

    def wait(self):
        pass


class Event:
    """An event that knows whether it has been recorded."""

    recorded = False

    def record(self):
        self.recorded = True


class HostEngines(CopyEngines):
    """The engines of a simulated GPU, which has two queues, or one for everything."""

    pushing, placing = 1, 2

    def __init__(self, one_queue=False):
        self.queues, self._operations, self.early, self._streams = {1: [], 2: []}, {}, 0, []
        if one_queue:
            self.queues[2] = self.queues[1]
        self._library = HostDriver(lambda stream, *operation: self.queues[stream].append(operation))

    @staticmethod
    def event():
        return Event()

    def begin(self, after=None):
        if after is not None:
            assert after.recorded, "streams do not wait for an event that is recorded later"
            self.early += 1

    def end(self, what):
        return Done()


class EagerEngines(HostEngines):
    """Engines of this process that run every call at once and wait for other processes: one queue, no lookahead."""

    def __init__(self):
        super().__init__()
        self._library = HostDriver(self._run)

    def _run(self, stream, ready, run):
        deadline = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < deadline, "another rank does not come"
            time.sleep(0)
        run()


class HostMemory:
    """Tensors of this process, for others in it."""

    DESCRIPTION = 8

    def empty(self, shape, dtype):
        return torch.full(shape, 7.0).to(dtype)

    def describe(self, x):
        return x.data_ptr().to_bytes(8, "little")

    def address(self, description):
        return int.from_bytes(description, "little")


class FileMemory:
    """Tensors in files that all processes map, one a process; nothing is used twice.

    Args:
        folder: of the files.
        number: of this process.
    """

    DESCRIPTION = 16
    SIZE = 1 << 28

    def __init__(self, folder, number):
        self._folder, self._number, self._maps, self._used = folder, number, {}, 0
        with open(folder / f"memory{number}", "wb") as file:
            file.truncate(self.SIZE)

    def empty(self, shape, dtype):
        out = torch.frombuffer(self._map(self._number), dtype=dtype, count=math.prod(shape), offset=self._used)
        self._used += -(-out.nbytes // 64) * 64
        return out.fill_(7).view(shape)

    def describe(self, x):
        return struct.pack("<QQ", self._number, x.data_ptr() - self._base(self._number))

    def address(self, description):
        number, offset = struct.unpack("<QQ", description)
        return self._base(number) + offset

    def _base(self, number):
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map(number)))

    def _map(self, number):
        if number not in self._maps:
            with open(self._folder / f"memory{number}", "r+b") as file:
                self._maps[number] = mmap.mmap(file.fileno(), 0)
        return self._maps[number]


def in_process(size, one_queue=False):
    """Peers of simulated GPUs, their engines, their flags."""
    flags = [torch.zeros(Peers.flag_bytes(size), dtype=torch.uint8) for _ in range(size)]
    engines = [HostEngines(one_queue) for _ in range(size)]
    boxes = bytearray(Mail.bytes_needed(size))
    return [Peers(r, [x.data_ptr() for x in flags], engines[r], HostMemory(), Mail(r, size, boxes, 60))
            for r in range(size)], engines, flags


def as_hosts(issue, size):
    """Calls ``issue(rank)`` for all ranks at the same time; their results."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(issue, range(size)))


def run_in_any_order(all_engines, chance):
    """Runs operations of all queues of all GPUs, each queue in order, until there is none."""
    queues = [queue for engines in all_engines for queue in {id(q): q for q in engines.queues.values()}.values()]
    while any(queues):
        ready = [queue for queue in queues if queue and queue[0][0]()]
        assert ready, "all queues wait: a deadlock"
        chance.choice(ready).pop(0)[1]()


def local_parts(whole, rows, parts):
    """This rank's rows as ``[parts, T, h, D]``, a strided view that begins in the middle of a tensor."""
    local = whole[rows.own_rows]
    fused = torch.cat((local, local.flip(0)), 1)  # rows twice as long
    return fused[:, :local.shape[1]].unflatten(1, (parts, -1))[:, :, 1:].transpose(0, 1)


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("size, parts, batch", [(2, 2, 1), (2, 1, 2), (3, 3, 1), (4, 4, 1), (4, 2, 1), (4, 1, 2)])
def test_bytes_go_where_they_belong(size, parts, batch, one_queue):
    """Many exchanges of different sizes under way at once, GPUs that run in any order."""
    generator = torch.Generator().manual_seed(0)
    peers, engines, _ = in_process(size, one_queue)
    sequences = Sequences.uniform(2 * size * 5, batch, torch.device("cpu"))
    rows = [sequences.rows(size, r) for r in range(size)]
    dims, rounds = (8, 6), []
    for heads_a_part, dtype in ((3, torch.bfloat16), (2, torch.float32), (5, torch.float64)) * 2:
        wholes = [torch.randn(rows[0].total, parts * heads_a_part, d, generator=generator).to(dtype) for d in dims]
        made = [[torch.randn(rows[0].total, heads_a_part, d, generator=generator).to(dtype) for d in dims]
                for _ in range(size)]
        rounds.append((heads_a_part, dtype, wholes, made))

    def issue(r):
        checks = []
        for heads_a_part, dtype, wholes, made in rounds:
            views = [local_parts(w, rows[r], parts) for w in wholes]
            mine = [w.unflatten(1, (parts, -1))[:, r * parts // size, 1:] for w in wholes]
            checks.append((peers[r].fetch(rows[r], views, "in"), mine))
            if parts == size:
                outs = [peers[r].empty((rows[r].local, size * heads_a_part * 2, d), dtype) for d in dims]
                places = [x.unflatten(1, (size, -1))[:, :, 1:1 + heads_a_part].transpose(0, 1) for x in outs]
                wanted = [torch.full_like(x, 7) for x in outs]
                for x, i in itertools.product(range(size), range(len(dims))):
                    wanted[i].unflatten(1, (size, -1))[:, x, 1:1 + heads_a_part] = made[x][i][rows[r].own_rows]
                checks.append((peers[r].deliver(rows[r], made[r], places, "out").then(lambda _, o=outs: o), wanted))
            wanted = [torch.stack([made[x][i][rows[r].own_rows] for x in range(size) if x != r])
                      for i in range(len(dims))]
            checks.append((peers[r].collect(rows[r], made[r], "out"), wanted))
        return checks

    checks = as_hosts(issue, size)
    run_in_any_order(engines, random.Random(size * 10 + parts))
    for pending, wanted in itertools.chain(*checks):
        for a, b in zip(pending.wait(), wanted, strict=True):
            assert torch.equal(a, b)
    assert {p._exchanges for p in peers} == {len(checks[0])} and len(checks[0]) >= 12


def test_nothing_is_written_before_the_receiver_is_ready():
    """A rank whose tensor is still in use holds the others' copies back."""
    peers, engines, _ = in_process(2)
    rows = [Sequences.uniform(16, 1, torch.device("cpu")).rows(2, r) for r in range(2)]
    x = torch.randn(16, 2, 8)
    results = as_hosts(lambda r: peers[r].fetch(rows[r], [x[rows[r].own_rows][None]], "in"), 2)
    late, *engines[1].queues[1] = engines[1].queues[1]  # rank 1's "ready"
    held = engines[1].queues[1][:]
    engines[1].queues[1].clear()
    outs = results[1]._finish(None)[0]
    before = outs.clone()
    for queue in (engines[0].queues[1], engines[1].queues[2], engines[0].queues[2]):
        while queue and queue[0][0]():
            queue.pop(0)[1]()
    assert torch.equal(outs[rows[0].own_rows], before[rows[0].own_rows]), "rank 0 pushed before rank 1 was ready"
    assert engines[0].queues[1], "rank 0 did not wait"
    engines[1].queues[1] += held
    late[1]()
    run_in_any_order(engines, random.Random(1))
    assert all(torch.equal(pending.wait()[0], x) for pending in results)


class CanaryMemory(HostMemory):
    """Tensors with other memory behind them, which nothing may write to."""

    def __init__(self):
        self.blocks = []

    def empty(self, shape, dtype):
        block = torch.full((math.prod(shape) + 4096,), 7.0).to(dtype)
        self.blocks.append(block[-4096:])
        return block[:-4096].view(shape)


# what one rank exchanges and what another one does: (sequences' length, number, heads, dtype, stage)
DIFFERENT = {"length": ((48, 1, 4, torch.float32, "in"), (24, 1, 4, torch.float32, "in")),
             "number": ((48, 1, 4, torch.float32, "in"), (24, 2, 4, torch.float32, "in")),
             "heads": ((48, 1, 4, torch.float32, "in"), (48, 1, 8, torch.float32, "in")),
             "dtype": ((48, 1, 4, torch.bfloat16, "in"), (48, 1, 4, torch.float32, "in")),
             "stage": ((48, 1, 4, torch.float32, "fwd gather"), (48, 1, 4, torch.float32, "bwd gather"))}


@pytest.mark.parametrize("size, odd", [(2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("way", ["fetch", "collect", "deliver"])
@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ(what, way, size, odd):
    """All raise the same error in that exchange, nothing is written beyond a tensor, and later exchanges are right."""
    peers, engines, _ = in_process(size)
    for p in peers:
        p._memory = CanaryMemory()

    def exchange(rank, length, number, heads, dtype, stage):
        rows = Sequences.uniform(length * size, number, torch.device("cpu")).rows(size, rank)
        x = torch.arange(rows.total * heads * 8).view(rows.total, heads, 8).to(dtype)
        if way == "fetch":
            return peers[rank].fetch(rows, [x[rows.own_rows][None]], stage), x
        if way == "collect":
            return peers[rank].collect(rows, [x], stage), x[rows.own_rows].expand(size - 1, -1, -1, -1)
        out = peers[rank].empty((size, rows.local, heads, 8), dtype)
        done = peers[rank].deliver(rows, [x], [out], stage).then(lambda _: [torch.cat((out[:rank], out[rank + 1:]))])
        return done, x[rows.own_rows].expand(size - 1, -1, -1, -1)

    def error_of(rank):
        with pytest.raises(ValueError, match="must exchange the same rows, got rank 0: .*; rank 1: ") as caught:
            exchange(rank, *DIFFERENT[what][rank == odd])
        return str(caught.value)

    good = DIFFERENT[what][0]
    pending = as_hosts(lambda r: exchange(r, *good), size)  # still under way when ranks differ
    assert len(set(as_hosts(error_of, size))) == 1
    pending += as_hosts(lambda r: exchange(r, *good), size)
    run_in_any_order(engines, random.Random(1))
    for done, wanted in pending:
        assert torch.equal(done.wait()[0], wanted)
    assert all((block == 7).all() for p in peers for block in p._memory.blocks)


def test_a_rank_that_raised_before_an_exchange():
    """The one that waits for it raises at once, and both can go on: nobody takes the message that was of no use."""
    peers, engines, _ = in_process(2)
    rows = [Sequences.uniform(16, 1, torch.device("cpu")).rows(2, r) for r in range(2)]
    x = torch.randn(16, 2, 8)

    def look():
        raise ValueError("context parallel rank 1: odd")

    with mock.patch.object(peers[0], "_look", look), pytest.raises(ValueError, match="rank 1: odd"):
        peers[0].fetch(rows[0], [x[rows[0].own_rows][None]], "in")
    with pytest.raises(ValueError, match="odd"):  # nor can rank 1 read it any more
        peers[1]._mail.read(1, 0, "an exchange", look)
    results = as_hosts(lambda r: peers[r].fetch(rows[r], [x[rows[r].own_rows][None]], "in"), 2)
    run_in_any_order(engines, random.Random(1))
    assert all(torch.equal(pending.wait()[0], x) for pending in results)


def test_numbers_wrap_around():
    """Exchange numbers pass 2^32 and the waits still hold."""
    peers, engines, flags = in_process(2)
    for m, p in zip(flags, peers):
        p._exchanges = 2 ** 32 - 3
        m.view(torch.int32)[:] = -3
    rows = [Sequences.uniform(16, 1, torch.device("cpu")).rows(2, r) for r in range(2)]
    x = torch.randn(16, 2, 64, dtype=torch.float64)
    results = as_hosts(lambda r: [peers[r].fetch(rows[r], [x[rows[r].own_rows][None]], "in") for _ in range(8)], 2)
    run_in_any_order(engines, random.Random(1))
    assert all(torch.equal(pending.wait()[0], x) for both in results for pending in both)
    assert peers[0]._exchanges > 2 ** 32 + 4


def test_copies_are_few_and_long():
    """Two ranks: a copy for each run of rows, and rows that are neighbours in both tensors are one row."""
    rows = [Sequences.uniform(64, 1, torch.device("cpu")).rows(2, r) for r in range(2)]
    local, whole = torch.empty(32, 4, 8), torch.empty(64, 2, 8)
    pair = pair_of(whole, local.unflatten(1, (2, 2)).transpose(0, 1))
    plans = [plan_exchange(exchange_of(r, [pair])) for r in rows]
    assert plans[1].push == (Copy(1, 0, 128, 2, 16 * 64, 64, 32, 64),)  # the middle
    assert [len(p.push) for p in plans] == [len(p.own) for p in plans] == [2, 1]
    back = plan_exchange(exchange_of(rows[0], [pair], back=True))
    assert back.push == (Copy(0, 16 * 64, 64, 2, 0, 128, 32, 64),)
    contiguous = pair_of(whole, torch.empty(1, 32, 2, 8))
    assert plan_exchange(exchange_of(rows[1], [contiguous])).push == (Copy(1, 0, 2048, 2, 1024, 2048, 1, 2048),)


def test_mail_of_a_rank_that_does_not_come():
    boxes = bytearray(Mail.bytes_needed(2))
    mail = [Mail(r, 2, boxes, 0.05) for r in range(2)]
    mail[1].post(1, b"first")
    mail[1].post(2, b"")
    assert mail[0].read(1, 1, "an exchange") == b"first" and mail[0].read(2, 1, "an exchange") == b""
    with pytest.raises(RuntimeError, match="an exchange: rank 1 of 2 did not come within 0 s"):
        mail[0].read(3, 1, "an exchange")
    boxes[mail[0]._box(1, 1) + 16] ^= 1  # half written
    with pytest.raises(RuntimeError, match="did not come"):
        mail[0].read(1, 1, "an exchange")
    with pytest.raises(ValueError, match="message must have at most 16368 bytes, got 20000"):
        mail[0].post(4, bytes(20000))


def test_off_cuda_the_library_moves_rows():
    assert peers_for(Sequences.uniform(8, 1, torch.device("cpu")).rows(2, 0), None, torch.device("cpu")) is None


class SharedPeers:
    """Peers of this process in several groups, in memory that the other processes map."""

    def __init__(self, folder, rank):
        self.peers, self._folder, self._memory = {}, folder, FileMemory(folder, rank)

    def peers_for(self, rows, group, device):
        if rows.runs is None or rows.size == 1 or device.type == "meta":
            return None
        if group not in self.peers:
            rank, size = dist.get_rank(group), group.size()
            path = self._folder / f"mail{dist.get_rank()}_{len(self.peers)}"
            if rank == 0:
                path.write_bytes(bytes(Mail.bytes_needed(size)))
            flags = self._memory.empty((Peers.flag_bytes(size),), torch.uint8).zero_()
            told = [None] * size
            dist.all_gather_object(told, (path, self._memory.describe(flags)), group)
            with open(told[0][0], "r+b") as file:
                mail = Mail(rank, size, mmap.mmap(file.fileno(), 0), 60)
            addresses = [self._memory.address(place) for _, place in told]
            self.peers[group] = Peers(rank, addresses, EagerEngines(), self._memory, mail, flags)
        return self.peers[group]


def with_peers(rank, size, folder):
    """Cases of the gloo suite, exchanged through shared memory; bytes sent; how many exchanges there were."""
    shared = SharedPeers(folder, rank)
    all_to_all.peers_for = exchange_module.peers_for = shared.peers_for
    cp.CASES = [case for case in cp.CASES if case[0] in CASES]
    errors = cp.compare_with_single_rank(rank, size)
    local = [torch.randn(16, h, 8) for h in (8, 4, 4, 8)]
    leaves = [x.requires_grad_() for x in local[:3]]
    sent = {}
    for comm_type in ("all_gather", "a2a"):
        with record_waits() as record:
            o = context_parallel_attention(*leaves, Sequences.uniform(64, 1, torch.device("cpu")), 8, 3,
                                           dist.group.WORLD, comm_type=comm_type, head_groups=2, backend="reference")
            torch.autograd.grad(o, leaves, local[3])
        sent[comm_type] = {stage: entry["sent_bytes"] for stage, entry in record.summary().items()}
    dist.barrier()
    early = sum(p._engines.early for p in shared.peers.values())
    return errors, None, sent, early, sum(p._exchanges for p in shared.peers.values())


CASES = ("aligned_groups", "blocks_cut", "long_chunks_cut", "bf16", "one_chunk", "packed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(with_peers, 4, folder, folder)


def test_equals_single_rank(results):
    """Whole attention, every communication type, P = 2, 3, 4, head groups, fewer kv heads than ranks."""
    errors = {key: value for result, *_ in results for key, value in result.items()}
    assert {key[0] for key in errors} == set(CASES) and {key[1] for key in errors} == {2, 3, 4}
    for key, values in errors.items():
        dtype = next(case[-1] for case in cp.CASES if case[0] == key[0])
        assert max(values) <= cp.TOLERANCE[dtype], (key, values)
    assert all(exchanges > 100 for *_, exchanges in results), "the exchanges went another way"
    assert all(early for *_, early, _ in results), f"dk and dv waited for dq: {[x[-2] for x in results]}"


def test_bytes_sent(results):
    cp.test_bytes_sent([result[:3] for result in results])
