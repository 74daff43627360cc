"""Dynamic context parallelism: the group comes with the batch. Four gloo ranks, fp64, lengths a hundredfold apart; on
GPUs (``layouts.py``) as many as there are.

MoBACoreAttention in groups of 1, 2 and 4 ranks in turn, against the reference of the whole sequences, and a GPT under
Megatron-Core's own schedule for ``--hybrid-context-parallel``, against its sequences one by one in one process.
"""
import gc

import pytest
import torch
from ranks import run_ranks

from comparison import relative_error

pytest.importorskip("megatron.core.pipeline_parallel.hybrid_cp_schedule")
import megatron.core.utils  # noqa: E402

SIZES, COMM_TYPES, FORMATS = (1, 2, 4), ("all_gather", "a2a"), ("thd", "sbhd")
KINDS = [(size, comm, qkv_format) for comm in COMM_TYPES for qkv_format in FORMATS for size in SIZES]
ROUNDS = 5
HEADS, KV_HEADS, LAYERS = 4, 2, 2
TOLERANCE = 1e-12  # sums of some hundred products in another order


def lengths_of(size, qkv_format, short):
    """Of a batch on ``size`` ranks: the longest is a hundred times the shortest."""
    short *= 2 * size
    return [short * 100] if qkv_format == "sbhd" else [short, short * 100, short * 7]


def exact(x, lengths, moba):
    """o and the gradients of q, k and v of whole sequences, through the reference and ``LAYERS`` layers."""
    *x, do = x
    from moba_megatron import moba_attn_varlen
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=do.device)
    x = [y.detach().requires_grad_() for y in x]
    o = x[0]
    for _ in range(LAYERS):
        o = moba_attn_varlen(o, *x[1:], cu_seqlens, max(lengths), moba.chunk_size, moba.topk, backend="reference")
    o.backward(do)
    return [o.detach(), *(y.grad for y in x)]


def held():
    """What may not grow: groups, what is remembered of them, kept results, live tensors, their bytes, and a GPU's.

    Messages are read first: how many are on their way is a matter of time.
    """
    import torch.distributed as dist

    from moba_megatron.context_parallel.transport import collective_check
    from moba_megatron.tensor_cache import cached_tensors
    collective_check.CollectiveCheck.look(wait=True)
    gc.collect()
    on_gpu = 0
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        on_gpu = torch.cuda.memory_allocated()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return (len(dist.distributed_c10d._world.pg_map), len(collective_check._groups),
            sum(len(calls.after) for calls in collective_check._groups.values()), len(cached_tensors._entries),
            len(tensors), sum(x.nbytes for x in tensors), on_gpu)


def attend(rank, ranks):
    """Errors of every kind of batch; what was held after each round of them; how often in each layer the host waited
    for the other ranks' message, on GPUs in the first two rounds (the change from the last kind to the first is new in
    the second), since in later ones any wait for the GPU is an error."""
    import gpt
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from moba_megatron import MoBAConfig
    from moba_megatron.context_parallel.transport import collective_check
    from moba_megatron.megatron.core_attention import MoBACoreAttention
    from tests.context_parallel.test_context_parallel_disagreement import CountedWaits, LateMessage

    kinds = [kind for kind in KINDS if kind[0] <= ranks]
    dim, short = (64, 8) if gpt.GPU else (8, 1)
    moba = MoBAConfig(chunk_size=24 * short, topk=3)
    config = gpt.build(gpt.Layout("dynamic", cp=2, hybrid=True)).config
    layers = {comm: [MoBACoreAttention(config, number, AttnMaskType.causal, "self", cp_comm_type=comm, moba_config=moba)
                     for number in range(1, LAYERS + 1)] for comm in COMM_TYPES}
    if not gpt.GPU:
        collective_check.READ_LATER = "cpu",  # as on a GPU
        collective_check._read_later = lambda headers, device: (LateMessage(headers), headers._output)
    errors, rounds, waits = {}, [], [0] * LAYERS
    for number in range(ROUNDS * len(kinds)):
        size, comm, qkv_format = kinds[number % len(kinds)]
        lengths = lengths_of(size, qkv_format, short)
        group = None if size == 1 else parallel_state.get_hybrid_data_context_parallel_groups(group_size=size)
        generator = torch.Generator().manual_seed(100 * number + rank // size)  # other groups attend to other batches
        whole = [torch.randn(sum(lengths), heads, dim, dtype=torch.float64, generator=generator).to(
            gpt.DEVICE, gpt.DTYPE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
        rows = gpt.local_positions(lengths, size, rank % size)
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=gpt.DEVICE)
        packed = PackedSeqParams(qkv_format=qkv_format, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                                 max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths), local_cp_size=size,
                                 cp_group=group)
        *x, do = [y[rows] if qkv_format == "thd" else y[rows, None] for y in whole]
        o, *kv = x = [y.requires_grad_() for y in x]
        if gpt.GPU:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("default" if number < 2 * len(kinds) else "error")
        for i, layer in enumerate(layers[comm]):
            with CountedWaits() as counted:
                o = layer(o, *kv, None, packed_seq_params=packed).view_as(do)
            waits[i] += counted.number
        o.backward(do)
        if gpt.GPU:
            torch.cuda.set_sync_debug_mode("default")
        if number < len(kinds):
            errors[kinds[number]] = [relative_error(a.reshape_as(b[rows]), b[rows]) for a, b in zip(
                (o.detach(), *(y.grad for y in x)), exact([y.double() for y in whole], lengths, moba))]
        del o, kv, x, whole, do
        if (number + 1) % len(kinds) == 0:
            rounds.append(held())
    dist.barrier()
    return dict(errors=errors, held=rounds, waits=waits)


def train_one_step(rank, ranks):
    """A global batch through Megatron-Core's loader and schedule of hybrid context parallelism: how many ranks each
    sequence of this rank was given, the loss of all tokens, and every gradient against the sequences one by one."""
    import gpt
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.datasets.data_schedule import HybridCPDataLoaderWrapper
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_hybrid_cp_rank

    rows = [[8, 800, 16], [24, 304], [104, 8], [400]]  # of the data parallel ranks; multiples of 2 * 4 ranks
    streams = [torch.randint(0, gpt.VOCAB, (sum(lengths) + 1,), generator=torch.Generator().manual_seed(seed))
               for seed, lengths in enumerate(rows)]
    weights = gpt.common_weights()

    def loss_of(model, tokens, labels, packed=None):
        positions = torch.arange(tokens.shape[1])[None]
        logits = model(tokens, positions, None, packed_seq_params=packed)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def cut(stream, lengths):
        return zip(stream[:-1].split(lengths), stream[1:].split(lengths))

    whole = gpt.build(gpt.Layout("whole"))
    gpt.load(whole, weights, gpt.Layout("whole"))
    total = 0
    for stream, lengths in zip(streams, rows):
        for tokens, labels in cut(stream, lengths):
            loss = loss_of(whole, tokens[None], labels[None])
            loss.backward()
            total += loss.item()

    layout = gpt.Layout("hybrid", hybrid=True)  # with more, 0.16 cuts the rotary angles of a sequence on one rank
    model = gpt.build(layout)
    gpt.load(model, weights, layout)
    model.config.hybrid_context_parallel = model.config.calculate_per_token_loss = True
    model.config.max_seqlen_per_dp_cp_rank = 200
    mine = parallel_state.get_data_parallel_rank()
    cu_seqlens = torch.tensor([0, *torch.tensor(rows[mine]).cumsum(0)], dtype=torch.int32)
    sample = dict(tokens=streams[mine][:-1], labels=streams[mine][1:], cu_seqlens=cu_seqlens)
    given = {}

    def forward_step(iterator, model):
        sub = next(iterator)
        size, length = int(sub.pop("local_cp_size")), sub["tokens"].numel()
        given[length] = size
        batch, packed = get_batch_on_this_hybrid_cp_rank(sub, size)
        loss = loss_of(model, batch["tokens"], batch["labels"], packed)
        return loss, lambda loss: (loss, torch.tensor(batch["tokens"].numel(), dtype=torch.int), loss.detach().clone())

    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=HybridCPDataLoaderWrapper(iter([[sample]]), model.config),
        model=model, num_microbatches=1, seq_length=max(map(max, rows)), micro_batch_size=1, forward_only=False)
    loss = torch.stack(losses).sum()
    dist.all_reduce(loss)
    errors = {}
    for (name, parameter), expected in zip(model.named_parameters(), whole.parameters()):
        dist.all_reduce(parameter.grad)
        errors[name] = relative_error(parameter.grad, expected.grad)
    return dict(given=given, loss=loss.item(), expected=total, grads=errors)


def has_loader() -> bool:
    """Whether this Megatron-Core's loader and schedule go together: Megatron-LM's own program fails from 0.18 on."""
    return hasattr(megatron.core.utils, "get_batch_on_this_hybrid_cp_rank")


@pytest.mark.skipif(not has_loader(), reason="no get_batch_on_this_hybrid_cp_rank in this Megatron-Core")
def test_megatrons_schedule_equals_the_sequences_one_by_one(tmp_path):
    results = run_ranks(train_one_step, 4, tmp_path)
    given = {length: ranks for result in results for length, ranks in result["given"].items()}
    assert given[800] == 4 and given[8] == 1 and set(given.values()) == set(SIZES), given
    for result in results:
        assert abs(result["loss"] / result["expected"] - 1) <= TOLERANCE, result
        assert max(result["grads"].values()) <= TOLERANCE, result


def test_groups_of_one_two_and_four_ranks_in_turn(tmp_path):
    for result in run_ranks(attend, 4, tmp_path):
        assert list(result["errors"]) == KINDS
        for kind, errors in result["errors"].items():
            assert max(errors) <= TOLERANCE, (kind, errors)
        _, second, *later = result["held"]  # by then every kind has followed every other
        assert later == [second] * 3
        first_layer, second_layer = result["waits"]  # of ROUNDS * len(KINDS) calls each
        assert 0 < first_layer <= len(KINDS) and second_layer == 0
