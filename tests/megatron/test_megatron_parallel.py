"""The same GPT on the same batch on every parallel layout: loss, every gradient and every selection against one rank.

fp64 throughout, so that agreement is a matter of rounding and not of luck. Four gloo processes run all layouts in turn.
"""
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from comparison import relative_error

pytest.importorskip("megatron.core")

LAYOUTS = ["cp1", "cp2", "cp4", "tp2", "tp2_sp", "tp2_cp2", "tp2_cp2_sp", "pp2", "pp2_cp2", "cp2_recompute",
           "cp2_selective", "cp2_a2a", "cp4_by_layer"]
BY_LAYER = ["a2a+all_gather", "allgather", "a2a", "all_gather"]
PACKED = [8 * 12, 8 * 2, 8 * 9]  # the first is longer than topk chunks: only there is something to select
# Sums of some thousand products in another order: errors of 1e-16 grow a little through four layers.
TOLERANCE = 1e-12


def make_batch():
    generator = torch.Generator().manual_seed(3)
    from gpt import BATCH, SEQLEN, VOCAB
    return torch.randint(0, VOCAB, (BATCH, SEQLEN + 1), generator=generator)


def run_model(model, batch, layout):
    """Forward and backward of this rank's part; returns the local part of the loss, or None off the last stage."""
    from gpt import BATCH, DEVICE, SEQLEN, local_positions, token_loss
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rows = local_positions([SEQLEN], layout.cp, parallel_state.get_context_parallel_rank())
    tokens, labels, position_ids = (x.to(DEVICE) for x in (
        batch[:, :-1][:, rows], batch[:, 1:][:, rows], rows.expand(BATCH, -1)))
    if layout.pp == 1:
        loss = token_loss(model(tokens, position_ids, None), labels) / (BATCH * SEQLEN)
        loss.backward()
        return loss.detach()

    def forward_step(data_iterator, model):
        i = next(data_iterator)
        logits = model(tokens[i:i + 1], position_ids[i:i + 1], None)

        def loss_function(logits):
            loss = token_loss(logits, labels[i:i + 1]) / SEQLEN  # the schedule averages over microbatches
            return loss / layout.cp, {"loss": loss.detach().clone()}

        return logits, loss_function

    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(range(BATCH)), model=model, num_microbatches=BATCH,
        seq_length=SEQLEN, micro_batch_size=1, forward_only=False)
    return sum(entry["loss"] for entry in losses) / BATCH if losses else None


def expected_selection(whole, layout):
    """This rank's rows and heads of the selections of the whole model, for the layers of its pipeline stage."""
    from gpt import BATCH, NUM_LAYERS, SEQLEN, local_positions
    from megatron.core import parallel_state

    cp_rank = parallel_state.get_context_parallel_rank()
    tp_rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    per_stage = NUM_LAYERS // layout.pp
    chosen = []
    for number in range(stage * per_stage, min((stage + 1) * per_stage, len(whole))):
        comm = layout.comm if isinstance(layout.comm, str) else layout.comm[number]
        heads = {"a2a": layout.cp, "a2a+all_gather": layout.levels and layout.levels[0]}.get(comm, 1)
        rows = local_positions([SEQLEN], layout.cp // heads, cp_rank // heads)
        selected = whole[number].unflatten(0, (BATCH, SEQLEN))[:, rows]
        chosen.append(selected.chunk(layout.tp, 2)[tp_rank].chunk(heads, 2)[cp_rank % heads])
    if layout.pp == 1:
        return [s.flatten(0, 1) for s in chosen]
    return [s[i] for i in range(BATCH) for s in chosen]  # a microbatch is one sequence; 1F1B keeps their order


def renumber_microbatches(selections, layout):
    """Chunk ids of a pipeline count from each microbatch's first chunk: renumbers them as in the whole batch."""
    from gpt import BATCH, MOBA, SEQLEN
    if layout.pp == 1:
        return selections
    per_microbatch = len(selections) // BATCH
    result = []
    for number, selected in enumerate(selections):
        sequence = number // per_microbatch
        first = sequence * SEQLEN // MOBA.chunk_size + sequence
        result.append(torch.where(selected < 0, selected, selected + first))
    return result


def compare(weights, batch, whole_grads, whole_loss, whole_selection, layout):
    import torch.distributed as dist
    from gpt import RecordedSelections, build, global_name, load, reduce_gradients, shard
    from megatron.core import parallel_state

    model = build(layout)
    load(model, weights, layout)
    with RecordedSelections() as recorded:
        loss = run_model(model, batch, layout)
    expected = expected_selection(whole_selection, layout)
    if layout.pp == 1:
        recorded.selections = recorded.selections[:len(expected)]  # recompute chooses a second time
    selections = renumber_microbatches(recorded.selections, layout)
    same = len(selections) == len(expected) and all(torch.equal(a, b) for a, b in zip(selections, expected))
    if loss is not None:
        dist.all_reduce(loss, group=parallel_state.get_context_parallel_group())
    grads = reduce_gradients(model, layout)
    errors = {}
    for name, parameter in model.named_parameters():
        whole = shard(whole_grads[global_name(name, layout)], name, parameter)
        errors[global_name(name, layout)] = relative_error(grads[name], whole)
    return dict(loss=None if loss is None else loss.item(), expected=whole_loss, grads=errors, selection=same,
                selections=len(selections))


def packed_under_cp(weights, cp):
    """Packed sequences (THD): loss and gradients on ``cp`` ranks."""
    import torch.distributed as dist
    from gpt import (
        DEVICE,
        VOCAB,
        Layout,
        RecordedSelections,
        build,
        load,
        local_positions,
        reduce_gradients,
        token_loss,
    )
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    layout = Layout("packed", cp=cp)
    model = build(layout)
    load(model, weights, layout)
    stream = torch.randint(0, VOCAB, (1, sum(PACKED) + 1), generator=torch.Generator().manual_seed(4))
    rows = local_positions(PACKED, cp, parallel_state.get_context_parallel_rank())
    cu_seqlens = torch.tensor([0, *torch.tensor(PACKED).cumsum(0)], dtype=torch.int32, device=DEVICE)
    tokens, labels, positions = (x.to(DEVICE) for x in (stream[:, :-1][:, rows], stream[:, 1:][:, rows], rows[None]))
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                             max_seqlen_q=max(PACKED), max_seqlen_kv=max(PACKED))
    with RecordedSelections() as recorded:
        logits = model(tokens, positions, None, packed_seq_params=packed)
    loss = token_loss(logits, labels) / sum(PACKED)
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, group=parallel_state.get_context_parallel_group())
    return loss.item(), reduce_gradients(model, layout), recorded.selections, rows


def compare_packed(weights, size):
    whole_loss, whole_grads, whole_selections, _ = packed_under_cp(weights, 1)
    result = {}
    for cp in (2, 4)[:size // 2]:
        loss, grads, selections, rows = packed_under_cp(weights, cp)
        same = all(torch.equal(a, b[rows]) for a, b in zip(selections, whole_selections))
        same = same and len(selections) == len(whole_selections) == 3  # the MoBA layers
        result[cp] = dict(loss=loss, expected=whole_loss, selection=same,
                          grads={name: relative_error(grads[name], grad) for name, grad in whole_grads.items()})
    return result


def bad_input(rank):
    """One rank of CP = 2 gets bad input; returns each rank's error text by problem."""
    from gpt import MOBA, Layout, build, local_positions
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    try:
        build(Layout("repeated heads", tp=4))
        texts = {"repeated heads": None}
    except ValueError as error:
        texts = {"repeated heads": str(error)}
    model = build(Layout("bad", cp=2))
    core = model.decoder.layers[0].self_attention.core_attention
    assert core.moba_config == MOBA
    wrong = parallel_state.get_context_parallel_rank() == 1

    def call(length=16, dtype=torch.float64, packed=None, mask=None, settings=(), **kwargs):
        core.moba_config = replace(MOBA, **dict(settings))
        shape = (length, 1) if packed is None else (length,)
        q, kv = torch.ones(*shape, 4, 8, dtype=dtype), torch.ones(*shape, 2, 8, dtype=dtype)
        return core(q, kwargs.pop("key", kv), kv, mask, packed_seq_params=packed, **kwargs)

    def causal(length, rank=parallel_state.get_context_parallel_rank()):
        rows = local_positions([2 * length], 2, rank)
        return torch.ones(2 * length, 2 * length, dtype=torch.bool).triu(1)[None, None, rows]

    def lengths(*cu_seqlens):
        return PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(cu_seqlens, dtype=torch.int32))

    problems = {
        "odd length": dict(length=15),
        "other length": dict(length=18),
        "other dtype": dict(dtype=torch.float32),
        "heads": dict(key=torch.ones(16, 1, 3, 8, dtype=torch.float64)),
        "bias": dict(attention_bias=torch.zeros(1)),
        "mask": dict(mask=causal(16, 0)[..., torch.arange(32).roll(1)]),
        "unknown": dict(sinks=torch.ones(1)),
        "packed length": dict(packed=lengths(0, 14, 32)),
        "packed total": dict(packed=lengths(0, 16, 28)),
        "other packed": dict(packed=lengths(0, 12, 32)),
        "a variable": dict(settings={"cp_head_groups": 7}),  # as MOBA_CP_HEAD_GROUPS on one rank only
    }
    for name, bad in problems.items():
        good = dict(packed=lengths(0, 16, 32)) if "packed" in bad else dict(mask=causal(16))
        try:
            call(**(bad if wrong else good))
            texts[name] = None
        except (TypeError, ValueError) as error:
            texts[name] = str(error)
    call()  # the group is still usable
    return texts


def dynamic_groups():
    """A group in packed_seq_params, or local_cp_size 1, takes the place of the module's group; relative errors."""
    import torch.distributed as dist
    from gpt import Layout, build, local_positions
    from megatron.core.packed_seq_params import PackedSeqParams

    if "cp_group" not in PackedSeqParams.__dataclass_fields__:
        return None
    lengths = [40, 88]
    cu_seqlens = torch.tensor([0, 40, 128], dtype=torch.int32)
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(128, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    rows = local_positions(lengths, 4, dist.get_rank())
    errors = {}
    for comm in ("all_gather", "a2a", "a2a+all_gather"):
        cp, levels = (4, (2, 2)) if comm == "a2a+all_gather" else (2, None)
        model = build(Layout("dynamic", cp=cp, comm=comm, levels=levels))
        core = model.decoder.layers[0].self_attention.core_attention

        def attend(rows, **groups):
            packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, max_seqlen_q=88, **groups)
            return core(q[rows], k[rows], v[rows], None, packed_seq_params=packed)

        alone = attend(torch.arange(128), local_cp_size=1)
        errors[comm] = relative_error(attend(rows, local_cp_size=4, cp_group=dist.group.WORLD), alone[rows])
    return errors


def static_inference(weights):
    """Prefill and token by token with Megatron's key/value cache against one forward: relative error of the logits."""
    from gpt import VOCAB, Layout, build, load
    from megatron.core.inference.contexts import StaticInferenceContext

    layout = Layout("inference")
    model = build(layout).eval()
    load(model, weights, layout)
    tokens = torch.randint(0, VOCAB, (2, 70), generator=torch.Generator().manual_seed(8))
    positions = torch.arange(70).expand(2, -1)
    with torch.inference_mode():
        whole = model(tokens, positions, None)
        context = StaticInferenceContext(max_batch_size=2, max_sequence_length=80)
        pieces = []
        for begin, end in ((0, 60), *((i, i + 1) for i in range(60, 70))):
            logits = model(tokens[:, begin:end], positions[:, begin:end], None, inference_context=context,
                           runtime_gather_output=True)
            pieces.append(logits[:, -1:])
            context.sequence_len_offset += end - begin
    return relative_error(torch.cat(pieces, 1), whole[:, 59:])


def train_layouts(rank, size):
    """Every layout of so many ranks, and packed sequences, against one rank."""
    from gpt import Layout, RecordedSelections, build, common_weights, load

    layouts = [Layout("cp1"), Layout("cp2", cp=2), Layout("cp4", cp=4), Layout("tp2", tp=2),
               Layout("tp2_sp", tp=2, sp=True), Layout("tp2_cp2", tp=2, cp=2),
               Layout("tp2_cp2_sp", tp=2, cp=2, sp=True), Layout("pp2", pp=2), Layout("pp2_cp2", pp=2, cp=2),
               Layout("cp2_recompute", cp=2, recompute="full"),
               Layout("cp2_selective", cp=2, recompute="selective"), Layout("cp2_a2a", cp=2, comm="a2a"),
               Layout("cp4_by_layer", cp=4, comm=BY_LAYER, levels=(2, 2))]
    assert [layout.name for layout in layouts] == LAYOUTS
    layouts = [layout for layout in layouts if layout.tp * layout.cp * layout.pp <= size]
    weights, batch = common_weights(), make_batch()
    model = build(layouts[0])
    load(model, weights, layouts[0])
    with RecordedSelections() as recorded:
        whole_loss = run_model(model, batch, layouts[0]).item()
    grads = {name: p.grad for name, p in model.named_parameters()}
    results = {layout.name: compare(weights, batch, grads, whole_loss, recorded.selections, layout)
               for layout in layouts}
    return dict(layouts=results, packed=compare_packed(weights, size), names=sorted(grads), loss=whole_loss,
                chosen=[(s >= 0).any(2).double().mean().item() for s in recorded.selections])


def everything(rank, size):
    from gpt import common_weights

    return dict(train_layouts(rank, size), bad=bad_input(rank), dynamic=dynamic_groups(),
                inference=static_inference(common_weights()))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"))


def assert_equal_to_one_rank(result):
    assert result["selection"], "a rank selected other chunks"
    assert result["loss"] is None or abs(result["loss"] / result["expected"] - 1) <= TOLERANCE
    worst = max(result["grads"], key=result["grads"].get)
    assert result["grads"][worst] <= TOLERANCE, (worst, result["grads"][worst])


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_rank(results, name):
    per_rank = [result["layouts"][name] for result in results]
    for result in per_rank:
        assert_equal_to_one_rank(result)
    assert any(result["loss"] is not None for result in per_rank)
    compared = set().union(*(result["grads"] for result in per_rank))
    assert sorted(compared) == results[0]["names"], "every parameter's gradient is compared on some rank"
    assert {result["selections"] for result in per_rank} <= ({4, 2} if name.startswith("pp2") else {3})


def test_the_model_selects(results):
    assert sum("key_convolution.weight" in name for name in results[0]["names"]) == 3  # compared as all the others
    assert len(results[0]["chosen"]) == 3 and min(results[0]["chosen"]) > 0.5  # three MoBA layers, the last is dense


@pytest.mark.parametrize("cp", [2, 4])
def test_packed_equals_one_rank(results, cp):
    for result in results:
        assert_equal_to_one_rank(result["packed"][cp])


def test_dynamic_context_parallel_groups(results):
    if results[0]["dynamic"] is None:
        pytest.skip("this Megatron-Core has no groups in PackedSeqParams")
    for result in results:
        assert len(result["dynamic"]) == 3 and max(result["dynamic"].values()) <= TOLERANCE, result["dynamic"]


def test_static_inference(results):
    assert max(result["inference"] for result in results) <= TOLERANCE


def test_bad_input_raises_on_every_rank(results):
    texts = results[0]["bad"]
    for result in results:
        assert result["bad"] == texts
    for name, expected in {
        "odd length": "context parallel rank 1: the sequence length must be a multiple of 2 \\* context_parallel_size",
        "other length": r"rank 0: query \(16, 1, 4, 8\).*; rank 1: query \(18, 1, 4, 8\)",
        "other dtype": "rank 0: .*torch.float64.*; rank 1: .*torch.float32",
        "heads": "context parallel rank 1: v must have k's tokens and heads",
        "bias": "context parallel rank 1: attention_bias must be None",
        "mask": "context parallel rank 1: attention_mask must be None or causal",
        "unknown": "context parallel rank 1: MoBACoreAttention.forward got an argument sinks",
        "repeated heads": r"--moba-key-conv needs kv heads \(--num-query-groups\) .* got 2 and 4",
        "packed length": "context parallel rank 1: the length of packed sequence 0 must be a multiple of .* got 14",
        "packed total": "context parallel rank 1: cu_seqlens must run from 0 to the tokens of all .* 32, got 0 to 28",
        "a variable": "rank 0: .*cp_head_groups .*; rank 1: .*cp_head_groups 7",
        "other packed": r"rank 0: .*cu_seqlens \[0, 16, 32\].*; rank 1: .*cu_seqlens \[0, 12, 32\]",
    }.items():
        assert texts[name] is not None, f"{name}: no error"
        with pytest.raises(ValueError, match=expected):
            raise ValueError(texts[name])
