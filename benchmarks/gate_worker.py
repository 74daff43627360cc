"""One side of the gate: runs rows with whatever moba_megatron PYTHONPATH holds, by public names that every version has.

A program of its own, started by gate.py: a line of JSON on its input asks, a line on its output answers.
``prepare`` makes a row's inputs, runs it twice and says what came out; ``time`` gives milliseconds of so many calls.
"""
import gc
import importlib.metadata
import json
import os
import sys
import time

if __name__ == "__main__":
    del sys.path[0]  # this folder, whose modules are none of the version's
import torch
import torch.distributed as dist

SAMPLED = 4096
"""Rows of each result that are compared; sums over all bits tell whether everything else is the same."""
DECODE_STEPS = 32
"""Calls of a decoding row that are timed as one: a call alone is short."""


def inputs_of(row: dict, device: torch.device) -> list[torch.Tensor]:
    """q, k, v, do: random, the same in every process."""
    generator = torch.Generator(device).manual_seed(7)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = row["heads"], row["kv_heads"], row["kv_heads"], row["heads"]
    return [torch.randn(row["sequences"] * row["tokens"], h, row["head_dim"], generator=generator, device=device,
                        dtype=dtype) for h in heads]


def operator(row: dict, device: torch.device, backend: str):
    """Forward and backward of the operator over packed sequences of one length."""
    from moba_megatron import moba_attn_varlen
    *leaves, do = inputs_of(row, device)
    leaves = [x.requires_grad_() for x in leaves]
    cu_seqlens = torch.arange(row["sequences"] + 1, dtype=torch.int32, device=device) * row["tokens"]

    def run() -> list[torch.Tensor]:
        o = moba_attn_varlen(*leaves, cu_seqlens, row["tokens"], row["chunk_size"], row["topk"], backend=backend)
        return [o, *torch.autograd.grad(o, leaves, do)]

    return run


def decode(row: dict, device: torch.device, backend: str):
    """Steps over a cache that is full but for half a chunk."""
    from moba_megatron.ops.decode import fill_chunk_means, moba_decode
    q, k, v, _ = inputs_of(row, device)
    size = row["sequences"], row["tokens"], row["kv_heads"], row["head_dim"]
    k, v = k.view(size), v.view(size)
    q = q[:row["sequences"]].contiguous()
    lengths = torch.full((row["sequences"],), row["tokens"] - row["chunk_size"] // 2, dtype=torch.int32, device=device)
    means = k.new_zeros(row["sequences"], row["tokens"] // row["chunk_size"], row["kv_heads"], row["head_dim"])
    fill_chunk_means(k, means, lengths, row["chunk_size"], backend=backend)

    def run() -> list[torch.Tensor]:
        for _ in range(DECODE_STEPS):
            o = moba_decode(q, k, v, means, lengths, row["chunk_size"], row["topk"], backend=backend)
        return [o]

    return run


def context_parallel(row: dict, device: torch.device, backend: str):
    """Forward and backward of one sequence over all ranks, each with the pieces r and 2P - 1 - r of 2P."""
    from moba_megatron.context_parallel import Sequences, context_parallel_attention
    sequences, last = Sequences.uniform(row["tokens"], 1, device), 2 * dist.get_world_size() - 1
    pieces = torch.arange(row["tokens"], device=device).chunk(last + 1)
    mine = torch.cat((pieces[dist.get_rank()], pieces[last - dist.get_rank()]))
    *leaves, do = (x[mine] for x in inputs_of(row, device))
    leaves = [x.requires_grad_() for x in leaves]

    def run() -> list[torch.Tensor]:
        o = context_parallel_attention(*leaves, sequences, row["chunk_size"], row["topk"], dist.group.WORLD,
                                       comm_type=row["comm"], backend=backend)
        return [o, *torch.autograd.grad(o, leaves, do)]

    return run


def described(results: list[torch.Tensor], path: str) -> list[int]:
    """A sum over all bits of each result; writes the sampled rows to ``path``."""
    sums, samples = [], []
    for x in results:
        bits = x.detach().contiguous().flatten().view(torch.int16 if x.element_size() == 2 else torch.int32)
        sums.append(sum(int((part.long() * (torch.arange(len(part), device=x.device) % 8191 + 1)).sum())
                        for part in bits.split(1 << 24)))
        rows = torch.linspace(0, len(x) - 1, min(SAMPLED, len(x)), device=x.device).long()
        samples.append(x.detach()[rows].cpu())
    torch.save(samples, path)
    return sums


def milliseconds(run, device: torch.device, repeats: int, host: bool = False) -> list[float]:
    """Of each of so many calls, enqueued without waiting in between; of the host's part, while the device is idle."""
    if host or device.type != "cuda":
        times = []
        for _ in range(repeats * (20 if host else 1)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
        return times
    run()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def answer(request: dict, state: dict, device: torch.device) -> dict:
    if request["do"] == "time":
        return {"ms": milliseconds(state["run"], device, request["repeats"], state["host"])}
    state.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if request["do"] == "drop":
        return {}
    kind = request["row"]["kind"]
    make = {"operator": operator, "host": operator, "decode": decode, "cp": context_parallel}[kind]
    state["run"], state["host"] = make(request["row"], device, request["backend"]), kind == "host"
    state["run"]()
    sums = described(state["run"](), request["path"])
    return {"sums": sums, "package": os.path.dirname(sys.modules["moba_megatron"].__file__),
            "triton": importlib.metadata.version("triton")}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    device = torch.device(sys.argv[1])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    state: dict = {}
    for line in sys.stdin:
        try:
            said = answer(json.loads(line), state, device)
        except Exception as error:  # the other rows shall still be timed
            said = {"error": f"{type(error).__name__}: {str(error).strip()[:400]}"}
        print(json.dumps(said), file=answers, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
