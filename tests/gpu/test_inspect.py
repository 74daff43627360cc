"""Watching the router on the device: the host never waits, and the statistics are those of the CPU."""
from types import SimpleNamespace

import pytest
import torch
from cases import Case

pytest.importorskip("megatron.core")
from moba_megatron import MoBAConfig  # noqa: E402
from moba_megatron.inspect import statistics  # noqa: E402
from moba_megatron.inspect.choices import look  # noqa: E402

pytestmark = pytest.mark.gpu


def seen(case, device):
    q, k, *_ = (x.to(device) for x in case.tensors(torch.bfloat16))
    module = SimpleNamespace(layer_number=1, selector=None, softmax_scale=None,
                             moba_config=MoBAConfig(chunk_size=case.chunk_size, topk=case.topk))
    segments = type(case.segments()).from_cu_seqlens(case.cu_seqlens().to(device), case.max_seqlen, case.chunk_size)

    def count():
        choices = look(module, q, k, segments)
        places = statistics.Places.of(choices, 10 ** 6)
        return statistics.tally(choices, places), statistics.sums([statistics.tally(choices, places)])

    return count


def values_of(tally, total):
    places = tally.places
    return statistics.layer_statistics(total.cpu(), places.first.cpu(), places.topk, 1, places.choosers.numel())


@pytest.mark.parametrize("case", [
    pytest.param(Case((2048,), 64, 4, heads=4, kv_heads=2, head_dim=64), id="one sequence"),
    pytest.param(Case((700, 33, 1500), 128, 3, heads=2, kv_heads=1, head_dim=64), id="packed"),
])
def test_tally_of_the_device(case):
    count = seen(case, "cuda")
    first, _ = count()  # compiles
    count()  # notes what it does, to repeat it
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tally, total = count()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tally.chosen, first.chosen) and torch.equal(tally.recall, first.recall)
    expected = values_of(*seen(case, "cpu")())
    # Scores in another order of additions choose otherwise where two chunks are as good: few queries of a thousand.
    torch.testing.assert_close(values_of(tally, total), expected, rtol=2e-2, atol=1e-2)
