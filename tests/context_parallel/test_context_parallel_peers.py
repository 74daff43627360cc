"""Exchanges in symmetric memory without any: in host memory, in one process in any order, and among processes.

What is tested is which bytes go where, in what order they may be read, that nothing waits for what comes after it, and
that a rank writes into no arena but its own, and its numbers alone into others' signal pads.
"""
import ctypes
import itertools
import mmap
import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import tests.context_parallel.test_context_parallel as cp
from moba_megatron.context_parallel import Sequences, all_gather, all_to_all, context_parallel_attention, record_waits
from moba_megatron.context_parallel.transport import comm
from moba_megatron.context_parallel.transport.comm import MAX_RUNS
from moba_megatron.context_parallel.transport.symmetric_memory import Peers, SymmetricMemory, aligned

CPU = torch.device("cpu")
PAD_BYTES = 2048  # of a signal pad, behind the arena, as torch's are in some versions


class Event:
    """An event that knows whether it has been recorded."""

    recorded = False

    def record(self):
        self.recorded = True

    def wait(self):
        pass

    synchronize = wait


class HostPeers(Peers):
    """Peers on a simulated GPU with two queues, or one for everything: operations run once they are ready.

    Args:
        arena: this rank's.
        one_queue: whether there is one.
    """

    remote, local = 0, 1

    def __init__(self, arena, one_queue=False):
        self.arena, self.early, self.copies, self.queues = arena, 0, [], [[], []]
        if one_queue:
            self.queues[1] = self.queues[0]

    def connect(self, rank, handle):
        self.rank, self.pads = rank, handle.signal_pad_ptrs
        super().connect(rank, handle)

    def _enqueue(self, stream, run, ready=lambda: True):
        self.queues[stream].append((ready, run))

    def begin(self, after=None):
        if after is not None:
            assert after.recorded, "streams do not wait for an event that is recorded later"
            self.early += 1

    def end(self, what, finish=None, keep=None):
        remote = Event()
        self._enqueue(self.remote, remote.record)
        self._enqueue(self.local, finish or (lambda: None), lambda: remote.recorded)
        return Event()

    def copy(self, stream, copies, bases, here):
        for copy in copies:
            self._copy(stream, copy, bases)

    def _copy(self, stream, copy, bases):
        rows, width, pitches = copy.rows, copy.width, copy.pitches
        assert min(pitches) >= width
        ends = target, source = [bases[i] + offset for i, offset in zip(copy.bases, copy.offsets)]
        size = self.arena.nbytes
        for r, begin in enumerate(self.arenas):
            for address, pitch in zip(ends, pitches):
                end = address + (rows - 1) * pitch + width
                if address < begin + size and end > begin:
                    assert begin <= address and end <= begin + size
                    assert r == self.rank or address == source, "written into another rank's arena"
        self.copies.append((stream, rows, width))

        def run():
            for row in range(rows):
                ctypes.memmove(target + row * pitches[0], source + row * pitches[1], width)

        self._enqueue(stream, run)

    def signal(self, address, number):
        assert address in [pad + 8 * self.rank + i for pad in self.pads for i in (0, 4)], "not a number of this rank"
        at = ctypes.c_uint32.from_address(address)
        self._enqueue(self.remote, lambda: setattr(at, "value", number & 0xFFFFFFFF))

    def wait(self, stream, address, number):
        first = self.pads[self.rank]
        assert address in range(first, first + 8 * len(self.pads), 4), "waits for what is elsewhere"
        at = ctypes.c_uint32.from_address(address)
        self._enqueue(stream, lambda: None, lambda: (at.value - number) & 0x80000000 == 0)


class EagerPeers(HostPeers):
    """Peers of this process that run every call at once and wait for other processes: one queue, no lookahead."""

    def _enqueue(self, stream, run, ready=lambda: True):
        deadline = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < deadline, "another rank does not come"
            time.sleep(0)
        run()


class HostTransport(SymmetricMemory):
    @staticmethod
    def event():
        return Event()


def in_process(size, one_queue=False, slots=1 << 16):
    """Peers of simulated GPUs, connected; arenas have a page behind them that nothing may write to."""
    arenas = [torch.full((slots + 4096,), 7, dtype=torch.uint8) for _ in range(size)]
    pads = [torch.zeros(2 * size, dtype=torch.int32) for _ in range(size)]
    peers = [HostPeers(x[:slots], one_queue) for x in arenas]
    for r, p in enumerate(peers):
        p.connect(r, SimpleNamespace(buffer_ptrs=[x.data_ptr() for x in arenas], whole=arenas[r], pads=pads,
                                     signal_pad_ptrs=[x.data_ptr() for x in pads]))
        run_in_any_order([p], random.Random(r))  # it waits for nobody
        p.copies.clear()
    return peers


def lane_bytes(lane):
    return sum(aligned(x) + MAX_RUNS * aligned(1) for x in lane)


def transports(peers, rows, *lanes):
    return [HostTransport(x, None, p, list(map(lane_bytes, lanes))) for p, x in zip(peers, rows)]


def as_hosts(issue, size):
    """Calls ``issue(rank)`` for all ranks at the same time; their results."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(issue, range(size)))


def run_in_any_order(peers, chance):
    """Runs operations of all queues of all GPUs, each queue in order, until there is none."""
    queues = [queue for p in peers for queue in {id(q): q for q in p.queues}.values()]
    while any(queues):
        ready = [queue for queue in queues if queue and queue[0][0]()]
        assert ready, "all queues wait: a deadlock"
        chance.choice(ready).pop(0)[1]()


def local_parts(whole, rows, parts):
    """This rank's rows as ``[parts, T, h, D]``, a strided view that begins in the middle of a tensor."""
    local = whole[rows.own_rows]
    fused = torch.cat((local, local.flip(0)), 1)  # rows twice as long
    return fused[:, :local.shape[1]].unflatten(1, (parts, -1))[:, :, 1:].transpose(0, 1)


def rows_of(size, batch=1, pieces=5):
    sequences = Sequences.uniform(2 * size * pieces, batch, CPU)
    return [sequences.rows(size, r) for r in range(size)]


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("size, parts, batch", [(2, 2, 1), (2, 1, 2), (3, 3, 1), (4, 4, 1), (4, 2, 1), (4, 1, 2),
                                                (8, 8, 1)])
def test_bytes_go_where_they_belong(size, parts, batch, one_queue):
    """Exchanges of every kind under way at once, GPUs that run in any order; what arrives is waited for late."""
    generator = torch.Generator().manual_seed(0)
    rows, dims, rounds = rows_of(size, batch), (8, 6), []
    for heads, dtype in ((3, torch.bfloat16), (2, torch.float32), (5, torch.float64)):
        wholes = [torch.randn(rows[0].total, parts * heads, d, generator=generator).to(dtype) for d in dims]
        made = [[torch.randn(rows[0].total, heads, d, generator=generator).to(dtype) for d in dims]
                for _ in range(size)]
        rounds.append((heads, dtype, wholes, made))
    lane = [rows[0].total * 5 * d * 8 for d in dims]
    peers = in_process(size, one_queue, 12 * lane_bytes(lane))
    for i, (heads, dtype, wholes, made) in enumerate(rounds):
        on_ranks = transports(peers, rows, *[lane] * 6)

        def issue(r):
            transport, checks = on_ranks[r], []
            views = [local_parts(w, rows[r], parts) for w in wholes]
            mine = [w.unflatten(1, (parts, -1))[:, r * parts // size, 1:] for w in wholes]
            checks.append((transport.fetch(views, "in", (0, i)), mine))
            checks.append((transport.fetch(views, "in", (1, i), lasting=False), mine))
            for lane, memory in (2, None), (3, transport.tensors((3, i), *((x.shape, dtype) for x in made[r]))):
                if parts != size:
                    continue
                outs = [torch.full((rows[r].local, size * heads * 2, d), 7.0).to(dtype) for d in dims]
                places = [x.unflatten(1, (size, -1))[:, :, 1:1 + heads].transpose(0, 1) for x in outs]
                wanted = [torch.full_like(x, 7) for x in places]
                for x, j in itertools.product(range(size), range(len(dims))):
                    wanted[j][x] = made[x][j][rows[r].own_rows]
                for x, value in zip(memory or (), made[r]):
                    x.copy_(value)
                checks.append((transport.deliver(memory or made[r], places, "out", (lane, i)), wanted))
            if parts < size and dtype == torch.float64:  # what several ranks computed is added
                places = [torch.zeros(parts, rows[r].local, heads, d, dtype=dtype) for d in dims]
                wanted = [torch.stack([sum(made[x][j][rows[r].own_rows] for x in range(size) if x * parts // size == n)
                                       for n in range(parts)]) for j in range(len(dims))]
                checks.append((transport.deliver(made[r], places, "out", (4, i)), wanted))
            sums = [torch.zeros(rows[r].local, heads, d, dtype=dtype) for d in dims]
            wanted = [sum(made[x][j][rows[r].own_rows].double() for x in range(size)).to(dtype)
                      for j in range(len(dims))]
            checks.append((transport.reduce(made[r], sums, "out", (5, i), False)[0], wanted))
            return checks

        checks = as_hosts(issue, size)
        run_in_any_order(peers, random.Random(size * 10 + parts + i))
        for pending, wanted in itertools.chain(*checks):
            for a, b in zip(pending.wait(), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0.05 if dtype == torch.bfloat16 else 1e-6, atol=1e-2)
    for p in peers:
        assert p.exchanges == 3 * len(checks[0]) - (parts < size) * 2
        assert bool((p._handle.whole[p.arena.nbytes:] == 7).all()), "written behind the arena"


def test_nothing_is_read_before_the_sender_is_ready():
    peers = in_process(2)
    rows = rows_of(2, pieces=4)
    x = torch.randn(16, 2, 8)
    on_ranks = transports(peers, rows, [x.nbytes])
    results = as_hosts(lambda r: on_ranks[r].fetch([x[rows[r].own_rows][None]], "in", (0, 0), lasting=False), 2)
    held = peers[1].queues[0][:]  # what rank 1 puts into its arena, its "ready" and what it reads
    peers[1].queues[0].clear()
    outs = results[0]._output[0]
    outs[rows[1].own_rows] = 7
    for queue in (peers[0].queues[0], peers[1].queues[1], peers[0].queues[1]):
        while queue and queue[0][0]():
            queue.pop(0)[1]()
    assert bool((outs[rows[1].own_rows] == 7).all()), "rank 0 read before rank 1 was ready"
    assert peers[0].queues[0], "rank 0 did not wait"
    peers[1].queues[0] += held
    run_in_any_order(peers, random.Random(1))
    assert all(torch.equal(pending.wait()[0], x) for pending in results)


def test_a_slot_is_not_used_again_before_all_have_read():
    """The end of an exchange, whose event later users of the slot await, comes after every rank's "done"."""
    peers = in_process(3)
    rows = rows_of(3)
    x = torch.randn(rows[0].total, 2, 8)
    on_ranks = transports(peers, rows, [x.nbytes])
    results = as_hosts(lambda r: on_ranks[r].fetch([x[rows[r].own_rows][None]], "in", (0, 0)), 3)
    queue = peers[2].queues[0]
    staged, signals = 1, 2  # one copy for both ranks, one signal for each; what follows is what rank 2 reads
    held, queue[staged + signals:] = queue[staged + signals:], []
    while ready := [q for e in peers for q in e.queues if q and q[0][0]()]:
        ready[0].pop(0)[1]()
    assert not any(e.queues[0] for e in peers) and all(e.queues[1] for e in peers), "not all wait for rank 2"
    queue += held
    run_in_any_order(peers, random.Random(1))
    assert all(torch.equal(pending.wait()[0], x) for pending in results)


@pytest.mark.parametrize("size, odd", [(2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("what", ["heads", "dtype", "length"])
def test_ranks_that_differ_stay_within_the_arenas(what, size, odd):
    """Simulated copies refuse what leaves an arena; larger than a lane is refused before anything is issued."""
    peers = in_process(size)
    rows = rows_of(size)
    wrong = rows_of(size, pieces=90) if what == "length" else rows
    lane = [rows[0].total * 2 * 8 * 4]

    def issue(r, lasting):
        mine = wrong[r] if r == odd else rows[r]
        heads, dtype = (400, torch.float32) if r == odd and what == "heads" else (2, torch.float32)
        heads, dtype = (90, torch.float64) if r == odd and what == "dtype" else (heads, dtype)
        transport = transports([peers[r]], [mine], lane)[0]
        return transport.fetch([torch.ones(1, mine.local, heads, 8, dtype=dtype)], "in", (0, 0), lasting=lasting)

    for r, lasting in itertools.product(range(size), (True, False)):
        if r == odd:
            with pytest.raises((ValueError, RuntimeError), match="in must fit its .* bytes, got |shape .* is invalid"):
                issue(r, lasting)
        else:
            issue(r, lasting)
    assert not any(peers[odd].queues)


def test_a_rank_that_gives_up_is_not_waited_for():
    """What it had issued is done; whatever the others issue beyond ends."""
    peers = in_process(3)
    rows = rows_of(3)
    x = torch.randn(rows[0].total, 2, 8)
    on_ranks = transports(peers, rows, [x.nbytes])
    results = [[on_ranks[r].fetch([x[rows[r].own_rows][None]], "in", (0, i)) for i in range(1 if r == 1 else 5)]
               for r in range(3)]
    peers[1].give_up()
    run_in_any_order(peers, random.Random(1))
    assert all(torch.equal(of_rank[0].wait()[0], x) for of_rank in results)


def test_numbers_wrap_around():
    """Exchange numbers pass 2^32 and the waits still hold."""
    peers = in_process(2)
    for p in peers:
        p.exchanges = 2 ** 32 - 3
        for pad in p._handle.pads:
            pad[:] = -3
    rows, x = rows_of(2, pieces=4), torch.randn(16, 2, 64, dtype=torch.float64)
    on_ranks = transports(peers, rows, [x.nbytes])
    results = []
    for i in range(8):
        results.append(as_hosts(lambda r: on_ranks[r].fetch([x[rows[r].own_rows][None]], "in", (0, i)), 2))
        run_in_any_order(peers, random.Random(i))
    assert all(torch.equal(pending.wait()[0], x) for both in results for pending in both)
    assert peers[0].exchanges > 2 ** 32 + 4


def test_copies_are_long():
    """Rows that are neighbours in both places are one; what is in its place already is not copied again."""
    peers = in_process(2)
    rows = rows_of(2, pieces=8)
    transport = transports(peers, rows, [1 << 12], [1 << 12])[0]
    transport.fetch([torch.ones(1, 16, 2, 8)], "in", (0, 0), lasting=False)
    assert peers[0].copies == [(0, 1, 512)] * 2 + [(0, 1, 1024)]  # two runs to the arena; the other's are neighbours
    peers[1].copies.clear()
    transports(peers, rows, [1 << 12], [1 << 12])[1].fetch([torch.ones(1, 16, 2, 8)], "in", (0, 0), lasting=False)
    assert peers[1].copies == [(0, 1, 1024), (0, 2, 512)]  # and here those of the other are not
    peers[0].copies.clear()
    transport.fetch([torch.ones(2, 16, 4, 8)[:, :, 1:3]], "in", (0, 1))
    assert sorted(peers[0].copies) == [(0, 1, 1024), (0, 16, 64), (1, 8, 64), (1, 8, 64)]
    peers[0].copies.clear()
    memory = transport.tensors((1, 0), ((32, 2, 8), torch.float32))
    transport.deliver(memory, [torch.empty(2, 16, 4, 8)[:, :, 1:3]], "out", (1, 0))
    assert peers[0].copies == [(1, 8, 64)] * 2 + [(0, 8, 64)] * 2


def mapped(path):
    """uint8, a file's bytes, which other processes may have mapped too."""
    with open(path, "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)


class SharedPeers:
    """Peers of this process in several groups, in arenas in files that the other processes map."""

    def __init__(self, folder, rank):
        self.peers, self._folder, self._rank = {}, folder, rank

    def transport_for(self, rows, group, x, lanes):
        if rows.runs is None or rows.size == 1 or x.is_meta:
            return comm.Library(rows, group)
        sizes = list(map(lane_bytes, lanes))
        nbytes = 2 * sum(sizes)
        if group not in self.peers or self.peers[group].arena.nbytes < nbytes:
            self.peers[group] = self._meet(group, nbytes)
        return HostTransport(rows, group, self.peers[group], sizes)

    def _meet(self, group, nbytes):
        path, paths = self._folder / f"arena{self._rank}_{time.monotonic_ns()}", [None] * group.size()
        path.write_bytes(bytes(nbytes + PAD_BYTES))
        dist.all_gather_object(paths, path, group)
        maps, rank = list(map(mapped, paths)), dist.get_rank(group)
        addresses, peers = [x.data_ptr() for x in maps], EagerPeers(maps[rank][:nbytes])
        peers.connect(rank, SimpleNamespace(buffer_ptrs=addresses, signal_pad_ptrs=[x + nbytes for x in addresses],
                                            maps=maps))
        if group in self.peers:
            peers.early = self.peers[group].early
        return peers


def with_peers(rank, size, folder):
    """Cases of the gloo suite, exchanged through shared memory; bytes sent; how many exchanges there were."""
    shared, counts = SharedPeers(folder, rank), []
    all_to_all.transport_for = all_gather.transport_for = shared.transport_for
    run = Peers.run
    Peers.run = lambda *args: counts.append(1) or run(*args)
    cp.CASES = [case for case in cp.CASES if case[0] in CASES]
    errors = cp.compare_with_single_rank(rank, size)
    local = [torch.randn(16, h, 8) for h in (8, 4, 4, 8)]
    leaves = [x.requires_grad_() for x in local[:3]]
    sent = {}
    for comm_type in ("all_gather", "a2a"):
        with record_waits() as record:
            o = context_parallel_attention(*leaves, Sequences.uniform(64, 1, CPU), 8, 3, dist.group.WORLD,
                                           comm_type=comm_type, head_groups=2, backend="reference")
            torch.autograd.grad(o, leaves, local[3])
        sent[comm_type] = {stage: entry["sent_bytes"] for stage, entry in record.summary().items()}
    dist.barrier()
    return errors, None, sent, sum(p.early for p in shared.peers.values()), len(counts)


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
