"""The table of parallel layouts against one process (``tests/megatron/layouts.py`` makes the result)."""
from . import report


def _difference(x: float) -> str:
    return f"{abs(x):.0e}" if x else "same bits"


TABLE = report.Table({
    "run": report.same("name"), "ranks": lambda row: str(row["ranks"]), "loss": lambda row: f"{row['loss']:.9g}",
    "one process": lambda row: f"{row['expected']:.9g}",
    "loss differs by": lambda row: _difference(row["loss"] / row["expected"] - 1),
    "gradients by": lambda row: _difference(row["gradients"])}, below=report.measured_at)
"""A layout a line; differences are relative, that of the gradients the largest of a parameter's."""


def summary(result: dict) -> str:
    """A sentence: how many runs there were, and the largest differences."""
    rows, core = result["rows"], result["environment"]["megatron_core"]
    loss, gradients = (_difference(max(values)) for values in (
        [abs(row["loss"] / row["expected"] - 1) for row in rows], [row["gradients"] for row in rows]))
    return (f"Megatron-Core {core}, {len(rows)} of these runs: losses differ by at most {loss}, gradients by at most "
            f"{gradients}. {report.measured_at(result)}")


GROUPS = report.Table(
    {"ranks of a sequence": lambda item: item[0].split()[0], "by": lambda item: item[0].split()[1],
     "rows": lambda item: {"thd": "packed", "sbhd": "one sequence"}[item[0].split()[2]],
     **{name: (lambda item, i=i: f"{item[1][i]:.1e}") for i, name in enumerate(("o", "dq", "dk", "dv"))}},
    items=lambda result: result["groups"]["errors"].items(), below=report.measured_at)
"""Groups that come with the batch: errors of norms against fp64, the largest of a rank's."""
