"""The Gluon kernels for Hopper, emulated: o and gradients against fp64, whatever the order in which things happen.

tests/helpers/gluon_emulator.py says what that shows. tests/gpu has the same kernels on a card.
"""
import pytest
import torch
from gluon_emulator import emulated

import comparison
from moba_megatron import kernels, reference
from moba_megatron.kernels import tuning
from moba_megatron.kernels.tuning_table import TABLE, is_gluon
from tests.gpu.test_sm90_delays import BROKEN
from tests.interpreted.test_attention_fwd import problem

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
FORWARD, DQ, DKDV = (f"_attention_{name}_sm90_kernel" for name in ("fwd", "bwd_dq", "bwd_dkdv"))
DIAGONAL = {f"_attention_{name}_diagonal_sm90_kernel" for name in ("fwd", "bwd_dq")}
GATE = "_gate_sm90_kernel"
GATE_CASES = {
    "several tiles": dict(lengths=[700], chunk=2, topk=8),
    "packed, gqa": dict(lengths=[300, 0, 129, 1, 260], chunk=1, topk=8, heads=4, kv_heads=2),
    "parts of sequences": dict(lengths=[600, 400], chunk=2, topk=4, parts=[(0, 128, 200), (1, 130, 70), (0, 500, 60)]),
    "few chunks": dict(lengths=[900], chunk=128, topk=8),
    "no choice": dict(lengths=[300], chunk=512, topk=3),
    "D 64": dict(lengths=[400], chunk=1, topk=2, dim=64),
    "D 80, two parts": dict(lengths=[400], chunk=1, topk=9, dim=80),
}
CASES = {
    "chunk 128": dict(lengths=[700], chunk=128, topk=3),
    "chunk 128, gqa, packed": dict(lengths=[300, 0, 129, 1], chunk=128, topk=2, heads=4),
    "chunk 64": dict(lengths=[300, 100], chunk=64, topk=4, heads=4),
    "chunk 48": dict(lengths=[400], chunk=48, topk=4),
    "chunk 100: one ragged tile": dict(lengths=[450], chunk=100, topk=4, kv_heads=1),
    "chunk 256": dict(lengths=[900], chunk=256, topk=3),
    "chunk 320: 64 keys a tile": dict(lengths=[500, 330], chunk=320, topk=2, heads=4),
    "chunk 200: the last tile begins early": dict(lengths=[700], chunk=200, topk=3),
    "parts of sequences": dict(lengths=[600, 400], chunk=128, topk=3,
                               parts=[(0, 128, 200), (1, 130, 70), (0, 500, 60)]),
    "D 64": dict(lengths=[700], chunk=256, topk=2, dim=64),
    "D 80": dict(lengths=[500], chunk=128, topk=2, dim=80),
    "D 96": dict(lengths=[600], chunk=256, topk=2, dim=96),
    "D 192, DV 128": dict(lengths=[600], chunk=256, topk=2, dim=192, dim_v=128),
    "D 256": dict(lengths=[600], chunk=256, topk=2, dim=256),
}


def check(q, k, v, selected, segments):
    q, do = q.contiguous(), torch.randn(*q.shape[:2], v.shape[2]).to(q.dtype)
    scale = q.shape[2] ** -0.5
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, scale)
    gradients = kernels.attention_bwd(do, None, q, k, v, o, lse, selected, segments, scale)
    mask = comparison.dense_mask(selected.repeat_interleave(q.shape[1] // selected.shape[1], 1), segments, q.shape[0],
                                 k.shape[0])
    exact, eager = (comparison.attend(q, k, v, do, None, mask, scale, dtype) for dtype in (torch.float64, q.dtype))
    comparison.assert_as_good_as_eager(dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *gradients))), exact, eager,
                                       q.dtype)


def choose(case, seed=0, changes=(), spread=4, **options):
    """How many programs of which kernels ran: the gate on integers, so that scores are exact and many are equal."""
    q, k, _, selected, segments = problem(**{"dtype": torch.float16, "dim": 128, **case})
    random = torch.Generator().manual_seed(seed)
    q, means = (torch.randint(1 - spread, spread, (n, *x.shape[1:]), generator=random).half()
                for n, x in ((q.shape[0], q), (segments.num_chunks(k.shape[0]), k)))
    config = next(row.config for row in TABLE["gate"] if is_gluon(row.config))
    with tuning.forced("sm_90", {"gate": {**config, **options}}), emulated(seed, changes) as ran:
        chosen = kernels.gate(q, means, segments, case["topk"])
    assert torch.equal(chosen, reference.gate(q, means, segments, case["topk"]))
    return ran


@pytest.mark.parametrize("spread", [2, 8])
@pytest.mark.parametrize("name", GATE_CASES)
def test_gate(name, spread):
    assert set(choose(GATE_CASES[name], spread, spread=spread)) == {GATE}


def run(case, seed=0, changes=(), shared=1):
    """How many programs of which kernels ran. shared: query heads that have one choice."""
    q, k, v, selected, segments = problem(**{"dtype": torch.float16, "dim": 128, **case})
    with tuning.forced("sm_90"), emulated(seed, changes) as ran:
        check(q, k, v, selected[:, ::shared].contiguous(), segments)
    return ran


@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name):
    chunk = CASES[name]["chunk"] if name != "D 256" else 0
    assert set(run(CASES[name])) == {DKDV} | ({FORWARD} if chunk >= 128 else set()) | (
        {DQ} if chunk > 128 else set()) | (DIAGONAL if 64 < CASES[name].get("dim", 128) <= 128 else set())


@pytest.mark.parametrize("seed", range(1, 4))
def test_other_orders(seed):
    run(CASES["chunk 200: the last tile begins early"], seed)


def test_heads_that_choose_together():
    run(CASES["chunk 128, gqa, packed"], shared=2)


def test_long_lists_are_cut():
    options = {"STAGES": 3, "LOADER_REGS": 40, "CONSUMER_REGS": 232, "num_warps": 4, "num_stages": 1, "BLOCK_M": 64,
               "BLOCK_N": 128}
    with tuning.forced(configs={"attention_bwd_dkdv": {**options, "SPLIT": 128}}):
        cut = run(CASES["chunk 128"])
    assert cut[DKDV] > run(CASES["chunk 128"])[DKDV]


@pytest.mark.parametrize("block_n", [32, 64])
@pytest.mark.parametrize("case", [dict(lengths=[20], chunk=64), dict(lengths=[138], chunk=192),
                                  dict(lengths=[300], chunk=128, parts=[(0, 70, 10)])], ids=["20", "138", "parts"])
def test_own_chunks_whose_second_half_has_no_rows(case, block_n):
    """That group has no keys to skip which are not there, also in tiles that only a tuning file asks for."""
    own = {stage: {**next(row.config for row in TABLE[stage] if is_gluon(row.config)), "BLOCK_N": block_n}
           for stage in ("attention_fwd_diagonal", "attention_bwd_dq_diagonal")}
    q, k, v, selected, segments = problem(**{"dtype": torch.float16, "dim": 128, "topk": 2, **case})
    with tuning.forced("sm_90", own), emulated() as ran:
        check(q, k, v, selected, segments)
    assert DIAGONAL <= set(ran)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_seen(name):
    """A buffer that is announced before it is filled, or given back before it is read."""
    kernel, case, changes = BROKEN[name]
    case = CASES["chunk 128" if "128" in case else "chunk 256"]
    changes = [(f"{kernel}_sm90", *change) for change in changes]

    def goes_wrong(seed):
        try:
            if kernel == "gating":
                choose(GATE_CASES["several tiles"], seed, changes, STAGES=2, AHEAD=1)
            else:
                run(case, seed, changes)
        except AssertionError:
            return True
        return False

    assert any(goes_wrong(seed) for seed in range(4))
