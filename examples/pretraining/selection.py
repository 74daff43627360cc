"""A routing trace of a validation text: which chunks its queries chose, layer by layer and head by head."""
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from moba_megatron.inspect.choices import watching
from moba_megatron.inspect.recorder import TraceRecorder
from moba_megatron.inspect.trace import save_trace

from . import data


def save_selection(args, model, dataset, iteration: int) -> None:
    """Runs the first validation micro batch forward and writes `args.save_selection`; called by all ranks.

    Raises:
        ValueError: no query has a choice, since topk chunks cover the sequence or every layer attends densely.
    """
    batch = next(data.batches(args, dataset, 0, 1))

    def forward_step(iterator, model):
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, lambda output: (output.sum(), batch["loss_mask"].sum().int(), {})

    model.eval()
    with torch.no_grad(), watching(TraceRecorder()) as recorder:
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(()), model=[model], num_microbatches=1,
            seq_length=args.seq_length, micro_batch_size=args.micro_batch_size, forward_only=True)
    model.train()
    trace = recorder.trace({"data": args.data_path, "iteration": iteration})
    if torch.distributed.get_rank() == 0:
        save_trace(trace, args.save_selection)
