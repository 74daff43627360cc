"""Router statistics and traces on parallel layouts against one process: two gloo ranks, a small GPT in fp64."""
import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")

LAYOUTS = {"cp2": dict(cp=2), "tp2": dict(tp=2), "pp2": dict(pp=2), "cp2_recompute": dict(cp=2, recompute="full")}
ALL_QUERIES = 10 ** 6  # as samples: recall is then no estimate, and independent of how queries are spread


def run(rank, size):
    """Report and trace of each layout, and of the whole model in this process."""
    from gpt import BATCH, NUM_LAYERS, SEQLEN, VOCAB, Layout, build, common_weights, load, local_positions
    from megatron.core import parallel_state

    from moba_megatron.inspect.choices import watching
    from moba_megatron.inspect.recorder import TraceRecorder
    from moba_megatron.inspect.router_log import RouterLog

    batch = torch.randint(0, VOCAB, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(3))
    weights = common_weights()

    def look_at(layout):
        model = build(layout)
        load(model, weights, layout)
        if layout.recompute:
            model.train()
        rows = local_positions([SEQLEN], layout.cp, parallel_state.get_context_parallel_rank())
        positions = rows.expand(BATCH, -1)
        if not parallel_state.is_pipeline_first_stage():
            model.set_input_tensor(torch.zeros(SEQLEN, BATCH, 32, dtype=torch.float64))
        recorder, log = TraceRecorder(), RouterLog(2, NUM_LAYERS, 4, samples=ALL_QUERIES)
        for step in (1, 2):
            with watching(recorder), log.watch(step):
                output = model(batch[:, rows], positions, None)
                if layout.recompute:
                    output.sum().backward()
            if step == 1:
                assert log.report is None
        trace = recorder.trace()
        return log.report, {layer: trace.counts(layer) for layer in trace.layers}, trace.sequences

    found = {name: look_at(Layout(name, **sizes)) for name, sizes in LAYOUTS.items()}
    found["whole"] = look_at(Layout("whole"))
    return found, BATCH


def test_layouts_agree_with_one_process(tmp_path):
    results = run_ranks(run, 2, tmp_path)
    found, batch = results[0]
    report, counts, sequences = found["whole"]
    assert sorted(report) == sorted(counts) == [1, 2, 3]  # the last layer is dense
    assert sequences == 2 * batch  # two data parallel ranks, with the same batch here
    assert all((table % 2 == 0).all() for table in counts.values())
    for found, _ in results:
        for name in LAYOUTS:
            other, other_counts, sequences = found[name]
            assert sequences == batch
            assert sorted(other) == sorted(other_counts) == [1, 2, 3]
            # The stand-in for what the first stage sends leaves the second pipeline stage another input.
            for layer in [1, 2] if name == "pp2" else [1, 2, 3]:
                assert (2 * other_counts[layer] == counts[layer]).all(), (name, layer)
                for statistic, heads in report[layer].items():
                    assert other[layer][statistic] == pytest.approx(heads, rel=1e-9), (name, layer, statistic)
