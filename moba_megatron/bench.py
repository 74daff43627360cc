"""Says where the benchmarks are, which this module ran before they left the package."""
import sys

if __name__ == "__main__":
    print("error: benchmarks are run from a checkout: python -m benchmarks kernels (cp, gpt, decode, table, ...)\n"
          "launch configurations are found by python -m moba_megatron.tune", file=sys.stderr)
    sys.exit(2)
