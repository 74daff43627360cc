"""The table of packed sequences in Megatron-LM's program (``tests/megatron/packed_training.py`` makes the result)."""
from . import report


def expected(result: dict, row: dict) -> dict | None:
    """The row of the same sequences one by one."""
    name = f"{row['name'].split(', ')[0]}, one by one"
    return next((other for other in result["rows"] if other["name"] == name and other["losses"] and all(
        other[key] == row[key] for key in ("checkout", "dtype"))), None)


def _largest(row: dict, alone: dict | None, name: str, steps: int | None = None) -> str:
    """How far a number of the first steps, or of all, is at most from that of the sequences one by one, relative."""
    if alone is None or alone is row or not row[name]:
        return ""
    most = max(abs(ours / theirs - 1) for ours, theirs in zip(row[name][:steps], alone[name]))
    return f"{most:.0e}" if most else "no digit"


def _columns(result: dict) -> report.Columns:
    return {"checkout": report.same("checkout"), "run": report.same("name"), "ranks": report.same("ranks"),
            "dtype": report.same("dtype"), "loss, step 1": lambda row: f"{row['losses'][0]:.6f}",
            "last step": lambda row: f"{row['losses'][-1]:.6f}",
            "differs by": lambda row: _largest(row, expected(result, row), "losses", 1),
            "in all steps": lambda row: _largest(row, expected(result, row), "losses"),
            "gradient norms by": lambda row: _largest(row, expected(result, row), "grad_norms"), "note": report.nothing}


def _rows(result: dict) -> list[dict]:
    """By checkout and dtype, each as they first come."""
    order = list(dict.fromkeys((row["checkout"], row["dtype"]) for row in result["rows"]))
    return sorted(result["rows"], key=lambda row: order.index((row["checkout"], row["dtype"])))


TABLE = report.Table(_columns, _rows, {
    "checkout": report.same("checkout"), "run": report.same("name"), "ranks": report.same("ranks"),
    "dtype": report.same("dtype"), "note": report.why}, below=report.measured_at)
"""A run a line, its losses and gradient norms of all steps beside those of the sequences one by one, relative."""
