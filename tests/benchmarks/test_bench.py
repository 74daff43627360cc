"""The benchmark itself: its floors, its oracle (which must notice errors), its tables, its command line."""
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import cases, cpu, dense, gpt, options, oracle, report, router, tables
from benchmarks.__main__ import main
from moba_megatron import environment, reference, torch_stages
from moba_megatron.ops import causal_attn_varlen
from moba_megatron.segments import Segments

ROOT = Path(__file__).parents[2]
TOKENS, CHUNK, TOPK = 1000, 24, 4


def _solved(dtype):
    """A small problem and the reference's answers to it."""
    torch.manual_seed(3)
    q, do = torch.randn(2, TOKENS, 4, 32).to(dtype)
    k, v = torch.randn(2, TOKENS, 2, 32).to(dtype)
    segments = Segments.from_cu_seqlens(torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS, CHUNK)
    selected = reference.gate(q, reference.chunk_means(k, segments), segments, TOPK)
    o, lse = reference.attention_fwd(q, k, v, selected, segments, 0.2)
    grads = reference.attention_bwd(do, None, q, k, v, o, lse, selected, segments, 0.2)
    answers = dict(zip(("o", "lse", "dq", "dk", "dv"), (o, lse, *grads)))
    return oracle.Problem(q, k, v, do, selected, CHUNK, 0.2), answers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_oracle_agrees_with_the_reference(dtype):
    problem, answers = _solved(dtype)
    assert oracle.check_selection(problem, TOPK)["wrong"] == 0
    for name, error in oracle.check_values(problem, **answers).items():
        assert error["error"] <= error["limit"], name
        assert error["error"] < {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype], name


@pytest.mark.parametrize("name", ["o", "lse", "dq", "dk", "dv"])
def test_oracle_notices_a_wrong_value(name):
    problem, answers = _solved(torch.bfloat16)
    answers[name] = answers[name] * 1.05
    wrong = [n for n, e in oracle.check_values(problem, **answers).items() if e["error"] > e["limit"]]
    assert wrong == [name]


@pytest.mark.parametrize("spoil", ["missing", "twice", "not the best", "own chunk"])
def test_oracle_notices_a_wrong_selection(spoil):
    problem, _ = _solved(torch.float32)
    selected = problem.selected.clone()
    if spoil == "missing":
        selected[..., -1] = -1
    elif spoil == "twice":
        selected[..., 1] = selected[..., 0]
    elif spoil == "not the best":
        selected[..., 0] = 0
    else:
        selected[..., 0] = (torch.arange(TOKENS) // CHUNK)[:, None]
    assert oracle.check_selection(dataclasses.replace(problem, selected=selected), TOPK)["wrong"] > 0


@pytest.mark.parametrize("name, floor", [
    ("8K-512-3", 0.35), ("32K-512-3", 1.5), ("32K-128-8", 1.1), ("128K-128-8", 4.6), ("128K-512-8", 18),
    ("128K-2048-3", 24), ("512K-128-8", 18), ("512K-4096-12", 856), ("gqa-128K-512-8", 36), ("1head-32K-512-3", 0.09)])
def test_floors(name, floor):
    case, = cases.find_cases([name])
    assert cases.floor_ms(case) == pytest.approx(floor, rel=0.08)


def test_rows_are_named_and_unknown_names_refused():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert [case.name for case in cases.find_cases(["gqa", "1head"])] == ["gqa-128K-512-8", "1head-32K-512-3"]
    with pytest.raises(ValueError, match="--rows must name rows"):
        cases.find_cases(["nonsense"])


def test_command_line_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "out" / "rows.json"
    assert main(["kernels", "--rows", "tiny", "--backend", "reference", "--device", "cpu", "--repeats", "2", "--stages",
                 "--json", str(path)]) == 0
    row, = json.loads(path.read_text())["rows"]
    assert row["status"] == "ok" and row["ms"]["runs"] == 2 and set(row["stages_ms"]) >= {"gate", "attention_bwd"}
    assert "tiny" in capsys.readouterr().out
    assert main(["table", str(path)]) == 0
    assert capsys.readouterr().out.startswith("| row |")


def test_no_speed_for_a_wrong_result(monkeypatch, tmp_path, capsys):
    right = reference.attention_fwd
    monkeypatch.setattr(reference, "attention_fwd", lambda *a: (right(*a)[0] * 1.01, right(*a)[1]))
    path = tmp_path / "rows.json"
    assert main(["kernels", "--rows", "tiny", "--backend", "reference", "--device", "cpu", "--json", str(path)]) == 1
    row, = json.loads(path.read_text())["rows"]
    assert row["status"] == "wrong" and "ms" not in row
    assert "wrong: error above its limit: o" in capsys.readouterr().out


@pytest.mark.parametrize("refuses_groups", [False, True])
def test_the_dense_yardstick_is_full_causal_attention(monkeypatch, refuses_groups):
    """Its arguments, by another backend than cuDNN; with and without a backend that takes grouped heads."""
    attention = dense.scaled_dot_product_attention

    def refusing(q, k, v, enable_gqa, **options):
        if enable_gqa and refuses_groups:
            raise RuntimeError("No available kernel")
        return attention(q, k, v, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(dense, "scaled_dot_product_attention", refusing)
    monkeypatch.setattr(dense, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    problem, _ = _solved(torch.float64)
    dq, dk, dv = dense.cudnn_attention(problem.q, problem.k, problem.v, problem.do)()
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    o = causal_attn_varlen(*leaves, torch.tensor([0, TOKENS]), TOKENS, backend="reference")
    want = torch.autograd.grad(o, leaves, problem.do)
    torch.testing.assert_close(dq[0].transpose(0, 1), want[0])
    if not refuses_groups:
        torch.testing.assert_close(dk[0].transpose(0, 1), want[1])
        torch.testing.assert_close(dv[0].transpose(0, 1), want[2])


def _row(case, ms, **more):
    return {"case": case.as_dict(), "status": "ok", "floor_ms": 1.0, "extra_peak_bytes": 2 ** 30, **more,
            **{name: dict.fromkeys(("median", "p20", "p80"), ms) for name in ("ms", "forward_ms")}}


def test_notes_say_what_failed_and_compare_with_the_plain_row():
    plain, half = (cases.find_cases([name])[0] for name in ("128K-512-8", "fp16-128K-512-8"))
    lines = report.KERNELS.lines({"rows": [
        _row(plain, 30.0), _row(half, 33.0),
        {"case": plain.as_dict(), "status": "failed", "reason": "x", "floor_ms": 1.0}]})
    assert [line["note"] for line in lines] == ["", "1.10x 128K-512-8", "failed: x"]


def test_rows_stored_with_fields_of_earlier_versions_are_read():
    case, = cases.find_cases(["128K-512-8"])
    assert report.case_of({"case": case.as_dict() | {"must": 44, "flash_moba": 104.0}}) == case


def test_speedup_is_against_full_attention_of_the_same_length():
    result = report.load(report.RESULTS / "h200" / "gpt-p1.json")
    ms = {row["name"]: row["ms"]["median"] for row in result["rows"] if row["status"] == "ok"}
    gain = ms["128K/full"] / ms["128K/moba-512-8"]
    assert f"| 512, 8 | {ms['32K/full'] / ms['32K/moba-512-8']:.2f}x | {gain:.2f}x |" in gpt.SPEEDUP.markdown(result)


def test_a_later_runs_rows_are_added():
    def result(commit, **status):
        return {"environment": {"commit": commit, "command": f"run {commit}"},
                "rows": [{"name": name, "status": value, "ms": commit} for name, value in status.items()]}

    both = report.added(result("old", a="ok", b="not run", c="ok"), result("new", b="ok", c="failed", d="ok"))
    assert [(row["name"], row["status"], row["ms"], row.get("commit")) for row in both["rows"]] == [
        ("a", "ok", "old", None), ("b", "ok", "new", "new"), ("c", "ok", "old", None), ("d", "ok", "new", "new")]
    assert report.made_by(both) == "Made by `run old`. Rows of commit new by `run new`."
    both["added"][0]["rows"] = ["b", "d"]
    assert report.made_by(both).endswith("Rows of commit new (b; d) by `run new`.")


@pytest.mark.parametrize("name", [name for name, table in tables.TABLES.items() if table.path.exists()])
def test_page_has_the_stored_table(name):
    page = tables.TABLES[name].page
    text = (ROOT / page).read_text()
    assert text == tables.written(name, text), \
        f"write it with: python -m benchmarks table --name {name} --write {page}"


def test_losses_under_options_of_megatron_lm(tmp_path, capsys):
    def log(name, losses):
        (tmp_path / f"{name}.log").write_text("".join(
            f" [x] iteration {i:8d}/ 12 | elapsed time per iteration (ms): {90 + i}.5 | lm loss: {loss:.6E} | x\n"
            for i, loss in enumerate(losses, 1)) + "[Rank 0] (after 2 iterations) | max allocated: 71.25 |\n")
        return str(tmp_path / f"{name}.log")

    plain = [9 - 0.1 * i for i in range(12)]
    logs = [log(name, losses) for name, losses in (
        ("one", plain), ("key-conv", [9, *plain[:11]]), ("offload-modules", plain), ("eager", plain),
        ("graphs", [*plain[:11], 7.5]))]
    stored = tmp_path / "options.json"
    assert main(["options", *logs, "--json", str(stored)]) == 0
    lines = {line["run"]: line for line in options.TABLE.lines(report.load(stored))}
    assert [lines[name]["largest difference"] for name in lines] == [
        "", "none from one", "none from one in step 1", "", "0.4000 from eager"]
    assert [lines["graphs"][name] for name in ("ms/step", "peak MiB", "step 12")] == ["102.0", "71", "7.50000"]
    assert lines["one"]["ms/step"] == ""
    assert main(["options", log("one", plain[:3]), "--json", str(stored)]) == 1
    assert "one: 3 steps, more than 10 are needed" in capsys.readouterr().err
    assert main(["options", log("other", plain), "--json", str(stored)]) == 1
    assert "must have the name of a run" in capsys.readouterr().err


def test_stored_options_of_megatron_lm_changed_no_loss():
    """What the README says of runs on H200s."""
    rows = {row["name"]: row for row in report.load(report.RESULTS / "h200" / "megatron_options.json")["rows"]}
    assert set(rows) == set(options.RUNS) and all(len(row["losses"]) == 20 for row in rows.values())
    for name, run in options.RUNS.items():
        if run.like:
            ours, theirs = (rows[x]["losses"] for x in (name, run.like))
            if "fsdp" in name:  # gradients of bf16 in another order
                assert ours[0] == theirs[0] and max(abs(a - b) for a, b in zip(ours, theirs)) < 0.02
            else:
                assert ours[:run.steps] == theirs[:run.steps], name
    assert rows["graphs-te"]["graphs"] and rows["graphs"]["graphs"]
    assert rows["graphs"]["ms_median"] < rows["eager"]["ms_median"]
    assert rows["cpu-offloading"]["max_allocated_mib"] < rows["offload-modules"]["max_allocated_mib"] < (
        rows["one"]["max_allocated_mib"])


def test_environment_names_the_commit_and_the_versions():
    about = environment.describe(torch.device("cpu"))
    assert about["torch"] == torch.__version__ and about["command"].startswith("python ")


def test_cost_of_watching_the_router(tmp_path, capsys):
    args = dict.fromkeys(router.SETTINGS, 4) | {"log_interval": 1, "seq_length": 2048, "global_batch_size": 2}
    ms = {1: 900, 2: 110, 3: 110, 4: 110, 5: 100, 6: 400, 7: 102, 8: 104, 9: 125, 10: 102}  # 6 and 9 are watched
    lines = [{"kind": "start", "args": args}]
    for i, t in ms.items():
        lines.append({"kind": "step", "iteration": i, "tokens_per_second": 4096 / t * 1000})
        if i in (6, 9):
            lines.append({"kind": "router", "iteration": i, "layers": {
                "1": {"recall": 0.5 + i / 100, "heads": {}}, "2": {"recall": 0.7, "heads": {}}}})
    log, stored = tmp_path / "run.jsonl", tmp_path / "router.json"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["router", str(log), "--trained", str(log), "--json", str(stored)]) == 0
    result = report.load(stored)
    row, = result["rows"]
    assert row["name"] == "4 layers, 2 x 2K" and row["ms"]["median"] == pytest.approx(102)
    assert row["extra_ms"] == pytest.approx(23) and row["share"] == pytest.approx(23 / 5100)
    assert result["trained"] == [{"iteration": 6, "recall": 0.63}, {"iteration": 9, "recall": 0.645}]
    text = router.TABLE.markdown(result)
    assert "| 2 x 2,048 | 4 | 4, 4 | 102.0 | 23.0 | 0.45 % |" in text and "recall 0.630 to 0.645" in text
    later = {"environment": result["environment"] | {"commit": "later"}, "rows": [row | {"extra_ms": 11.0}]}
    text = router.TABLE.markdown(report.added(result, later))
    assert "| 102.0 | 11.0 | 0.45 % | later |" in text and f"model at commit {result['environment']['commit']}:" in text
    log.write_text(json.dumps({"kind": "step"}) + "\n")
    assert main(["router", str(log), "--json", str(stored)]) == 1 and "no start" in capsys.readouterr().err


def test_without_a_gpu_both_backends_are_measured_beside_torchs_attention(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu, "CASES", (cases.Case("tiny", 200, 16, 3, 4, 2, 16, "float32"),))
    threads = torch.get_num_threads()
    try:
        assert main(["cpu", "--turns", "2", "--threads", "1", "--json", str(tmp_path / "out.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    row, = report.load(tmp_path / "out.json")["rows"]
    assert {name: times["runs"] for name, times in row["ms"].items()} == {"sdpa": 2, "torch": 2, "reference": 1}
    assert all(row[kind][name]["min"] > 0 for kind in ("ms", "cpu_ms", "forward_ms") for name in row["ms"])
    assert "tiny" in capsys.readouterr().out
    monkeypatch.setattr(torch_stages, "attention_fwd", lambda *a: (1.01 * reference.attention_fwd(*a)[0],
                                                                   reference.attention_fwd(*a)[1]))
    assert main(["cpu", "--turns", "1", "--threads", str(threads)]) == 1
