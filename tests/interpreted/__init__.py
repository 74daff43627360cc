"""The kernels under Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/interpreted``, in a process of their own."""
