"""Several hosts on one machine, network namespaces (``hosts.py``): training, a host that dies, who shares one.

gloo. Skipped where namespaces cannot be made: it takes Linux, root and iproute2.
"""
import logging
import os
import shlex
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hosts import hosts, ip, kill_all, move_to, on_host, python, sent_bytes
from ranks import ROOT, pretrain_gpt, run_ranks

from moba_megatron.context_parallel import Sequences, context_parallel_attention, record_waits
from moba_megatron.context_parallel.transport import symmetric_memory
from tests.context_parallel.test_context_parallel_disagreement import CPU, Lines, Stand, meet

pytest.importorskip("megatron.core")
from megatron.core import parallel_state  # noqa: E402
from prepare_data import main as prepare_data  # noqa: E402
from pretraining.monitor import read_log  # noqa: E402

STEPS = 8
LOST = "another rank did not answer for 30 s"
SMALL = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--num-query-groups", "2",
         "--ffn-hidden-size", "64", "--seq-length", "64", "--moba-chunk-size", "8", "--moba-topk", "2",
         "--moba-full-attention-layers", "none", "--train-iters", str(STEPS), "--lr", "1e-2", "--lr-warmup-iters", "1",
         "--global-batch-size", "2", "--log-interval", "1", "--eval-iters", "0", "--split", "1,0,0",
         "--save-interval", "2", "--distributed-timeout-minutes", "0.5"]
ROWS, KV_HEADS = 256, 4
# by hosts: processes on each, how they communicate
LAYOUTS = {2: (2, ["--cp-comm-type", "a2a+all_gather", "--hierarchical-context-parallel-sizes", "2", "2"]),
           4: (1, ["--cp-comm-type", "all_gather", "--context-parallel-size", "2"])}


def make_data(directory: Path) -> Path:
    """A prefix for --data-path."""
    words = "the quick brown fox jumps over the lazy dog and the dog sleeps on".split()
    (directory / "words.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 600)))
    assert prepare_data(["--input", str(directory / "words.txt"), "--output-prefix", str(directory / "words")]) == 0
    return directory / "words"


class Job:
    """launch/pretrain_multi_node.sh, begun on every host with the same variables and flags."""

    def __init__(self, directory: Path, data: Path, names: list[str]):
        processes, how = LAYOUTS[len(names)]
        self.directory, self.names = directory, names
        self.variables = {**os.environ, "NNODES": str(len(names)), "MASTER_ADDR": names[0], "GPUS": str(processes),
                          "CP": "4", "DATA_PATH": str(data), "RUN": str(directory), "USE_SYSTEM_PYTHON": "1",
                          "PYTHON": python(directory), "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        self.command = ["bash", str(ROOT / "launch/pretrain_multi_node.sh"), *SMALL, *how]

    def start(self) -> list[subprocess.Popen]:
        started = []
        for name in self.names:
            with open(self.directory / f"{name}.err", "w") as err:
                started.append(subprocess.Popen(on_host(name, *self.command), env=self.variables, stdout=err,
                                                stderr=err))
        return started

    def said(self, host: int) -> str:
        return (self.directory / f"{self.names[host]}.err").read_text()

    def on_one_host(self, directory: Path) -> list[tuple]:
        """The curve of the same flags in as many processes of this machine."""
        shown = subprocess.run(self.command, env={**self.variables, "DRY_RUN": "1"}, capture_output=True, text=True)
        flags = shlex.split(shown.stderr.splitlines()[-1].split("examples/pretrain_gpt.py")[1])
        log = directory / "log.jsonl"
        run_ranks(pretrain_gpt, len(self.names) * int(self.variables["GPUS"]), directory, [
            *flags, "--save", str(directory / "c"), "--load", str(directory / "c"), "--log-jsonl", str(log)])
        return curve(log)


def curve(log: Path) -> list[tuple]:
    return [(r["iteration"], r["loss"], r["grad_norm"], r["lr"]) for r in read_log(log)["step"]]


def steps_so_far(log: Path) -> int:
    return log.read_text().count('"kind": "step"') if log.exists() else 0


def start_and_lose(job: Job, victim: int) -> int:
    """A host's network goes and its processes end without a word; the step of the last checkpoint then."""
    log, started, deadline = job.directory / "log.jsonl", job.start(), time.monotonic() + 300
    while steps_so_far(log) < 3:
        assert time.monotonic() < deadline and all(p.poll() is None for p in started), job.said(0) + job.said(1)
        time.sleep(0.01)
    ip("-n", job.names[victim], "link", "set", "eth0", "down")
    kill_all(job.names[victim])
    while LOST not in job.said(1 - victim):
        assert time.monotonic() < deadline, job.said(1 - victim)
        time.sleep(0.1)
    if victim == 0:  # torchrun on the others waits for its store: they are ended, as a scheduler does
        for name in job.names:
            kill_all(name)
    assert all([process.wait(600) for process in started])
    saved = int((job.directory / "checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert 2 <= saved < STEPS
    ip("-n", job.names[victim], "link", "set", "eth0", "up")
    return saved


drill = pytest.mark.skipif(os.environ.get("MOBA_FAULT_DRILLS") != "1", reason="MOBA_FAULT_DRILLS=1 loses other hosts")


def train(count: int, victim: int | None, directory: Path) -> tuple[list[int], list[tuple], list[tuple]]:
    """On so many hosts, one of which may be lost: where each start began, the curve, and that of one host."""
    data, run, one = (directory / name for name in ("data", "hosts", "one"))
    for each in (data, run, one):
        each.mkdir(parents=True)
    with hosts(count) as names:
        job, starts = Job(run, make_data(data), names), [0]
        if victim is not None:
            starts.append(start_and_lose(job, victim))
        assert [process.wait(600) for process in job.start()] == [0] * count, job.said(0)
        assert [r["iteration"] for r in read_log(run / "log.jsonl")["start"]] == starts
        return starts, curve(run / "log.jsonl"), job.on_one_host(one)


@pytest.mark.parametrize("count, victim", [(2, 1), (4, None), pytest.param(2, 0, marks=drill),
                                           pytest.param(4, 2, marks=drill)])
def test_training_equals_that_on_one_host(tmp_path, count, victim):
    starts, found, expected = train(count, victim, tmp_path)
    assert len(starts) == 1 + (victim is not None) and len(found) == STEPS
    assert found == expected


def on_two_hosts(rank, size, names, file):
    """A layer's exchanges, forward and backward, among two hosts of two ranks, and what is said of who shares one."""
    dist.barrier()  # all are connected
    dist.destroy_process_group()
    move_to(names[rank // 2])
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group("gloo", store=dist.FileStore(str(file), size), rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(context_parallel_size=4, hierarchical_context_parallel_sizes=[2, 2])
    found = {"host": socket.gethostname()}
    for comm_type, groups in (("a2a+all_gather", parallel_state.get_hierarchical_context_parallel_groups()),
                              ("a2a", parallel_state.get_context_parallel_group())):
        x = [torch.randn(ROWS, heads, 64, dtype=torch.float64, requires_grad=True) for heads in (8, KV_HEADS, KV_HEADS)]
        before = sent_bytes()
        dist.barrier()
        with record_waits() as record:
            context_parallel_attention(*x, Sequences.uniform(4 * ROWS, 1, CPU), 32, 3, groups,
                                       comm_type=comm_type).sum().backward()
        dist.barrier()
        found[comm_type] = sent_bytes() - before, {name: x["sent_bytes"] for name, x in record.summary().items()}
    lines = Lines()
    logging.getLogger(symmetric_memory.__name__).addHandler(lines)
    pairs = {pair: dist.new_group(pair) for pair in ((0, 1), (2, 3), (1, 2))}
    with Stand(Path(file).parent, rank):
        for pair, group in pairs.items():
            if rank in pair:
                found[pair] = meet(group, lines)
    return found


def test_heads_stay_on_a_host_and_keys_cross(tmp_path):
    with hosts(2) as names:
        results = run_ranks(on_two_hosts, 4, tmp_path, names, tmp_path / "store")
    assert [r["host"] for r in results] == [names[0]] * 2 + [names[1]] * 2
    for host in (results[:2], results[2:]):
        for comm_type, kinds, heads_across in (("a2a+all_gather", {"exchange", "sums", "gather", "reduce"}, 0),
                                               ("a2a", {"exchange"}, 2 / 3)):  # to two of three other ranks
            sent, expected = host[0][comm_type][0], 0
            for _, stages in (rank[comm_type] for rank in host):
                assert {name.split()[1] for name in stages} == kinds
                expected += sum(n * (heads_across if "exchange" in name else 1) for name, n in stages.items())
            assert expected <= sent < 1.05 * expected  # headers are small
    for pair, there in (((0, 1), True), ((2, 3), True), ((1, 2), False)):
        assert [results[rank][pair][0] for rank in pair] == [there, there]
    assert results[1][1, 2][1] == [
        "context parallel group of 2 exchanges through its library: its ranks are on several hosts"]
