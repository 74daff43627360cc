"""Mixture of experts: a GPT whose experts, and whose sequences, are spread over ranks, against the same in one process.

fp64, gloo, four processes.
"""
import pytest
import torch
from ranks import run_ranks

from comparison import relative_error

pytest.importorskip("megatron.core")
EXPERTS = 4
TOLERANCE = 1e-12  # as in test_megatron_parallel.py
OPTIONS = dict(num_moe_experts=EXPERTS, moe_router_topk=2, moe_router_load_balancing_type="none",
               moe_aux_loss_coeff=0.0, moe_router_dtype="fp64", moe_ffn_hidden_size=24)
SHARED = dict(moe_shared_expert_intermediate_size=16)


def selective(*modules):
    return dict(recompute_granularity="selective", recompute_modules=list(modules))


# name: expert and context parallel size, dispatcher, options
RUNS = {
    "ep2": (2, 1, "alltoall", {}),
    "ep2_allgather": (2, 1, "allgather", {}),
    "ep4_cp2": (4, 2, "alltoall", {}),
    "ep2_cp2": (2, 2, "alltoall", {}),
    "ep2_cp2_shared_recompute": (2, 2, "alltoall", SHARED | selective("core_attn", "moe", "shared_experts")),
    "ep2_shared_recompute_full": (2, 1, "alltoall", SHARED | dict(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)),
}


def on_the_cpu():
    """What Megatron-Core's experts take for granted: Transformer Engine (0.16 names a function of it without having
    it), and split sizes on a GPU, which it reads as numbers from there only."""
    import gpt
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    if gpt.GPU:
        return
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = lambda x, as_numpy=False, **_: (
        x.numpy() if as_numpy and torch.is_tensor(x) else x)


def whole_name(name):
    """A parameter's name in the whole model: a rank counts its experts from 0."""
    from megatron.core import parallel_state
    if ".local_experts." not in name:
        return name
    before, after = name.split(".local_experts.")
    number, rest = after.split(".", 1)
    mine = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    return f"{before}.local_experts.{int(number) + mine * parallel_state.get_expert_model_parallel_rank()}.{rest}"


def run(ep, cp, dispatcher, options, weights=None):
    """Loss, gradients of the parameters on this rank, and the weights, made if there are none yet."""
    import gpt
    import torch.distributed as dist
    from megatron.core import parallel_state

    model = gpt.build(gpt.Layout("experts", cp=cp, ep=ep), moe_token_dispatcher_type=dispatcher, **OPTIONS, **options)
    generator = torch.Generator().manual_seed(7)
    scale = 0.2 * (32 / gpt.WIDTH) ** 0.5
    weights = weights or {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
                          for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[whole_name(name)])
    alone = ep == 1
    replicas = 1 if alone else parallel_state.get_data_parallel_world_size()
    batch = torch.randint(0, gpt.VOCAB, (4, gpt.SEQLEN + 1), generator=torch.Generator().manual_seed(3))
    mine = batch.chunk(replicas)[0 if alone else parallel_state.get_data_parallel_rank()]
    rows = gpt.local_positions([gpt.SEQLEN], cp, parallel_state.get_context_parallel_rank())
    tokens, labels, positions = (x.to(gpt.DEVICE) for x in (
        mine[:, :-1][:, rows], mine[:, 1:][:, rows], rows.expand(len(mine), -1)))
    loss = gpt.token_loss(model(tokens, positions, None), labels)
    loss.backward()
    loss, grads = loss.detach(), {}
    if not alone:
        dist.all_reduce(loss)
    for name, parameter in model.named_parameters():
        grads[whole_name(name)] = grad = parameter.grad
        if not alone:
            dist.all_reduce(grad, group=parallel_state.get_expert_data_parallel_group() if "local_experts" in name
                            else dist.group.WORLD)
    return loss.item(), grads, weights


def everything(rank, size):
    on_the_cpu()
    results = {}
    for name, (ep, cp, dispatcher, options) in RUNS.items():
        if ep > size:
            continue
        whole_loss, whole, weights = run(1, 1, "allgather", {k: v for k, v in options.items() if k in SHARED})
        loss, grads, _ = run(ep, cp, dispatcher, options, weights)
        errors = {name: relative_error(grad, whole[name]) for name, grad in grads.items()}
        results[name] = dict(loss=loss, expected=whole_loss, grads=errors, names=sorted(whole))
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", RUNS)
def test_equals_one_process(results, name):
    for result in results:
        found = result[name]
        assert abs(found["loss"] / found["expected"] - 1) <= TOLERANCE
        worst = max(found["grads"], key=found["grads"].get)
        assert found["grads"][worst] <= TOLERANCE, (worst, found["grads"][worst])
    compared = set().union(*(result[name]["grads"] for result in results))
    assert sorted(compared) == results[0][name]["names"], "every parameter's gradient is compared on some rank"
