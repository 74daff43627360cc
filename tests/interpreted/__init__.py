"""The kernels under Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreted``, a process of its own."""
