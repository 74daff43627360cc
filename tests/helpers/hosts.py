"""Hosts of one machine: network namespaces with host names of their own, joined by a bridge (Linux, root, iproute2)."""
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLONE_NEWUTS = 0x04000000


def ip(*arguments, check=True) -> str:
    """``ip arguments``; what it prints."""
    return subprocess.run(["ip", *map(str, arguments)], check=check, capture_output=True, text=True).stdout


@contextlib.contextmanager
def hosts(count: int):
    """Names of ``count`` hosts that know each other by them; skips the test where namespaces cannot be made.

    Each has the device eth0. Whatever runs in them is killed at the end.
    """
    name = f"moba{os.getpid()}"
    switch, names = f"{name}-switch", [f"{name}-host{number}" for number in range(count)]
    try:
        try:
            _connect(switch, names)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        if shutil.which("ip"):
            for each in (switch, *names):
                kill_all(each)
                ip("netns", "delete", each, check=False)
                shutil.rmtree(f"/etc/netns/{each}", ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir("/etc/netns")


def _connect(switch, names):
    ip("netns", "add", switch)
    ip("-n", switch, "link", "add", "bridge", "up", "type", "bridge")
    addresses = "".join(f"10.77.0.{number} {host}\n" for number, host in enumerate(names, 1))
    for number, host in enumerate(names, 1):
        ip("netns", "add", host)
        ip("-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}", "netns", switch)
        ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
        ip("-n", host, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", host, "link", "set", device, "up")
        files = Path("/etc/netns", host)  # `ip netns exec` lays them over /etc
        files.mkdir(parents=True)
        (files / "hosts").write_text("127.0.0.1 localhost\n" + addresses)
    subprocess.run(on_host(names[0], "true"), check=True, capture_output=True, text=True)


def on_host(host: str, *command) -> list:
    """The command line that runs a command there."""
    return ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host, *command]


def kill_all(host: str) -> None:
    """SIGKILL to every process of a host; returns when none is left."""
    while pids := ip("netns", "pids", host, check=False).split():
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def move_to(host: str) -> None:
    """This thread, and those that it starts from now on, are on that host; sockets that are open stay as they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host}") as namespace:
        if libc.setns(namespace.fileno(), 0) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), f"cannot move to {host}")
    socket.sethostname(host)


def sent_bytes() -> int:
    """What the calling thread's host has sent to others, bytes."""
    devices = Path("/proc/thread-self/net/dev").read_text().splitlines()
    return int(next(line for line in devices if "eth0:" in line).split(":")[1].split()[8])


def python(directory: Path) -> str:
    """A program that takes Python's place for torchrun: agent and ranks are forks of one process (``ranks.py``)."""
    program = directory / "python"
    program.write_text(f'''#!/bin/sh
[ "$1" = -m ] && exec {sys.executable} {Path(__file__).with_name("ranks.py")} "$@"
exec {sys.executable} "$@"
''')
    program.chmod(0o755)
    return str(program)
