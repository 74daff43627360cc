"""Random calls of the operators in every mode of torch, against the fp64 oracle (properties.py; on GPUs gpu/)."""
import pytest
import torch
from hypothesis import given
from properties import Problem, calls, examples, operators_called
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("backend", ("torch", "reference"))
@examples(100)
@given(calls())
def test_eager(backend, call):
    problem = Problem(call, backend=backend)
    problem.check(problem.run())


@examples(30)
@given(calls())
def test_without_gradients(call):
    problem = Problem(call)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            results = problem.function(problem.q, problem.k, problem.v)
        problem.check([x.clone() for x in results])


@pytest.mark.parametrize("use_reentrant", (False, True))
@examples(20)
@given(calls())
def test_checkpointed(use_reentrant, call):
    problem, leaves = Problem(call), None
    leaves = problem.leaves()
    o, lse = checkpoint(problem.function, *leaves, use_reentrant=use_reentrant)
    loss = (o * problem.do).sum() + (0 if problem.dlse is None else (lse * problem.dlse).sum())
    loss.backward()
    problem.check((o.detach(), lse.detach(), *(x.grad.contiguous() for x in leaves)))


@examples(5)
@given(calls(longest=12))
def test_compiled(call):
    torch._dynamo.reset()
    problem = Problem(call)
    problem.check(problem.run(torch.compile(problem.function, backend="aot_eager", fullgraph=True)))


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = lambda q, k, v: function(q, k, v)


@examples(4)
@given(calls(longest=12))
def test_exported(call):
    problem = Problem(call)
    exported = torch.export.export(Module(problem.function), (problem.q, problem.k, problem.v), strict=False)
    problem.check(problem.run(exported.module()))


@examples(40)
@given(calls())
def test_fakes_have_the_strides_of_what_is_real(call):
    """opcheck compares every output's shape, strides and dtype; both operators, any strides of the inputs."""
    seen = operators_called(Problem(call).run)
    assert [function.name() for function, _ in seen] == ["moba_megatron::attention_fwd", "moba_megatron::attention_bwd"]
    for function, args in seen:
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))
