"""The command line of the benchmarks: one subcommand a job."""
from moba_megatron import environment
from moba_megatron.rendezvous import ArgumentParser

from . import (
    cli,
    cliffs,
    comparison,
    cp,
    cpu,
    decode,
    first_call,
    gate,
    gpt,
    megatron_fields,
    options,
    plot,
    rooms,
    router,
    selection,
    tables,
)
from .planner import commands as planner
from .planner import measure


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m benchmarks", description=cli.__doc__)
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for add in (cli.add_kernels, cliffs.add_cliffs, cli.add_compile, cp.add_cp, decode.add_decode, cpu.add_cpu,
                first_call.add_first_call, gpt.add_gpt, comparison.add_readme, tables.add_table, plot.add_plot,
                router.add_router, selection.add_selection, options.add_options, gate.add_gate, rooms.add_rooms,
                megatron_fields.add_fields, planner.add_check, planner.add_fit, planner.add_simulate,
                measure.add_measure):
        add(subcommands)
    arguments = parser.parse_args(argv)
    if not getattr(arguments, "show", None):
        environment.need_device(parser, getattr(arguments, "device", "cpu"), getattr(arguments, "only_cuda", False))
    return arguments.run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
