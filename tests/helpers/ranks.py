"""Runs a function, or an example under torchrun, in several processes joined over loopback, with a time limit.

On the CPU it all runs in forks of a process that has imported PyTorch and Megatron-Core, torchrun's agent and its ranks
too: importing them takes longer than most of what is tested.
"""
import contextlib
import faulthandler
import functools
import importlib
import io
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run"]
PRELOADED = ["moba_megatron", "megatron.core.models.gpt", "megatron.core.distributed"]


def torchrun(processes, program, *flags, timeout=600, environment=None, options=(), fork=True):
    """Runs examples/<program>.py, or a module of benchmarks, under torchrun on CPU.

    Returns the CompletedProcess with stdout and stderr as text. ``environment`` is added to this process's,
    ``options`` are torchrun's. Nothing is compiled on the CPU.
    """
    environment = {"GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT),
                   **(environment or {})}
    named = ["-m", program] if program.startswith("benchmarks") else [str(ROOT / f"examples/{program}.py")]
    return run_program([*TORCHRUN, "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", processes, *options,
                        *named, *flags], environment, timeout, fork)


def run_program(arguments, environment=None, seconds=600, fork=True):
    """``python arguments`` (``-m module`` or a script, and its flags); where there is no GPU in a fork, if it may be.

    Returns the CompletedProcess with stdout and stderr as text. ``environment`` is added to this process's.
    """
    arguments = [str(argument) for argument in arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(environment or {})}
    with tempfile.TemporaryDirectory() as directory:
        files = out, err = Path(directory, "out"), Path(directory, "err")
        if torch.cuda.is_available() or not fork:
            with out.open("w") as stdout, err.open("w") as stderr, subprocess.Popen(
                    [sys.executable, *arguments], env=environment, stdout=stdout, stderr=stderr) as process:
                try:
                    status = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.terminate()  # torchrun ends its workers
                    raise
        else:
            process = _start_method("gloo").Process(target=_program, args=(arguments, environment, *files))
            process.start()
            process.join(seconds)
            if process.is_alive():
                process.terminate()
                process.join(30)
                process.kill()
                raise subprocess.TimeoutExpired(arguments, seconds)
            status = process.exitcode
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


def _program(arguments, environment, out, err):
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if environment.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    _run(arguments)


def _run(arguments):
    if arguments[:2] == TORCHRUN:
        from torch.distributed import run
        run.config_from_args = functools.partial(_with_forks, run.config_from_args)
        run.main(arguments[2:])
    else:
        _as_main(*arguments)


def _as_main(*arguments):
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _with_forks(config_from_args, args):
    """What torchrun makes of its arguments, but that the ranks are forks of its agent."""
    config, _, (unbuffered, *arguments) = config_from_args(args)
    assert unbuffered == "-u"
    config.start_method = "fork"
    return config, _rank_of_torchrun, arguments


def _rank_of_torchrun(*arguments):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # the agent's own, until now
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.reconfigure(line_buffering=True)
    numpy.random.seed()  # else all forks draw the same, which processes of their own do not
    random.seed()
    _as_main(*arguments)


def pretrain_gpt(rank, size, flags):
    """For :func:`run_ranks`, what examples/pretrain_gpt.py does under torchrun; returns what it says on stderr."""
    import pretrain_gpt as job

    with contextlib.redirect_stderr(io.StringIO()) as err, mock.patch.object(job, "init_process_group"):
        args = job.parse_args(flags)
        job.initialize(args)
        job.pretrain(args)
    return err.getvalue()


def run_ranks(function, size, directory, *args, seconds=600, backend="gloo"):
    """Calls ``function(rank, size, *args)`` in ``size`` processes and returns their results, by rank.

    Raises AssertionError with the traceback of a rank that failed, or of those that the time limit found running.
    """
    directory = Path(directory)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = _start_method(backend)
    shared = size, port, str(directory), backend, args, dict(os.environ), seconds
    processes = [context.Process(target=_main, args=(function, rank, *shared)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds + 5  # at the limit each late rank writes where it stands
    try:
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode not in (None, 0) for p in processes):
                time.sleep(2)  # let the others report their own error
                break
            time.sleep(0.05)
    finally:
        late = [rank for rank, p in enumerate(processes) if p.is_alive()]
        for process in processes:
            process.kill() if process.is_alive() else None
            process.join()
    errors = [path.read_text() for path in sorted(directory.glob("error*.txt")) if path.stat().st_size]
    assert not errors, f"ranks {late} did not finish within {seconds} s\n" * bool(late) + "\n".join(errors)
    assert not late, f"ranks {late} did not finish within {seconds} s"
    return [torch.load(directory / f"result{rank}.pt", weights_only=False) for rank in range(size)]


def _start_method(backend):
    """On the CPU the ranks are forks of a process that has imported what most of them need: it takes each ten seconds
    otherwise. CUDA does not outlive a fork, and Transformer Engine may have used it when it was imported."""
    if backend == "nccl" or torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _main(function, rank, size, port, directory, backend, args, environment, seconds):
    os.environ.clear()  # a variable that a test has deleted since the first fork
    os.environ.update(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size),
                      LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    with (Path(directory) / f"error{rank}.txt").open("w") as error:
        faulthandler.dump_traceback_later(seconds, file=error)
        try:
            dist.init_process_group(backend, rank=rank, world_size=size)
            torch.save(function(rank, size, *args), Path(directory) / f"result{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            error.write(f"rank {rank}:\n{traceback.format_exc()}")
            error.flush()
            sys.stdout.flush()
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":  # in Python's place: `ranks.py -m torch.distributed.run ...`, whose ranks are forks
    warnings.simplefilter("ignore")
    for name in PRELOADED:
        importlib.import_module(name)
    _run(sys.argv[1:])
