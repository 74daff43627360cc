"""Does it learn? Quality of MoBA beside full attention's; docs/quality.md holds what came out.

    python -m benchmarks.quality scratch --output runs/scratch
    python -m benchmarks.quality untrained --pretrained model.gguf
    python -m benchmarks.quality continued --pretrained model.gguf --output runs/continued
    python -m benchmarks.quality draw

Whatever stops a command, the same command goes on. `draw` makes tables and pictures again from what is stored.
"""
import argparse
import sys

from . import pages, runs, untrained


def main(argv: list[str] | None = None) -> int:
    """The subcommand's status; 2 with a message on bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    subcommands = parser.add_subparsers(dest="subcommand", required=True)
    for name in runs.PARTS:
        runs.add_part(subcommands, name)
    untrained.add_untrained(subcommands)
    pages.add_draw(subcommands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
