"""The comparison with other implementations, its table and its pictures, without a GPU and without the others."""
import json

import pytest
import torch

from benchmarks import baselines, comparison, plot
from benchmarks.__main__ import main
from moba_megatron import plotting, torch_stages

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
    own, dense, *others = comparison.TABLE.lines(result)
    error = next(r for r in result["rows"] if r["tokens"] == 640)["errors"]["o"]["error"]
    assert own["error o, dq, dk, dv"].startswith(f"{error:.1e}") and dense["attention"] == "full"
    assert [line["note"] for line in others] == ["absent", "absent"]
    text = comparison.PAGE.markdown(result)
    assert "more than 32 chunks" in text and result["environment"]["torch"] in text
    assert "Not measured: cuDNN, moonshot-moba, triton-moba, fla-moba, flash-moba, flash-attn-2, flash-attn-4." in text
    assert "| flash-moba |" not in text


def test_a_wrong_result_is_said_to_be_wrong(monkeypatch, tmp_path):
    right = torch_stages.attention_fwd
    monkeypatch.setattr(torch_stages, "attention_fwd", lambda *a: (right(*a)[0] * 1.2, right(*a)[1]))
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

    baseline = baselines.find(name)
    x, cu = torch.zeros(64, 2, 8), torch.tensor([0, 64], dtype=torch.int32)
    assert baseline.adapt(stand_in)(x, x, x, cu, 64, 16, 3).shape == x.shape
    assert got["shape"] == ((1, 64, 2, 8) if name == "fla-moba" else (64, 2, 8))
    expected = {"flash-moba": (cu, cu, 64, 64, 16, 3), "flash-attn-2": (cu, cu, 64, 64), "flash-attn-4": ()}
    assert got["rest"] == expected.get(name, (cu, 64, 16, 3))
    assert got["named"].get("causal", False) is (baseline.kind == "full")


def test_pictures(result, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"attention": name, "dense_kernel": None, "seed": seed, "status": "ok", "tokens_per_step": 1000,
             "losses": [5 - 0.1 * i + 0.01 * seed for i in range(30)]} for name in ("moba", "full") for seed in (1, 2)]
    for row in result["rows"]:  # no memory is measured on the CPU
        row["extra_peak_bytes"] = 2 ** 20
    files = {"comparison": result, "learning": {"rows": rows}}
    arguments = ["plot", "--output", str(tmp_path / "docs")]
    for name, stored in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(stored))
        arguments += [f"--{name}", str(tmp_path / f"{name}.json")]
    assert main(arguments) == 0
    drawn = sorted((tmp_path / "docs").iterdir())
    assert [path.name for path in drawn] == [
        "exchange_10M.png", "exchange_1M.png", "learning.png", "memory.png", "selective.png", "speed-dark.png",
        "speed.png", "throughput-dark.png", "throughput.png"]
    assert all(path.stat().st_size < plot.MOST_BYTES for path in drawn)
    nothing = [word for name in ("comparison", "learning", "gpt", "exchange", "selective")
               for word in (f"--{name}", "nowhere.json")]
    assert main(["plot", *nothing, "--output", str(tmp_path / "docs")]) == 2


def test_labels_at_the_ends_do_not_touch(tmp_path):
    pytest.importorskip("matplotlib")
    with plotting.figure(tmp_path / "x.png") as (_, axes):
        axes.plot([0, 1], [0, 1])
        plotting.label_ends(axes, [(0.99, "a", "k"), (0.5, "b", "k"), (1.0, "c", "k"), (1.0, "d", "k")])
        places = sorted(text.get_position()[1] for text in axes.texts)
        step = plotting.LINE / (axes.figure.get_figheight() * axes.get_position().height)
        assert min(b - a for a, b in zip(places, places[1:])) > 0.99 * step and places[-1] <= plotting.HIGHEST + 1e-6
