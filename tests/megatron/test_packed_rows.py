"""Packed rows as ``--sft`` makes them: sequences of 1 token to the whole row, each padded, on one and on two ranks.

Every sequence's loss, and the gradients of their sum, against a GPT that sees the sequences one by one; fp64, gloo.
"""
import pytest
import torch
from ranks import run_ranks

from comparison import relative_error

pytest.importorskip("megatron.core")
MULTIPLE = 4  # to which sequences are padded: 2 * context parallel size
ROW = 152
ROWS = [[ROW], [1] * (ROW // MULTIPLE), [1, 118, 2, 7, 5], [ROW - 3], [60, 1, 79]]
RUNS = {"one rank": (1, "all_gather"), "all_gather": (2, "all_gather"), "a2a": (2, "a2a")}
LENGTHS = {"real and padded lengths": False, "padded lengths as real ones": True}  # releases; main
TOLERANCE = 1e-12  # as in test_megatron_parallel.py


def sequences_of(number, lengths):
    from gpt import VOCAB
    generator = torch.Generator().manual_seed(20 + number)
    return [torch.randint(0, VOCAB, (n + 1,), generator=generator) for n in lengths]


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def one_by_one(weights):
    """Of each row each sequence's loss, and the gradients of all rows together."""
    import gpt
    layout, losses = gpt.Layout("whole"), []
    model = gpt.build(layout)
    gpt.load(model, weights, layout)
    for number, lengths in enumerate(ROWS):
        losses.append([])
        for sequence in sequences_of(number, lengths):
            tokens, positions = sequence[None].to(gpt.DEVICE), torch.arange(len(sequence) - 1, device=gpt.DEVICE)
            loss = gpt.token_loss(model(tokens[:, :-1], positions[None], None), tokens[:, 1:])
            loss.backward()
            losses[-1].append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


def packed(weights, cp, comm, as_real):
    import gpt
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    layout, losses = gpt.Layout("packed", cp=cp, comm=comm), []
    model = gpt.build(layout)
    gpt.load(model, weights, layout)
    for number, lengths in enumerate(ROWS):
        padded = [-(-n // MULTIPLE) * MULTIPLE for n in lengths]
        padded[-1] += ROW - sum(padded)
        starts = cumulative(padded)
        tokens, labels, of = torch.zeros(ROW, dtype=torch.long), torch.zeros(ROW, dtype=torch.long), torch.full(
            (ROW,), len(lengths))
        for i, sequence in enumerate(sequences_of(number, lengths)):
            at = slice(starts[i], starts[i] + len(sequence) - 1)
            tokens[at], labels[at], of[at] = sequence[:-1], sequence[1:], i
        rows = gpt.local_positions(padded, cp, parallel_state.get_context_parallel_rank())
        tokens, labels, of, positions = (x[rows].to(gpt.DEVICE) for x in (tokens, labels, of, torch.arange(ROW)))
        starts = starts.to(gpt.DEVICE)
        cu_seqlens = starts if as_real else cumulative(lengths).to(gpt.DEVICE)
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                                 cu_seqlens_q_padded=starts, cu_seqlens_kv_padded=starts, max_seqlen_q=max(padded),
                                 max_seqlen_kv=max(padded))
        of_token = gpt.token_loss(model(tokens[None], positions[None], None, packed_seq_params=params), labels, "none")
        of_sequence = of_token.new_zeros(len(lengths) + 1).index_add(0, of, of_token)[:-1]
        of_sequence.sum().backward()
        of_sequence = of_sequence.detach()
        dist.all_reduce(of_sequence, group=parallel_state.get_context_parallel_group())
        losses.append(of_sequence.tolist())
    return losses, gpt.reduce_gradients(model, layout)


def everything(rank, size):
    import gpt
    weights = gpt.common_weights()
    losses, grads = one_by_one(weights)
    found = {"expected": losses}
    for run, (cp, comm) in RUNS.items():
        for kind, as_real in LENGTHS.items():
            ours, our_grads = packed(weights, cp, comm, as_real)
            found[run, kind] = ours, {name: relative_error(our_grads[name], grad) for name, grad in grads.items()}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("run", RUNS)
def test_losses_equal_the_sequences_one_by_one(results, run, kind):
    for result in results:
        losses, grads = result[run, kind]
        for ours, expected in zip(losses, result["expected"], strict=True):
            assert ours == pytest.approx(expected, rel=TOLERANCE, abs=0)
        assert max(grads.values()) <= TOLERANCE, grads
