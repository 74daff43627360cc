"""A router that learns: a low-rank indexer in place of MoBA's gate, trained towards the dense attention's mass.

    python examples/learned_router.py --output learned_router.json

A small GPT of Megatron-Core learns to read Python sources with dense attention, and is frozen. Then each layer's
indexer learns, by a KL loss, which chunks the dense attention of a group of heads looks at; `chunk_mass` says so in
blocks. On sources that neither has seen, the mass of dense attention inside the indexer's choices is compared with that
inside the choices of MoBA's gate, at equal topk. Every seed is a model, an indexer and an order of the text of its own.
"""
import argparse
import json
import math
import statistics
import sysconfig
from pathlib import Path

import megatron_on_cpu

megatron_on_cpu.enable()

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from pretraining.model import RMSNorm
from torch import Tensor, nn

from moba_megatron import MoBAConfig, chunk_mass, get_moba_layer_local_spec
from moba_megatron.context_parallel import gather_keys
from moba_megatron.ops import select_for_segments
from moba_megatron.segments import Segments

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a two-sided 95 % interval, by the number of seeds."""


class Indexer(nn.Module):
    """Chunks by ``<queries, mean key> + <psi(queries), mean phi(key)>``, one choice for the heads of a kv head.

    phi and psi have two layers of width ``rank``; psi begins at 0, and the indexer as MoBA's gate for groups. Since a
    score is a product with a mean, the gate's own kernels choose.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, moba_config: MoBAConfig, rank: int, samples: int):
        super().__init__()
        dim, groups = config.kv_channels, config.num_query_groups // config.tensor_model_parallel_size
        group = config.num_attention_heads // config.num_query_groups
        self.topk, self.samples = moba_config.topk, samples

        def matrix(rows: int, columns: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(groups, rows, columns, device=torch.cuda.current_device()) * std)

        self.phi = nn.ParameterList([matrix(dim, rank, dim ** -0.5), matrix(rank, rank, rank ** -0.5)])
        self.psi = nn.ParameterList([matrix(group * dim, rank, (group * dim) ** -0.5), matrix(rank, rank, 0.0)])
        self.temperature = nn.Parameter(torch.zeros((), device=torch.cuda.current_device()))
        self.mode, self.loss, self.masses = "choose", None, []

    def forward(self, q: Tensor, k: Tensor, segments: Segments, group=None, global_rows=None) -> Tensor:
        """As of MoBACoreAttentionSubmodules: int32 ``[T, HK, n]``. In mode ``learn`` and ``compare`` everything is
        chosen, that is, attention is dense."""
        q, k = q.detach(), k.detach()
        queries, keys = self.features(q, k)
        if self.mode == "choose":
            keys = keys if group is None else gather_keys(keys, group, global_rows)
            return select_for_segments(queries, keys, segments, self.topk)
        if self.mode == "learn":
            self.loss = self.divergence(q, k, queries, keys, segments)
        elif self.mode == "compare":
            chosen = (select_for_segments(queries, keys, segments, self.topk),
                      select_for_segments(q, k, segments, self.topk, shared="group"))
            self.masses.append(self.compare(q, k, chosen, segments))
        sequence, _ = segments.query_positions(q.shape[0])
        every = torch.arange((segments.max_seqlen_k - 1) // segments.chunk_size, device=q.device)
        every = segments.first_chunk()[sequence, None] + every  # later ones are ignored
        return every.int()[:, None].expand(-1, k.shape[1], -1)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What scores are products of: ``[T, HK, D + rank]`` and ``[S, HK, D + rank]``."""
        groups = q.unflatten(1, (k.shape[1], -1))

        def layers(x: Tensor, weights: nn.ParameterList) -> Tensor:
            first, second = (w.to(x.dtype) for w in weights)
            return torch.einsum("tgr,grs->tgs", F.silu(torch.einsum("tgd,gdr->tgr", x, first)), second)

        return (torch.cat((groups.mean(2), layers(groups.flatten(2), self.psi)), 2),
                torch.cat((k, layers(k, self.phi)), 2))

    def rows(self, q: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """Some queries that have a choice, the first chunk of their sequences, and their own chunk."""
        sequence, position = segments.query_positions(q.shape[0])
        earlier = position // segments.chunk_size
        with_choice = (earlier >= self.topk).nonzero()[:, 0]
        rows = with_choice[torch.randint(with_choice.numel(), (self.samples,), device=q.device)]
        first = segments.first_chunk()[sequence[rows]]
        return rows, first, first + earlier[rows]

    def divergence(self, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, segments: Segments) -> Tensor:
        """KL from the dense attention's masses on earlier chunks to the indexer's."""
        rows, first, own = self.rows(q, segments)
        mass = chunk_mass(q, k, segments, rows).unflatten(1, (k.shape[1], -1)).mean(2)  # [n, HK, chunks]
        sequence, position = segments.key_positions(k.shape[0])
        chunk = segments.first_chunk()[sequence] + position // segments.chunk_size
        sums = torch.zeros(mass.shape[2], *keys.shape[1:], device=k.device).index_add(0, chunk, keys.float())
        scores = torch.einsum("ngd,cgd->ngc", queries[rows].float(), sums / segments.chunk_size)
        scores = scores * self.temperature.exp() * q.shape[2] ** -0.5
        column = torch.arange(mass.shape[2], device=q.device)
        hidden = ((column < first[:, None]) | (column >= own[:, None]))[:, None]
        target = mass.masked_fill(hidden, 0)
        target = target / target.sum(2, keepdim=True).clamp(min=1e-20)
        log = scores.masked_fill(hidden, -torch.inf).log_softmax(2).masked_fill(hidden, 0)
        return (torch.special.xlogy(target, target) - target * log).sum(2).mean()

    @torch.no_grad()
    def compare(self, q: Tensor, k: Tensor, chosen: tuple[Tensor, Tensor], segments: Segments) -> list[float]:
        """Mass of dense attention inside the choices, own chunks with it: the indexer's, the gate's, the best."""
        rows, first, own = self.rows(q, segments)
        mass = chunk_mass(q, k, segments, rows).unflatten(1, (k.shape[1], -1)).mean(2)
        column = torch.arange(mass.shape[2], device=q.device)
        earlier = mass.masked_fill(((column < first[:, None]) | (column >= own[:, None]))[:, None], 0)
        own_mass = mass.gather(2, own[:, None, None].expand(-1, mass.shape[1], 1)).sum(2)
        found = [earlier.gather(2, x[rows].long()).sum(2) for x in chosen] + [earlier.topk(self.topk - 1, 2)[0].sum(2)]
        return [(own_mass + x).mean().item() for x in found]


class Text:
    """Bytes of .py files; every tenth file is held out."""

    def __init__(self, folder: Path, device: torch.device):
        files = sorted(folder.rglob("*.py"))
        self.parts = [torch.frombuffer(bytearray(b"".join(path.read_bytes() for i, path in enumerate(files)
                                                          if (i % 10 == 0) == held_out)), dtype=torch.uint8)
                      for held_out in (False, True)]
        self.device = device

    def batch(self, size: int, length: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
        """``[size, length + 1]`` tokens."""
        part = self.parts[held_out]
        begins = torch.randint(part.numel() - length, (size,), generator=generator).tolist()
        return torch.stack([part[i:i + length + 1] for i in begins]).long().to(self.device)


def build(args: argparse.Namespace) -> GPTModel:
    config = TransformerConfig(
        num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=args.heads,
        num_query_groups=args.kv_heads, ffn_hidden_size=4 * args.hidden, attention_dropout=0.0, hidden_dropout=0.0,
        normalization="RMSNorm", add_bias_linear=False, init_method_std=args.hidden ** -0.5,
        use_cpu_initialization=not args.cuda)
    selector = ModuleSpec(Indexer, params={"rank": args.rank, "samples": args.samples})
    layer = get_moba_layer_local_spec(MoBAConfig(args.chunk_size, args.topk), selector, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    block = TransformerBlockSubmodules(layer_specs=[layer] * args.layers, layer_norm=RMSNorm)
    return GPTModel(config, block, 256, args.seq_length, position_embedding_type="rope")


def run(args: argparse.Namespace, seed: int, text: Text) -> dict[str, float]:
    """Masses inside the choices, means over layers and held-out text; the losses beside them."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), build(args)
    model.to(text.device)
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    own = {id(p) for module in indexers for p in module.parameters()}
    positions = torch.arange(args.seq_length, device=text.device).expand(args.batch, -1)

    def forward(mode: str, held_out: bool = False) -> Tensor:
        for module in indexers:
            module.mode = mode
        tokens = text.batch(args.batch, args.seq_length, generator, held_out)
        return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean()

    def train(parameters: list[nn.Parameter], steps: int, lr: float, loss_of) -> float:
        optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
            (step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-2))
        for step in range(steps):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % max(1, steps // 5) == 0 or step == steps - 1:
                print(f"seed {seed}, step {step + 1} of {steps}: {loss.item():.4f}", flush=True)
        return loss.item()

    def learn() -> Tensor:
        forward("learn")
        return sum(module.loss for module in indexers) / len(indexers)

    dense = train([p for p in model.parameters() if id(p) not in own], args.dense_steps, args.dense_lr,
                  lambda: forward("dense"))
    for p in model.parameters():
        p.requires_grad_(id(p) in own)
    learned = train([p for p in model.parameters() if id(p) in own], args.steps, args.lr, learn)
    with torch.no_grad():
        losses = {mode: statistics.mean(forward(mode, True).item() for _ in range(args.held_out))
                  for mode in ("compare", "choose")}
    names = ("indexer", "gate", "best")
    masses = {name: statistics.mean(x[i] for module in indexers for x in module.masses) for i, name in enumerate(names)}
    return {**masses, "difference": masses["indexer"] - masses["gate"], "dense_loss": losses["compare"],
            "sparse_loss": losses["choose"], "trained_loss": dense, "divergence": learned}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, help in (
            ("layers", 4, "of the model"), ("hidden", 256, "its width"), ("heads", 8, "query heads"),
            ("kv-heads", 2, "key heads"), ("seq-length", 4096, "tokens"), ("batch", 4, "sequences"),
            ("chunk-size", 64, "keys"), ("topk", 4, "chunks a query attends to"), ("rank", 32, "of the indexer"),
            ("samples", 1024, "queries a layer and step for the KL loss"), ("dense-steps", 400, "of the model"),
            ("steps", 400, "of the indexer"), ("held-out", 8, "batches to compare"), ("seeds", 3, "2 to 5")):
        p.add_argument(f"--{name}", type=int, default=default, help=f"{help} (default: {default})")
    p.add_argument("--dense-lr", type=float, default=2e-3)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--data", type=Path, default=Path(sysconfig.get_paths()["stdlib"]),
                   help="folder of .py files (default: Python's own)")
    p.add_argument("--output", type=Path, help="write the result, as JSON")
    args = p.parse_args(argv)
    args.cuda = torch.cuda.is_available()
    return args


def main(argv: list[str] | None = None) -> int:
    """0 where the interval of the difference is above 0, else 1."""
    args = parse_args(argv)
    device = torch.device("cuda" if args.cuda else "cpu")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(megatron_on_cpu.distributed_backend(), store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    text = Text(args.data, device)
    seeds = [run(args, seed, text) for seed in range(1, args.seeds + 1)]
    differences = [seed["difference"] for seed in seeds]
    half = T_95[args.seeds] * statistics.stdev(differences) / math.sqrt(args.seeds)
    mean = statistics.mean(differences)
    result = {"settings": {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()},
              "seeds": seeds, "difference": mean, "interval": [mean - half, mean + half]}
    for name in ("indexer", "gate", "best"):
        print(f"dense attention's mass inside the choices, {name}: "
              + ", ".join(f"{seed[name]:.4f}" for seed in seeds))
    print(f"indexer over gate: {mean:.4f}, 95 % interval {mean - half:.4f} to {mean + half:.4f} ({args.seeds} seeds)")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    torch.distributed.destroy_process_group()
    return int(mean - half <= 0)


if __name__ == "__main__":
    raise SystemExit(main())
