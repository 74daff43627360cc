"""benchmarks/selection.py on the CPU: what it measures, and that wrong choices and other bits are seen."""
import torch

from benchmarks import selection
from benchmarks.cases import find_cases

CASE, CPU = find_cases(["tiny"])[0], torch.device("cpu")


def test_a_row():
    row = selection.measure_selection(CASE, CPU, "torch", turns=1)
    assert row["status"] == "ok" and row["selection"]["checked"] and not row["selection"]["wrong"]
    assert row["ratio"] == row["head"]["median"] / row["group"]["median"]
    assert "tiny" in selection.TABLE.text({"rows": [row]})


def test_what_is_wrong_is_said(monkeypatch):
    def later(*args, **named):
        return chosen(*args, **named).roll(1, 0)

    chosen = selection.select_chunks
    monkeypatch.setattr(selection, "select_chunks", later)
    row = selection.measure_selection(CASE, CPU, "torch", turns=1)
    assert row["status"] == "wrong" and "head" not in row
