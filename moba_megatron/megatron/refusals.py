"""What MoBA refuses of Megatron: options, masks, layouts and arguments that it would otherwise have to ignore. Values
that lie on a GPU are compared there and read once they have arrived, at a later call: no step waits for them."""
from collections.abc import Sized

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..config import MoBAConfig
from ..tensor_cache import is_capturing, remembered
from .host import host_args

LAYOUT_FIELDS = ("cp_partition_mode", "attention_cp_layout", "linear_cp_layout")
"""How Megatron releases since 0.20 name the order of the tokens on context parallel ranks, in more than one class."""
_pending: list[tuple[torch.cuda.Event, Tensor, Tensor, str]] = []


def refuse_unsupported(config: TransformerConfig, attn_mask_type: AttnMaskType, attention_type: str,
                       attention_dropout: float | None) -> None:
    """Raises ValueError for an option that MoBA attention would have to ignore; the message names Megatron's flag."""
    if attention_type != "self":
        raise ValueError(f"attention_type must be 'self', got {attention_type!r}: MoBA has no cross attention")
    if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        raise ValueError(f"attn_mask_type must be AttnMaskType.causal, got {attn_mask_type}: MoBA is causal; for "
                         "padded batches use packed sequences")
    dropout = config.attention_dropout if attention_dropout is None else attention_dropout
    if dropout > 0:
        raise ValueError(f"attention_dropout must be 0, got {dropout}: pass --attention-dropout 0 (Megatron's default "
                         "is 0.1; --hidden-dropout is not affected)")
    refuse_fields(config, "TransformerConfig", _UNSUPPORTED_FIELDS)
    if config.context_parallel_size > 1:
        refuse_fields(config, "TransformerConfig", _LAYOUTS)
    args = host_args()
    if getattr(args, "reset_attention_mask", False):
        raise ValueError("--reset-attention-mask must not be given, got True: MoBA reads no mask and would attend "
                         "across documents. Pack them (cu_seqlens), with --dataloader-inter-document-masking where "
                         "this Megatron-LM has that")
    if config.context_parallel_size > 1 and getattr(args, "dataloader_inter_document_masking", False):
        raise ValueError("--dataloader-inter-document-masking must not be given with --context-parallel-size "
                         f"{config.context_parallel_size}, got True: Megatron-LM cuts the pack as one sequence there, "
                         "and MoBA reads each document's own zigzag pieces, whatever the documents' lengths")
    ignored = [(field, value) for field in _NOT_IN_PLAIN_LAYERS if (value := getattr(config, field, None))]
    if ignored and (getattr(args, "spec", None) or [""])[0] == "moba_megatron.layer_specs":
        field, value = ignored[0]
        raise ValueError(f"--{field.replace('_moe', '').replace('_', '-')} must not be given with --spec "
                         f"moba_megatron.layer_specs, got {value!r}: its layers are plain and would ignore that. Use "
                         "--attention moba (launch or patch), or a spec of your own (with_moba_core_attention)")


def refuse_split_groups(config: TransformerConfig, moba: MoBAConfig) -> None:
    """Raises ValueError where tensor parallelism would leave a rank a part of the heads that choose together."""
    groups, size = config.num_query_groups or config.num_attention_heads, config.tensor_model_parallel_size
    if moba.selection == "group" and groups < size:
        raise ValueError(f"--moba-selection must be head with --tensor-model-parallel-size {size} and "
                         f"--num-query-groups {groups}, got group: no rank has a whole group's queries")


_UNSUPPORTED_FIELDS = (
    ("window_size", None, "MoBA selects chunks itself and has no sliding window"),
    ("softmax_type", "vanilla", "MoBA has no softmax offset or attention sink"),
    ("qk_clip", False, "MoBA does not report the maximal attention logit"),
    ("log_max_attention_logit", False, "MoBA does not report the maximal attention logit"),
    ("fp8_dot_product_attention", False, "MoBA attends in bf16, fp16 or fp32; fp8 linear layers are fine"),
    ("fp8_multi_head_attention", False, "MoBA attends in bf16, fp16 or fp32; fp8 linear layers are fine"),
    ("apply_query_key_layer_scaling", False, "MoBA does not scale scores by layer"),
    ("batch_invariant_mode", False, "it needs kernels that MoBA does not use"),
    ("flash_decode", False, "decoding with it bypasses core attention and would be dense"))
"""Fields of TransformerConfig, where this version has them, with the value that MoBA works with and why no other."""
_LAYOUTS = tuple((field, "zigzag", "MoBA takes a context parallel rank's tokens for zigzag pieces of each sequence")
                 for field in LAYOUT_FIELDS)
_NOT_IN_PLAIN_LAYERS = ("num_moe_experts", "qk_layernorm", "qk_l2_norm", "multi_latent_attention",
                        "experimental_attention_variant")


def refuse_switch_in_graphs(config: TransformerConfig, moba_config: MoBAConfig) -> None:
    """Raises ValueError where a CUDA graph would go on replaying sparse attention beyond the step that ends it."""
    switches = ((moba_config.full_attention_from_step, "full-attention-from-step (or -last-fraction)",
                 "never becomes dense. Capture nothing, or stop at that step and resume with --attention full"),
                (moba_config.topk_schedule, "topk-schedule",
                 "keeps its topk. Capture nothing, or stop at each change and resume with --moba-topk"))
    for field in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"):
        for given, name, reason in switches:
            if given is not None and (value := getattr(config, field, None)) not in (False, None, "none"):
                raise ValueError(f"--moba-{name} cannot be used with --{field.replace('_', '-')}, got {given!r} and "
                                 f"{value!r}: a captured graph {reason}")


def refuse_fields(owner: TransformerConfig | PackedSeqParams, name: str, rows: tuple) -> None:
    """Raises ValueError for a field of ``rows``, each with the value that it may have beside None, and the reason."""
    for field, allowed, reason in rows:
        value = getattr(owner, field, allowed)
        if getattr(value, "value", value) not in (allowed, None):
            raise ValueError(f"--{field.replace('_', '-')} ({name}.{field}) must be {allowed!r}, got {value!r}: "
                             + reason)


def refuse_arguments(arguments: dict, place: str) -> None:
    """Raises TypeError for a keyword argument that MoBA does not know, unless it is None, False or empty."""
    for name, value in arguments.items():
        size = value.numel() if isinstance(value, Tensor) else len(value) if isinstance(value, Sized) else 1
        if not (value is None or value is False or size == 0):
            raise TypeError(f"MoBACoreAttention{place} got an argument {name} of type {type(value).__name__}, which it "
                            "does not know and must not ignore: leave it out, or None")


def check_attention_mask(mask: Tensor, query: Tensor, key: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raises ValueError for a mask that says anything but "causal"; of one on a GPU a call later. Its rows' and
    columns' sums tell: no other mask than the causal one has the causal one's. Under context parallelism the rows are
    this rank's zigzag pieces, the columns the whole sequence."""
    size, rows, device = 1 if group is None else group.size(), query.shape[0], query.device
    if group is not None and rows % 2:  # odd: refused elsewhere
        return
    columns = key.shape[0] * size
    if not isinstance(mask, Tensor) or tuple(mask.shape[-2:]) != (rows, columns):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be None or a causal one of shape [.., {rows}, {columns}], got {got}: "
                         "MoBA is causal and reads no mask; for documents or padding use packed_seq_params")

    def check() -> None:
        everywhere = torch.arange(columns, device=device)
        hidden = mask if mask.dtype == torch.bool else mask != 0
        in_rows, in_columns = hidden.sum(-1), hidden.sum(-2)
        if group is None:
            orders = [torch.arange(columns - rows, columns, device=device)]
        else:  # Megatron warms up CUDA graphs with the first rows' mask on every rank
            pieces, rank = everywhere.view(2 * size, rows // 2), dist.get_rank(group)
            orders = [torch.cat((pieces[rank], pieces[-1 - rank])), everywhere[:rows]]
        ok = torch.zeros((), dtype=torch.bool, device=device)
        for position in orders:
            ok |= ((in_rows == columns - 1 - position).all()
                   & (in_columns == torch.searchsorted(position, everywhere)).all())
        _raise_unless(ok, mask, "attention_mask must be None or causal, got one that hides other positions (documents "
                                "of --reset-attention-mask, padding, bidirectional attention): MoBA is causal and "
                                "reads no mask; for documents or padding use packed_seq_params")

    if not is_capturing(device):
        remembered(mask, ("causal", rows, size), check)  # all layers get the same


def check_packed(packed: PackedSeqParams, group: dist.ProcessGroup | None) -> None:
    """Raises ValueError for lengths of keys or places that do not fit, on a GPU a call later, and for layouts."""
    if group is not None:
        refuse_fields(packed, "PackedSeqParams", _LAYOUTS)
    for name, other in (("cu_seqlens_kv", "cu_seqlens_q"), ("cu_seqlens_kv_padded", "cu_seqlens_q_padded"),
                        ("cu_seqlens_q_padded", "cu_seqlens_q")):
        x, q, room = getattr(packed, name), getattr(packed, other), name.startswith(other)
        if x is None or x is q or (q is None and other == "cu_seqlens_q"):
            continue
        text = f"packed_seq_params.{name} must " + (f"leave room for each sequence of {other}" if room else
                                                    f"equal {other}: MoBA is self attention, a key for each query")
        if q is None or q.shape != x.shape:
            raise ValueError(f"{text}; got shapes {tuple(x.shape)} and {None if q is None else tuple(q.shape)}")
        remembered(x, name, lambda: _raise_unless((x.diff() >= q.diff() if room else x == q).all(), x, text), (q,))


def _raise_unless(ok: Tensor, of: Tensor, text: str) -> None:
    """Raises ValueError where ok, which says what ``of`` is, is False: on a CPU now, else once the GPU has said so."""
    if type(ok) is not Tensor:  # a fake has no value
        return
    if ok.device.type == "cpu":
        if not ok:
            raise ValueError(text)
    elif not torch.cuda.is_current_stream_capturing():
        flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(ok, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append((event, flag, of, text))


def raise_what_arrived() -> None:
    """Raises ValueError for what an earlier call gave and a GPU has found wrong by now."""
    while _pending and not torch.cuda.is_current_stream_capturing() and _pending[0][0].query():
        _, flag, of, text = _pending.pop(0)
        if not flag:
            vars(of).pop("moba_remembered", None)  # looked at again
            raise ValueError(f"in an earlier call: {text}")
