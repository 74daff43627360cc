"""Says where the benchmarks are, which this module ran before they left the package."""
import sys


def main() -> int:
    print("error: benchmarks are run from a checkout: python -m benchmarks kernels (cp, gpt, decode, table, ...)\n"
          "launch configurations are found by python -m moba_megatron.tune", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
