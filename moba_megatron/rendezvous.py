"""Where the ranks of a job find each other, also after torchrun has restarted them, and how an error of all is said."""
import argparse
import json
import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist


def init_process_group(backend: str, timeout: timedelta) -> None:
    """``torch.distributed.init_process_group`` from the launcher's environment, with a store of its own for each start.
    ``torchrun --max-restarts`` lets all starts of a job share one key-value store (torch 2.13), where the ranks of the
    second would find the addresses of the first and fail to connect. A prefix with the number of the restart keeps them
    apart. Started without a launcher, the job is one process."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def report_error(message: str) -> None:
    """Says an error that every rank of a job makes, once; the caller then ends with a status other than 0. Under
    torchrun the message goes into torchrun's own report, which ends the screen; the ranks that are not the first of
    their machine wait for it, since it quotes the rank that ended first. Of a start that torchrun will repeat it
    reports nothing."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    starts_left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if (not file or starts_left > 0) and os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    if file and os.environ.get("LOCAL_RANK", "0") == "0":
        about = {"message": f"error: {message}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with open(file, "w", encoding="utf-8") as opened:
            json.dump({"message": about}, opened)
    elif file:
        time.sleep(10)  # torchrun ends this rank before


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong with the flags once, not once a rank; every rank ends with status 2."""

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0" and "TORCHELASTIC_ERROR_FILE" not in os.environ:
            self.print_usage(sys.stderr)
        report_error(f"{message}   (--help lists the flags)")
        sys.exit(2)
