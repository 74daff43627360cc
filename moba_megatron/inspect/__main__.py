"""Which chunks does each layer and head choose? Pictures, a page and a trace from a checkpoint and a text.

    python -m moba_megatron.inspect --load runs/quickstart/checkpoints --text README.md --output look
    python -m moba_megatron.inspect --load runs/quickstart/checkpoints --text README.md --trace routing.npz
    python -m moba_megatron.inspect --from-trace routing.npz --output look

The checkpoint is one of examples/pretrain_gpt.py, of any parallel size; reading it unpickles parts of it, which can run
code, so it must come from someone you trust. In the output directory:

    router.html       the chosen chunks of each layer and head, to point at; one file, loads nothing
    selection.png     the same as heat maps
    statistics.json   first-chunk share, load imbalance, entropy, recall of each layer and head (inspect/statistics.py)
    statistics.png    the same as heat maps

The trace is what a simulation of the exchange needs (inspect/trace.py).
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

from .picture import draw_report, draw_trace, write_page
from .report import as_record, as_table
from .trace import RoutingTrace, load_trace, save_trace


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m moba_megatron.inspect", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--load", metavar="DIR", help="directory of checkpoints, or one checkpoint; it is unpickled: "
                        "it must be trusted")
    source.add_argument("--from-trace", metavar="FILE.npz", help="draw a trace that was made before")
    parser.add_argument("--text", metavar="FILE", help="its first tokens are what the model reads")
    parser.add_argument("--output", metavar="DIR", help="where pictures, page and statistics go")
    parser.add_argument("--trace", metavar="FILE.npz", help="also write the routing trace")
    parser.add_argument("--seq-length", type=int, help="tokens to read; default: what the model was trained on")
    parser.add_argument("--tokenizer-model", metavar="DIR", help="where the checkpoint needs a Hugging Face tokenizer")
    parser.add_argument("--moba-chunk-size", type=int, help="instead of the checkpoint's")
    parser.add_argument("--moba-topk", type=int, help="instead of the checkpoint's")
    parser.add_argument("--moba-full-attention-layers",
                        help="instead of the checkpoint's; with 'none', layers that were trained densely are looked at")
    parser.add_argument("--samples", type=int, default=512, help="queries whose recall is computed (default: 512)")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    args = parser.parse_args(argv)
    if args.load and not args.text:
        parser.error("--load needs --text")
    if not args.output and not args.trace:
        parser.error("--output or --trace must say where the result goes")
    return args


def look(args: argparse.Namespace) -> tuple[RoutingTrace, dict, list[str]]:
    """The trace, the statistics and each chunk's first characters of a checkpoint's model that reads the text;
    ValueError where a flag, the checkpoint or the text does not serve."""
    import torch

    from ..config import MoBAConfig
    from ..environment import describe
    from .checkpoint import find_checkpoint, load_model, read_description, single_process, tokenizer
    from .choices import watching
    from .recorder import TraceRecorder
    from .router_log import RouterLog
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = find_checkpoint(args.load)
    with single_process(device):
        description = read_description(checkpoint)
        given = {name: getattr(args, f"moba_{name}") for name in ("chunk_size", "topk", "full_attention_layers")}
        given = {name: value for name, value in given.items() if value is not None}
        if given.keys() & {"chunk_size", "topk"}:  # for all layers
            given["per_layer"] = None
        moba = MoBAConfig(**description["moba"]).at_step(description["iteration"])
        moba = dataclasses.replace(moba, full_attention_from_step=None, **given)
        words = tokenizer(description["tokenizer"], args.tokenizer_model)
        length = args.seq_length or description["gpt"]["max_sequence_length"]
        ids = words.encode(Path(args.text).read_text(encoding="utf-8"))[:length]
        if len(ids) <= moba.topk * moba.chunk_size:
            raise ValueError(f"--text must have more than topk * chunk_size = {moba.topk * moba.chunk_size} tokens, or "
                             f"there is nothing to choose; read {len(ids)} of at most {length} (--seq-length)")
        model = load_model(checkpoint, description, moba, device)
        recorder, log = TraceRecorder(), RouterLog(1, model.config.num_layers, model.config.num_attention_heads,
                                                   args.samples)
        with torch.no_grad(), watching(recorder), log.watch(1):
            model(torch.tensor([ids], device=device), torch.arange(len(ids), device=device)[None], None)
        about = {"checkpoint": str(args.load), "iteration": description["iteration"], "text": Path(args.text).name,
                 **describe(device), "command": "python -m moba_megatron.inspect " + " ".join(sys.argv[1:])}
        trace = recorder.trace(about)
    size = trace.chunk_size
    return trace, log.report, [words.decode(ids[i * size:(i + 1) * size])[:120] for i in range(trace.num_chunks)]


def main(argv: list[str] | None = None) -> int:
    """0 on success, 2 with a message on bad input."""
    args = parse_args(argv)
    try:
        trace, report, excerpts = (load_trace(args.from_trace), {}, []) if args.from_trace else look(args)
        if not args.from_trace:
            print(as_table(report))
        if args.trace:
            save_trace(trace, args.trace)
            print(args.trace)
        if args.output:
            directory = Path(args.output)
            directory.mkdir(parents=True, exist_ok=True)
            written = [directory / "router.html", directory / "selection.png"]
            write_page(trace, written[0], report, excerpts)
            draw_trace(trace, written[1])
            if report:
                written += [directory / "statistics.json", directory / "statistics.png"]
                numbers = {"about": dict(trace.about), "layers": as_record(report)}
                written[2].write_text(json.dumps(numbers, indent=1) + "\n")
                draw_report(report, written[3])
            print(*written, sep="\n")
    except (ImportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
