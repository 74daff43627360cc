"""The doctor: what it reports, and that its exit status tells."""
import re
from pathlib import Path

import pytest

from moba_megatron import doctor, launch


def run(capsys, *arguments):
    status = doctor.main(list(arguments))
    return status, capsys.readouterr().out


def test_a_working_installation_is_healthy(capsys):
    status, said = run(capsys)
    assert status == 0 and said.endswith("healthy\n") and "FAIL" not in said
    assert "reference = definition         ok, relative error" in said
    for heading in ("cards", "packages", "Megatron", "backends", "settings", "self-test"):
        assert f"\n{heading}" in said


def test_a_wrong_operator_is_found(capsys, monkeypatch):
    right = doctor.moba_attn_varlen
    monkeypatch.setattr(doctor, "moba_attn_varlen", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    status, said = run(capsys)
    assert status == 1 and "FAIL: AssertionError: relative error 1.00e-03, at most 1e-10 expected" in said


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
    assert launch.is_known_version("0.16.1") and not launch.is_known_version("unknown")


def test_every_variable_that_the_package_reads_is_known():
    """But for those of settings' fields, whose names are made."""
    sources = "".join(path.read_text() for path in Path(doctor.__file__).parent.rglob("*.py"))
    read = set(re.findall(r'environ(?:\.get\(|\[)"(MOBA_\w+)"', sources))
    assert {"MOBA_DENSE", "MOBA_CP_COPY_ENGINES"} <= read <= doctor.OTHER_VARIABLES
