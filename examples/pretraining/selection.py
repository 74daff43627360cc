"""Records which chunks the queries of a validation text chose, layer by layer: what `plot_run.py` draws."""
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from moba_megatron import MoBACoreAttention
from moba_megatron.ops import get_stages
from moba_megatron.segments import Segments

from . import data


def save_selection(args, model, dataset) -> None:
    """Runs the first validation sample forward and writes `args.save_selection`; called by all ranks.

    The file (.npz) holds `chunk_size` and, for each layer that attends sparsely, `layer_<number>`: int32 [seq_length,
    heads, topk - 1], chunk numbers, -1 padded. The query's own chunk is not listed.
    """
    inputs = {}
    hooks = []
    for module in model.modules():
        if isinstance(module, MoBACoreAttention) and not module.full_attention:
            hooks.append(module.register_forward_pre_hook(
                lambda module, arguments: inputs.update({module.layer_number: arguments[:2]})))
    positions = _forward(args, model, dataset)
    for hook in hooks:
        hook.remove()
    mine = {layer: _select(args, q, k, positions) for layer, (q, k) in inputs.items()}
    rank = (parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank())
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (rank, mine))
    if torch.distributed.get_rank() == 0:
        # Data and context parallel ranks hold the same; tensor parallel ranks hold the heads in order.
        parts = [layers for rank, layers in sorted(gathered, key=lambda part: part[0]) if rank[:2] == (0, 0)]
        numbers = sorted({number for layers in parts for number in layers})
        arrays = {f"layer_{number}": np.concatenate([layers[number] for layers in parts if number in layers], axis=1)
                  for number in numbers}
        Path(args.save_selection).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(args.save_selection, chunk_size=args.moba_config.chunk_size, **arrays)


def _forward(args, model, dataset) -> torch.Tensor:
    """One micro batch through the model; returns the positions [s] that this rank holds."""
    batch = next(data.batches(args, dataset, 0, 1))

    def forward_step(iterator, model):
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, lambda output: (output.sum(), batch["loss_mask"].sum().int(), {})

    model.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(()), model=[model], num_microbatches=1,
            seq_length=args.seq_length, micro_batch_size=args.micro_batch_size, forward_only=True)
    model.train()
    return batch["position_ids"][0]


def _select(args, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> np.ndarray:
    """The chunks that the first sample's queries choose; q [s, b, h, d] and k [s, b, hk, d] are this rank's part."""
    order = torch.argsort(_gather_sequence(positions))
    q, k = (_gather_sequence(x[:, 0])[order] for x in (q, k))
    moba = args.moba_config
    bounds = torch.tensor([0, args.seq_length], dtype=torch.int32, device=q.device)
    segments = Segments.from_cu_seqlens(bounds, args.seq_length, moba.chunk_size)
    stages = get_stages(moba.backend, q.device)
    selected = stages.gate(q, stages.chunk_means(k, segments), segments, moba.topk)
    return selected.sort(dim=-1, descending=True).values.cpu().numpy()


def _gather_sequence(x: torch.Tensor) -> torch.Tensor:
    """All context parallel ranks' rows, one rank after the other."""
    group = parallel_state.get_context_parallel_group()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)
