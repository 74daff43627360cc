"""Exchanges by copy engines without any: driver calls on host memory, in one process in any order, and among processes.

The stand-in reads the same structures that the CUDA driver would, so what is tested is which bytes go where, in what
order they may be written, and that nothing waits for what comes after it.
"""
import ctypes
import itertools
import random
import time
from multiprocessing import shared_memory

import pytest
import torch
import torch.distributed as dist
import test_context_parallel as cp
from ranks import run_ranks

from moba_megatron.context_parallel import heads, rows as rows_module
from moba_megatron.context_parallel import Sequences, context_parallel_attention, record_waits
from moba_megatron.context_parallel.copy_engines import CopyEngines, _MemoryOperation, _Rectangle
from moba_megatron.context_parallel.moves import Copy, exchange_of, pair_of, plan_exchange
from moba_megatron.context_parallel.peers import FLAG_STEP, SLOTS, Peers, peers_for


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


class Milestone:
    """An event that knows whether it has been recorded."""

    recorded = False

    def record(self):
        self.recorded = True


class HostEngines(CopyEngines):
    """The engines of a simulated GPU, which has two queues, or one for everything."""

    pushing, placing = 1, 2

    def __init__(self, one_queue=False):
        self.queues, self._operations, self.early = {1: [], 2: []}, {}, 0
        if one_queue:
            self.queues[2] = self.queues[1]
        self._library = HostDriver(lambda stream, *operation: self.queues[stream].append(operation))

    @staticmethod
    def milestone():
        return Milestone()

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


def staging_size(size, slot_bytes):
    return SLOTS * slot_bytes + 2 * size * FLAG_STEP


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
    """Many exchanges of different sizes under way at once, little staging, GPUs that run in any order."""
    chance = random.Random(size * 10 + parts)
    generator = torch.Generator().manual_seed(0)
    slot_bytes = 2048 * (size - 1)
    memory = [torch.zeros(staging_size(size, slot_bytes), dtype=torch.uint8) for _ in range(size)]
    engines = [HostEngines(one_queue) for _ in range(size)]
    peers = [Peers(r, [m.data_ptr() for m in memory], engines[r], slot_bytes=slot_bytes) for r in range(size)]
    sequences = Sequences.uniform(2 * size * 5, batch, torch.device("cpu"))
    rows = [sequences.rows(size, r) for r in range(size)]
    checks = []
    for heads_a_part, dtype in ((3, torch.bfloat16), (2, torch.float32), (5, torch.float64)) * 2:
        dims = (8, 6)
        wholes = [torch.randn(rows[0].total, parts * heads_a_part, d, generator=generator).to(dtype) for d in dims]
        for r in range(size):
            views = [local_parts(w, rows[r], parts) for w in wholes]
            mine = [w.unflatten(1, (parts, -1))[:, r * parts // size, 1:] for w in wholes]
            checks.append((peers[r].fetch(rows[r], views, "in"), mine))
        made = [[torch.randn(rows[0].total, heads_a_part, d, generator=generator).to(dtype) for d in dims]
                for _ in range(size)]
        for r in range(size):
            if parts == size:
                outs = [torch.full((rows[r].local, size * heads_a_part * 2, d), 7.0).to(dtype) for d in dims]
                places = [x.unflatten(1, (size, -1))[:, :, 1:1 + heads_a_part].transpose(0, 1) for x in outs]
                wanted = [torch.full_like(x, 7) for x in outs]
                for x, i in itertools.product(range(size), range(len(dims))):
                    wanted[i].unflatten(1, (size, -1))[:, x, 1:1 + heads_a_part] = made[x][i][rows[r].own_rows]
                checks.append((peers[r].deliver(rows[r], made[r], places, "out").then(lambda _, o=outs: o), wanted))
            wanted = [torch.stack([made[x][i][rows[r].own_rows] for x in range(size) if x != r])
                      for i in range(len(dims))]
            checks.append((peers[r].collect(rows[r], made[r], "out"), wanted))
    run_in_any_order(engines, chance)
    for pending, wanted in checks:
        for a, b in zip(pending.wait(), wanted, strict=True):
            assert torch.equal(a, b)
    assert peers[0]._pieces > 4 * SLOTS and len({p._pieces for p in peers}) == 1


def test_numbers_wrap_around():
    """Piece numbers pass 2^32 and the waits still hold."""
    memory = [torch.zeros(staging_size(2, 1024), dtype=torch.uint8) for _ in range(2)]
    engines = [HostEngines() for _ in range(2)]
    peers = [Peers(r, [m.data_ptr() for m in memory], engines[r], slot_bytes=1024) for r in range(2)]
    for m, p in zip(memory, peers):
        p._pieces = 2 ** 32 - 6
        m[SLOTS * 1024:].view(torch.int32)[:] = -6
    rows = [Sequences.uniform(16, 1, torch.device("cpu")).rows(2, r) for r in range(2)]
    x = torch.randn(16, 2, 64, dtype=torch.float64)
    results = [[p.fetch(r, [x[r.own_rows][None]], "in") for p, r in zip(peers, rows)] for _ in range(4)]
    run_in_any_order(engines, random.Random(1))
    assert all(torch.equal(pending.wait()[0], x) for both in results for pending in both)
    assert peers[0]._pieces > 2 ** 32 + 4


def test_copies_are_few_and_long():
    """Two ranks: a tensor is pushed by one copy, and rows that are neighbours in both tensors are one row."""
    rows = [Sequences.uniform(64, 1, torch.device("cpu")).rows(2, r) for r in range(2)]
    local, whole = torch.empty(32, 4, 8), torch.empty(64, 2, 8)
    pair = pair_of(whole, local.unflatten(1, (2, 2)).transpose(0, 1))
    plans = [plan_exchange(exchange_of(r, [pair], 1 << 20)) for r in rows]
    assert plans[0].pieces[0].push == (Copy(1, 64, 128, -2, 0, 64, 32, 64),)
    assert plans[0].pieces[0].place == (Copy(-1, 0, 2048, 0, 16 * 64, 2048, 1, 2048),)  # the middle
    assert len(plans[1].pieces[0].place) == 2
    assert [len(p.own) for p in plans] == [2, 1]
    with pytest.raises(ValueError, match="a row of 64 bytes does not fit into staging memory of 32 bytes"):
        plan_exchange(exchange_of(rows[0], [pair], 32))


def test_off_cuda_the_library_moves_rows():
    assert peers_for(Sequences.uniform(8, 1, torch.device("cpu")).rows(2, 0), None, torch.device("cpu")) is None


class SharedStaging:
    """Peers of this process in several groups, their staging memory shared with the other processes."""

    def __init__(self):
        self._peers, self._blocks = {}, []

    def peers_for(self, rows, group, device):
        if rows.runs is None or rows.size == 1 or device.type == "meta":
            return None
        if group not in self._peers:
            slot_bytes, rank = 1024 * (group.size() - 1), dist.get_rank(group)
            mine = shared_memory.SharedMemory(create=True, size=staging_size(group.size(), slot_bytes))
            mine.buf[:] = bytes(mine.size)
            names = [None] * group.size()
            dist.all_gather_object(names, mine.name, group)
            blocks = [mine if r == rank else shared_memory.SharedMemory(name) for r, name in enumerate(names)]
            self._blocks += [(block, block is mine) for block in blocks]
            addresses = [ctypes.addressof(ctypes.c_char.from_buffer(block.buf)) for block in blocks]
            self._peers[group] = Peers(rank, addresses, EagerEngines(), slot_bytes=slot_bytes)
        return self._peers[group]

    def unlink(self):
        for block, is_mine in self._blocks:
            if is_mine:
                block.unlink()


def with_peers(rank, size):
    """Cases of the gloo suite, exchanged through shared staging memory; bytes sent; how many pieces there were."""
    staging = SharedStaging()
    heads.peers_for = rows_module.peers_for = staging.peers_for
    cp.CASES = [case for case in cp.CASES if case[0] in CASES]
    try:
        errors = cp.compare_with_single_rank(rank, size)
        local = [torch.randn(16, h, 8) for h in (8, 4, 4, 8)]
        leaves = [x.requires_grad_() for x in local[:3]]
        sent = {}
        for comm_type in ("all_gather", "a2a"):
            with record_waits() as record:
                o = context_parallel_attention(*leaves, Sequences.uniform(64, 1, torch.device("cpu")), 8, 3,
                                               dist.group.WORLD, comm_type=comm_type, head_groups=2,
                                               backend="reference")
                torch.autograd.grad(o, leaves, local[3])
            sent[comm_type] = {stage: entry["sent_bytes"] for stage, entry in record.summary().items()}
        dist.barrier()
    finally:
        staging.unlink()
    early = sum(p._engines.early for p in staging._peers.values())
    return errors, None, sent, early, sum(p._pieces for p in staging._peers.values())


CASES = ("blocks_cut", "long_chunks_cut", "bf16", "one_chunk", "packed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(with_peers, 4, tmp_path_factory.mktemp("ranks"))


def test_equals_single_rank(results):
    """Whole attention, every communication type, P = 2, 3, 4, head groups, fewer kv heads than ranks."""
    errors = {key: value for result, *_ in results for key, value in result.items()}
    assert {key[0] for key in errors} == set(CASES) and {key[1] for key in errors} == {2, 3, 4}
    for key, values in errors.items():
        dtype = next(case[-1] for case in cp.CASES if case[0] == key[0])
        assert max(values) <= cp.TOLERANCE[dtype], (key, values)
    assert all(pieces > 100 for *_, pieces in results), "the exchanges went another way"
    assert all(early for *_, early, _ in results), f"dk and dv waited for dq: {[x[-2] for x in results]}"


def test_bytes_sent(results):
    cp.test_bytes_sent([result[:3] for result in results])
