"""Random calls of the operators through the kernels, interpreted, with inputs of any strides."""
import torch
from hypothesis import given
from properties import Problem, calls, examples


@examples(6)
@given(calls(dtypes=(torch.float32, torch.float16), chunks=(16, 20), dims=((4, 4), (16, 16), (3, 6)), longest=50))
def test_kernels(call):
    problem = Problem(call, backend="triton")
    problem.check(problem.run())
