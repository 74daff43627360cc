"""Races of the Gluon kernels for Hopper: groups of warps that sleep at random at every barrier give the same bits.

compute-sanitizer's racecheck often cannot tell (launch/sanitize.sh says why). So the kernels are built again, with
sleeps before and after every wait, arrival and copy, of lengths that change with each warp, block and launch; a buffer
that is read before it is filled, or filled before it has been read, then holds something else. Kernels that are broken
on purpose, in ways that cannot hang (tests/kernels/test_sm90_protocol.py), show that this is seen.
"""
import importlib.util
import itertools
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moba_megatron import kernels
from moba_megatron.kernels import launcher, sm90, tuning
from tests.gpu import test_attention_fwd, test_sm90

gluon = pytest.importorskip("triton.experimental.gluon")
gl = pytest.importorskip("triton.experimental.gluon.language")
sm90_language = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
jit_helpers_sm90 = pytest.importorskip("moba_megatron.kernels.jit_helpers_sm90")
pytestmark = pytest.mark.gpu

CASES = {
    "chunk 100, packed, gqa": dict(lengths=[2100, 99, 1, 450], chunk=100, topk=5, heads=8, kv_heads=4),
    "chunk 128, packed, mqa": dict(lengths=[1900, 0, 1, 129, 640], chunk=128, topk=4, heads=6, kv_heads=1),
    "chunk 200, parts, gqa": dict(lengths=[1500, 900], chunk=200, topk=4, heads=8, kv_heads=2,
                                  parts=[(1, 700, 200), (0, 0, 300), (0, 1200, 300), (0, 300, 1)]),
    "chunk 320, packed, gqa": dict(lengths=[2000, 0, 1, 999], chunk=320, topk=3, heads=6, kv_heads=2),
    "chunk 512": dict(lengths=[3000], chunk=512, topk=3, heads=4, kv_heads=2),
    "chunk 512, D 64": dict(lengths=[2500], chunk=512, topk=3, heads=4, kv_heads=4, dim=64),
}
ALL_CASES = {**CASES, "many chunks": dict(lengths=[12000, 0, 1, 5000], chunk=16, topk=8, heads=8, kv_heads=2)}
LISTS = 640
"""Rows of a piece of a list: five tiles of the forward, ten steps of dk and dv; longer lists are cut."""
SLOW, QUICK = 6000, 100
MODES = {  # longest sleeps, in ns, of consumer 0, consumer 1, the loader and the warp that finds tiles
    "all": (SLOW // 3,) * 4,
    "loader slow": (QUICK, QUICK, SLOW, QUICK),
    "finder slow": (QUICK, QUICK, QUICK, SLOW),
    "consumer 0 slow": (SLOW, QUICK, QUICK, QUICK),
    "consumer 1 slow": (QUICK, SLOW, QUICK, QUICK),
    "only one warp group sleeps": (0, SLOW, 0, 0),
}
SEEDS = 6

# Half of the times none, else up to the longest of the warp's group: settings are [seed, longest for each group].
SLEEP = gl.constexpr("""{
    .reg .pred some;
    .reg .b32 warp, group, longest, mixed, other;
    .reg .b64 at;
    mov.u32 warp, %tid.x;
    shr.u32 group, warp, 7;
    shr.u32 warp, warp, 5;
    mul.wide.u32 at, group, 4;
    add.u64 at, at, $1;
    ld.global.u32 longest, [at + 4];
    ld.global.u32 mixed, [$1];
    mad.lo.u32 mixed, warp, 0x9E3779B1, mixed;
    mov.u32 other, %ctaid.x;
    mad.lo.u32 mixed, other, 0x85EBCA77, mixed;
    mov.u32 other, %clock;
    xor.b32 mixed, mixed, other;
    mul.lo.u32 mixed, mixed, 0xC2B2AE3D;
    shr.u32 other, mixed, 15;
    xor.b32 mixed, mixed, other;
    mul.lo.u32 mixed, mixed, 0x27D4EB2F;
    shr.u32 other, mixed, 31;
    setp.ne.u32 some, other, 0;
    setp.ne.and.u32 some, longest, 0, some;
    shr.u32 mixed, mixed, 8;
    add.u32 longest, longest, 1;
    rem.u32 other, mixed, longest;
    @some nanosleep.u32 other;
    mov.u32 $0, other;
}""")
SETTINGS = gl.constexpr(0)
"""Where the settings are on the device; a part of what is compiled, so that no kernel takes a further argument."""
real_mbarrier, real_copy = sm90_language.mbarrier, sm90_language.async_copy
real_load, real_tma_load = jit_helpers_sm90.async_load, jit_helpers_sm90.tma_load
real_mma_wait = sm90_language.warpgroup_mma_wait
real_fence = sm90_language.fence_async_shared


@gluon.jit
def _sleep():
    gl.inline_asm_elementwise(SLEEP, "=r,l", [SETTINGS], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _wait(bar, phase):
    _sleep()
    real_mbarrier.wait(bar, phase)
    _sleep()


@gluon.jit
def _arrive(bar, count: gl.constexpr):
    _sleep()
    real_mbarrier.arrive(bar, count=count)
    _sleep()


@gluon.jit
def _expect(bar, size: gl.constexpr):
    _sleep()
    real_mbarrier.expect(bar, size)
    _sleep()


@gluon.jit
def _copy(smem, pointer, mask=None):
    _sleep()
    real_load(smem, pointer, mask=mask)


@gluon.jit
def _copy_arrive(bar, increment_count: gl.constexpr):
    _sleep()
    real_copy.mbarrier_arrive(bar, increment_count=increment_count)
    _sleep()


@gluon.jit
def _tma_copy(source, at, bar, smem):
    _sleep()
    real_tma_load(source, at, bar, smem)
    _sleep()


@gluon.jit
def _mma_wait(num_outstanding: gl.constexpr, deps):
    _sleep()
    results = real_mma_wait(num_outstanding, deps=deps)
    _sleep()
    return results


@gluon.jit
def _fence():
    _sleep()
    real_fence()
    _sleep()


def stand_in(real, **changed):
    module = ModuleType(f"{real.__name__}_with_sleeps")
    vars(module).update({**vars(real), "__name__": module.__name__, **changed})
    return module


STAND_INS = {
    "mbarrier": stand_in(real_mbarrier, wait=_wait, arrive=_arrive, expect=_expect),
    "async_copy": stand_in(real_copy, mbarrier_arrive=_copy_arrive),
    "async_load": _copy,
    "tma_load": _tma_copy,
    "warpgroup_mma_wait": _mma_wait,
    "fence_async_shared": _fence,
}

# Each breaks one barrier: (kernel, case, what is replaced by what). Every barrier still gets all its arrivals. (The
# forward's rows announced too early are not seen: its groups also await keys, whose copies start after the rows'. Rows
# given back too early are not, where a chunk is several tiles: the loader awaits the use of keys before it gathers.)
BROKEN = {
    "dk, dv: rows are announced before all their copies have started": ("attention_bwd_dkdv", "chunk 512", [
        ("    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)\n", ""),
        ("    at = terms + row.to(gl.int64) * 4\n",
         "    mbarrier.arrive(full.index(stage), count=128)\n    at = terms + row.to(gl.int64) * 4\n")]),
    "dk, dv: rows are given back before they are read": ("attention_bwd_dkdv", "chunk 512", [
        ("    mbarrier.arrive(empty.index(stage), count=1)\n", ""),
        ("    mbarrier.wait(full.index(stage), (step // STAGES) & 1)\n",
         "    mbarrier.wait(full.index(stage), (step // STAGES) & 1)\n"
         "    mbarrier.arrive(empty.index(stage), count=1)\n")]),
    "dk, dv: halves of ds are announced before they are stored": ("attention_bwd_dkdv", "chunk 128, packed, mqa", [
        ("    mbarrier.arrive(ds_to[1], count=1)\n", ""),
        ("    ds_to[0].store(ds)\n", "    mbarrier.arrive(ds_to[1], count=1)\n    ds_to[0].store(ds)\n")]),
    "dq: keys are given back before they are read": ("attention_bwd_dq", "chunk 512", [
        ("    mbarrier.arrive(kv_empty.index(step % STAGES), count=1)\n", ""),
        ("    mbarrier.wait(v_full.index(stage), phase)\n",
         "    mbarrier.wait(v_full.index(stage), phase)\n    mbarrier.arrive(kv_empty.index(stage), count=1)\n")]),
    "gate: means are given back before they are read": ("gating", "many chunks", [
        ("    mbarrier.arrive(empty.index(stage), count=1)\n", ""),
        ("    mbarrier.wait(full.index(stage), (step // STAGES) & 1)\n",
         "    mbarrier.wait(full.index(stage), (step // STAGES) & 1)\n"
         "    mbarrier.arrive(empty.index(stage), count=1)\n")]),
    "forward: rows are given back before they are read": ("attention_fwd", "chunk 128, packed, mqa", [
        ("    mbarrier.arrive(row_empty.index(buffer), count=1)\n", ""),
        ("    mbarrier.wait(row_full.index(buffer), (tile // BUFFERS) & 1)\n",
         "    mbarrier.wait(row_full.index(buffer), (tile // BUFFERS) & 1)\n"
         "    mbarrier.arrive(row_empty.index(buffer), count=1)\n")]),
    "own chunk: keys are given back before they are read": ("attention_diagonal", "chunk 512", [
        ("                mbarrier.arrive(k_empty.index(stage), count=1)\n                if masked",
         "                if masked"),
        ("            mbarrier.wait(k_full.index(stage), phase)\n",
         "            mbarrier.wait(k_full.index(stage), phase)\n"
         "            if FORWARD:\n                mbarrier.arrive(k_empty.index(stage), count=1)\n")]),
}


def build(name: str, folder: Path, changes=(), **names) -> ModuleType:
    """A module of the kernels from its source, changed, with the stand-ins and ``names`` for what they stand for."""
    source = Path(sm90.__file__).with_name(f"{name}.py").read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{name} has not exactly one {old!r}"
        source = source.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{sm90.__package__}.{name}_with_sleeps", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update({name: value for name, value in {**STAND_INS, **names}.items() if hasattr(module, name)})
    return module


class Modules(dict):
    """``sm90.kernel_module``'s modules, with sleeps, in a folder; counts launches."""

    def __init__(self, folder: Path):
        self.folder, self.launched = folder, Counter()
        rows = build("jit_helpers_sm90", folder)
        self.copies = {name: getattr(rows, name) for name in ("_copy_rows", "_copy_listed", "_copy_keys",
                                                                "_load_lists", "_hand", "_take", "_wait")}
        for name in sorted(test_sm90.ALL | {"gating", "attention_diagonal"}):
            self.build(name)

    def build(self, name: str, changes=()) -> None:
        class Delayed(SimpleNamespace):
            def __getitem__(delayed, grid):  # noqa: N805
                def run(*args, **constants):
                    compiled = delayed.kernel[grid](*args, **constants)
                    assert compiled.asm["ptx"].count("nanosleep") > 10
                    self.launched[name] += 1  # and nothing is returned, so that no launch is prepared

                return run

        def launch(kernel, grid, *args, **constants):
            launcher.launch(Delayed(kernel=kernel), grid, *args, **constants)

        self.folder = self.folder / "next"  # a source must not change while its functions are in use
        self.folder.mkdir()
        self[name] = build(f"{name}_sm90", self.folder, changes, **self.copies)
        self[name].launch = launch


@pytest.fixture(scope="session")
def settings():
    """Seed, and the longest sleeps of the four groups in ns, on the device."""
    global SETTINGS
    tensor = torch.zeros(5, dtype=torch.int32, device="cuda")
    SETTINGS = gl.constexpr(tensor.data_ptr())
    return tensor


@pytest.fixture
def modules(settings, tmp_path, monkeypatch):
    """The modules with sleeps, in use, with long pieces of lists."""
    if not sm90.takes(torch.empty(1, 1, 128, dtype=torch.bfloat16, device="cuda")):
        pytest.skip(f"needs a Hopper card and a Triton that has the kernels: {sm90.unusable()}")
    modules = Modules(tmp_path)
    monkeypatch.setattr(sm90, "kernel_module", modules.__getitem__)
    monkeypatch.setattr(sm90, "PROGRAMS", 1)  # as long as SPLIT, however few rows there are
    configs = {stage: {**config, "SPLIT": LISTS} for stage, config in test_sm90.CONFIGS.items()}
    with tuning.forced(configs=configs):
        yield modules


def problem(case):
    """What test_sm90.run takes."""
    q, k, v, selected, segments = test_attention_fwd.problem(**case)
    return q, k, v, selected, segments, kernels.route(selected, k.shape[1], segments.num_chunks(k.shape[0]))


def gate(q, k, v, selected, segments, routing):
    """Choices of the gate alone."""
    return (kernels.gate(q, kernels.chunk_means(k, segments), segments, selected.shape[2] + 1),)


def differing(expected, tensors, settings, run=test_sm90.run):
    """How often o, lse, dq, dk, dv (or what else ``run`` gives) have other bits than expected, by mode and name."""
    found = Counter()
    for (mode, longest), seed in itertools.product(MODES.items(), range(SEEDS)):
        settings.copy_(torch.tensor([seed * 7919 + 1, *longest], dtype=torch.int32))
        for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), expected, run(*tensors)):
            found[mode, name] += not torch.equal(a, b)
    settings.zero_()
    return +found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sleeping_warps_change_no_bits(case, modules, settings):
    tensors = problem(case)
    expected = test_sm90.run(*tensors)
    assert all(x.isfinite().all() for x in expected)
    diagonal = set() if case.get("dim") == 64 else {"attention_diagonal"}
    assert set(modules.launched) == test_sm90.kernels_for(case["chunk"]) | diagonal
    assert not differing(expected, tensors, settings)


@pytest.mark.parametrize("case", [
    dict(lengths=[1500, 0, 1, 200], chunk=64, topk=4, heads=8, kv_heads=2),
    dict(lengths=[2500], chunk=512, topk=3, heads=4, kv_heads=2, dim=256)], ids=["chunk 64", "D 256"])
def test_sleeping_warps_that_share_keys_change_no_bits(case, modules, settings):
    tensors = problem(case)
    with tuning.forced(configs={"attention_bwd_dkdv": {**test_sm90.SHARED_KEYS, "SPLIT": LISTS, "STAGES": 2}}):
        expected = test_sm90.run(*tensors)
        assert all(x.isfinite().all() for x in expected)
        diagonal = {"attention_diagonal"} if case["chunk"] == 64 else set()
        assert set(modules.launched) == {"attention_bwd_dkdv"} | diagonal
        assert not differing(expected, tensors, settings)


def test_sleeping_warps_choose_the_same_chunks(modules, settings):
    tensors = problem(ALL_CASES["many chunks"])
    expected = gate(*tensors)
    assert set(modules.launched) == {"gating"}
    assert not differing(expected, tensors, settings, gate)


@pytest.mark.parametrize("kernel, case, changes", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_barrier_is_seen(kernel, case, changes, modules, settings):
    tensors, run = problem(ALL_CASES[case]), gate if kernel == "gating" else test_sm90.run
    expected = run(*tensors)
    modules.build(kernel, changes)
    assert differing(expected, tensors, settings, run)
