"""Tensors kept between calls, on a GPU: asked for first under capture or on a busy stream, read by graphs, dropped."""
import pytest
import torch

from moba_megatron.context_parallel import Sequences
from moba_megatron.segments import Segments, uniform_segments
from moba_megatron.tensor_cache import TensorCache, cached_tensors

pytestmark = pytest.mark.gpu
LARGE = 0x3fffffff


def cu_seqlens(n):
    return torch.tensor([0, n, 2 * n], dtype=torch.int32, device="cuda")


CACHED = {
    "uniform segments": lambda n: uniform_segments(n, n, 2, 64, torch.device("cuda", 0)).cu_seqlens_q,
    "the end of sequences": lambda n: uniform_segments(n, 2 * n, 2, 64, torch.device("cuda", 0)).cu_seqlens_q,
    "a group's sequences": lambda n: Sequences.uniform(n, 2, "cuda").cu_seqlens,
    "a group's segments": lambda n: Sequences.uniform(n, 2, "cuda").whole(64).cu_seqlens_k,
}


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing is kept, and free memory holds large numbers."""
    torch.zeros(1, device="cuda")
    cached_tensors.clear()
    junk = [torch.full((128,), LARGE, dtype=torch.int32, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    del junk
    yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", CACHED)
def test_first_under_capture(name):
    n, make = 1000, CACHED[name]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = make(n) + 0
    assert make(n).tolist() == [0, n, 2 * n]  # before the graph has run
    graph.replay()
    assert captured.tolist() == [0, n, 2 * n]


@pytest.mark.parametrize("name", CACHED)
def test_first_in_a_capture_that_fails(name):
    n, make = 1004, CACHED[name]
    with pytest.raises(KeyError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        make(n)
        raise KeyError("something fails during capture")
    torch.cuda.synchronize()
    assert make(n).tolist() == [0, n, 2 * n]


@pytest.mark.parametrize("name", CACHED)
def test_first_on_a_busy_stream(name):
    n, make = 1008, CACHED[name]
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(100_000_000)
        make(n)
    with torch.cuda.stream(other):
        got = make(n).cpu()  # waits for this stream alone
    assert got.tolist() == [0, n, 2 * n]


def test_rows_and_a_zigzag_first_under_capture():
    """Rows are captured; what ranks send depends on values, so a first zigzag cannot be, and says so."""
    torch.use_deterministic_algorithms(False)  # which would scatter in another way
    sequences = Sequences.uniform(1024, 2, "cuda")
    expected = Sequences.uniform(1024, 2, "cpu").rows(2, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sequences.rows(2, 1).global_rows + 0
    assert torch.equal(sequences.rows(2, 1).global_rows.cpu(), expected.global_rows)
    graph.replay()
    assert torch.equal(captured.cpu(), expected.global_rows)
    with pytest.raises(RuntimeError, match="must run once with the same shapes before it is captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            sequences.zigzag(2, 1, 64)
    torch.cuda.synchronize()
    blocks, expected = sequences.zigzag(2, 1, 64).blocks, Sequences.uniform(1024, 2, "cpu").zigzag(2, 1, 64).blocks
    assert torch.equal(blocks.sum_source.cpu(), expected.sum_source) and blocks.table_shape == expected.table_shape


def test_a_graph_reads_what_the_cache_has_dropped():
    cache = TensorCache(max_bytes=1 << 20, max_entries=2)

    @cache
    def full(value, device):
        return torch.full((128,), value, dtype=torch.int32, device=device)

    device = torch.device("cuda", 0)
    full(1, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = full(1, device) + 0
    for value in range(2, 20):
        full(value, device)
    cache.clear()
    junk = [torch.full((128,), LARGE, dtype=torch.int32, device="cuda") for _ in range(64)]
    graph.replay()
    assert bool((captured == 1).all()) and len(junk) == 64


def test_memory_is_not_reused_before_a_stream_has_read_it():
    """Dropped on the host while a stream has yet to read it: what is made next must lie elsewhere."""
    cache = TensorCache(max_bytes=1 << 20, max_entries=1)

    @cache
    def full(value, device):
        return torch.full((128,), value, dtype=torch.int32, device=device)

    device, side = torch.device("cuda", 0), torch.cuda.Stream()
    full(1, device)
    with torch.cuda.stream(side):
        x = full(1, device)
        torch.cuda._sleep(100_000_000)
        read = x + 0
    del x
    later = [full(value, device) for value in range(2, 20)]
    torch.cuda.synchronize()
    assert bool((read == 1).all()) and [int(x[0]) for x in later] == list(range(2, 20))


def test_the_host_does_not_wait_for_what_is_there():
    uniform_segments(512, 512, 2, 64, torch.device("cuda", 0))
    Segments.from_cu_seqlens(cu_seqlens(512), 512, 64)
    places = cu_seqlens(512)
    torch.cuda.set_sync_debug_mode("error")
    try:
        uniform_segments(512, 512, 2, 64, torch.device("cuda", 0))
        Segments.from_cu_seqlens(places, 512, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
