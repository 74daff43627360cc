"""examples/pretrain_gpt.py with faults (`faults.py`): run under torchrun in its place."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import pretraining  # noqa: E402,F401  (the writers' helpers, which import this file again, need this much of it)

if __name__ == "__main__":
    import faults

    sys.exit(faults.main())
