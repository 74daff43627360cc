"""What the wheel leaves out: modules that make the pages' tables and pictures."""
from setuptools.command.build_py import build_py

CHECKOUT_ONLY = {f"moba_megatron.{name}" for name in (
    "bench.comparison", "bench.options", "bench.peers", "bench.plot", "bench.router", "bench.tables", "bench.training",
    "bench.zero", "plan.scenarios", "plan.simulate")}


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):
        return [found for found in super().find_package_modules(package, package_dir)
                if f"{found[0]}.{found[1]}" not in CHECKOUT_ONLY]
