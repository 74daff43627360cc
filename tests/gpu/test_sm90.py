"""The Gluon kernels for Hopper: every awkward shape goes through them, what they cannot take to the Triton kernels."""
import collections

import pytest
import torch

import comparison
from moba_megatron import kernels
from moba_megatron.kernels import sm90, tuning
from moba_megatron.kernels.tuning_table import TABLE, is_gluon
from moba_megatron.kernels.workspace import head_groups
from moba_megatron.segments import Routing
from tests.gpu import test_attention_bwd, test_attention_fwd, test_op

pytestmark = pytest.mark.gpu
CONFIGS, WIDE = ({stage: row.config for stage, rows in TABLE.items() for row in rows[::-1]
                  if "SPLIT" in row.config and is_gluon(row.config) and row.upto["head_dim"] in (dim, 192)
                  and "chunk_size" not in row.upto}
                 for dim in (128, 192))
SHARED_KEYS = next(row.config for row in TABLE["attention_bwd_dkdv"]
                   if is_gluon(row.config) and row.config["BLOCK_N"] == 64)  # of both groups, not 64 for each
ALL = {"attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv"}
WHOLE_CHUNK = {"attention_fwd", "attention_bwd_dkdv"}  # the latter holds all keys of a chunk, and writes partial dq
CASES = {name: case for name, case in test_op.CASES.items()
         if "dtype" not in case and ("dim" not in case or name.startswith("D 128"))}
CASES |= {
    "chunk 128, packed, mqa": dict(lengths=[1000, 0, 1, 129, 640], chunk=128, topk=4, heads=6, kv_heads=1),
    "chunk 100, packed, gqa": dict(lengths=[1000, 99, 1, 450], chunk=100, topk=5, heads=8, kv_heads=4),
    "chunk 192": dict(lengths=[1500], chunk=192, topk=3),
    "chunk 320, packed, gqa": dict(lengths=[1000, 0, 1, 999], chunk=320, topk=3, heads=6, kv_heads=2),
    "chunk 1000": dict(lengths=[3500], chunk=1000, topk=3, heads=2, kv_heads=1),
    "chunk 1024": dict(lengths=[3000, 1100], chunk=1024, topk=2, heads=2, kv_heads=2),
}
PARTS = {
    "chunk 128": dict(lengths=[2500, 900], chunk=128, topk=5, parts=[(0, 500, 700), (1, 3, 890), (0, 1900, 600)]),
    "chunk 48, gqa": dict(lengths=[1500, 900], chunk=48, topk=4, heads=8, kv_heads=2,
                          parts=[(1, 700, 200), (0, 0, 300), (0, 1200, 300), (0, 300, 1)]),
    "chunk 512": dict(lengths=[2500, 900], chunk=512, topk=3, parts=[(0, 500, 700), (1, 3, 890), (0, 1900, 600)]),
    "chunk 200, gqa": dict(lengths=[1500, 900], chunk=200, topk=4, heads=8, kv_heads=2,
                           parts=[(1, 700, 200), (0, 0, 300), (0, 1200, 300), (0, 300, 1)]),
}


@pytest.fixture
def launched(monkeypatch):
    """How often each of the kernels' modules launched; skips where they cannot be used."""
    q = torch.empty(1, 1, 128, dtype=torch.bfloat16, device="cuda")
    if not sm90.takes(q):
        pytest.skip(f"needs a Hopper card and a Triton that has the kernels: {sm90.unusable()}")
    count = collections.Counter()

    def counting(name, launch):
        def run(*args, **constants):
            count[name] += 1
            launch(*args, **constants)
        return run

    for name in ALL:
        module = sm90.kernel_module(name)
        monkeypatch.setattr(module, "launch", counting(name, module.launch))
    return count


@pytest.fixture
def always(launched):
    """Within the test every chunk size goes to these kernels, with short pieces of lists."""
    short = {stage: {**config, "SPLIT": 256} for stage, config in CONFIGS.items()}
    with tuning.forced(configs=short):
        yield launched


def diagonal_by_triton():
    """Within the block the portable kernels take diagonal chunks and sum up partial results, with their tiles."""
    key = {"head_dim": 128, "itemsize": 2, "choices": 3}
    return tuning.forced(configs=tuning.forced_settings.get("configs", {}) | {
        stage: next(row.config for row in TABLE[stage] if row.fits("sm_90", key))
        for stage in ("attention_fwd_diagonal", "attention_bwd_dq_diagonal")})


def kernels_for(chunk):
    """The kernels that the fixture ``always`` makes a chunk size use, where there are choices."""
    return ALL if chunk > 128 else WHOLE_CHUNK


def operator_cases():
    """Every case at D = 128 in bf16; some in fp16 and at D = 64, and at D = 80 and 96, rows of which lie in parts."""
    for name, case in CASES.items():
        yield pytest.param({**case, "dim": 128, "dtype": torch.bfloat16}, id=name)
    for name in ("packed, ragged, empty", "D 128", "chunk 320, packed, gqa", "D 128, chunk 512"):
        yield pytest.param({**CASES[name], "dim": 128, "dtype": torch.float16}, id=f"{name}, fp16")
        for dim in (64, 80, 96):
            yield pytest.param({**CASES[name], "dim": dim, "dtype": torch.bfloat16}, id=f"{name}, D {dim}")


@pytest.mark.parametrize("case", list(operator_cases()))
def test_operator(case, always):
    comparison.check_operator(*test_op.make(**case))
    some_left_out = case["topk"] > 1 and max(case["lengths"]) > case["topk"] * case["chunk"]  # else: one chunk
    assert set(always) == (kernels_for(case["chunk"]) if some_left_out else {"attention_bwd_dkdv"})


@pytest.mark.parametrize("name", ["large chunk", "chunk 192", "chunk 320, packed, gqa", "D 128, chunk 512",
                                  "chunk 1000"])
def test_heads_of_192_and_128(name, launched):
    with tuning.forced(configs={stage: {**config, "SPLIT": 256} for stage, config in WIDE.items()}):
        comparison.check_operator(*test_op.make(**{**CASES[name], "dim": 192, "dim_v": 128}))
    assert set(launched) == ALL


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("name", ["packed, ragged, empty", "gqa", "D 128", "large chunk"])
def test_groups_that_share_64_keys(name, dim, launched):
    """Chunks of up to 64 keys of heads of 128, all chunks of heads of 256."""
    if dim == 128 and CASES[name]["chunk"] > 64:
        pytest.skip("the groups have 64 keys each there")
    if dim == 256 and CASES[name]["chunk"] <= 64:
        pytest.skip("not for partial dq of 256 columns")
    with tuning.forced(configs={"attention_bwd_dkdv": {**SHARED_KEYS, "SPLIT": 256, "STAGES": 2}}):
        comparison.check_operator(*test_op.make(**{**CASES[name], "dim": dim, "dtype": torch.bfloat16}))
    assert set(launched) == {"attention_bwd_dkdv"}


@pytest.mark.parametrize("dim, dim_v, chunk", [(80, 80, 512), (96, 96, 512), (96, 96, 128), (192, 128, 512)])
def test_nan_of_another_head_stays_there(dim, dim_v, chunk, launched):
    """Parts of a row are copied apart from each other, and end where the next head begins."""
    q, k, v, selected, segments = test_attention_fwd.problem([3000], chunk, 3, dim=dim, dim_v=dim_v)
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, 1::2] = float("nan")
    o, lse, dq, dk, dv = run(q, k, v, selected, segments)
    assert all(x[:, ::2].isfinite().all() for x in (o, lse, dq, dk, dv))
    assert set(launched) == kernels_for(chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PARTS.values(), ids=PARTS.keys())
def test_parts_of_sequences(case, dtype, always):
    """Queries of a context-parallel rank: several parts of a sequence, in any order."""
    q, k, v, selected, segments = test_attention_fwd.problem(**case, dtype=dtype)
    scale = 128 ** -0.5
    test_attention_fwd.check(kernels.attention_fwd(q, k, v, selected, segments, scale), q, k, v, selected, segments,
                             scale)
    test_attention_bwd.check(q, k, v, selected, segments, lse_gradient=True)
    assert set(always) == kernels_for(case["chunk"])


@pytest.mark.parametrize("chunk", [16, 100, 128, 512])
def test_every_query_picks_the_first_chunk(chunk, always):
    q, k, v, selected, segments = test_attention_fwd.problem([3000], chunk, 4, heads=8, kv_heads=2)
    selected = test_attention_bwd.to_first_chunk(selected, segments)
    test_attention_fwd.check(kernels.attention_fwd(q, k, v, selected, segments, 0.1), q, k, v, selected, segments, 0.1)
    test_attention_bwd.check(q, k, v, selected, segments)
    assert set(always) == kernels_for(chunk)


def run(q, k, v, selected, segments, routing=None):
    """o, lse, dq, dk, dv."""
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, 0.1, routing)
    torch.manual_seed(3)
    do = torch.randn_like(o)
    return o, lse, *kernels.attention_bwd(do, None, q, k, v, o, lse, selected, segments, 0.1, routing=routing)


@pytest.mark.parametrize("chunk", [48, 128, 200, 512])
def test_nothing_chosen(chunk, always):
    """Empty lists: nothing of a chunk is read, and what nobody wrote is not added."""
    q, k, v, selected, segments = test_attention_fwd.problem([1300, 700], chunk, 4)
    empty = run(q, k, v, torch.full_like(selected, -1), segments)
    alone = run(q, k, v, selected[:, :, :0], segments)
    assert set(always) == kernels_for(chunk)
    for a, b in zip(empty, alone):
        assert comparison.relative_error(a, b.double()) < 1e-2


@pytest.mark.parametrize("chunk", [128, 512])
def test_choices_numbered_in_64_bits(chunk, always):
    tensors = test_attention_fwd.problem([3000], chunk, 4, heads=8, kv_heads=2)
    q, k, _, selected, segments = tensors
    narrow = kernels.route(selected, k.shape[1], segments.num_chunks(k.shape[0]))
    for a, b in zip(run(*tensors, narrow), run(*tensors, Routing(narrow.indices.long(), narrow.indptr.long()))):
        assert torch.equal(a, b)
    assert set(always) == kernels_for(chunk)


@pytest.mark.parametrize("chunk", [100, 128, 200, 512])
def test_layouts_and_groups_of_heads_give_the_same_bits(chunk, always, monkeypatch):
    q, k, v, selected, segments = test_attention_fwd.problem([3000], chunk, 4, heads=8, kv_heads=4)
    first = run(*(x.contiguous() for x in (q, k, v)), selected, segments)
    heads_outside = run(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)), selected, segments)
    with diagonal_by_triton():  # their diagonal chunks are Triton's: no descriptor has heads outside
        same = run(*(x.contiguous() for x in (q, k, v)), selected, segments)
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", "4")
    for one, other in ((first, run(q, k, v, selected, segments)), (same, heads_outside)):
        for a, b in zip(one[:3], other):
            assert torch.equal(a, b)
        for a, b in zip(one[3:], other[3:]):  # their lists may be cut elsewhere
            assert comparison.relative_error(a, b.double()) < 1e-2
    for a, b in zip(first, same):
        assert comparison.relative_error(a, b.double()) < 1e-2
    assert set(always) == kernels_for(chunk)


@pytest.mark.parametrize("chunk", [100, 128, 200])
def test_a_smaller_last_group_of_heads(chunk, always, monkeypatch):
    """Three kv heads, two at a time, with lists that are cut."""
    monkeypatch.setenv("MOBA_WORKSPACE_MIB", "10")
    tensors = test_attention_fwd.problem([3000], chunk, 4, heads=6, kv_heads=3)
    assert head_groups(3, 3000 * 2 * 3 * 128 * 2) == [(0, 2), (2, 3)]
    test_attention_bwd.check(*tensors)
    assert "attention_bwd_dkdv" in always


@pytest.mark.parametrize("lengths", [[300, 1, 70, 1000, 0, 40, 513], [64, 63, 65, 128, 129, 127, 1400]], ids=str)
def test_nan_of_other_sequences_stays_there(lengths, launched):
    """Tiles of queries and keys reach into the next sequence, and into rows that no sequence has."""
    q, k, v, selected, segments = test_attention_fwd.problem(lengths, 128, 4, heads=4, kv_heads=2)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    expected = run(q, k, v, selected, segments)
    for bad in range(len(lengths)):
        rows = slice(ends[bad] - lengths[bad], ends[bad])
        poisoned = [x.clone() for x in (q, k, v)]
        for x in poisoned:
            x[rows] = float("nan")
        for a, b in zip(expected, run(*poisoned, selected, segments)):
            a, b = a.clone(), b.clone()
            a[rows], b[rows] = 0, 0
            assert torch.equal(a, b), bad


@pytest.mark.parametrize("change", ["chunk 512", "chunk 100, parts", "choices of few rows", "topk 16"])
def test_diagonal_chunks_as_by_triton(change, launched, monkeypatch):
    case = {"chunk 512": dict(lengths=[3000, 5, 700], chunk=512, topk=4, heads=8, kv_heads=2),
            "chunk 100, parts": PARTS["chunk 200, gqa"] | dict(chunk=100),
            "choices of few rows": dict(lengths=[1000] * 3, chunk=128, topk=8, heads=2, kv_heads=2),
            "topk 16": dict(lengths=[3000], chunk=64, topk=16, heads=2, kv_heads=1)}[change]
    tensors, module = test_attention_fwd.problem(**case), sm90.kernel_module("attention_diagonal")
    count = collections.Counter()
    monkeypatch.setattr(module, "launch", lambda kernel, *args, launch=module.launch, **named: (
        count.update([kernel.fn.__name__]), launch(kernel, *args, **named)))
    found = run(*tensors)
    assert set(count) == {"_attention_fwd_diagonal_sm90_kernel", "_attention_bwd_dq_diagonal_sm90_kernel"}
    with diagonal_by_triton():
        for a, b in zip(found, run(*tensors)):
            assert comparison.relative_error(a, b.double()) < 4e-3
    assert sum(count.values()) == 2


@pytest.mark.parametrize("chunk", [100, 200, 512])
def test_nan_of_later_keys_stays_there(chunk, always):
    """A tile of keys may reach beyond its chunk, into keys that its rows must not see."""
    q, k, v, selected, segments = test_attention_fwd.problem([1150], chunk, 4)
    k, v = k.clone(), v.clone()
    k[1024:], v[1024:] = float("nan"), float("nan")
    o, lse, dq, _, _ = run(q, k, v, selected, segments)
    assert all(x[:1024].isfinite().all() for x in (o, lse, dq))
    assert set(always) == kernels_for(chunk)


def test_weights_of_keys_that_are_not_there(always):
    """Where every score is far below 0, a missing key's score of 0 would have a weight that overflows."""
    q, k, v, selected, segments = test_attention_fwd.problem([1100], 100, 4)
    assert all(x.isfinite().all() for x in run(q.abs() + 4, -k.abs() - 4, v, selected, segments))
    assert set(always) == WHOLE_CHUNK


@pytest.mark.parametrize("change", ["unaligned", "fp32", "DV 64", "odd strides"])
def test_what_they_cannot_take(change, launched):
    shape = dict(lengths=[1500], chunk=512, topk=3, dim_v=64 if change == "DV 64" else None,
                 dtype=torch.float32 if change == "fp32" else torch.bfloat16)
    q, k, v, selected, segments = test_attention_fwd.problem(**shape)
    if change == "unaligned":
        k = torch.cat((k.new_zeros(1), k.flatten()))[1:].view(k.shape)
    if change == "odd strides":
        q = torch.nn.functional.pad(q, (0, 1))[:, :, :-1]
    o, lse = kernels.attention_fwd(q, k, v, selected, segments, 0.1)
    test_attention_fwd.check((o, lse), q, k, v, selected, segments, 0.1)
    kernels.attention_bwd(torch.randn_like(o), None, q, k, v, o, lse, selected, segments, 0.1)
    assert not launched


@pytest.mark.parametrize("dims, chunk, names", [
    ((128, 128), 32, set()), ((128, 128), 64, {"attention_bwd_dkdv"}), ((128, 128), 100, {"attention_bwd_dkdv"}),
    ((128, 128), 128, WHOLE_CHUNK), ((256, 256), 128, set()), ((256, 256), 512, {"attention_bwd_dkdv"}),
    ((128, 128), 500, ALL), ((128, 128), 512, ALL), ((64, 64), 128, {"attention_bwd_dkdv"}), ((64, 64), 512, ALL),
    ((80, 80), 512, ALL), ((96, 96), 512, ALL), ((192, 128), 512, ALL), ((192, 128), 64, {"attention_fwd"}),
    ((192, 192), 512, set()), ((112, 112), 512, set())])
def test_the_table_chooses_them(dims, chunk, names, launched):
    q, k, v, do, _, arguments = test_op.make([4000], chunk, 3, heads=4, kv_heads=2, dim=dims[0], dim_v=dims[1])
    test_op.gradients(q, k, v, do, arguments)
    assert set(launched) == names
