"""Copies of rows by a few blocks, in the interpreter: every byte goes where it belongs, and no other is touched."""
import contextlib
from types import SimpleNamespace

import pytest
import torch

from moba_megatron.kernels import copying

STREAM = SimpleNamespace(device="cpu", cuda_stream=0)


@pytest.mark.parametrize("rows, width, source_pitch, target_pitch", [
    (1, 16, 16, 16), (1, 3 * 4096, 3 * 4096, 3 * 4096), (1, 4096 + 48, 4200, 4200), (7, 48, 48, 160),
    (70, 256, 1024, 256), (33, 2048, 2048, 4096), (5, 160, 320, 480)])
def test_rows_go_where_they_belong(rows, width, source_pitch, target_pitch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    source = torch.randint(0, 255, (rows * source_pitch + 64,), dtype=torch.uint8)
    target = torch.full((rows * target_pitch + 64,), 255, dtype=torch.uint8)
    expected = target.clone()
    for row in range(rows):
        expected[32 + row * target_pitch:][:width] = source[16 + row * source_pitch:][:width]
    places = source.data_ptr() + 16, target.data_ptr() + 32
    assert copying.copyable(rows, width, source_pitch * (rows > 1), target_pitch * (rows > 1), *places)
    copying.copy_rows(*places, rows, width, source_pitch, target_pitch, STREAM)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("case", [(4, 24, 32, 32), (4, 32, 40, 32), (4, 32, 32, 8), (1 << 20, 1 << 14, 1 << 14)])
def test_what_they_cannot_copy(case):
    assert not copying.copyable(*case)
