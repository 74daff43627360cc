"""Logits of a checkpoint in Megatron-Core, under context parallelism too, against a folder of Transformers.

    torchrun --nproc-per-node 2 examples/huggingface_to_megatron/compare.py --huggingface MODEL \\
        --pretrained-checkpoint CHECKPOINTS --text FILE --seq-length 2048 --context-parallel-size 2 \\
        --moba-chunk-size 64 --moba-topk 4

Other flags are examples/pretrain_gpt.py's. Transformers attends by `register_moba` with the same settings, or with
`--attention full` by sdpa, on every rank over the whole sequence; a rank compares the rows that it holds. In fp64, the
default: in fp32 two chunks whose scores are nearly equal may change places by rounding, and a query attends elsewhere.
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pretrain_gpt as job  # first: it readies Megatron-Core
import torch
import torch.nn.functional as F
from convert import settings
from megatron.core import parallel_state
from pretraining import checkpointing
from pretraining.data import part_of_sequence
from pretraining.model import build_config, build_gpt
from transformers import AutoModelForCausalLM, AutoTokenizer

from moba_megatron import register_moba


def compare(args: argparse.Namespace, model: AutoModelForCausalLM, ids: torch.Tensor, tolerance: float) -> dict:
    """Compares all logits of one sequence, of tokens [1, seq_length + 1], in the model's dtype.

    Returns:
        largest difference, largest logit, the share of places where a logit differs by more than the tolerance, and
        both losses in nats a token; the same on all ranks.
    """
    gpt = build_gpt(args, build_config(args))
    checkpointing.load_weights(args, gpt)
    gpt.to(model.dtype)
    positions = torch.arange(args.seq_length, device=ids.device)[None]
    inputs, labels, places = (part_of_sequence(x) for x in (ids[:, :-1], ids[:, 1:], positions))
    with torch.no_grad():
        theirs = model.eval()(ids[:, :-1], use_cache=False).logits[0, places[0]]
        ours = gpt.eval()(inputs, places, None)[0, :, :theirs.shape[1]]
    group = parallel_state.get_context_parallel_group()
    apart = (ours - theirs).abs().amax(-1)
    largest = torch.stack([apart.max(), theirs.abs().max()]).double()
    losses = [F.cross_entropy(logits.double(), labels[0], reduction="sum") for logits in (ours, theirs)]
    sums = torch.stack([(apart > tolerance).sum().double(), *losses])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    torch.distributed.all_reduce(sums, group=group)
    names = "largest_difference", "largest_logit", "places_apart", "loss_megatron", "loss_transformers"
    return dict(zip(names, (*largest.tolist(), *(sums / args.seq_length).tolist()), strict=True))


def main(argv=None) -> int:
    """0 where no logit differs by more than --tolerance, 1 where one does in fp64."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--huggingface", type=Path, required=True, help="a folder of Transformers")
    parser.add_argument("--text", type=Path, required=True, help="a file; its first tokens are the sequence")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a logit (1e-4)")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    a, flags = parser.parse_known_args(argv)
    _, args = settings(a.huggingface, *flags)
    if args.tensor_model_parallel_size * args.pipeline_model_parallel_size > 1 or not args.pretrained_checkpoint:
        parser.error("give --pretrained-checkpoint, and no tensor or pipeline parallel size")
    if a.dtype == "float64" and args.moba_config.backend == "auto":  # which is Triton on a GPU, and has no fp64
        args.moba_config = dataclasses.replace(args.moba_config, backend="torch")
    job.initialize(args)
    attention = "moba" if args.attention == "moba" else "sdpa"
    if attention == "moba":
        register_moba(args.moba_config)
    device = torch.cuda.current_device()
    model = AutoModelForCausalLM.from_pretrained(a.huggingface, attn_implementation=attention,
                                                 dtype=getattr(torch, a.dtype)).to(device)
    tokens = AutoTokenizer.from_pretrained(a.huggingface)(a.text.read_text(encoding="utf-8"), add_special_tokens=False)
    ids = torch.tensor([tokens["input_ids"][:args.seq_length + 1]], device=device)
    if ids.shape[1] <= args.seq_length:
        parser.error(f"--text must have more than --seq-length {args.seq_length} tokens, got {ids.shape[1]}")
    found = compare(args, model, ids, a.tolerance)
    if torch.distributed.get_rank() == 0:
        print(f"{args.attention}, {args.seq_length} tokens, CP {args.context_parallel_size}, {a.dtype}: logits differ "
              f"by {found['largest_difference']:.1e} at most (at {found['places_apart']:.1%} of the places by more "
              f"than {a.tolerance:g}), the largest is {found['largest_logit']:.1f}; loss {found['loss_megatron']:.6f} "
              f"in Megatron-Core, {found['loss_transformers']:.6f} in Transformers")
        if a.json:
            a.json.write_text(json.dumps(found, indent=1) + "\n")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return int(found["places_apart"] > 0 and a.dtype == "float64")


if __name__ == "__main__":
    sys.exit(main())
