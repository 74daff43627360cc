"""Ranks that disagree, set-up that fails on one of them, groups that come and go; three processes over gloo.

Messages are read late, as NCCL's are: the stand-in looks whether gloo has them. Copy engines are simulated.
"""
import gc
import importlib.util
import logging
import os
import threading
import time
import weakref
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed._symmetric_memory import _SymmetricMemory

from moba_megatron import MoBAConfig, kernels
from moba_megatron.context_parallel import (
    CollectiveCheck,
    Sequences,
    all_gather,
    all_to_all,
    context_parallel_attention,
)
from moba_megatron.context_parallel.all_gather import transport_for
from moba_megatron.context_parallel.transport import collective_check, symmetric_memory
from moba_megatron.deepspeed import MoBAAttention, SequenceParallel
from moba_megatron.ops import flash_attn_4, pipeline
from tests.context_parallel.test_context_parallel_peers import PAD_BYTES, EagerPeers, Event, mapped

CPU = torch.device("cpu")


class LateMessage:
    """What tells whether a gloo message is here, in place of a CUDA event."""

    never = False  # not before somebody waits

    def __init__(self, headers):
        self._works, self._waited = list(headers._works), False

    def query(self):
        return (self._waited or not self.never) and all(work.is_completed() for work in self._works)

    def synchronize(self):
        for work in self._works:
            work.wait()
        self._waited = True


class CountedWaits:
    """How often CollectiveCheck has the host wait for a message of its own call."""

    def __enter__(self):
        self.number, look = 0, CollectiveCheck.look

        def counted(group, wait=False):
            self.number += wait
            return look(group, wait)

        self._patch = mock.patch.object(CollectiveCheck, "look", staticmethod(counted))
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


def call(signature, lengths=None, max_seqlen=48, error=None):
    with CollectiveCheck(dist.group.WORLD) as a:
        if error is not None:
            raise error
        a.signature = signature
        if lengths is not None:
            a.compare_lengths(lengths, max_seqlen, 96)


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


def packing(step):
    """Lengths of three ranks' 96 tokens, another for each of many steps."""
    return cu(0, *sorted(6 * (step // 7 ** i % 7 + 8 * i) for i in range(2)), 96)


def waits_of_steps():
    """Waits in each of six steps, a new packing in each: three layers of one kind and two of another, and so on."""
    waits = []
    for step in range(6):
        lengths = packing(step)
        with CountedWaits() as counted:
            for layer in ("sparse", "sparse", "sparse", "dense", "dense", "sparse", "dense"):
                call(f"packed, {layer}", lengths, 96)
        waits.append(counted.number)
    return waits


def kept_after(calls):
    """The most that is kept during so many batches, all of them different: changes, lengths, messages unread."""
    given = []

    def lengths(step):
        found = packing(step)
        given.append(weakref.ref(found))
        return found

    changes = [len(collective_check._groups[dist.group.WORLD].after) for step in range(calls)
               if call(f"{step} sequences", lengths(step), 96) is None]
    LateMessage.never = True  # a device that lags behind
    for step in range(100):
        call("packed", lengths(step), 96)
    alive = sum(x() is not None for x in given)  # beside which is what was found of them
    kept = max(changes), alive, len(collective_check._groups[dist.group.WORLD].unread)
    LateMessage.never = False
    CollectiveCheck.look(dist.group.WORLD, wait=True)
    return kept


def raised_by(calls):
    """In which of the calls, each given as arguments, the first error came, and its text."""
    for number, arguments in enumerate(calls):
        try:
            call(**arguments)
        except ValueError as error:
            return number, str(error)
        for message, *_ in collective_check._groups[dist.group.WORLD].unread:
            message.synchronize()
    return None


GOOD = (0, 36, 96)
PACKED = dict(signature="packed", lengths=cu(*GOOD), max_seqlen=60)
# what rank 1 alone gets in a call whose like all ranks have had before, what the others get
CASES = {
    "length": (dict(signature="length 64"), dict(signature="length 32")),
    "length, not foretold": (dict(signature="length 32"), dict(signature="length 64")),
    "layer": (dict(signature="length 64"), dict(signature="dense")),
    "new": (dict(signature="length 128"), dict(signature="length 32")),
    "error": (dict(signature="", error=TypeError("query must be a tensor")), dict(signature="length 32")),
    "other lengths": (PACKED | dict(lengths=cu(0, 48, 96)), PACKED),
    "more sequences": (PACKED | dict(lengths=cu(*GOOD, 96)), PACKED),
    "other max_seqlen": (PACKED | dict(max_seqlen=66), PACKED),
    "ends early": (PACKED | dict(lengths=cu(0, 36, 90)), PACKED),
    "odd": (PACKED | dict(lengths=cu(0, 34, 96)), PACKED),
    "decreases": (PACKED | dict(lengths=cu(0, 36, 30, 96)), PACKED),
    "too long": (PACKED | dict(max_seqlen=48), PACKED),
}


def disagreements(rank):
    """By case: in which call from the disagreement on each rank raised, and what."""
    results = {}
    for name, (wrong, right) in CASES.items():
        for _ in range(2):  # in the end a call of length 64 is foretold, or a packed one
            for known in (dict(signature="length 64"), dict(signature="dense"), PACKED, dict(signature="length 32")):
                call(**known)
                call(**known)
        CollectiveCheck.look(dist.group.WORLD, wait=True)
        if right is PACKED:
            for known in (dict(signature="length 64"), dict(signature="dense")):
                call(**known)
                call(**known)
        results[name] = raised_by([wrong if rank == 1 else right, right])
        dist.barrier()
    call(signature="the group is usable again")
    return results


def raised_while_waiting(rank):
    """What a rank raises that waits in an exchange, of whatever group, for one that failed."""
    for _ in range(2):
        call("as before")
    deadline = time.monotonic() + 30
    try:
        call("as before", error=ValueError("no good") if rank == 1 else None)
        while time.monotonic() < deadline:
            CollectiveCheck.look()
    except ValueError as error:
        return str(error)


class Stand:
    """Simulated copies and signals of this process, and arenas in files that the others map."""

    def __init__(self, folder, rank):
        self.folder, self.rank = folder, rank
        self.patches = [mock.patch.object(symmetric_memory, "Peers", self.Peers),
                        mock.patch("torch.distributed._symmetric_memory.rendezvous", self.rendezvous)]

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()

    def Peers(self, device, nbytes, timeout_s):
        assert timeout_s > 60
        self.path = self.folder / f"arena{self.rank}_{time.monotonic_ns()}"
        self.path.write_bytes(b"\1" * nbytes + bytes(PAD_BYTES))
        self.whole = mapped(self.path)
        return EagerPeers(self.whole[:nbytes])

    def rendezvous(self, arena, name):
        group = dist.distributed_c10d._resolve_process_group(name)
        paths = [None] * group.size()
        dist.all_gather_object(paths, self.path, group)
        wholes = [self.whole if path == self.path else mapped(path) for path in paths]
        return SimpleNamespace(buffer_ptrs=[x.data_ptr() for x in wholes], wholes=wholes,
                               signal_pad_ptrs=[x.data_ptr() + arena.nbytes for x in wholes])


def failing(error):
    return mock.Mock(side_effect=error)


def variable(value):
    return mock.patch.dict(os.environ, MOBA_CP_COPY_ENGINES=value)


# what fails on one rank: a patch, what the line must say
FAILURES = {
    "no cuda.bindings": (lambda: mock.patch.object(symmetric_memory, "Peers", failing(ImportError("no cuda"))),
                         "no cuda"),
    "any error": (lambda: mock.patch.object(EagerPeers, "connect", failing(KeyError("map"))), "KeyError: 'map'"),
    "signals": (lambda: mock.patch.object(EagerPeers, "signal", failing(RuntimeError("error 801"))), "error 801"),
    "boot_id": (lambda: mock.patch.object(Path, "read_text", failing(PermissionError(13, "denied"))), "denied"),
    "host name": (lambda: mock.patch.object(os, "uname", lambda: SimpleNamespace(nodename="elsewhere")),
                  "several hosts"),
    "off": (lambda: variable("0"), "MOBA_CP_COPY_ENGINES=0"),
    "nonsense": (lambda: variable("yes"), "MOBA_CP_COPY_ENGINES must be 0 or 1, got 'yes'"),
}


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def meet(group, lines):
    """Whether the group gets symmetric memory, and the lines that this rank wrote meanwhile."""
    lines.texts.clear()
    return symmetric_memory.meet(group, CPU, 1 << 16) is not None, list(lines.texts)


def set_up(rank, folder):
    """By case, what :func:`meet` said on this rank."""
    lines, results = Lines(), {}
    logging.getLogger(symmetric_memory.__name__).addHandler(lines)
    logging.getLogger(symmetric_memory.__name__).propagate = False
    two, three = dist.new_group([0, 1]), dist.group.WORLD
    with Stand(folder, rank):
        if rank < 2:
            results["two"] = meet(two, lines)
            for name, (patch, _) in FAILURES.items():
                for where in (0, 1):
                    with patch() if rank == where else mock.MagicMock():
                        results[name, where] = meet(two, lines)
        dist.barrier()
        results["three"] = meet(three, lines)
        for name, value in {"three on one": "1" if rank == 1 else "", "three wanted": "1", "three off": "0"}.items():
            with variable(value):
                results[name] = meet(three, lines)
    return results


def attend(group, comm_type):
    """One layer, forward and backward, checked before as hosts do."""
    with CollectiveCheck(group) as a:
        a.signature = comm_type
    x = [torch.randn(24, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(3)]
    o = context_parallel_attention(*x, Sequences.uniform(72, 1, CPU), 8, 3, group, comm_type=comm_type, head_groups=2,
                                   backend="reference")
    o.sum().backward()
    return [o.detach(), *(y.grad for y in x)]


class InSymmetricMemory(Stand):
    """Schedules exchange through arenas, of processes that run at once, as on GPUs."""

    def __enter__(self):
        self.patches += [mock.patch.object(schedule, "transport_for", self.transport_for)
                         for schedule in (all_gather, all_to_all)]
        self.patches += [mock.patch.object(torch.cuda, "synchronize"),
                         mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False), variable("1")]
        return super().__enter__()

    def transport_for(self, rows, group, x, lanes):
        transport = transport_for(rows, group, SimpleNamespace(is_cuda=True, device=CPU), lanes)
        transport.event = Event
        return transport


def groups_come_and_go(rank, folder):
    """What still knows a group that was used and destroyed."""
    group = dist.new_group()
    with InSymmetricMemory(folder, rank):
        for comm_type in ("all_gather", "a2a", "selective"):
            attend(group, comm_type)
        exchanges = symmetric_memory.met[group].exchanges
    dist.barrier()
    known, its_peers = weakref.ref(group), weakref.ref(symmetric_memory.met[group])
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return known() is None, its_peers() is None, len(symmetric_memory.met), exchanges > 20


def raised(function, *args):
    try:
        function(*args)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def one_fails(rank, folder):
    """Rank 1 fails in mid-schedule. By communication type: what was raised here, then and by the next call but one.

    And whether all is well then.
    """
    texts, group = {}, dist.new_group()
    with InSymmetricMemory(folder, rank):
        for comm_type in ("all_gather", "a2a"):
            expected, texts[comm_type] = attend(group, comm_type), []
            count, pair = [], EagerPeers.run

            def fail(*args):
                count.append(1)
                if len(count) == 4:
                    raise RuntimeError("no good")
                return pair(*args)

            with mock.patch.object(EagerPeers, "run", fail) if rank == 1 else mock.MagicMock():
                texts[comm_type].append(raised(attend, group, comm_type))
            for _ in range(2):  # what the others begin next they may still end
                if text := raised(attend, group, comm_type):
                    texts[comm_type].append(text)
                    break
                for message, *_ in collective_check._groups[group].unread:
                    message.synchronize()
            texts[comm_type].append(all(map(torch.equal, attend(group, comm_type), expected)))
    return texts


def dense_kernels_differ(rank):
    """By host and by what rank 1 alone has, what this rank raised in a layer that attends densely."""
    layers, texts = {"DeepSpeed": MoBAAttention(MoBAConfig(8, 12), 1, 2, SequenceParallel(
        "zigzag", 3, rank, dist.group.WORLD))}, {}
    if importlib.util.find_spec("megatron") is not None:
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.enums import AttnMaskType

        from moba_megatron.megatron.core_attention import MoBACoreAttention

        config = TransformerConfig(num_layers=2, hidden_size=48, num_attention_heads=6, context_parallel_size=3,
                                   attention_dropout=0.0)
        layers["Megatron"] = MoBACoreAttention(config, 1, AttnMaskType.causal, "self", moba_config=MoBAConfig(8, 12),
                                               pg_collection=SimpleNamespace(cp=dist.group.WORLD))
    there = mock.patch.object(flash_attn_4, "module", SimpleNamespace)
    for name, patch in (("MOBA_DENSE", mock.patch.dict(os.environ, MOBA_DENSE="own")), ("flash-attn 4", there)):
        for host, layer in layers.items():
            x = torch.randn((1, 24, 6, 8) if host == "DeepSpeed" else (24, 1, 6, 8))
            with patch if rank == 1 else mock.MagicMock():
                texts[host, name] = raised(layer, x, x, x)
    return texts


def kernels_differ(rank, folder):
    """By communication type, whether gradients are right where rank 1's kernels alone return memory of their own."""
    group, right, backward = dist.new_group(), {}, pipeline.Pipeline.backward

    def elsewhere(*args):
        return backward(*args[:-1], None)

    with InSymmetricMemory(folder, rank):
        for comm_type in ("all_gather", "a2a"):
            expected = attend(group, comm_type)
            with mock.patch.object(pipeline.Pipeline, "backward", elsewhere) if rank == 1 else mock.MagicMock():
                right[comm_type] = all(map(torch.equal, attend(group, comm_type), expected))
    return right


def everything(rank, size, folder):
    folder = Path(folder)
    collective_check.READ_LATER = "cpu",
    collective_check._read_later = lambda headers, device: (LateMessage(headers), headers._output)
    return dict(waits=waits_of_steps(), kept=kept_after(300), apart=disagreements(rank),
                waiting=raised_while_waiting(rank),
                set_up=set_up(rank, folder), groups=groups_come_and_go(rank, folder), fails=one_fails(rank, folder),
                kernels=kernels_differ(rank, folder), dense=dense_kernels_differ(rank))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(everything, 3, folder, str(folder))


def test_layers_do_not_wait_after_the_first_steps(results):
    """Whatever the batches hold."""
    for result in results:
        first, second, *rest = result["waits"]
        assert 2 <= first <= 5 and second <= 3 and not any(rest), result["waits"]


def test_what_is_kept_is_bounded(results):
    for result in results:
        changes, lengths, unread = result["kept"]
        assert changes == 256 and lengths <= 1 and 60 <= unread <= 65, result["kept"]


@pytest.mark.parametrize("name, expected", {
    "length": "rank 0: length 32; rank 1: length 64; rank 2: length 32",
    "length, not foretold": "rank 0: length 64; rank 1: length 32; rank 2: length 64",
    "layer": "rank 0: dense; rank 1: length 64",
    "new": "rank 0: length 32; rank 1: length 128",
    "error": "context parallel rank 1: query must be a tensor",
    "other lengths": r"cu_seqlens \[0, 36, 96\] \(checksum .*; rank 1: .*cu_seqlens \[0, 48, 96\]",
    "more sequences": "rank 0: packed, 2 sequences, .*; rank 1: packed, 3 sequences",
    "other max_seqlen": "rank 0: .*max_seqlen 60.*; rank 1: .*max_seqlen 66",
    "ends early": "context parallel rank 1: cu_seqlens must run from 0 to .*, 96, got 0 to 90",
    "odd": "context parallel rank 1: the length of packed sequence 0 must be a multiple of .* = 6, got 34",
    "decreases": "context parallel rank 1: cu_seqlens must not decrease, got length -6 of packed sequence 1",
    "too long": "context parallel rank 1: max_seqlen must be at least the longest .*, got 48, packed sequence 1 has 60",
}.items())
def test_all_ranks_raise_by_the_next_call(results, name, expected):
    raised = [result["apart"][name] for result in results]
    assert None not in raised and len({text for _, text in raised}) == 1, raised
    with pytest.raises(ValueError, match=expected):
        raise ValueError(raised[0][1])
    numbers = [number for number, _ in raised]
    if CASES[name][1] is PACKED:  # what no collective depends on
        assert numbers == [1, 1, 1]
    else:  # ranks that do not raise at once all have the same
        assert numbers[1] == 0 or numbers[0] == numbers[2] == 0, numbers
        assert max(numbers) <= 1


def test_waiting_ends_where_a_rank_failed(results):
    assert {result["waiting"] for result in results} == {"context parallel rank 1: no good"}


def test_set_up_fails_on_all_ranks_alike(results):
    """Every failure on either rank: both get the library, rank 0 says why, once."""
    first, second = (results[rank]["set_up"] for rank in (0, 1))
    assert first["two"] == second["two"] == (True, [])
    for name, where in [(name, where) for name in FAILURES for where in (0, 1)]:
        met, lines = first[name, where]
        assert not met and second[name, where] == (False, []), (name, where)
        assert len(lines) == 1 and FAILURES[name][1] in lines[0], (name, lines)
        assert f"rank {where}: " in lines[0] or name == "host name", lines


def test_beyond_two_ranks_copy_engines_are_chosen(results):
    by_rank = [result["set_up"] for result in results]
    for said in by_rank:
        assert said["three"] == said["three off"] == (False, []), "what was chosen needs no line"
        assert said["three wanted"] == (True, [])
        assert not said["three on one"][0]
    assert len(by_rank[0]["three on one"][1]) == 1 and "MOBA_CP_COPY_ENGINES=1" in by_rank[0]["three on one"][1][0]


def test_groups_are_let_go(results):
    for result in results:
        assert result["groups"] == (True, True, 0, True), "the group, its peers, the table of groups, its exchanges"


def test_a_rank_that_fails_in_mid_schedule(results):
    """All raise the same by their next call but one, and then all is well again."""
    for comm_type in ("all_gather", "a2a"):
        said = [result["fails"][comm_type] for result in results]
        assert said[1][0] == "RuntimeError: no good" and said[0][0] is said[2][0] is None, said
        assert {second for _, second, _ in said} == {
            "ValueError: context parallel rank 1: attention failed before, in the middle of a call: RuntimeError: no "
            "good"}, said
        assert all(right for *_, right in said)


def test_ranks_whose_kernels_differ_read_the_right_gradients(results):
    """Whether a rank's kernels write dk and dv where they are sent from, or elsewhere."""
    assert [result["kernels"] for result in results] == [{"all_gather": True, "a2a": True}] * 3


def test_ranks_whose_dense_kernels_differ_raise(results):
    """In both hosts that have context parallelism, whatever differs, all ranks the same."""
    first, *others = (result["dense"] for result in results)
    assert others == [first] * 2
    for (_, name), text in first.items():
        own = {"MOBA_DENSE": "MOBA_DENSE=own without", "flash-attn 4": "MOBA_DENSE=auto with"}[name]
        said = [part.rsplit(", MOBA_", 1)[-1] for part in text.split(" flash-attn 4")]
        assert said[:2] == ["DENSE=auto without", own.removeprefix("MOBA_")], text
    assert len(first) >= 2


def test_late_exchanges_end_the_process(monkeypatch, capfd):
    """One that is done is let go of, whenever; one that is not is waited for until its time has passed."""
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=SystemExit))
    answers, exchanges, now = [False, True], SimpleQueue(), time.monotonic()
    for deadline, what, query in ((-1, "one", lambda: True), (60, "two", lambda: answers.pop(0)),
                                  (1, "three", lambda: False), (60, "four", lambda: True)):
        exchanges.put((now + deadline, SimpleNamespace(query=query), what, None))
    modules = {name: mock.MagicMock() for name in ("cuda", "cuda.bindings")}
    with mock.patch.dict("sys.modules", modules), pytest.raises(SystemExit):
        symmetric_memory.watch(exchanges)
    os._exit.assert_called_once_with(1)
    assert not answers and exchanges.qsize() == 1
    assert "moba_megatron: three was not done in time" in capfd.readouterr().err


def test_the_watch_ends_with_its_peers():
    """Groups come and go, and with each its thread, not before what was issued is done."""
    fakes = {name: mock.MagicMock() for name in ("cuda", "cuda.bindings", "moba_megatron.kernels.copying")}
    with (mock.patch.dict("sys.modules", fakes), mock.patch.object(torch.cuda, "current_stream"),
          mock.patch.object(torch.cuda, "Stream"), mock.patch.object(kernels, "copying", create=True),
          mock.patch.object(_SymmetricMemory, "empty_strided_p2p")):
        before, answers = set(threading.enumerate()), [False, True]
        peers = symmetric_memory.Peers(CPU, 1 << 16, 60)
        watch, = set(threading.enumerate()) - before
        peers.local.record_event.return_value = SimpleNamespace(query=lambda: answers.pop(0))
        peers.end("an exchange")
        assert watch.is_alive()
        del peers
        gc.collect()
        watch.join(30)
    assert not watch.is_alive() and not answers
