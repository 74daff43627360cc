"""The planner's command line: ``python -m moba_megatron.plan --seq 1M --model 8b --gpus 64 --card h100``."""
import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..config import MoBAConfig
from ..environment import as_text, describe, save
from . import command, hardware
from .attention_cost import Calibration, stored
from .layout import RECOMPUTE
from .models import MODELS, SIZES, Run, default_batch, parse_size
from .step import Prediction, plan

MOVED = {"--check": "plan-check", "--results": "plan-check", "--fit": "plan-fit", "--simulate": "plan-simulate",
         "--trace": "plan-simulate"}  # flags of earlier versions -> the benchmarks' subcommand that does it


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m moba_megatron.plan", description=__doc__)
    p.add_argument("--seq", metavar="N", help="tokens of a sequence, such as 131072, 128K or 1M")
    p.add_argument("--model", choices=list(MODELS), default="8b", help="a preset; its sizes can be changed below")
    p.add_argument("--gpus", type=int, default=8)
    p.add_argument("--card", default="h100", help=", ".join(hardware.CARDS))
    p.add_argument("--batch", type=int, metavar="N", help="sequences a step (default: about 4M tokens)")
    p.add_argument("--attention", choices=("moba", "full"), default="moba")
    p.add_argument("--chunk-size", type=int, default=MoBAConfig.chunk_size)
    p.add_argument("--topk", type=int, default=MoBAConfig.topk, help="chunks a query attends to, its own included")
    p.add_argument("--full-attention-layers", default="none", help="none, last:N, every:N or numbers")
    p.add_argument("--per-layer", help="chunk size and topk of some layers: 1-8:chunk=128,topk=16;9-24:topk=8")
    p.add_argument("--topk-schedule", help="topk from an iteration on: 0:64,1000:16,2000:8")
    p.add_argument("--iteration", type=int, default=0, metavar="N", help="of the step that is predicted (0)")
    p.add_argument("--no-distributed-optimizer", action="store_true")
    for name in SIZES:
        p.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help="instead of the preset's")
    for name in ("tp", "cp", "pp", "dp"):
        p.add_argument("--" + name, type=int, metavar="N", help="only layouts with this size")
    p.add_argument("--cp-comm-type", dest="comm_type", help="only layouts with this")
    p.add_argument("--recompute", choices=RECOMPUTE, help="only layouts with this")
    p.add_argument("--network", type=float, metavar="GB/s", help="a GPU's share of the network, one direction")
    p.add_argument("--link", type=float, metavar="GB/s", help="between GPUs of a machine, one direction")
    p.add_argument("--node", type=int, metavar="N", help="GPUs in a machine")
    p.add_argument("--top", type=int, default=15, metavar="N", help="rows of the table (15)")
    p.add_argument("--why", action="store_true", help="also the layouts that cannot be, with the reason")
    p.add_argument("--json", type=Path, metavar="PATH", help="write every layout that fits, part by part")
    p.add_argument("--picture", type=Path, metavar="PATH", help="time against sequence length, as .png or .svg")
    p.add_argument("--cards", action="store_true", help="print the card table with its sources, and end")
    return p


def main(argv: list[str] | None = None) -> int:
    """0; 1 where nothing fits; 2 for a wrong argument."""
    p = parser()
    for word in sys.argv[1:] if argv is None else argv:
        if (flag := word.partition("=")[0]) in MOVED:
            p.error(f"{flag} is `python -m benchmarks {MOVED[flag]}` now, in a checkout")
    arguments = p.parse_args(argv)
    if arguments.cards:
        print(as_text(hardware.as_rows()))
        return 0
    if arguments.seq is None:
        p.error("--seq is needed, such as --seq 1M")
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    figures = {name: hardware.Figure(given[name] * hardware.UNITS[name][0], hardware.ASSUMED, f"--{name}")
               for name in ("network", "link", "node") if name in given}
    try:
        if any(figure.value <= 0 for figure in figures.values()):
            raise ValueError("--network, --link and --node must be positive")
        card = replace(hardware.find_card(arguments.card), **figures)
        model = replace(MODELS[arguments.model], **{name: given[name] for name in SIZES if name in given})
        moba = MoBAConfig(arguments.chunk_size, arguments.topk, arguments.full_attention_layers,
                          per_layer=arguments.per_layer, topk_schedule=arguments.topk_schedule)
        moba.is_full_attention(model.layers, model.layers)  # a listed layer may be beyond the model
        seqlen = parse_size(arguments.seq)
        run = Run(model, seqlen, arguments.gpus, given.get("batch", default_batch(seqlen)), moba,
                  not arguments.no_distributed_optimizer, arguments.attention, arguments.iteration)
        run.layers  # per_layer may name one beyond the model
    except (TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fixed = {name: given[name] for name in ("tp", "cp", "pp", "dp", "comm_type", "recompute") if name in given}
    fitted = stored()
    fit, out = plan(run, card, fitted, fixed)
    attention = "full attention" if run.attention == "full" else (
        f"MoBA chunk {run.moba.chunk_size} topk {run.moba.at_step(run.iteration).topk}"
        + f" ({run.moba.per_layer})" * bool(run.moba.per_layer)
        + f", {model.layers - len(run.sparse_layers)} of {model.layers} layers full")
    print(f"{model.parameters / 1e9:.2f}B parameters, {run.seqlen:,} tokens a sequence, {run.batch} sequences "
          f"({run.tokens:,} tokens) a step, {run.gpus} x {card.name}, {attention}\n"
          f"Predicted, not measured: attention by {fitted.source}, the rest by the card's figures (--cards)\n")
    if fit:
        print(as_text([row_of(p) for p in fit[:arguments.top]]), end="\n\n")
    print(f"{len(fit)} layouts fit, {len(out)} do not" + ("" if arguments.why else " (--why says why)"))
    if arguments.why:
        print(as_text([{"layout": layout.name(), "reason": "; ".join(why)} for layout, why in out]))
    if arguments.json:
        save(arguments.json, {"environment": describe(torch.device("cpu")), "layouts": [as_dict(p) for p in fit]})
    if not fit:
        return 1
    print(f"\nThe cheapest, {fit[0].layout.name()} (add your own {command.YOUR_OWN}):\n")
    print(command.as_text(command.torchrun(run, fit[0].layout, card)))
    if arguments.picture:
        time_against_length(run, card, fitted, arguments.picture)
    return 0


def row_of(p: Prediction) -> dict[str, str]:
    """A line of the table; times in seconds a step, traffic in GB a GPU and step."""
    comm = p.layout.comm_type + ("" if p.layout.comm_type != "a2a+all_gather" else f" {p.layout.inner}")

    def seconds(*names: str) -> str:
        return f"{sum(p.parts[name].seconds for name in names):.2g}"

    return {"TP": str(p.layout.tp), "CP": str(p.layout.cp), "PP": str(p.layout.pp), "DP": str(p.layout.dp),
            "comm": comm, "recompute": p.layout.recompute, "GPU s/Mtok": f"{p.cost:.1f}",
            "s/step": f"{p.seconds:.3g}", "tokens/s": f"{p.tokens_per_second:,.0f}",
            "MFU full": f"{p.mfu:.0%}", "MFU": f"{p.mfu_moba:.0%}", "GiB": f"{p.memory.total / 2**30:.0f}",
            "matrices": seconds("matrices", "output"), "attention": seconds("attention"),
            "other": seconds("elementwise", "optimizer", "host"), "exposed CP": seconds("context"),
            "TP ": seconds("tensor"), "PP ": seconds("pipeline"), "DP ": seconds("data"), "hidden": f"{p.hidden:.2g}",
            "link GB": f"{sum(part.traffic.link for part in p.parts.values()) / 1e9:.0f}",
            "net GB": f"{sum(part.traffic.network for part in p.parts.values()) / 1e9:.0f}"}


def as_dict(p: Prediction) -> dict:
    """Everything of a prediction, for JSON: seconds, bytes."""
    return {"layout": asdict(p.layout), "step_s": p.seconds, "tokens_per_s": p.tokens_per_second,
            "gpu_seconds_per_million_tokens": p.cost, "mfu_as_if_full": p.mfu, "mfu": p.mfu_moba,
            "exposed_s": p.exposed, "hidden_s": p.hidden, "memory_bytes": {**asdict(p.memory), "total": p.memory.total},
            "parts": {name: asdict(part) for name, part in p.parts.items()}}


def time_against_length(run: Run, card: hardware.Card, calibration: Calibration, path: Path) -> None:
    """Draws GPU seconds a million tokens of the cheapest layout, of MoBA and of full attention, into a .png or .svg, by
    length: powers of two from 32K to four times the run's, and its own, in batches of about four million tokens."""
    from .. import plotting
    lengths = sorted({run.seqlen, *(1 << i for i in range(15, (4 * run.seqlen).bit_length()))})
    runs = [run if n == run.seqlen else replace(run, seqlen=n, batch=default_batch(n)) for n in lengths]
    with plotting.figure(path) as (_, axes):
        labels, shown = [], set()
        for attention, name, colour in (
                ("moba", f"MoBA ({run.moba.chunk_size}, {run.moba.topk})", plotting.LIGHT.accent),
                ("full", "full attention", plotting.LIGHT.others[0])):
            fits = [(r.seqlen, plan(replace(r, attention=attention), card, calibration)[0]) for r in runs]
            if points := [(tokens, fit[0].cost) for tokens, fit in fits if fit]:
                axes.plot(*zip(*points), color=colour, linewidth=2, marker="o", markersize=4)
                labels.append((points[-1][1], f"{name}: {points[-1][1]:.0f}", colour))
                shown.update(tokens for tokens, _ in points)
        plotting.log_axis(axes)
        plotting.length_axis(axes, sorted(shown)[::2])
        axes.set_title(f"Predicted GPU seconds per million tokens,\n{run.model.parameters / 1e9:.2g}B parameters, "
                       f"{run.gpus} x {card.name}")
        plotting.label_ends(axes, labels)


if __name__ == "__main__":
    raise SystemExit(main())
