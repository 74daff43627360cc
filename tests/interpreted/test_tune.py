"""``moba_megatron.tune`` from end to end without a device: interpreted times mean nothing, the file does."""
from moba_megatron.kernels import tuning
from moba_megatron.tune import main


def test_a_written_file_is_read_back(tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    assert main([str(path), "--stages", "attention_fwd_diagonal", "--head-dims", "16", "--chunk-sizes", "32",
                 "--tokens", "64", "--heads", "2", "--kv-heads", "1", "--topk", "2", "--dtype", "float32",
                 "--device", "cpu", "--budget", "20"]) == 0
    monkeypatch.setenv("MOBA_TUNING_FILE", str(path))
    row = tuning.rows("attention_fwd_diagonal")[0]
    assert row.archs == tuning.INTERPRETER
    assert row.upto["head_dim"] == 16 and "chunk_size" not in row.upto
    assert row.why.startswith("tune, ") and "chunk 32" in row.why
    assert tuning.config("attention_fwd_diagonal", **row.upto, chunk_size=4096) == row.config
