"""Recorded choices in Megatron: the same GPT on every layout records, and replays bit for bit, without its gate."""
import contextlib
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from moba_megatron import RecordedSelection, record_selection, replay_selection

pytest.importorskip("megatron.core")

LAYOUTS = ["whole", "recompute", "selective", "group", "tp2", "tp2_cp2", "pp2", "pp2_recompute", "cp2_recompute",
           "cp2_selective", "a2a", "by_layer", "selective_keys"]
BY_LAYER = ["a2a+all_gather", "allgather", "a2a", "all_gather"]


def train(model, batch, layout, micro_batches=2):
    """Forward and backward of one sequence after the other; losses, gradients, or what this rank has of them."""
    from gpt import SEQLEN, local_positions
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rows = local_positions([SEQLEN], layout.cp, parallel_state.get_context_parallel_rank())
    tokens, labels = batch[:, :-1][:, rows], batch[:, 1:][:, rows]
    model.zero_grad()

    def forward_step(data_iterator, model):
        i = next(data_iterator)
        logits = model(tokens[i:i + 1], rows[None], None)

        def loss_function(logits):
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[i])
            return loss, {"loss": loss.detach().clone()}

        return logits, loss_function

    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(range(micro_batches)), model=model,
        num_microbatches=micro_batches, seq_length=SEQLEN, micro_batch_size=1, forward_only=False)
    return [entry["loss"] for entry in losses] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def equal(a, b):
    """Two records."""
    return a.layers.keys() == b.layers.keys() and all(
        len(calls) == len(b.layers[layer]) and all(
            torch.equal(x.numbers, y.numbers) and vars(x) | {"numbers": 0} == vars(y) | {"numbers": 0}
            for x, y in zip(calls, b.layers[layer])) for layer, calls in a.layers.items())


def of_layout(layout, weights, batch, whole, path):
    import gpt

    from moba_megatron import torch_stages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "MOBA", replace(gpt.MOBA, selection="group" if layout.name == "group" else "head"))
        model = gpt.build(layout)
    gpt.load(model, weights, layout)
    plain = train(model, batch, layout)
    with record_selection() as choices:
        recorded = train(model, batch, layout)
    choices.save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_stages, "gate", None)  # nothing may choose
        with replay_selection(RecordedSelection.load(path)):
            replayed = train(model, batch, layout)
        from_whole = None
        if whole is not None and layout.name != "group":
            with replay_selection(whole):
                from_whole = train(model, batch, layout)
    return choices, dict(changes_nothing=same(recorded, plain), replayed=same(replayed, plain),
                         whole=from_whole is None or same(from_whole, plain), loaded=equal(
                             choices, RecordedSelection.load(path)),
                         calls={layer: len(calls) for layer, calls in choices.layers.items()},
                         numbers=sorted({x.numbers.dtype for calls in choices.layers.values() for x in calls}, key=str))


def one_rank_differs(weights, batch):
    """The errors of this rank where rank 1 has a record that does not fit, and where it alone has none."""
    import gpt

    layout, texts = gpt.Layout("cp2", cp=2), []
    model = gpt.build(layout)
    gpt.load(model, weights, layout)
    with record_selection() as choices:
        train(model, batch, layout)
    wrong = gpt.parallel_state.get_context_parallel_rank() == 1
    first, second = choices.layers[1]
    short = replace(first, numbers=first.numbers[:-1] if wrong else first.numbers)
    for context in (lambda: replay_selection(RecordedSelection({**choices.layers, 1: [short, second]})),
                    lambda: contextlib.nullcontext() if wrong else replay_selection(choices)):
        with pytest.raises(ValueError) as raised, context():
            train(model, batch, layout)
        texts.append(str(raised.value))
    with replay_selection(choices):  # the group is still usable
        train(model, batch, layout)
    return texts


def packed(weights):
    """Packed sequences: what this rank records are its rows of what one rank records, and give the same bits."""
    from gpt import VOCAB, Layout, build, load, local_positions, parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = [8 * 12, 8 * 2, 8 * 9]
    stream = torch.randint(0, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(4))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                             max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    whole, same = None, []
    for layout in (Layout("one"), Layout("cp2", cp=2), Layout("cp4", cp=4), Layout("a2a", cp=2, comm="a2a")):
        model = build(layout)
        load(model, weights, layout)
        rows = local_positions(lengths, layout.cp, parallel_state.get_context_parallel_rank())

        def run():
            with torch.no_grad():
                return model(stream[:, rows], rows[None], None, packed_seq_params=params)

        plain = run()
        with record_selection() as choices:
            same.append(torch.equal(run(), plain))
        whole = whole or choices
        for record in (choices, whole):
            with replay_selection(record):
                same.append(torch.equal(run(), plain))
        same += [torch.equal(call.numbers, whole.layers[layer][0].numbers[rows])
                 for layer, (call,) in choices.layers.items()]
    return same


def everything(rank, size, directory):
    from gpt import BATCH, SEQLEN, VOCAB, Layout, common_weights

    layouts = [Layout("whole"), Layout("recompute", recompute="full"), Layout("selective", recompute="selective"),
               Layout("group"), Layout("tp2", tp=2), Layout("tp2_cp2", tp=2, cp=2), Layout("pp2", pp=2),
               Layout("pp2_recompute", pp=2, recompute="full"), Layout("cp2_recompute", cp=2, recompute="full"),
               Layout("cp2_selective", cp=2, recompute="selective"), Layout("a2a", cp=2, comm="a2a"),
               Layout("by_layer", cp=4, comm=BY_LAYER, levels=(2, 2)),
               Layout("selective_keys", cp=4, comm="selective")]
    assert [layout.name for layout in layouts] == LAYOUTS
    weights, whole, results = common_weights(), None, {}
    batch = torch.randint(0, VOCAB, (BATCH, SEQLEN + 1), generator=torch.Generator().manual_seed(3))
    for layout in layouts:
        choices, results[layout.name] = of_layout(layout, weights, batch, whole, f"{directory}/{layout.name}{rank}.npz")
        whole = whole or choices
    results["packed"] = packed(weights)
    results["errors"] = one_rank_differs(weights, batch)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"), str(tmp_path_factory.mktemp("records")))


@pytest.mark.parametrize("name", LAYOUTS)
def test_replays(results, name):
    stages = [{1, 2}, {3}] if name.startswith("pp2") else [{1, 2, 3}]  # the last layer is dense
    for result in (result[name] for result in results):
        assert result["changes_nothing"], "recording changed the run"
        assert result["loaded"] and result["replayed"], "a replay of this rank's record gives other bits"
        assert result["whole"], "a replay of what one process recorded gives other bits"
        assert set(result["calls"]) in stages and set(result["calls"].values()) == {2}  # once a micro batch
        assert result["numbers"] == [torch.int16]


def test_packed_sequences(results):
    for same in (result["packed"] for result in results):
        assert len(same) == 4 * 6 and all(same)


def test_ranks_that_do_not_fit_raise_everywhere(results):
    for does_not_fit, alone in (result["errors"] for result in results):
        assert does_not_fit == ("context parallel rank 1: replay_selection: call 1 of layer 1 was recorded for 75 "
                                "tokens and 4 heads, got 76 and 4 here")
        assert "rank 0: " in alone and ", replayed; rank 1: " in alone
