"""``bench tune`` from end to end, where a device is not needed: interpreted times mean nothing, the file does."""
from moba_megatron.bench.__main__ import main
from moba_megatron.kernels import tuning


def test_a_written_file_is_read_back(tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    assert main(["tune", str(path), "--stages", "attention_fwd_own", "--head-dims", "16", "--chunk-sizes", "32",
                 "--tokens", "64", "--heads", "2", "--kv-heads", "1", "--topk", "2", "--dtype", "float32",
                 "--device", "cpu", "--budget", "8"]) == 0
    monkeypatch.setenv("MOBA_TUNING_FILE", str(path))
    row = tuning.rows("attention_fwd_own")[0]
    assert row.archs == tuning.INTERPRETER
    assert row.upto["head_dim"] == 16 and "chunk_size" not in row.upto
    assert row.why.startswith("bench tune") and "chunk 32" in row.why
    assert tuning.config("attention_fwd_own", **row.upto, chunk_size=4096) == row.config
