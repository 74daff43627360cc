"""Runs a training script of Megatron-LM with MoBA, without a change to its source.

    torchrun --nproc-per-node 8 -m moba_megatron.launch pretrain_gpt.py --attention moba --moba-chunk-size 4096 \\
        --moba-topk 12 ...

With ``--attention full``, the default, only the flags are added (and hooks that pass every call through where
``--use-checkpoint-args`` may restore ``moba``). What is hooked, and why, is said in `megatron/patching.py`.
"""
import os
import runpy
import sys

from .megatron import patching
from .megatron.arguments import add_moba_arguments, config_from_args
from .megatron.host import print_once
from .rendezvous import ArgumentParser, report_error

USAGE = ("usage: python -m moba_megatron.launch SCRIPT [--attention moba --moba-chunk-size N --moba-topk K] "
         "[SCRIPT's flags]")


def main(argv: list[str] | None = None) -> int:
    """Hooks MoBA into Megatron-LM and runs the script; returns the exit status if it could not start."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        print(f"{USAGE}\nSCRIPT comes first; its own --help lists the --moba-* flags too", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    script, flags = argv[0], argv[1:]
    try:
        if not os.path.isfile(script):
            raise ValueError(f"no file {script}: give the path of Megatron-LM's pretrain_gpt.py")
        attention = check_flags(flags)
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # as `python SCRIPT` does
        patching.apply(attention)
    except (TypeError, ValueError, ImportError) as error:
        report_error(str(error))
        return 2
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    return 0


def check_flags(flags: list[str]) -> str:
    """What ``--attention`` says, or ``--use-checkpoint-args`` may yet say; the ``--moba-*`` flags are checked."""
    parser = ArgumentParser(prog="moba_megatron.launch", usage=USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("--train-iters", type=int)
    args = add_moba_arguments(parser, default="full", full_meaning=patching.FULL_MEANING).parse_known_args(flags)[0]
    if args.attention == "moba":
        config_from_args(args)
    elif "--use-checkpoint-args" in flags:
        return "moba"
    elif "--spec" not in (names := {flag.split("=")[0] for flag in flags}) and any(
            name.startswith("--moba-") for name in names):
        print_once("> --moba-* flags have no effect without --attention moba")
    return args.attention


if __name__ == "__main__":
    sys.exit(main())
