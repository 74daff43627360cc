"""Batches from Megatron's indexed dataset: which samples a rank reads at which iteration, and its part of them."""
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list

from .agreement import SharedError


class DataTokenizer:
    """What Megatron's dataset asks of a tokenizer once the text is tokens: the size of the vocabulary and two ids."""

    def __init__(self, facts: dict):
        self.name = facts["tokenizer"]
        self.vocab_size = facts["vocab_size"]
        self.eod = facts["eod"]
        self.pad = -1
        self.unique_identifiers = {"tokenizer": self.name, "vocab_size": self.vocab_size, "eod": self.eod}


def read_tokenizer(data_path: list[str]) -> tuple[tuple, DataTokenizer]:
    """Checks that the files of every prefix exist and that all agree on their tokenizer.

    Args:
        data_path: the values of --data-path.

    Returns:
        the blend (prefixes, weights or None), and the tokenizer.

    Raises:
        ValueError: a file is missing or the prefixes were made with different tokenizers.
    """
    try:
        blend = get_blend_from_list(data_path)
    except (AssertionError, ValueError):
        raise ValueError(f"--data-path must be prefixes, or weights and prefixes in turn, got {data_path}") from None
    found = {}
    for prefix in blend[0]:
        for suffix in (".bin", ".idx", ".json"):
            if not Path(prefix + suffix).is_file():
                raise ValueError(f"--data-path {prefix}: there is no file {prefix + suffix}; "
                                 "make it with examples/prepare_data.py --output-prefix " + prefix)
        facts = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
        found[prefix] = (facts["tokenizer"], facts["vocab_size"], facts["eod"])
    if len(set(found.values())) > 1:
        raise ValueError(f"--data-path: all prefixes must have the same tokenizer, got {found}")
    return blend, DataTokenizer(facts)


def build_datasets(args, blend, tokenizer) -> tuple[GPTDataset, GPTDataset | None]:
    """Training and validation samples of `seq_length` tokens; rank 0 builds the index maps, the others read them.

    Raises:
        SharedError: a split that is needed has no document, or not the tokens of one sequence.
    """
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, blend=blend, split=args.split,
        path_to_cache=args.data_cache_path, tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False)
    eval_samples = args.eval_iters * args.global_batch_size
    needed = {"training": config.split_matrix[0], **({"validation": config.split_matrix[1]} if eval_samples else {})}
    for prefix in blend[0]:
        documents = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))["documents"]
        for name, share in needed.items():
            # as Megatron cuts documents; it would look for a sequence in none of them for ever
            if share is None or round(share[0] * documents) == round(share[1] * documents):
                raise SharedError(f"--split {args.split} leaves none of the {documents} document(s) of --data-path "
                                  f"{prefix} for {name}: give it more documents (a line each in a .jsonl file) or "
                                  "weight; --split 100,0,0 with --eval-iters 0 trains on all of them")
    sizes = [args.train_iters * args.global_batch_size, eval_samples or None, None]
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    for name, dataset in (("training", train), ("validation", valid)):
        if name in needed and (dataset is None or len(dataset) == 0):
            raise SharedError(f"--split {args.split} of --data-path leaves the {name} split no sequence of "
                              f"--seq-length {args.seq_length} tokens: give it more documents or weight")
    return train, valid


class Samples(torch.utils.data.Sampler):
    """Sample numbers of one data parallel rank, micro batch by micro batch.

    They depend on the iteration alone, so a resumed run reads on where the other stopped, whatever its parallel sizes.

    Args:
        args: the flags `micro_batch_size` and `global_batch_size`, and `data_parallel_size`.
        rank: of the data parallel group.
        first_iteration, last_iteration: the first to read for, and the one to stop before.
    """

    def __init__(self, args, rank: int, first_iteration: int, last_iteration: int):
        self.iterations = range(first_iteration, last_iteration)
        self.rank = rank
        self.micro, self.batch = args.micro_batch_size, args.global_batch_size
        self.stride = args.micro_batch_size * args.data_parallel_size

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in self.iterations:
            for start in range(0, self.batch, self.stride):
                first = iteration * self.batch + start + self.rank * self.micro
                yield list(range(first, first + self.micro))

    def __len__(self) -> int:
        return len(self.iterations) * (self.batch // self.stride)


def batches(args, dataset, first_iteration: int, last_iteration: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro batches of this rank for the iterations, on its device and cut to its context parallel part.

    Every rank of a tensor, context and pipeline parallel group reads the same samples: the data is a memory map.

    Yields:
        tokens, labels, position_ids [b, s] int64, loss_mask [b, s] fp32, with s = seq_length / context parallel size.
    """
    samples = Samples(args, parallel_state.get_data_parallel_rank(), first_iteration, last_iteration)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=samples, num_workers=args.num_workers,
                                         pin_memory=torch.cuda.is_available())
    device = torch.cuda.current_device()
    for batch in loader:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        yield {name: part_of_sequence(tensor) for name, tensor in batch.items()}


def part_of_sequence(x: torch.Tensor) -> torch.Tensor:
    """Pieces r and 2P-1-r of the sequence [b, seq_length] for rank r of P: the layout that Megatron prescribes.

    Megatron's own function for it has changed its signature; the layout has not.
    """
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return x
    pieces = x.chunk(2 * size, dim=1)
    return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]), dim=1)
