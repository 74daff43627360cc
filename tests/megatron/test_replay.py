"""Recorded choices in Megatron: the same GPT on every layout records, and replays bit for bit, without its gate."""
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
