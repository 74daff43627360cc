"""The SIGKILL drills on two GPUs over NCCL, by hand: one job, and one that torchrun restarts after each of three kills.

    PYTHONPATH=. python tests/fault/on_gpus.py fault.json

trains examples/pretrain_gpt.py (context parallel 2, bf16, deterministic) on the sources of Python's standard library,
and compares the two curves bit by bit; 0 where they are the same. Both jobs share the GPUs. On the CPU, over gloo, with
smaller sizes: PYTHONPATH=. python tests/fault/on_gpus.py fault.json --cpu --seq-length 256 ...
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from prepare_data import main as prepare_data  # noqa: E402

from benchmarks import report  # noqa: E402
from moba_megatron import environment  # noqa: E402

FAULTS = ["kill-forward:1:3", "kill-backward:0:5", "kill-save:1:6"]
STARTS, STEPS = [0, 2, 4, 4], 8  # a checkpoint every two steps; that of step 6 is never whole
JOB = ["--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8", "--group-query-attention",
       "--num-query-groups", "2", "--seq-length", "8192", "--moba-chunk-size", "128", "--moba-topk", "4",
       "--context-parallel-size", "2", "--use-distributed-optimizer", "--bf16", "--moba-deterministic",
       "--train-iters", str(STEPS), "--lr", "1e-3", "--lr-warmup-iters", "1", "--global-batch-size", "2",
       "--log-interval", "1", "--eval-iters", "0", "--split", "1,0,0", "--save-interval", "2",
       "--distributed-timeout-minutes", "1"]


def start(work: Path, name: str, faults: list[str], more: list[str]) -> dict:
    """A job with as many restarts as faults: its curve, where each start began, what ended each."""
    run = work / name
    run.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
               "--nproc-per-node", "2", "--max-restarts", str(len(faults)), str(ROOT / "tests/fault/faulty_job.py"),
               *JOB, "--data-path", str(work / "text"), "--save", str(run / "c"), "--load", str(run / "c"),
               "--log-jsonl", str(run / "log.jsonl"), *more]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {**os.environ, "FAULTS": " ".join(faults), "FAULTS_DONE": str(run / "started"), "PYTHONPATH": path}
    with open(run / "err", "w") as err:  # a pipe would stay open as long as any writer of a killed rank lives
        status = subprocess.run(command, env=settings, stdout=err, stderr=err).returncode
    text = (run / "err").read_text()
    if status:
        print(f"{name}: status {status}\n{text[-6000:]}", file=sys.stderr)
    log = run / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {"status": status, "starts": [r["iteration"] for r in records if r["kind"] == "start"],
            "curve": [[r["iteration"], r["loss"], r["grad_norm"]] for r in records if r["kind"] == "step"],
            "ended": [list(pair) for pair in re.findall(r"exitcode: (-?\d+)\) local_rank: (\d)", text)]}


def good(found: dict) -> bool:
    """Whether every fault happened, the job went on from the last whole checkpoint, and no bit of its curve differs."""
    plain, restarted = found["uninterrupted"], found["restarted"]
    killed = [["-9", fault.split(":")[1]] for fault in found["faults"]]
    return (plain["status"] == restarted["status"] == 0 and restarted["starts"] == STARTS
            and restarted["ended"] == killed and len(plain["curve"]) == STEPS and restarted["curve"] == plain["curve"])


def main() -> int:
    """0 where everything was as it must be, else 1."""
    if len(sys.argv) < 2:
        print("error: the first argument must name the file for the result", file=sys.stderr)
        return 2
    out, more = Path(sys.argv[1]), [flag for flag in sys.argv[2:] if flag != "--cpu"]
    if "--cpu" not in sys.argv and torch.cuda.device_count() < 2:
        print(f"error: two GPUs are needed and {torch.cuda.device_count()} are visible; --cpu runs it over gloo",
              file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {"environment": environment.describe(device) | {
        "command": environment.command("PYTHONPATH=. python tests/fault/on_gpus.py")}, "faults": FAULTS, "job": JOB}
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor() as pool:
        work = Path(directory)
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        (work / "text.txt").write_text("\n".join(f.read_text(errors="replace") for f in files)[:3_000_000])
        prepare_data(["--input", str(work / "text.txt"), "--output-prefix", str(work / "text")])
        jobs = {name: pool.submit(start, work, name, faults, more)
                for name, faults in (("uninterrupted", []), ("restarted", FAULTS))}
        found |= {name: job.result() for name, job in jobs.items()}
    report.save(out, found)
    print(f"starts at {found['restarted']['starts']}, ended by {found['restarted']['ended']}: "
          f"{'good' if good(found) else 'BAD'}")
    return int(not good(found))


if __name__ == "__main__":
    sys.exit(main())
