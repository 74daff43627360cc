"""Latent attention with MoBA on two ranks, SBHD and packed: TP 2 against TP 1, kernels against the reference, dense.

    torchrun --nproc-per-node 2 -m benchmarks.check_mla mla.json

Relative errors of the output and of all gradients go to the file; the exit status is 1 where one is too large, or where
dense attention gives nearly the same. Two GPUs: bf16, Transformer Engine's layers where it is installed; without a GPU
small shapes in fp32.
"""
import importlib.util
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from . import ROOT

CPU = not torch.cuda.is_available()
if CPU:
    sys.path.insert(0, str(ROOT / "examples"))
    import megatron_on_cpu
    megatron_on_cpu.enable()
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs as specs  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig  # noqa: E402

from moba_megatron import MoBAConfig, environment  # noqa: E402
from moba_megatron.megatron.layer_specs import with_moba_core_attention  # noqa: E402

from . import report  # noqa: E402

TE = importlib.util.find_spec("transformer_engine") is not None
LIMIT, DENSE = 5e-2, 0.1
if CPU:
    SIZES = dict(hidden_size=64, num_attention_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_head_dim=16,
                 qk_pos_emb_head_dim=8, v_head_dim=16)
    TOKENS, LENGTHS, CHUNK, DTYPE = 256, [100, 60, 96], 16, torch.float32
else:
    SIZES = dict(hidden_size=1024, num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_head_dim=128,
                 qk_pos_emb_head_dim=64, v_head_dim=128)
    TOKENS, LENGTHS, CHUNK, DTYPE = 4096, [1500, 700, 1896], 64, torch.bfloat16
MOBA = MoBAConfig(chunk_size=CHUNK, topk=3)


def build(tp, moba):
    """Megatron's latent attention, this rank's part."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=CPU)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = MLATransformerConfig(
        num_layers=1, rope_type="rope", apply_rope_fusion=False, attention_dropout=0.0, hidden_dropout=0.0,
        add_bias_linear=False, params_dtype=DTYPE, bf16=DTYPE == torch.bfloat16, tensor_model_parallel_size=tp,
        sequence_parallel=TE and tp > 1, use_cpu_initialization=CPU, **SIZES)
    make = specs.get_gpt_layer_with_transformer_engine_spec if TE else specs.get_gpt_layer_local_spec
    spec = with_moba_core_attention(make(multi_latent_attention=True), moba)
    attention = build_module(spec.submodules.self_attention, config=config, layer_number=1)
    return attention.to(DTYPE).to("cpu" if CPU else "cuda").train()


def shard(whole, like):
    """This rank's part of a weight or gradient: cut where it is smaller."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for dim in range(like.dim()):
        if whole.shape[dim] != like.shape[dim]:
            return whole.chunk(2, dim)[rank]
    return whole


def rows(x):
    """This rank's rows under sequence parallelism."""
    tp = parallel_state.get_tensor_model_parallel_world_size() if TE else 1
    return x.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()] if tp > 1 else x


def run(weights, hidden, do, packed, tp=1, moba=MOBA):
    """Output and gradients by name, and the parameters, which are random where there are no ``weights``."""
    attention = build(tp, moba)
    with torch.no_grad():
        for name, p in attention.named_parameters():
            if weights:
                p.copy_(shard(weights[name], p))
            else:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 if p.dim() > 1 else torch.ones_like(p))
    x = rows(hidden).clone().requires_grad_()
    out = attention(x, None, packed_seq_params=packed)[0]
    (out * rows(do)).sum().backward()
    grads = {name: p.grad for name, p in attention.named_parameters()}
    for name, p in attention.named_parameters():
        if getattr(p, "sequence_parallel", False):
            dist.all_reduce(grads[name], group=parallel_state.get_tensor_model_parallel_group())
    return {"output": out.detach(), "input": x.grad, **grads}, dict(attention.named_parameters())


def errors(got, expected):
    """Relative errors, this rank's parts of what one rank has."""
    result, parameters = {}, got[1]
    for name, x in got[0].items():
        whole = expected[0][name]
        part = shard(whole, parameters[name]) if name in parameters else rows(whole)
        result[name] = ((x.float() - part.float()).norm() / part.float().norm().clamp(min=1e-9)).item()
    return result


def inputs(device):
    """Hidden states whose chunks differ, so that selection is no matter of luck, the output's gradient, the packing."""
    torch.manual_seed(3)  # the same on both ranks
    width = SIZES["hidden_size"]
    topics = torch.randn(-(-TOKENS // CHUNK), 1, width).repeat_interleave(CHUNK, 0)[:TOKENS]
    hidden, do = topics + 0.5 * torch.randn(TOKENS, 1, width), torch.randn(TOKENS, 1, width)
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=device)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                             max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))
    return hidden.to(device, DTYPE), do.to(device, DTYPE), packed


def compare(device):
    """The errors of this rank, by what was compared."""
    hidden, do, thd = inputs(device)
    torch.manual_seed(4)
    weights = {name: p.detach().clone() for name, p in run(None, hidden, do, None)[1].items()}
    for x in weights.values():
        dist.broadcast(x, 0)
    found = {}
    for name, packed in (("SBHD", None), ("THD", thd)):
        alone = run(weights, hidden, do, packed)
        found[f"{name}: TP 2 against TP 1"] = errors(run(weights, hidden, do, packed, tp=2), alone)
        reference = run(weights, hidden, do, packed, moba=MoBAConfig(CHUNK, 3, backend="reference"))
        found[f"{name}: kernels against the reference"] = errors(alone, reference)
        dense = run(weights, hidden, do, packed, moba=MoBAConfig(CHUNK, 3, full_attention_from_step=0))
        found[f"{name}: dense against MoBA"] = {"output": errors(dense, alone)["output"]}
        for left_out in () if TE else ("input", "linear_kv_down_proj.weight"):
            # Megatron's local layers do not add the gradients of the rotary keys over tensor parallel ranks
            found[f"{name}: TP 2 against TP 1"].pop(left_out)
    return found


def good(found):
    """Whether dense attention is something else, and everything else the same."""
    return all(e > DENSE if "dense" in name else e <= LIMIT for name, each in found.items() for e in each.values())


def main() -> int:
    """0, or 1 where an error of one of the ranks is out of its bounds."""
    rank = int(os.environ["LOCAL_RANK"])
    if not CPU:
        torch.cuda.set_device(rank)
    elif not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False  # 0.16 believes in it without Transformer Engine
    dist.init_process_group("gloo" if CPU else "nccl")
    device = torch.device("cpu") if CPU else torch.device("cuda", rank)
    about = environment.describe(device) | {
        "command": environment.command("torchrun --nproc-per-node 2 -m benchmarks.check_mla")}
    found = compare(device)
    flag = torch.tensor([float(good(found))], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    if rank == 0:
        report.save(Path(sys.argv[1]), {
            "environment": about, "transformer_engine": TE, "limit": LIMIT, "dense_at_least": DENSE,
            "sizes": {**SIZES, "tokens": TOKENS, "chunk": CHUNK, "topk": 3}, "errors": found,
            "good_on_both_ranks": bool(flag.item())})
        for name, each in found.items():
            worst = max(each, key=each.get)
            print(f"{name}: worst {each[worst]:.2e} ({worst}), output {each['output']:.2e}")
        print("good" if flag.item() else "BAD")
    dist.barrier()
    dist.destroy_process_group()
    return int(not flag.item())


if __name__ == "__main__":
    sys.exit(main())
