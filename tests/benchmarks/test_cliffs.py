"""benchmarks/cliffs.py: its floors, what it calls wrong, what it keeps a row to, its rows on the CPU."""
from dataclasses import replace

import pytest
import torch

from benchmarks import cliffs, report
from benchmarks.__main__ import main
from benchmarks.cases import PEAK_BYTES, PEAK_FLOPS

CPU = torch.device("cpu")


@pytest.mark.parametrize("lengths, topk", [((300, 1, 64), 3), ((1000,), 1), ((31, 32, 33), 40)])
def test_the_floor_counts_chosen_pairs_one_by_one(lengths, topk, monkeypatch):
    monkeypatch.setattr(cliffs, "PEAK_BYTES", float("inf"))
    cliff = cliffs.Cliff("a row", lengths, 4, 2, 24, 32, topk, 16)
    pairs = sum(t % 32 + 1 + 32 * min(t // 32, topk - 1) for n in lengths for t in range(n))
    scores = sum(t // 32 for n in lengths for t in range(n)) if topk > 1 else 0
    flops = 4 * (2 * pairs * 24 + 2 * pairs * 16) * 3.5 + 4 * 2 * scores * 24
    assert cliffs.floor_ms(cliff) == pytest.approx(1e3 * flops / PEAK_FLOPS)


def test_where_there_is_little_to_multiply_bytes_are_the_floor():
    cliff = cliffs.Cliff("a row", (1 << 16,), 8, 8, 128, 1, 1)
    assert cliffs.floor_ms(cliff) == pytest.approx(1e3 * (1 << 16) * 16 * 256 * 2 * 3.5 / PEAK_BYTES)


def test_documents_fill_the_tokens():
    lengths = cliffs.documents(10_000, 300, 1000, 5)
    assert sum(lengths) == 10_000 and min(lengths) >= 1 and max(lengths) <= 1000 and len(set(lengths)) > 5
    assert lengths == cliffs.documents(10_000, 300, 1000, 5)


@pytest.mark.parametrize("backend", [[], ["--backend", "reference"]], ids=["unset", "reference"])
def test_rows_are_measured_and_stored(backend, tmp_path, capsys):
    path = tmp_path / "cliffs.json"
    assert main(["cliffs", "--device", "cpu", *backend, "--rows", "tiny", "tiny-sink", "tiny-view",
                 "--repeats", "1", "--json", str(path)]) == 0
    result = report.load(path)
    assert [row["status"] for row in result["rows"]] == ["ok"] * 3
    for row in result["rows"]:
        assert set(row["errors"]) == {"o", "lse", "dq", "dk", "dv"} and row["kept"] is None
        assert all(e["error"] < 1e-5 for e in row["errors"].values()) and row["selection"]["checked"] > 100
    assert "| tiny | 4:2 x 32/16 |" in cliffs.TABLE.markdown(result)
    assert main(["cliffs", "--device", "cpu", "--rows", "tiny", "--budget", "-1", "--json", str(path)]) == 1
    assert "not run: no time was left" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["o", "dq", "dk", "dv", "selection"])
def test_what_is_wrong_in_one_document_is_not_timed(which, monkeypatch):
    """In the last of three: the others are right."""
    cliff = cliffs.TINY[0]

    if which == "selection":
        stages = cliffs.get_stages("reference", CPU)

        class Wrong:
            chunk_means = staticmethod(stages.chunk_means)

            @staticmethod
            def gate(*args):
                selected = stages.gate(*args).clone()
                selected[-1] = -1
                return selected

        monkeypatch.setattr(cliffs, "get_stages", lambda *_: Wrong)
    else:
        class Off(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, back):
                ctx.back, out = back, x.clone()
                if not back:
                    out[-100:] *= 1.01
                return out

            @staticmethod
            def backward(ctx, dx):
                dx = dx.clone()
                if ctx.back:
                    dx[-100:] *= 1.01
                return dx, None

        real = cliffs.moba_attn_varlen

        def wrong(q, k, v, *args, **options):
            q, k, v = (Off.apply(x, True) if name == which else x
                       for name, x in (("dq", q), ("dk", k), ("dv", v)))
            found = real(q, k, v, *args, **options)
            if which == "o" and isinstance(found, tuple):
                found = Off.apply(found[0], False), found[1]
            return found

        monkeypatch.setattr(cliffs, "moba_attn_varlen", wrong)
    row = cliffs.measure_cliff(cliff, CPU, "reference", 1)
    assert row["status"] == "wrong" and "ms" not in row
    assert row["reason"].startswith(f"error above its limit: {which} (")


def test_a_row_that_ends_early_says_why(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cliffs, "moba_attn_varlen", full)
    row = cliffs.measure_cliff(cliffs.TINY[0], CPU, "reference", 1)
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: out of memory") and row["wall_s"] >= 0
    assert "in full" in row["traceback"] and "ms" not in row


def test_a_row_is_kept_to_its_time_and_memory():
    cliff = replace(cliffs.TINY[0], most_ms=10.0, before_gib=1.0)
    for ms, gib, kept in ((10, 1.1, True), (10.1, 1, False), (9, 1.11, False)):
        assert cliffs._kept(cliff, {"ms": {"median": ms}, "extra_peak_bytes": int(gib * report.GIB)}) is kept


def test_a_row_that_is_none_is_said():
    with pytest.raises(ValueError, match="--rows must name rows, got '128K'; rows: 128K-128-16, "):
        cliffs.find_cliffs(["128K"])
