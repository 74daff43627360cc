"""The best layout as a command: torchrun, the launch wrapper, Megatron-LM's flags."""
import shlex
import textwrap

from .hardware import Card
from .layout import Layout
from .models import Run

SCRIPT = "path/to/Megatron-LM/pretrain_gpt.py"
YOUR_OWN = "--data-path, --tokenizer-type, --train-iters, --lr, --save and so on"


def flags(run: Run, layout: Layout) -> list[str]:
    """Flags of the model, the run and the layout, spelled as in Megatron-LM, with MoBA's."""
    m, zero, full = run.model, run.distributed_optimizer, layout.recompute == "full"
    values = dict(  # True: without a value; False, None: not there
        num_layers=m.layers, hidden_size=m.hidden, ffn_hidden_size=m.ffn, num_attention_heads=m.heads,
        kv_channels=m.head_dim, group_query_attention=m.kv_heads < m.heads,
        num_query_groups=m.kv_heads if m.kv_heads < m.heads else None, swiglu=True, normalization="RMSNorm",
        disable_bias_linear=True, position_embedding_type="rope", untie_embeddings_and_output_weights=not m.tied,
        seq_length=run.seqlen, max_position_embeddings=run.seqlen, micro_batch_size=1, global_batch_size=run.batch,
        attention_dropout=0, hidden_dropout=0, bf16=True, tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1, pipeline_model_parallel_size=layout.pp, context_parallel_size=layout.cp,
        cp_comm_type=layout.comm_type if layout.cp > 1 else None, hierarchical_context_parallel_sizes=(
            (layout.inner, layout.cp // layout.inner) if layout.comm_type == "a2a+all_gather" else None),
        use_distributed_optimizer=zero, overlap_grad_reduce=zero, overlap_param_gather=zero,
        recompute_granularity=None if layout.recompute == "none" else layout.recompute,
        recompute_method="uniform" if full else None, recompute_num_layers=1 if full else None)
    if run.attention == "moba":
        layers = run.moba.full_attention_layers
        values |= dict(attention="moba", moba_chunk_size=run.moba.chunk_size, moba_topk=run.moba.topk,
                       moba_per_layer=run.moba.per_layer, moba_topk_schedule=run.moba.topk_schedule,
                       moba_full_attention_layers=None if layers in ("none", ()) else layers if isinstance(layers, str)
                       else ",".join(map(str, layers)))
    found = []
    for name, value in values.items():
        if value is not None and value is not False:
            found.append("--" + name.replace("_", "-"))
            found += [] if value is True else [str(v) for v in (value if isinstance(value, tuple) else (value,))]
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
    glue = "\N{NO-BREAK SPACE}"  # between a flag and its values, where no line ends
    text = "CUDA_DEVICE_MAX_CONNECTIONS=1"
    for word in words:
        text += (" " if word.startswith("-") or word == words[0] else glue) + (
            word if word.startswith("$") else shlex.quote(word))
    lines = textwrap.wrap(text, width - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines).replace(glue, " ")
