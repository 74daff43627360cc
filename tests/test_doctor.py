"""The doctor: what it reports, and that its exit status tells."""
import re
import sys
from pathlib import Path

import pytest
import torch

from moba_megatron import doctor


def run(capsys, *arguments):
    status = doctor.main(list(arguments))
    return status, capsys.readouterr().out


def test_a_working_installation_is_healthy(capsys):
    status, said = run(capsys)
    assert status == 0 and said.endswith("healthy\n") and "FAIL" not in said
    assert "reference = definition         ok, relative error" in said
    for heading in ("cards", "packages", "Megatron", "kernels by stage", "settings", "self-test"):
        assert f"\n{heading}" in said


def test_a_wrong_operator_is_found(capsys, monkeypatch):
    right = doctor.moba_attn_varlen
    monkeypatch.setattr(doctor, "moba_attn_varlen", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    status, said = run(capsys)
    assert status == 1 and "FAIL: AssertionError: relative error 2.00e-03, at most 1e-10 expected" in said


def test_settings_are_read(capsys, monkeypatch):
    monkeypatch.setenv("MOBA_TOPK", "three")
    monkeypatch.setenv("MOBA_CHUNKSIZE", "64")
    status, said = run(capsys, "--no-self-test")
    assert status == 1 and "FAIL: environment variable MOBA_TOPK must be of type int, got 'three'" in said
    assert "MOBA_CHUNKSIZE                 64  (unknown: nothing reads it)" in said and "self-test" not in said


def test_an_unknown_megatron_is_said(capsys, monkeypatch):
    pytest.importorskip("megatron.core")
    monkeypatch.setattr(doctor, "megatron_version", lambda: "0.42.0")
    assert "0.42.0, not checked (checked: 0.13 to 0.20)" in run(capsys, "--no-self-test")[1]
    assert doctor.is_known_version("0.16.1") and not doctor.is_known_version("unknown")


def test_every_variable_that_the_package_reads_is_known():
    """But for those of settings' fields, whose names are made."""
    sources = "".join(path.read_text() for path in Path(doctor.__file__).parent.rglob("*.py"))
    read = set(re.findall(r'environ(?:\.get\(|\[)"(MOBA_\w+)"', sources))
    assert {"MOBA_DENSE", "MOBA_CP_COPY_ENGINES"} <= read <= doctor.OTHER_VARIABLES


def kernels_of(said: str) -> dict[str, str]:
    """Stage to what the report says of it."""
    section = said.split("\nkernels by stage", 1)[1].split("\nsettings")[0].splitlines()[1:]
    return {line[4:34].strip(): line[35:] for line in section}


def test_every_stage_has_a_line(capsys):
    from moba_megatron.kernels.tuning_table import TABLE
    assert set(doctor.STAGES) == set(TABLE)
    found = kernels_of(run(capsys, "--no-self-test")[1])
    assert list(found) == list(doctor.STAGES.values())
    if not torch.cuda.is_available():
        assert set(found.values()) == {"torch: no CUDA device"}


HOPPER = {"gate and top-k", "sparse forward", "diagonal and merge, forward", "sparse dk and dv, backward",
          "sparse dq, backward", "diagonal dq, backward"}


@pytest.mark.parametrize("capability, triton, sm90, healthy", [
    ((9, 0), "3.6.0", HOPPER, True), ((9, 0), "3.10.0", set(), True), ((9, 0), "broken", set(), False),
    ((8, 6), "3.6.0", set(), True)], ids=("sm_90", "sm_90, unknown Triton", "sm_90, broken", "sm_86"))
def test_stages_on_a_card(capsys, monkeypatch, capability, triton, sm90, healthy):
    """The look-ups of a card, on a machine without one."""
    from moba_megatron.kernels import sm90 as kernels
    from moba_megatron.kernels import tuning
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device, **options: empty(*sizes, **options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    problem = {"3.6.0": None, "broken": "ImportError: no gluon"}.get(
        triton, "they are written for Triton 3.6 to 3.9, this is 3.10.0")
    monkeypatch.setattr(kernels, "unusable", lambda: problem)
    kernels._importable.cache_clear()
    try:
        with tuning.forced(arch=tuning.arch_of_capability(*capability)):
            assert doctor.report_stages() == healthy
    finally:
        kernels._importable.cache_clear()
    said = capsys.readouterr().out
    found = kernels_of("\n" + said)
    assert {stage for stage, kernel in found.items() if kernel.startswith("Hopper (Gluon)")} == sm90
    if problem:
        assert problem in said and ("FAIL" in said) == (not healthy)
        assert "cannot be used (below)" in found["sparse forward"]
    elif capability == (8, 6):
        assert "need sm_90, this is sm_86" in found["sparse forward"]


def test_kernels_that_cannot_be_imported_are_not_healthy(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "moba_megatron.kernels", None)
    status, said = run(capsys, "--no-self-test")
    assert status == 1 and "FAIL: cannot be imported" in said and said.endswith("FAIL\n")
    assert kernels_of(said)["gate and top-k"] == "torch: Triton cannot be used"
