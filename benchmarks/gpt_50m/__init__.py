"""The parts of `benchmarks/train_50m.py`, one file each: the model, its attention, the text, evaluation, the loop."""
