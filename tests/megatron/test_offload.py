"""Fine-grained activation offloading (--offload-modules) around MoBA: the same gradients, q, k and v gone meanwhile.

Megatron's own offload manager runs; only the device is not one, and what it asks of Transformer Engine is one flag.
Storages that it frees have no bytes left, so a backward that reads one fails.
"""
import functools
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("megatron.core")

CASES = {"alone": {}, "all_gather": dict(cp=2), "a2a": dict(cp=2, comm="a2a"),
         "selective": dict(cp=2, comm="selective")}
SMALLEST = [1, 2000]  # elements: everything; keys and queries, but no slice by kv head of them


def run(layout, weights, smallest):
    """Two steps' gradients of a rank, and the shapes that Megatron freed."""
    import gpt
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

    from tests.megatron.test_megatron_parallel import make_batch, run_model

    manager, freed = offload.PipelineOffloadManager, []
    manager.OFFLOAD_MGR = None
    options = {} if smallest is None else dict(fine_grained_activation_offloading=True, transformer_impl="local",
                                               offload_modules=["core_attn", "attn_proj"],
                                               min_offloaded_tensor_size=smallest)
    config, gpt.TransformerConfig = gpt.TransformerConfig, functools.partial(gpt.TransformerConfig, **options)
    try:
        model = gpt.build(layout)
    finally:
        gpt.TransformerConfig = config
    gpt.load(model, weights, layout)

    def observed(self, *args):
        released = args[-1]
        shapes = [tuple(x.shape) for x in released]
        commit(self, *args)
        freed.extend(shape for x, shape in zip(released, shapes) if x.untyped_storage().nbytes() == 0)

    commit = offload.ChunkOffloadHandler.bulk_offload
    offload.ChunkOffloadHandler.bulk_offload = observed
    try:
        grads = []
        for _ in range(2):  # the first is the manager's warm-up, in which it learns the groups
            model.zero_grad()
            run_model(model, make_batch(), layout)
            grads.append(gpt.reduce_gradients(model, layout))
            if smallest is not None:
                offload.FineGrainedActivationOffloadingInterface.reset()
    finally:
        offload.ChunkOffloadHandler.bulk_offload = commit
    return grads, freed


def everything(rank, size):
    import gpt
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

    transformer_engine.cpu_offload = SimpleNamespace()
    if hasattr(offload.ChunkOffloadHandler, "_can_manage_tensor_for_offload"):
        offload.ChunkOffloadHandler._can_manage_tensor_for_offload = staticmethod(
            lambda x: not isinstance(x, torch.nn.Parameter))
    weights, results = gpt.common_weights(), {}
    for name, layout in CASES.items():
        layout = gpt.Layout(name, **layout)
        expected, _ = run(layout, weights, None)
        for smallest in SMALLEST:
            grads, freed = run(layout, weights, smallest)
            same = all(torch.equal(a[key], b[key]) for a, b in zip(grads, expected) for key in b)
            results[name, smallest] = same, freed
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("smallest", SMALLEST)
@pytest.mark.parametrize("name", CASES)
def test_gradients_do_not_change(results, name, smallest):
    tokens = 152 // CASES[name].get("cp", 1)
    for result in results:
        same, freed = result[name, smallest]
        assert {(tokens, 2, 4, 8), (tokens, 2, 2, 8)} <= set(freed), freed  # queries; keys and values
        assert same
