"""Speed beside full attention: a program that prints a table; under pytest it must be faster.

The first case is the older benchmark's: one head, 32K tokens, chunk 512, topk 3. Times are ms of forward and backward;
in a CUDA graph, too, since one head leaves the GPU waiting for the host. Without a GPU a tiny case only runs.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout that is not installed

import pytest  # noqa: E402
import torch  # noqa: E402

from benchmarks import dense, timing  # noqa: E402
from benchmarks.cases import Case, make_inputs  # noqa: E402
from moba_megatron import moba_attn_varlen_triton  # noqa: E402

GPU = torch.cuda.is_available()
CASES = (
    Case("1 head, 32K, 512/3", 32768, 512, 3, 1, 1, 128),
    Case("8 heads of 64, 32K, 512/3", 32768, 512, 3, 8, 8, 64),
    Case("16 heads, 32K, 512/3", 32768, 512, 3, 16, 16, 128),
    Case("16 heads, 32K, 128/8", 32768, 128, 8, 16, 16, 128),
    Case("32:8 heads, 64K, 512/8", 65536, 512, 8, 32, 8, 128),
) if GPU else (Case("1 head, 512, 32/3", 512, 32, 3, 1, 1, 16, dtype="float32"),)


def _moba(case, q, k, v, do):
    cu_seqlens = torch.tensor([0, case.tokens], dtype=torch.int32, device=q.device)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run():
        o = moba_attn_varlen_triton(*leaves, cu_seqlens=cu_seqlens, max_seqlen=case.tokens,
                                    moba_chunk_size=case.chunk_size, moba_topk=case.topk)
        return torch.autograd.grad(o, leaves, do)

    return run


def measure(case):
    """Median ms: MoBA and full attention, called and (on a GPU) replayed from a CUDA graph."""
    device = torch.device("cuda" if GPU else "cpu")
    inputs = make_inputs(case, device, seed=0)
    runs = {"MoBA": _moba(case, *inputs)}
    if GPU:
        runs["full"] = dense.cudnn_attention(*inputs)
    found = {}
    for name, run in runs.items():
        found[name] = timing.summary(timing.measure(lambda i: run(), device, 10))["median"]
        if GPU:
            with timing.graph_of(run) as replay:
                found[f"{name}, graph"] = timing.summary(timing.measure(lambda i: replay(), device, 10))["median"]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attn_varlen_moba_speed(case):
    found = measure(case)
    print(f"{case.name}: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in found.items()))
    assert all(ms > 0 for ms in found.values())
    if GPU:
        assert found["MoBA, graph"] < found["full, graph"]


def main():
    """The table."""
    print(torch.cuda.get_device_name() if GPU else "no GPU: a tiny case in plain torch, whose time means nothing")
    for case in CASES:
        found = measure(case)
        line = f"{case.name:28}" + "".join(f"{name} {ms:8.3f} ms   " for name, ms in found.items())
        print(line + (f"{found['full'] / found['MoBA']:.1f}x, in graphs "
                      f"{found['full, graph'] / found['MoBA, graph']:.1f}x" if GPU else ""), flush=True)


if __name__ == "__main__":
    main()
