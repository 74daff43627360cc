"""The program that compute-sanitizer watches: every kernel once at awkward shapes. Run by launch/sanitize.sh."""
import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 1, 2)]
import decoding
import test_decode
import test_key_convolution
import test_op

from moba_megatron import kernels, moba_attn_varlen
from moba_megatron.kernels import hopper
from moba_megatron.ops.decode import moba_decode

NAMES = ["packed, ragged, empty", "gqa", "chunk not a power of two", "smallest chunk", "large chunk", "D 80",
         "D 128, chunk 512", "D 192, DV 128", "fp32", "own chunk only", "shorter than a chunk"]
CASES = {name: test_op.CASES[name] for name in NAMES}
CASES |= {  # on an H200 those of hopper.py
    "D 128, chunk 100, packed, gqa": dict(lengths=[700, 99, 1, 450], chunk=100, topk=5, heads=8, kv_heads=4, dim=128),
    "D 128, chunk 128, packed, mqa": dict(lengths=[700, 0, 1, 129, 640], chunk=128, topk=4, heads=6, kv_heads=1,
                                          dim=128),
    "D 128, chunk 320, packed, gqa": dict(lengths=[1000, 0, 1, 999], chunk=320, topk=3, heads=6, kv_heads=2, dim=128),
    "D 128, chunk 500, fp16": dict(lengths=[1800], chunk=500, topk=3, dim=128, dtype=torch.float16),
}
CASES["cut lists"] = dict(lengths=[2500], chunk=64, topk=3, heads=16, kv_heads=1, dim=128)
CASES["cut lists, the last group of kv heads is smaller"] = dict(lengths=[4300], chunk=128, topk=4, heads=3, kv_heads=3,
                                                                 dim=128, workspace_mib=8)


def run(lengths, workspace_mib=None, **case) -> None:
    q, k, v, do, dlse, arguments = test_op.make(lengths, **case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = moba_attn_varlen(*leaves, *arguments, backend="triton", return_lse=True, workspace_mib=workspace_mib)
    grads = torch.autograd.grad(results, leaves, (do, dlse))
    starts = torch.arange(0, k.shape[0] - 64, 61, dtype=torch.int32, device="cuda")
    sums = kernels.block_sums(k.detach(), starts, torch.full_like(starts, 61))
    means = kernels.means_from_block_sums(sums[:len(starts) // 2 * 2].unflatten(0, (-1, 2)), 122, k.dtype)
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in (*results, *grads, means))


def convolve(**case) -> None:
    """The key convolution's kernels."""
    results = test_key_convolution.gradients(*test_key_convolution.make(**case))
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in results)


def decode(chunk, topk, **case) -> None:
    """The decoding step's kernels."""
    q, k, v, lengths, places = decoding.make(chunk=chunk, topk=topk, **case, device="cuda")
    means = decoding.filled_means(k, lengths, chunk, places, "triton")
    o = moba_decode(q, k, v, means, lengths, chunk, topk, backend="triton", **places)
    torch.cuda.synchronize()
    assert o.isfinite().all()


PROGRAMS = {name: (run, case) for name, case in CASES.items()}
PROGRAMS |= {f"convolution, {name}": (convolve, test_key_convolution.CASES[name])
             for name in ("packed, ragged, empty", "five taps, halo", "odd heads and dims")}
PROGRAMS |= {f"decoding, {name}": (decode, test_decode.CASES[name])
             for name in ("empty, one key, less than a chunk", "pages that cut chunks, left padding", "D 24, DV 20",
                          "topk 13", "bf16, chunk 100", "fp16, D 192, DV 128")}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS), metavar="NAME")
    parser.add_argument("--hopper", action="store_true", help="only: status 0 where the kernels for Hopper are in use")
    arguments = parser.parse_args()
    if arguments.hopper:
        sys.exit(hopper.portable(torch.empty(1, 1, 128, dtype=torch.bfloat16, device="cuda")))
    for name in arguments.cases:
        program, case = PROGRAMS[name]
        program(**case)
        print(name, flush=True)
