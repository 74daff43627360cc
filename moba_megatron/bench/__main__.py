"""The command line of the benchmarks: one subcommand a job."""
import argparse

from . import cli, comparison, cp, decode, gpt, options, plot, router


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moba_megatron.bench", description=cli.__doc__)
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for add in (cli.add_kernels, cli.add_table, cli.add_tune, cli.add_compile, comparison.add_readme,
                plot.add_plot, cp.add_cp, decode.add_decode, gpt.add_gpt, router.add_router,
                options.add_options):
        add(subcommands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
