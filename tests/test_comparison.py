"""The comparison with other implementations, its table and its pictures, without a GPU and without the others."""
import json

import pytest
import torch

from moba_megatron import reference
from moba_megatron.bench import comparison, peers, plot
from moba_megatron.bench.__main__ import main

ARGUMENTS = ["readme", "--chunk-size", "16", "--heads", "2", "--head-dim", "8", "--dtype", "float32", "--repeats", "1",
             "--device", "cpu"]
OTHERS = ["flash-moba", "fla-moba"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison") / "result.json"
    status = main([*ARGUMENTS, "--here", "--tokens", "128", "640", "--only", comparison.OWN, "flash attention 2",
                   *OTHERS,
                   "--json", str(path)])
    assert status == 0
    return json.loads(path.read_text())


def test_every_row_has_its_error_or_its_reason(result):
    assert [(row["name"], row["tokens"]) for row in result["rows"]] == [
        (name, n) for name in (comparison.OWN, "flash attention 2", "fla-moba", "flash-moba") for n in (128, 640)]
    for row in result["rows"]:
        if row["status"] == "ok":
            assert row["ms"]["median"] > 0 and set(row["errors"]) == {"o", "dq", "dk", "dv"}
            assert all(error["error"] < 1e-5 for error in row["errors"].values())
        else:
            assert row["name"] in OTHERS and row["status"] == "absent" and "Error" in row["reason"]


def test_table_takes_the_error_where_there_are_many_chunks(result):
    own, dense, *others = comparison.table(result)
    error = next(r for r in result["rows"] if r["tokens"] == 640)["errors"]["o"]["error"]
    assert own["error o, dq, dk, dv"].startswith(f"{error:.1e}") and dense["attends"] == "to everything"
    assert [line["note"] for line in others] == ["absent", "absent"]
    text = comparison.markdown(result)
    assert "more than 32 chunks" in text and result["environment"]["torch"] in text
    assert "| flash-moba | MoBA |  |  |  |  | absent |" in text
    assert {line.split(" | ")[0] for line in text.splitlines() if line.endswith("|  |  |  |  | not measured |")} == {
        f"| {name}" for name in ("cuDNN", "moonshot-moba", "triton-moba", "flash-attn-2", "flash-attn-4")}


def test_a_wrong_result_is_said_to_be_wrong(monkeypatch, tmp_path):
    right = reference.attention_fwd
    monkeypatch.setattr(reference, "attention_fwd", lambda *a: (right(*a)[0] * 1.2, right(*a)[1]))
    path = tmp_path / "result.json"
    assert main([*ARGUMENTS, "--here", "--tokens", "128", "--only", comparison.OWN, "--json", str(path)]) == 1
    row, = json.loads(path.read_text())["rows"]
    assert row["status"] == "wrong" and "o" in row["reason"]


def test_a_process_that_dies_costs_its_rows_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(comparison.sys, "executable", "/bin/false")
    path = tmp_path / "result.json"
    assert main([*ARGUMENTS, "--tokens", "128", "--only", "flash-moba", "--json", str(path)]) == 0
    row, = json.loads(path.read_text())["rows"]
    assert row["status"] == "failed" and "ended with 1" in row["reason"] and "failed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["moonshot-moba", "triton-moba", "fla-moba", "flash-moba", "flash-attn-2",
                                  "flash-attn-4"])
def test_arguments_reach_other_packages_in_their_order(name):
    """Against stand-ins that write down what they get; the packages' own signatures are in their documentation."""
    got = {}

    def stand_in(q, k, v, *rest, **named):
        got.update(shape=tuple(q.shape), rest=rest, named=named)
        return q

    peer = peers.find(name)
    x, cu = torch.zeros(64, 2, 8), torch.tensor([0, 64], dtype=torch.int32)
    assert peer.adapt(stand_in)(x, x, x, cu, 64, 16, 3).shape == x.shape
    assert got["shape"] == ((1, 64, 2, 8) if name == "fla-moba" else (64, 2, 8))
    expected = {"flash-moba": (cu, cu, 64, 64, 16, 3), "flash-attn-2": (cu, cu, 64, 64), "flash-attn-4": ()}
    assert got["rest"] == expected.get(name, (cu, 64, 16, 3))
    assert got["named"].get("causal", False) is (peer.kind == "full")


def test_pictures(result, tmp_path):
    rows = [{"attention": name, "dense_kernel": None, "seed": seed, "status": "ok", "tokens_per_step": 1000,
             "losses": [5 - 0.1 * i + 0.01 * seed for i in range(20)],
             "validations": [{"by_position": [(0, 8, 4.0), (8, 16, 3.0)]}]} for name in ("moba", "full")
            for seed in (1, 2)]
    comparison_path, learning_path = tmp_path / "comparison.json", tmp_path / "learning.json"
    comparison_path.write_text(json.dumps(result))
    learning_path.write_text(json.dumps({"rows": rows}))
    output = tmp_path / "docs"
    arguments = ["plot", "--comparison", str(comparison_path), "--learning", str(learning_path), "--output",
                 str(output)]
    pytest.importorskip("matplotlib").use("Agg")
    # no memory is measured on the CPU
    for row in result["rows"]:
        row["extra_peak_bytes"] = 2 ** 20
    comparison_path.write_text(json.dumps(result))
    assert main(arguments) == 0
    names = sorted(path.name for path in output.iterdir())
    assert names == [f"{n}.{kind}" for n in ("learning", "memory", "speed") for kind in ("png", "svg")]
    assert all(path.stat().st_size < plot.MOST_BYTES for path in output.iterdir())
    assert main(["plot", "--comparison", "nowhere.json", "--learning", "nowhere.json", "--output", str(output)]) == 2
