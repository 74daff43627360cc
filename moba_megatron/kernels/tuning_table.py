"""The tuning table: rows for every stage, most particular first. How rows are read: ``tuning.py``.

``why`` names the measurement that chose the row: milliseconds on an H200, bf16, 16 heads of 128, Triton 3.6, unless it
says otherwise. ``docs/kernel-notes.md`` has all attempts.
"""
from dataclasses import dataclass

UNTUNED = "untuned: fits by the compile report"


def is_gluon(config: dict[str, int]) -> bool:
    """Whether a configuration is for the Gluon kernels (``sm90.py``)."""
    return "CONSUMER_REGS" in config


@dataclass(frozen=True)
class Row:
    """One line of the table: this configuration, on these architectures, where no key exceeds its bound.

    Args:
        archs: names in ``tuning.ARCHS`` (or ``interpreter``), separated by blanks; ``*`` for every one.
        upto: largest value of each key that the row is for; a key that is not named may have any value.
        config: constexprs and launch options, passed to the launch as they are. One for the
            Gluon kernels fits only where the key ``gluon`` says that they take the tensors.
        why: the measurement that chose it, or "untuned: fits by the compile report".
    """

    archs: str
    upto: dict[str, int]
    config: dict[str, int]
    why: str = UNTUNED

    def fits(self, arch: str, key: dict[str, int]) -> bool:
        return ((self.archs == "*" or arch in self.archs.split())
                and (not is_gluon(self.config) or bool(key.get("gluon")))
                and all(key.get(name, 0) <= bound for name, bound in self.upto.items()))


def _c(block_m: int, block_n: int, warps: int, stages: int, **more: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages, **more}


def _sm90(stages: int, **more: int) -> dict[str, int]:
    """The Gluon passes' (``sm90.py``): one group of four warps loads, two multiply."""
    return {"STAGES": stages, "LOADER_REGS": 40, "CONSUMER_REGS": 232, "num_warps": 4, "num_stages": 1} | more


def _portable(*sizes: tuple[int, int, int, int], **more: int) -> tuple[Row, ...]:
    """Untuned rows for every card: for 16 bits and for fp32 at head dims up to 128, then at larger ones."""
    keys = {"head_dim": 128, "itemsize": 2}, {"head_dim": 128}, {"itemsize": 2}, {}
    return tuple(Row("*", key, _c(*size, **more)) for key, size in zip(keys, sizes))


RESIDENT = _c(64, 128, 4, 3, SPLIT=2048)
"""The forward where a chunk of up to 128 keys stays in shared memory."""
WITH_SLOTS = _c(64, 128, 8, 2, SPLIT=4096)
"""dk and dv where one tile holds a chunk of up to 128 keys, and partial dq is written too."""

GQA = "H200, 128K/512/8, 32:8 heads"
D64 = "H200, 128K/512/8, 32:8 heads of 64"
D96 = "H200, 128K/512/8, 32 heads of 96"
MLA = "H200, 64K/512/8, 16 heads of 192 and 128"
D256 = "H200, 64K/512/8, 16:4 heads of 256"
FP32 = "H200, 16K/512/8, 8:2 heads, fp32"
"""Shapes of benchmarks/results/h200/tuning_sweep.json, where a stage's function is timed with all its other kernels."""

K64, K96, K128, K192 = ({"head_dim": dims, "itemsize": 2} for dims in (64, 96, 128, 192))  # heads of 16 bits

TABLE: dict[str, tuple[Row, ...]] = {
    # BLOCK running sums (columns of heads x dims, times blocks of rows side by side) of a program
    "chunk_means": (Row("*", {}, {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}),),
    # BLOCK_M queries of one head against BLOCK_N chunk means, into LANES lists a row, at most PASS choices at a time;
    # the latest WARM tiles give a first threshold
    "gate": (
        Row("sm_90", K128 | {"choices": 8},
            {"BLOCK_N": 64, "STAGES": 5, "AHEAD": 3, "WARM": 8, "LANES": 4, "REFRESH": 4, "CONSUMER_REGS": 128,
             "num_warps": 4, "num_stages": 1, "maxnreg": 128},
            "in turns 14.1 to 14.5 ms at 512K/128/8, Triton's 15.2 to 16.0; 11.1 to 11.6 at 1M, 12.1 to 13.1"),
        Row("sm_90", K128, _c(64, 64, 4, 2, WARM=8, LANES=4, PASS=16, maxnreg=128),
            "12.1 ms at 128K/32/32, passes of 11 14.1; 2.5 at 128K/128/16; by an earlier insertion two passes of 8 4.1 "
            "for 3.1, and at 512K/128/8 18.8; WARM 16 18.4, 4 20.1, 0 25.5; 128 rows, 8 warps 20.3; 3 stages 21.7"),
        Row("*", K128, _c(64, 64, 4, 2, WARM=8, LANES=8, PASS=8)),
        Row("*", {"itemsize": 2}, _c(32, 32, 4, 1, WARM=4, LANES=8, PASS=8)),
        Row("*", {}, _c(32, 32, 8, 1, WARM=4, LANES=16, PASS=8)),
    ),
    # choices that a program places at a time; it is one warp
    "route": (
        Row("*", {}, {"BLOCK": 1024}, "2.5 to 2.6 ms at 512K/128/8 with the registers that Triton 3.6 takes on sm_90: "
            "they leave 8 to 11 programs a processor, whose counters and lists L2 holds; 512 4.0, 256 4.7"),
    ),
    # BLOCK_M gathered (query, head) rows of one (chunk, kv head) against the chunk, BLOCK_N keys at a time; a chunk
    # that BLOCK_N covers stays in shared memory while a program's SPLIT rows stream past it. CONSUMER_REGS: for the
    # kernels of sm90.py, which have BUFFERS for rows and STAGES for keys
    "attention_fwd": (
        Row("sm_90 sm_100", K128 | {"chunk_size": 64}, _c(64, 64, 4, 3, SPLIT=2048)),
        Row("sm_90", K64 | {"chunk_size": 128}, RESIDENT),
        Row("sm_100", K128 | {"chunk_size": 128}, RESIDENT),
        Row("sm_90", K64, _sm90(4, BLOCK_N=128, BUFFERS=2, SPLIT=1024),
            f"{D64}: 10.3 ms, SPLIT 1024 10.8, two programs a processor (64 keys, 104 registers) 10.8, Triton's 11.0"),
        Row("sm_90 sm_100", K64, _c(64, 128, 4, 2),
            "H200, 8 heads of 64, 128K/512/3: 0.91 ms; 64x64 at 3 stages 0.94, 128x64 1.12"),
        Row("sm_90", K128 | {"chunk_size": 127}, RESIDENT),
        Row("sm_90", K128 | {"chunk_size": 128}, _sm90(2, BLOCK_N=128, BUFFERS=3, SPLIT=2048),
            "H200, 128K/128/16: 7.1 ms, 2 buffers 7.3 to 7.6, 1 stage 7.0; documents 6.4, 2 buffers 6.5"),
        Row("sm_90", K128 | {"triton": 308}, _sm90(2, BLOCK_N=128, BUFFERS=2, SPLIT=1024),
            "H200, 128K/512/8: 7.1 to 7.4 ms, Triton's 9.0; 64 keys, 4 stages 8.6; SPLIT 512 8.1; chunk 256: 4.65, "
            "6.13; chunk 128: 3.52, 3.64; chunk 500 at 32:8 heads 17.8, 24.7"),
        Row("sm_90", K128, _sm90(2, BLOCK_N=128, BUFFERS=2, SPLIT=1024, LOADER_REGS=56, CONSUMER_REGS=224),
            "not timed: with Triton 3.9 the loader spills in 40 registers"),
        Row("sm_90", K128 | {"chunk_size": 128}, RESIDENT,
            "H200, 128K/128/8: 3.8 ms; SPLIT 1024 3.9, 512 4.0; 2 stages 4.2; 128x128, 8 warps 4.8; keys streamed 4.6"),
        Row("sm_90 sm_100", K128, _c(128, 64, 4, 2),
            "H200, 128K/512/8: 9.2 ms; 3 stages, 8 warps 12.4; 64x64, 128x32 10.7; 128K/2048/3: 8.3 (515 TFLOP/s)"),
        Row("sm_90", {"head_dim": 128, "ieee": 0}, _c(128, 64, 8, 1),
            f"{FP32}: forward 0.8 ms less than 64x32, 4 warps, of 4.9"),
        Row("sm_90", K192, _sm90(3, BLOCK_N=64, BUFFERS=2, SPLIT=1024),
            f"{MLA}: 4.2 ms, 2 stages 4.3, 128 keys 4.8, Triton's 7.1"),
        Row("sm_90", {"itemsize": 2}, _c(128, 64, 8, 2),
            f"{D256}: forward 18.3 ms, 64x32, 4 warps 18.8, 64x64 20.8, 128x32, 4 warps 56.2"),
        *_portable((64, 64, 4, 2), (32, 32, 4, 1), (64, 32, 4, 1), (16, 16, 4, 1)),
    ),
    # BLOCK_M queries of one head against their diagonal chunk, BLOCK_N keys at a time, and _merge_partial
    "attention_fwd_diagonal": (
        Row("sm_90 sm_100", K128 | {"choices": 0}, _c(128, 64, 8, 3),
            "H200, dense 32K: 9.5 ms (462 TFLOP/s); 128x64 at 4 warps 10.3; 128x128 at 8 warps 10.9; 64x64 11.6"),
        Row("sm_90", K64, _c(64, 64, 4, 2, maxnreg=128),
            f"{D64}: 2.6 ms, without maxnreg 2.9, 64x32 2.9, 128 rows 3.0, in Gluon 2.8; chunks of 128 2.0"),
        Row("sm_90", K128 | {"choices": 31}, _sm90(2, BLOCK_N=64, SLOTS=3, CONSUMER_REGS=224),
            f"{GQA}: 4.0 ms, Triton's 5.1; 128K/128/8 1.5, 1.9"),
        Row("sm_100", K128, _c(64, 64, 4, 3)),
        Row("*", K128, _c(64, 64, 4, 2)),
        Row("sm_90", {"head_dim": 128, "ieee": 0}, _c(64, 32, 4, 1)),
        Row("*", {"head_dim": 128}, _c(32, 32, 4, 1)),
        Row("sm_90", K192, _c(128, 64, 8, 2), f"{MLA}: forward 10.1 ms, 64x32, 4 warps 10.5, 8 warps 12.0"),
        Row("sm_90", {"itemsize": 2}, _c(64, 64, 8, 2),
            f"{D256}: forward 20.2 ms, 64x32, 8 warps 20.9; 128x64 19.3, which spills 5 KB with Triton 3.5"),
        Row("*", {"itemsize": 2}, _c(64, 32, 8, 1), "untuned: 4 warps spill 0.4 to 0.9 KB a thread at head dim 256"),
        Row("*", {}, _c(16, 16, 4, 1)),
    ),
    # BLOCK_M (query, head) rows: delta = <do, o> - dlse
    "attention_bwd_delta": (Row("*", {}, {"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}),),
    # BLOCK_N keys of one (chunk, kv head) against its list, BLOCK_M rows at a time, SPLIT rows of a list a program;
    # where one tile holds the chunk, the kernel writes partial dq too
    "attention_bwd_dkdv": (
        Row("sm_100", K128 | {"chunk_size": 128}, _c(32, 128, 8, 2, SPLIT=4096),
            "untuned: 64 rows would need 576 of 512 columns of tensor memory"),
        Row("sm_90", K128 | {"chunk_size": 32}, _c(128, 32, 4, 2, SPLIT=4096),
            "H200, 64K/32/32: backward 14.1 ms, 64 keys 14.6, 128 keys, 8 warps 19.3"),
        Row("sm_90", K128 | {"chunk_size": 64},
            _sm90(3, BLOCK_M=64, BLOCK_N=64, SPLIT=4096, LOADER_REGS=80, CONSUMER_REGS=216)),
        Row("sm_90", K128 | {"chunk_size": 64}, _c(64, 64, 4, 2, SPLIT=4096),
            "H200, 128K/64/16: backward 20.3 ms, 128 keys, 8 warps 22.3, 128 rows 25.3"),
        Row("sm_90", K64 | {"chunk_size": 128}, _sm90(3, BLOCK_M=64, BLOCK_N=128, SPLIT=4096),
            "H200, 128K/128/8, 32:8 heads of 64: 6.7 ms, Triton's 10.4"),
        Row("sm_90", K64, _sm90(5, BLOCK_M=64, BLOCK_N=128, SPLIT=4096),
            f"{D64}: 15.8 ms, 3 stages 16.1, Triton's 21.5"),
        Row("sm_90", K96, _sm90(4, BLOCK_M=64, BLOCK_N=128, SPLIT=4096),
            f"{D96}: 23.7 ms, 3 stages 24.4, 5, too many with partial dq, 23.1, Triton's 35.3; heads of 80 5.7, 8.1"),
        Row("sm_90", K128, _sm90(3, BLOCK_M=64, BLOCK_N=128, SPLIT=4096),
            "H200, 128K/512/8: 15.1 ms, Triton's 17.4; 2 stages 16.6; SPLIT 8192 15.5; 56 and 224 registers 16.1"),
        Row("sm_90", K128 | {"chunk_size": 128}, WITH_SLOTS,
            "H200: 9.0 ms at 128K, chunk 128, topk 8, partial dq included; 64 keys and a dq kernel of its own 11.2"),
        Row("sm_90 sm_100", K128, _c(64, 64, 4, 2, SPLIT=4096),
            "H200: 16.2 ms at 128K, chunk 512, topk 8; 64x128, 8 warps, 3 stages 17.4, 32x64 20.1"),
        Row("sm_90", {"head_dim": 128, "chunk_size": 128, "ieee": 0}, _c(16, 64, 8, 1, SPLIT=4096)),
        Row("sm_90", {"head_dim": 128, "ieee": 0, "triton": 308}, _c(32, 128, 8, 1, SPLIT=4096),
            f"{FP32}: 11.1 ms, 16x128 14.4, 32x64 18.8"),
        Row("sm_90", {"head_dim": 128, "ieee": 0}, _c(16, 128, 8, 1, SPLIT=4096),
            "not timed: Triton 3.9 spills 2.2 KB of 32x128, more than is allowed"),
        Row("sm_90", K192 | {"chunk_size": 128}, _c(64, 64, 8, 2, SPLIT=4096)),
        Row("sm_90", K192, _sm90(4, BLOCK_M=32, BLOCK_N=128, SPLIT=4096),
            f"{MLA}: 9.3 ms, 3 stages 9.5, 6 9.4, Triton's 20.1"),
        Row("sm_90", {"itemsize": 2, "chunk_size": 128}, _c(64, 64, 8, 2, SPLIT=4096)),
        Row("sm_90", {"head_dim": 256, "itemsize": 2},
            _sm90(2, BLOCK_M=64, BLOCK_N=64, SPLIT=4096, LOADER_REGS=80, CONSUMER_REGS=216)),
        Row("sm_90", {"itemsize": 2}, _c(64, 64, 8, 2, SPLIT=4096),
            f"{D256}: backward 73.4 ms, 1 stage 83.9, 32x64 85.3, 32x32, 4 warps 93.8"),
        *_portable((32, 64, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), SPLIT=4096),
    ),
    # BLOCK_M gathered rows against the chunk, BLOCK_N keys at a time, into partial dq
    "attention_bwd_dq": (
        Row("sm_90", K64, _sm90(3, BLOCK_N=128, BUFFERS=2, SPLIT=1024),
            f"{D64}: 10.9 ms, 2 stages, SPLIT 1024 11.1, 64 keys, 3 stages 12.2, Triton's 11.5"),
        Row("sm_90", K96, _sm90(2, BLOCK_N=128, BUFFERS=2, SPLIT=1024),
            f"{D96}: 15.2 ms, 64 keys, 3 or 4 stages 16.4, Triton's 22.4; heads of 80 at 32K 3.6, 3.5, 5.1"),
        Row("sm_90", K128 | {"triton": 308}, _sm90(3, BLOCK_N=64, BUFFERS=2, SPLIT=1024),
            "H200, 128K/512/8: 9.5 ms, Triton's 11.9; SPLIT 512 10.0, 2048 10.3; 128 keys, 1 stage 13.3"),
        Row("sm_90", K128, _sm90(3, BLOCK_N=64, BUFFERS=2, SPLIT=1024, LOADER_REGS=56, CONSUMER_REGS=224),
            "not timed: with Triton 3.9 the loader spills in 40 registers"),
        Row("sm_90 sm_100", K128, _c(128, 32, 4, 3),
            "H200: 12.1 ms at 128K, chunk 512, topk 8; 64 rows 13.7, 2 stages 13.6, 128x64 at 8 warps 13.8"),
        Row("sm_90", {"head_dim": 128, "ieee": 0}, _c(128, 32, 8, 1), f"{FP32}: backward 38.1 ms, 64x32, 4 warps 40.8"),
        Row("sm_90", K192, _sm90(2, BLOCK_N=32, BUFFERS=2, SPLIT=1024),
            f"{MLA}: 7.1 ms, 3 stages 7.4, 64 keys, 1 stage 8.8, Triton's 9.9"),
        Row("sm_90", {"itemsize": 2}, _c(128, 32, 8, 3),
            f"{D256}: backward 71.2 ms, 2 stages 73.8, 64x32, 4 warps, 3 stages 74.4, 32x32 93.8"),
        *_portable((64, 32, 4, 1), (32, 16, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    ),
    # BLOCK_M queries of one head against their diagonal chunk, BLOCK_N keys at a time, then the sum of partial dq
    "attention_bwd_dq_diagonal": (
        Row("sm_90", K64, _c(64, 64, 4, 2, maxnreg=128),
            f"{D64}: 2.2 ms, without maxnreg 2.4, 64x32 2.4, in 104 registers 3.1, in Gluon 2.5; chunks of 128 1.6"),
        Row("sm_90", K128 | {"choices": 31}, _sm90(2, BLOCK_N=64, SLOTS=2, CONSUMER_REGS=224),
            f"{GQA}: 4.2 ms, Triton's 4.7; 128K/128/8 1.65, 1.75"),
        Row("sm_90 sm_100", K128, _c(64, 64, 4, 2)),
        Row("sm_90", {"head_dim": 128, "ieee": 0}, _c(64, 32, 4, 1)),
        Row("sm_90", {"itemsize": 2}, _c(64, 64, 8, 2),
            f"{MLA}: backward 1.0 ms less than 32x32, 4 warps, of 79; 256: 1.6 less of 94"),
        *_portable((32, 32, 4, 1), (32, 16, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    ),
    # BLOCK_C chunk means at a time against the query heads of one kv head
    "decode_gate": (
        Row("*", K128, {"BLOCK_C": 128, "num_warps": 4, "num_stages": 1}),
        Row("*", {}, {"BLOCK_C": 32, "num_warps": 4, "num_stages": 1}),
    ),
    # BLOCK_N keys of a chunk at a time; chunks are cut into pieces until a processor has PROGRAMS of them
    "decode": (
        Row("sm_90 sm_100", K128, {"BLOCK_N": 64, "PROGRAMS": 2, "num_warps": 4, "num_stages": 3},
            "H200, step at 128K/512/8, 32:8 heads, batch 16 and 1: 0.235, 0.0298 ms; PROGRAMS 4 0.235, 0.0326"),
        Row("*", K128, {"BLOCK_N": 32, "PROGRAMS": 4, "num_warps": 4, "num_stages": 3}),
        Row("*", {}, {"BLOCK_N": 16, "PROGRAMS": 4, "num_warps": 4, "num_stages": 2}),
    ),
}
