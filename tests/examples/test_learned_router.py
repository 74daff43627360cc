"""examples/learned_router.py at a small scale: an indexer that learns finds more of dense attention than the gate."""
import json
import math

import pytest
from ranks import ROOT, run_program

pytest.importorskip("megatron.core")

SMALL = "--layers 1 --hidden 64 --heads 4 --kv-heads 2 --seq-length 256 --batch 2 --chunk-size 8 --topk 4 --rank 16 " \
        "--samples 256 --dense-steps 60 --steps 60 --held-out 8 --seeds 2"


def test_the_indexer_finds_more_than_the_gate(tmp_path):
    program = run_program([ROOT / "examples/learned_router.py", *SMALL.split(), "--output", tmp_path / "out.json"],
                          {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"})
    assert program.returncode in (0, 1), program.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["seeds"]) == 2 and result["seeds"][0] != result["seeds"][1]
    for seed in result["seeds"]:
        assert 0 < seed["gate"] < seed["indexer"] < seed["best"] < 1
        assert seed["difference"] == pytest.approx(seed["indexer"] - seed["gate"])
        assert math.isfinite(seed["sparse_loss"]) and seed["trained_loss"] < 5
    low, high = result["interval"]
    assert (low + high) / 2 == pytest.approx(result["difference"]) and (low > 0) == (program.returncode == 0)
    assert "indexer over gate: " in program.stdout
