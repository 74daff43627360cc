"""Validation: the loss, and the loss by position in the sequence."""
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from . import data


@dataclass(frozen=True)
class Validation:
    """A validation's losses, nats a token.

    `by_position`: (first, last + 1, loss) for each part of the sequence; `standard_errors`: of these losses, over
    their tokens.
    """

    loss: float
    by_position: list[tuple[int, int, float]]
    standard_errors: list[float]

    @property
    def trailing_loss(self) -> float:
        """The loss of the sequence's last part, where attention reaches farthest back (the paper's trailing loss)."""
        return self.by_position[-1][2]


def evaluate(args, model, dataset) -> Validation:
    """Runs `eval_iters` global batches forward, the same in every call; called by all ranks, same result on all."""
    device = torch.cuda.current_device()
    # [position, (sum of losses, tokens, sum of squared losses)]; fp64, so that the order of ranks does not show.
    sums = torch.zeros(args.seq_length, 3, dtype=torch.float64, device=device)

    def forward_step(iterator, model):
        batch = next(iterator)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def collect(losses):
            mask = batch["loss_mask"].flatten()
            losses_of_tokens = losses.float().flatten() * mask
            rows = torch.stack([losses_of_tokens, mask, losses_of_tokens ** 2], dim=-1)
            sums.index_add_(0, batch["position_ids"].flatten(), rows.double())
            count = mask.sum().int()
            return losses.sum(), count, {}

        return losses, collect

    model.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data.batches(args, dataset, 0, args.eval_iters),
            model=[model],
            num_microbatches=args.eval_iters * args.num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=True,
        )
    model.train()
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(sums, parallel_state.get_pipeline_model_parallel_last_rank(),
                                group=parallel_state.get_pipeline_model_parallel_group())
    parts = sums.view(args.loss_position_bins, -1, 3).sum(1).tolist()
    width = args.seq_length // args.loss_position_bins
    by_position = [(i * width, (i + 1) * width, total / max(count, 1)) for i, (total, count, _) in enumerate(parts)]
    errors = [max(squares / max(count, 1) - (total / max(count, 1)) ** 2, 0) ** 0.5 / max(count, 1) ** 0.5
              for total, count, squares in parts]
    total, count, _ = sums.sum(0).tolist()
    return Validation(total / max(count, 1), by_position, errors)
