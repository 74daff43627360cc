"""The command line of the benchmarks: one subcommand a job."""
import importlib
import importlib.util

from ..rendezvous import ArgumentParser
from . import cli, cp, decode, environment, gpt

CHECKOUT_ONLY = {"comparison": "add_readme", "tables": "add_table", "plot": "add_plot", "router": "add_router",
                 "options": "add_options"}
"""Modules that a wheel lacks, as it lacks the stored results, with the function that adds their subcommand."""


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m moba_megatron.bench", description=cli.__doc__)
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for add in (cli.add_kernels, cli.add_tune, cli.add_compile, cp.add_cp, decode.add_decode, gpt.add_gpt):
        add(subcommands)
    for name, add in CHECKOUT_ONLY.items():
        if importlib.util.find_spec(f".{name}", __package__) is not None:
            getattr(importlib.import_module(f".{name}", __package__), add)(subcommands)
        else:
            missing = subcommands.add_parser(add.removeprefix("add_"), help="(needs a checkout)")
            missing.set_defaults(missing=True)
    arguments, unknown = parser.parse_known_args(argv)
    if getattr(arguments, "missing", False):
        parser.error(f"{arguments.subcommand} and its stored results need a checkout; the wheel has neither")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not getattr(arguments, "show", None):
        environment.need_device(parser, getattr(arguments, "device", "cpu"))
    return arguments.run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
