"""The best layout as a command: torchrun, the launch wrapper, Megatron-LM's flags."""
from __future__ import annotations

import shlex

from .hardware import Card
from .layout import Layout
from .models import Run

SCRIPT = "path/to/Megatron-LM/pretrain_gpt.py"
YOUR_OWN = "--data-path, --tokenizer-type, --train-iters, --lr, --save and so on"


def flags(run: Run, layout: Layout) -> list[str]:
    """Flags of the model, the run and the layout, spelled as in Megatron-LM, with MoBA's."""
    m, found = run.model, []
    sizes = (layout.inner, layout.cp // layout.inner) if layout.comm_type == "a2a+all_gather" else None

    def add(**values) -> None:
        for name, value in values.items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                found.append(flag)
            elif value is not False and value is not None:
                found.extend([flag, *(str(v) for v in (value if isinstance(value, tuple) else (value,)))])

    add(num_layers=m.layers, hidden_size=m.hidden, ffn_hidden_size=m.ffn, num_attention_heads=m.heads,
        kv_channels=m.head_dim, group_query_attention=m.kv_heads < m.heads,
        num_query_groups=m.kv_heads if m.kv_heads < m.heads else None, swiglu=True, normalization="RMSNorm",
        disable_bias_linear=True, position_embedding_type="rope",
        untie_embeddings_and_output_weights=not m.tied)
    add(seq_length=run.seqlen, max_position_embeddings=run.seqlen, micro_batch_size=1, global_batch_size=run.batch,
        attention_dropout=0, hidden_dropout=0, bf16=True)
    add(tensor_model_parallel_size=layout.tp, sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp, context_parallel_size=layout.cp,
        cp_comm_type=layout.comm_type if layout.cp > 1 else None,
        hierarchical_context_parallel_sizes=sizes,
        use_distributed_optimizer=run.distributed_optimizer, overlap_grad_reduce=run.distributed_optimizer,
        overlap_param_gather=run.distributed_optimizer)
    if layout.recompute != "none":
        full = layout.recompute == "full"
        add(recompute_granularity=layout.recompute, recompute_method="uniform" if full else None,
            recompute_num_layers=1 if full else None)
    if run.attention == "moba":
        add(attention="moba", moba_chunk_size=run.moba.chunk_size, moba_topk=run.moba.topk)
        if run.moba.full_attention_layers not in ("none", ()):
            layers = run.moba.full_attention_layers
            add(moba_full_attention_layers=layers if isinstance(layers, str) else ",".join(map(str, layers)))
    return found


def torchrun(run: Run, layout: Layout, card: Card) -> list[str]:
    """The words of the command that every machine runs."""
    node = int(card.node.value)
    nodes = -(-layout.gpus // node)
    words = ["torchrun", "--nproc-per-node", str(min(node, layout.gpus))]
    if nodes > 1:
        words += ["--nnodes", str(nodes), "--node-rank", "$NODE_RANK", "--master-addr", "$MASTER_ADDR",
                  "--master-port", "$MASTER_PORT"]
    return [*words, "-m", "moba_megatron.launch", SCRIPT, *flags(run, layout)]


def as_text(words: list[str], width: int = 110) -> str:
    """Words on lines that a shell joins; ``$NAME`` stays for the shell, a flag stays beside its values."""
    quoted = [word if word.startswith("$") else shlex.quote(word) for word in words]
    phrases: list[str] = []
    for word in quoted:
        if word.startswith("-") or not phrases:
            phrases.append(word)
        else:
            phrases[-1] += " " + word
    lines = ["CUDA_DEVICE_MAX_CONNECTIONS=1"]
    for phrase in phrases:
        if len(lines[-1]) + len(phrase) + 3 > width:
            lines.append("   ")
        lines[-1] += " " + phrase
    return " \\\n".join(lines)
