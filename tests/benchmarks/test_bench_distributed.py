"""The benchmarks that run under torchrun, tried on gloo with tiny shapes; their tables and refusals."""
import json
import os

import pytest
import torch
from ranks import ROOT, torchrun

from benchmarks import cp, cp_cases, cp_speed, distributed, gpt, gpt_cases
from benchmarks.__main__ import main
from benchmarks.cases import K

TINY = ("--rows", "tiny", "--backend", "reference", "--device", "cpu")


def run_benchmark(size, *arguments):
    done = torchrun(size, "benchmarks", *arguments,
                    environment={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cp_on_gloo(tmp_path):
    path = tmp_path / "cp.json"
    out = run_benchmark(2, "cp", *TINY, "--repeats", 2, "--json", path)
    stored = json.loads(path.read_text())
    assert [row["name"] for row in stored["rows"]] == [f"tiny/{comm}" for comm in cp_cases.COMMS]
    *measured, hierarchical = stored["rows"]
    assert hierarchical["status"] == "not run" and "2 ranks are not 2 times 2" in hierarchical["reason"]
    for row in measured:
        assert row["status"] == "ok" and row["ms"]["runs"] == 2 and row["efficiency"] > 0
        assert max(row["errors"].values()) < 1e-5
        assert row["exposed"] and row["sent_bytes"] > 0 and row["quarter_link_ms"] > row["ms"]["median"]
    assert "a2a+all_gather" in out
    assert cp.TABLE.markdown(stored).startswith("| row |")


def test_gpt_on_gloo(tmp_path):
    path = tmp_path / "gpt.json"
    run_benchmark(2, "gpt", "--device", "cpu", "--repeats", 2, "--json", path)
    stored = json.loads(path.read_text())
    rows = {row["name"]: row for row in stored["rows"]}
    moba, full, hybrid = (rows[row.name] for row in gpt_cases.TINY)
    assert [row["attention"]["sparse_calls"] for row in (moba, full, hybrid)] == [2, 0, 2]
    assert moba["loss"] == pytest.approx(full["loss"], rel=1e-3) and moba["loss"] != full["loss"]
    assert moba["tokens_per_s"] > 0 and gpt.TABLE.markdown(stored).startswith("| row |")


def test_no_speed_for_a_wrong_result(monkeypatch):
    row, = cp_cases.find_rows(["tiny"], ["all_gather"])
    right = cp_speed._one_gpu(row.case, "reference")

    def call(q, k, v):
        return right(q, k, v) * 1.01

    call.rows = torch.arange(row.case.tokens)
    monkeypatch.setattr(cp_speed, "_call", lambda *arguments: call)
    ranks = distributed.join("cpu")
    try:
        result = cp_speed.measure_row(row, ranks, cp_speed.Settings("reference"))
    finally:
        distributed.leave()
    assert result["status"] == "wrong" and "ms" not in result
    assert result["reason"].startswith("differs from one GPU: o 1.0e-02")
    assert "wrong: differs" in cp.progress(result) and cp.TABLE.lines({"rows": [result]})[0]["ms"] == "-"


def test_one_rank_is_refused(capsys):
    assert main(["cp", *TINY]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


def scaled_row(efficiency):
    case, = (c for c in cp_cases.SHAPES if c.name == "128K-512-8")
    times = {"median": 10.0, "p20": 9.0, "p80": 11.0}
    return {"name": "128K-512-8/a2a", "case": case.as_dict(), "comm": "a2a", "ranks": 2, "status": "ok",
            "ms": times, "forward_ms": times, "one_gpu_ms": {"median": 16.0}, "efficiency": efficiency,
            "errors": dict.fromkeys(("o", "dq", "dk", "dv"), 1e-3), "extra_peak_bytes": 2 ** 30}


def test_efficiency_is_a_cell():
    assert cp.TABLE.lines({"rows": [scaled_row(0.8)]})[0]["efficiency"] == "0.800"


@pytest.mark.parametrize("size, inner, sizes", [(4, 2, (2, 2)), (8, 4, (4, 2)), (2, 2, None), (6, 4, None),
                                                (4, 1, None)])
def test_hierarchy(size, inner, sizes):
    assert cp_cases.hierarchy(size, inner) == sizes


def test_unknown_rows_are_refused():
    with pytest.raises(ValueError, match="--rows must name rows of the table, got 'nonsense'"):
        cp_cases.find_rows(["nonsense"], ["a2a"])
    with pytest.raises(ValueError, match="--rows must name rows for 2 ranks, got '1024K'"):
        gpt_cases.rows_for(2, ["1024K"], tiny=False)


def test_gpt_rows_have_names_of_their_own():
    for size in (1, 2, 4, 8):
        names = [row.name for row in gpt_cases.rows_for(size, None, tiny=False)]
        assert len(set(names)) == len(names)
    assert gpt_cases.SHAPE.linear_parameters == pytest.approx(271e6, rel=0.01)


def gpt_row(name, tokens, attention, ms):
    row = gpt_cases.Row(tokens, attention)
    return {"name": name, "row": row.as_dict(), "ranks": 4, "status": "ok", "tokens_per_s": 1.0, "loss": 5.5,
            "ms": dict.fromkeys(("median", "p20", "p80"), ms), "linear_floor_ms": 1.0, "peak_bytes": 2 ** 30,
            "grad_norm": 0.5,
            "attention": {"sparse_calls": 24}}


def test_gpt_is_compared_with_the_fastest_full_attention():
    lines = gpt.TABLE.lines({"rows": [gpt_row("m", 128 * K, "moba", 500.0), gpt_row("f", 128 * K, "full", 1600.0),
                                      gpt_row("g", 128 * K, "full", 1500.0), gpt_row("l", 32 * K, "full", 200.0)]})
    assert lines[0]["x full"] == "3.00"
    assert [line["x full"] for line in lines[1:]] == ["", "", ""]
