"""The program that compute-sanitizer watches: every kernel once at awkward shapes. Run by launch/sanitize.sh."""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/gpu"), str(ROOT / "tests/helpers")]
import launched
import test_attention_fwd
import test_decode
import test_key_convolution
import test_op

import comparison
import decoding
from moba_megatron import kernels, moba_attn_varlen, select_chunks, sparse_attn_varlen
from moba_megatron.inspect import kernels as router_kernels
from moba_megatron.kernels import copying, sm90
from moba_megatron.ops.decode import moba_decode

NAMES = ["packed, ragged, empty", "gqa", "chunk not a power of two", "smallest chunk", "large chunk", "D 80",
         "D 128, chunk 512", "D 192, DV 128", "fp32", "own chunk only", "shorter than a chunk"]
CASES = {name: test_op.CASES[name] for name in NAMES}
CASES |= {  # on an H200 those of sm90.py
    "D 128, chunk 100, packed, gqa": dict(lengths=[700, 99, 1, 450], chunk=100, topk=5, heads=8, kv_heads=4, dim=128),
    "D 128, chunk 128, packed, mqa": dict(lengths=[700, 0, 1, 129, 640], chunk=128, topk=4, heads=6, kv_heads=1,
                                          dim=128),
    "D 128, chunk 320, packed, gqa": dict(lengths=[1000, 0, 1, 999], chunk=320, topk=3, heads=6, kv_heads=2, dim=128),
    "D 256, chunk 320, packed, gqa": dict(lengths=[1000, 0, 1, 999], chunk=320, topk=3, heads=4, kv_heads=2, dim=256),
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


def run_given(lengths, shared, **case) -> None:
    """The kernels that stand beside the gate, and lists of heads that choose together."""
    q, k, v, do, dlse, (*places, topk) = test_op.make(lengths, **case)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    selected = select_chunks(q, k, *places, topk, shared=shared, backend="triton")
    results = sparse_attn_varlen(*leaves, selected, *places, backend="triton", return_lse=True)
    grads = torch.autograd.grad(results, leaves, (do, dlse))
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in (*results, *grads))


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


def run_parts(**case) -> None:
    """The kernels for pieces of sequences, as under context parallelism: they are put in order for dk and dv."""
    q, k, v, selected, segments = test_attention_fwd.problem(**case)
    segments = kernels.bounded(segments, len(q), len(k))
    routing = kernels.route(selected, k.shape[1], segments.num_chunks(len(k)))
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, 0.1, routing)
    grads = kernels.attention_bwd(torch.randn_like(o), None, q, k, v, o, lse, selected, segments, 0.1)
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in (o, lse, *grads))


def watch_router(lengths, chunk, topk, samples, **case) -> None:
    """The kernels of the router's statistics."""
    q, k, _, _, _, arguments = test_op.make(lengths, chunk, topk, **case)
    total = q.shape[0]
    selected, segments = comparison.selection(q, k, *arguments)
    sequence, position = segments.query_positions(total)
    rows = total - 1 - torch.arange(samples, device="cuda") * total // samples
    own = segments.first_chunk()[sequence] + position // chunk
    places = rows, own[rows], sequence[rows], position[rows]
    groups = torch.arange(total, device="cuda") % 4 - 1
    counts = router_kernels.counts(selected, groups, 3, segments.num_chunks(total))
    recalls = router_kernels.recalls(q, k, selected, segments, 0.1, *places)
    torch.cuda.synchronize()
    assert counts.sum() == (selected[groups >= 0] >= 0).sum() and recalls.isfinite().all()


def copy(rows, width, source_pitch, target_pitch) -> None:
    """The kernel that copies rows; nothing lies behind the last one."""
    sizes = [(rows - 1) * pitch + width for pitch in (source_pitch, target_pitch)]
    source, target = (torch.arange(size, device="cuda").to(torch.uint8) for size in sizes)
    copying.copy_rows(source.data_ptr(), target.data_ptr(), rows, width, source_pitch, target_pitch,
                      torch.cuda.current_stream())
    torch.cuda.synchronize()
    assert torch.equal(*(x.as_strided((rows, width), (pitch, 1))
                         for x, pitch in ((source, source_pitch), (target, target_pitch))))


PROGRAMS = {name: (run, case) for name, case in CASES.items()}
PROGRAMS |= {
    "given, gqa, packed": (run_given, dict(CASES["D 128, chunk 100, packed, gqa"], shared="head")),
    "given, groups of two, packed": (run_given, dict(CASES["D 128, chunk 320, packed, gqa"], kv_heads=3,
                                                     shared="group")),
    "given, groups of three, D 80": (run_given, dict(lengths=[700, 99, 0, 45], chunk=48, topk=4, heads=6, kv_heads=2,
                                                     dim=80, shared="group")),
}
PROGRAMS |= {f"convolution, {name}": (convolve, test_key_convolution.CASES[name])
             for name in ("packed, ragged, empty", "five taps, halo", "odd heads and dims")}
PROGRAMS |= {f"decoding, {name}": (decode, test_decode.CASES[name])
             for name in ("empty, one key, less than a chunk", "pages that cut chunks, left padding", "D 24, DV 20",
                          "topk 13", "bf16, chunk 100", "fp16, D 192, DV 128")}
PARTS = [(0, 400, 300), (1, 3, 397), (0, 0, 1), (0, 700, 211)]  # sequence, offset, length
PROGRAMS |= {
    "pieces of sequences": (run_parts, dict(lengths=[1000, 400], chunk=48, topk=4, heads=4, kv_heads=2, dim=64,
                                            parts=PARTS)),
    "pieces of sequences, D 128": (run_parts, dict(lengths=[1000, 400], chunk=128, topk=3, parts=PARTS)),
    "router, packed, ragged, empty": (watch_router, dict(lengths=[0, 131, 7, 0, 333], chunk=16, topk=4, kv_heads=2,
                                                         samples=37)),
    "router, one query, D 80": (watch_router, dict(lengths=[420], chunk=100, topk=3, heads=6, kv_heads=2, dim=80,
                                                   samples=1)),
    "router, fp32": (watch_router, dict(lengths=[333], chunk=64, topk=3, heads=3, kv_heads=1, dtype=torch.float32,
                                        samples=50)),
    "copies, one row": (copy, dict(rows=1, width=4144, source_pitch=4144, target_pitch=4144)),
    "copies, seven rows": (copy, dict(rows=7, width=48, source_pitch=48, target_pitch=160)),
    "copies, more than a round of blocks": (copy, dict(rows=600, width=2064, source_pitch=4096, target_pitch=2064)),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS), metavar="NAME")
    parser.add_argument("--sm90", action="store_true", help="only: status 0 where the kernels for Hopper are in use")
    arguments = parser.parse_args()
    gluon = sm90.takes(torch.empty(1, 1, 128, dtype=torch.bfloat16, device="cuda"))
    if arguments.sm90:
        sys.exit(not gluon)
    for name in arguments.cases:
        program, case = PROGRAMS[name]
        program(**case)
        print(name, flush=True)
    if arguments.cases == list(PROGRAMS) and (missing := launched.never_launched(sm90=gluon)):
        sys.exit(f"no case launches {', '.join(missing)}")
