"""Memory of the fullest GPU of a layout, part by part, in bytes."""
from dataclasses import astuple, dataclass, replace

from .attention_cost import BF16, FP32
from .layout import Layout
from .models import Run

RESERVED = 5 << 30  # CUDA context, NCCL buffers, fragmentation of the allocator (assumed)
WORKSPACE = 1 << 30  # default of MOBA_WORKSPACE_MIB: what one group of kv heads may take for partial results
ADAM = 12  # bytes of optimizer state a parameter: master weight and two moments in fp32
LOGIT = 10  # bytes an entry of the logits: bf16, fp32 for the loss, gradient
HEADS_IN_FLIGHT = 2  # kv heads whose gathered K and V exist at a time: one is attended to, the next arrives


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float  # bf16
    gradients: float  # fp32, as Megatron accumulates them
    optimizer: float  # adam in fp32
    activations: float  # kept for backward, of all micro batches in flight
    working: float  # the layer that is computed: attention's workspace, recomputed activations, or the logits
    gathered: float  # K, V, dK, dV of other ranks
    reserved: float = RESERVED  # what no tensor accounts for

    @property
    def total(self) -> float:
        return sum(astuple(self))


def rank_parameters(run: Run, layout: Layout) -> float:
    """Parameters of one GPU of the first or last pipeline stage, the larger ones."""
    m = run.model
    embeddings = m.padded_vocabulary(layout.tp) * m.hidden / layout.tp * (1 if m.tied or layout.pp > 1 else 2)
    return m.layers / layout.pp * (m.matrix_parameters / layout.tp + 2 * m.hidden) + embeddings + m.hidden


def layer_activations(run: Run, layout: Layout) -> float:
    """Bytes that one layer keeps for backward, for one micro batch (one sequence); the mean of sparse and dense layers.
    bf16: the two norms' inputs and outputs, q, k, v, o, both halves of SwiGLU and their product. Attention keeps lse in
    fp32. Where it is sparse it keeps the selection and its routing, 4 bytes a choice each; under selective recompute v
    is kept as a view of the fused projection, whose q and k (before rotation) stay alive with it. Dropout is off."""
    m, tokens = run.model, run.seqlen / layout.cp / layout.tp  # sequence parallelism cuts everything
    if layout.recompute == "full":
        return tokens * m.hidden * BF16
    per_token = BF16 * (4 * m.hidden + 2 * (m.heads + m.kv_heads) * m.head_dim + 3 * m.ffn)
    if layout.recompute == "selective":
        return tokens * (per_token + len(run.sparse_layers) / m.layers * BF16 * (m.heads + m.kv_heads) * m.head_dim)
    choices = sum(moba.topk - 1 for moba in run.sparse_layers) / m.layers
    return tokens * (per_token + m.heads * (FP32 + 8 * choices))


def attention_working(run: Run, layout: Layout) -> float:
    """Bytes of one attention call beyond q, k, v: results, selection, routing, partial o and lse. The largest of the
    passes is backward: dq, dk, dv, and partial dq for as many kv heads as fit the workspace."""
    m, tokens = run.model, run.seqlen / (layout.cp * layout.tp)  # times heads; all-to-all trades one for the other
    q = tokens * m.heads * m.head_dim * BF16
    kv = tokens * m.kv_heads * m.head_dim * BF16
    if run.attention == "full":
        return 2 * q + 2 * kv
    choices = tokens * m.heads * max((moba.topk - 1 for moba in run.sparse_layers), default=run.moba.topk - 1)
    partial = choices * (m.head_dim * BF16 + FP32)
    least = partial / max(1, m.kv_heads / layout.tp / layout.heads_split)  # one kv head runs even where it needs more
    return 2 * q + 2 * kv + 8 * choices + min(partial, max(WORKSPACE, least))


def gathered(run: Run, layout: Layout) -> float:
    """Bytes of other ranks' K and V and of the sums that go back to them."""
    if layout.cp == 1 or layout.comm_type == "a2a":
        return 0.0
    if layout.comm_type == "selective":
        return 2 * WORKSPACE
    in_flight = min(HEADS_IN_FLIGHT, max(1, run.model.kv_heads / layout.tp / layout.heads_split))
    return in_flight * run.seqlen * 2 * run.model.head_dim * (BF16 + FP32)


def estimate(run: Run, layout: Layout) -> Memory:
    """Memory of the fullest GPU."""
    m = run.model
    parameters = rank_parameters(run, layout)
    shards = layout.dp * layout.cp if run.distributed_optimizer else 1
    layer = layer_activations(run, layout)
    # what is recomputed of a layer exists while its backward runs
    recomputed = layer_activations(run, replace(layout, recompute="none")) - layer
    logits = run.seqlen / layout.cp * m.padded_vocabulary(layout.tp) / layout.tp * LOGIT
    return Memory(BF16 * parameters, FP32 * parameters, ADAM * parameters / shards,
                  layer * (m.layers / layout.pp) * min(layout.pp, run.batch // layout.dp),  # of those in flight
                  max(attention_working(run, layout) + recomputed, logits), gathered(run, layout))
