"""Masks, positions, caches and packing: dense layers are torch's, sparse ones the oracle's, and what is true eagerly is
true compiled and exported, refusals included."""
import huggingface_models as hf
import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache, masking_utils

from moba_megatron import MoBAConfig, register_moba
from moba_megatron.huggingface.mask import row_segments

CONFIG = MoBAConfig(hf.CHUNK, hf.TOPK)
DENSE = MoBAConfig(hf.CHUNK, hf.TOPK, full_attention_layers="all")
T, FIRST = 30, 13
"""Tokens a row; those of a packed row's first document."""
MASKS = {"none": None, "ones": (0, T), "left": (9, T), "right": (0, 24)}
"""The slots of row 1 that count; those of row 0 all do."""
POSITIONS = {"default": None, "jump": torch.cat([torch.arange(FIRST), torch.arange(100, 100 + T - FIRST)]),
             "restart": torch.cat([torch.arange(FIRST), torch.arange(T - FIRST)])}


def rows_of(mask):
    """Slots of each row that count."""
    return (0, T), MASKS[mask] or (0, T)


def inputs(mask, positions):
    given = {"input_ids": hf.tokens(2, T)}
    if MASKS[mask] is not None:
        slot = torch.arange(T)
        given["attention_mask"] = torch.stack([(slot >= a) & (slot < b) for a, b in rows_of(mask)]).long()
    if positions != "default":
        given["position_ids"] = POSITIONS[positions].expand(2, T)
    return given


def cache_of(kind, model):
    """Keyword arguments that bring a cache, empty or with five tokens."""
    if kind == "none":
        return {"use_cache": False}
    if kind == "static":
        return {"past_key_values": StaticCache(config=model.config, max_cache_len=T + 6)}
    cache = DynamicCache(config=model.config)
    if kind == "filled":
        model(hf.tokens(2, 5, seed=8), past_key_values=cache)
    return {"past_key_values": cache}


def logits_of(model, given, cache="none", run=None):
    with torch.no_grad():
        if cache == "filled" and "attention_mask" in given:
            ones = torch.ones(2, 5, dtype=torch.long)
            given = given | {"attention_mask": torch.cat([ones, given["attention_mask"]], 1)}
        return (model if run is None else run)(**given, **cache_of(cache, model)).logits


def assert_counted_rows(got, expected, mask, **tolerance):
    for row, (begin, end) in enumerate(rows_of(mask)):
        torch.testing.assert_close(got[row, begin:end], expected[row, begin:end], **tolerance)


def alone(model, mask):
    """Logits of packed rows, each document by itself; rows as the mask leaves them."""
    ids = hf.tokens(2, T)
    logits = torch.zeros(2, T, 61, dtype=torch.float64)
    with torch.no_grad():
        for row, (begin, end) in enumerate(rows_of(mask)):
            for a, b in ((begin, FIRST), (FIRST, end)):
                at = POSITIONS["restart"][a:b][None]
                logits[row, a:b] = model(ids[row:row + 1, a:b], position_ids=at, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("cache", ["none", "fresh", "static", "filled"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_dense_layers_are_sdpa(positions, cache):
    """Whatever the mask; only packed documents stay apart where torch's attention sees one sequence (mask or cache)."""
    register_moba(DENSE)
    moba, sdpa = hf.model().eval(), hf.model(attention="sdpa").eval()
    for mask in MASKS:
        if mask == "left" and cache == "filled":
            continue  # a hole
        given = inputs(mask, positions)
        if positions == "restart" and cache in ("static", "filled"):
            with pytest.raises(ValueError, match="position_ids must not go back within a row .* in row 0"):
                logits_of(moba, given, cache)
            continue
        merged = positions == "restart" and (mask != "none" or cache != "none")
        expected = alone(sdpa, mask) if merged else logits_of(sdpa, given, cache)
        assert_counted_rows(logits_of(moba, given, cache), expected, mask)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_sparse_layers_are_the_oracle(positions, mask):
    register_moba(CONFIG)
    cut = positions == "restart" or positions == "jump" and mask == "none"  # a jump, where Transformers' own mask cuts
    sequences = [(row, a, b) for row, (begin, end) in enumerate(rows_of(mask))
                 for a, b in (((begin, FIRST), (FIRST, end)) if cut else ((begin, end),))]
    given = inputs(mask, positions)
    with hf.oracle_attention(sequences):
        expected = logits_of(hf.model(attention="moba_oracle").eval(), given)
    assert_counted_rows(logits_of(hf.model().eval(), given), expected, mask)


@pytest.mark.parametrize("mask, cache", [("none", "none"), ("none", "fresh"), ("ones", "none"), ("right", "static")])
def test_compiled_is_eager(mask, cache):
    """One graph, without a break, for all positions."""
    register_moba(CONFIG)
    model = hf.model(layers=1).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for positions in ("restart", "jump"):
        given = inputs(mask, positions)
        try:
            expected = logits_of(model, given, cache)
        except ValueError as error:
            with pytest.raises(ValueError, match="position_ids must not go back within a row"):
                logits_of(model, given, cache, compiled)
            assert cache == "static" and "position_ids" in str(error)
        else:
            assert_counted_rows(logits_of(model, given, cache, compiled), expected, mask)


def test_compiled_training_of_packed_rows():
    """Gradients, with layers compiled one by one as with the whole model."""
    register_moba(CONFIG)
    given = inputs("none", "restart") | {"labels": hf.tokens(2, T), "use_cache": False}

    def gradients(model, run=None):
        (model if run is None else run)(**given).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradients(hf.model(layers=1).train())
    torch._dynamo.reset()
    model = hf.model(layers=1).train()
    torch.testing.assert_close(gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True)), expected)
    torch._dynamo.reset()
    model = hf.model(layers=1).train()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(gradients(model), expected)


def test_exported_is_eager():
    """A program exported with one document in a row keeps two apart; the export leaves nothing behind."""
    register_moba(CONFIG)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = hf.model(layers=1).eval()

        def forward(self, input_ids, position_ids):
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    module, ids = Logits(), hf.tokens(2, T)
    with torch.no_grad():
        program = torch.export.export(module, (ids, torch.arange(T).expand(2, T).clone()))
        for positions in ("restart", "jump"):
            given = ids, POSITIONS[positions].expand(2, T).clone()
            torch.testing.assert_close(program.module()(*given), module(*given))


def test_more_sequences_than_a_graph_has_room_for():
    register_moba(CONFIG)
    model, ids = hf.model(layers=1).eval(), hf.tokens(1, 2100)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(ValueError, match="position_ids must begin at most 2048 sequences a batch"):
        torch.compile(model, backend="eager")(ids, position_ids=torch.zeros_like(ids), use_cache=False)


def refusal(run, *args, **kwargs):
    try:
        with torch.no_grad():
            run(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def test_calls_are_refused_in_every_mode():
    register_moba(CONFIG)
    model, ones = hf.model(layers=1).eval(), torch.ones(2, T, dtype=torch.long)
    hole, padded = ones.clone(), ones.clone()
    hole[1, 10:14] = 0
    padded[1, 20:] = 0
    bounds = torch.tensor([0, FIRST, T, T + FIRST, 2 * T], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=17, max_length_k=17)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for given, message in ((dict(attention_mask=hole), "attention_mask must be 1 in one run of each row"),
                           (dict(attention_mask=padded, **packed), "cu_seq_lens_q must come without attention_mask"),
                           (dict(attention_mask=ones, **packed), None), (dict(attention_mask=padded), None)):
        for run in (model, compiled):
            said = refusal(run, hf.tokens(2, T), use_cache=False, **given)
            assert said is None if message is None else said.startswith(message) and "row 1" in said


def test_bounds_are_refused_in_every_mode():
    """Tokens in no sequence, or in two, would attend wrongly and nobody would know."""
    register_moba(CONFIG)
    model, ids = hf.model(layers=1).eval(), hf.tokens(2, T)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    good, most = [0, FIRST, T, T + FIRST, 2 * T], 17
    refused = "cu_seq_lens_q must begin with 0, not decrease, and end with the number of tokens"
    for q, k, max_q, max_k, message in (
            (good, good, most, most, None), (good, None, None, None, None), (good, good, 2 * T, most, None),
            ([0, FIRST, FIRST, T, 2 * T], None, T, T, None),
            ([0, FIRST, T, T + FIRST, 2 * T - 1], None, most, most, refused),
            ([0, FIRST, T, T + FIRST, 2 * T + 1], None, most, most, refused),
            ([1, FIRST, T, T + FIRST, 2 * T], None, most, most, refused),
            ([0, T, FIRST, T + FIRST, 2 * T], None, 2 * T, 2 * T, refused),
            (good, good, most - 1, most, refused), (good, good, most, most - 1, refused),
            (good, [0, FIRST, T, T + FIRST + 1, 2 * T], most + 1, most + 1, refused)):
        given = {"cu_seq_lens_q": torch.tensor(q), "cu_seq_lens_k": None if k is None else torch.tensor(k)}
        for run in (model, compiled):
            said = refusal(run, ids, use_cache=False, max_length_q=max_q, max_length_k=max_k, **given)
            assert said is None if message is None else said.startswith(message), (q, k, max_q, max_k, said)


@pytest.mark.parametrize("given", ["q alone", "all", "tensors"])
def test_bounds_are_the_oracle(given):
    """Compiled too, whatever else comes with them."""
    register_moba(CONFIG)
    cu, ids = torch.tensor([0, FIRST, T, 2 * T]), hf.tokens(2, T)
    more = {} if given == "q alone" else dict(cu_seq_lens_k=cu.int(), max_length_q=T, max_length_k=T + 1)
    if given == "tensors":
        more |= dict(max_length_q=torch.tensor(T), max_length_k=torch.tensor(T))
    with hf.oracle_attention([(0, 0, FIRST), (0, FIRST, T), (1, 0, T)]), torch.no_grad():
        expected = hf.model(layers=1, attention="moba_oracle").eval()(ids, use_cache=False).logits
    model = hf.model(layers=1).eval()
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        with torch.no_grad():
            torch.testing.assert_close(run(ids, use_cache=False, cu_seq_lens_q=cu, **more).logits, expected)


def functions():
    """Mask functions as Transformers composes them, and whether they are causal within packed rows."""
    packed = masking_utils.packed_sequence_mask_function((torch.arange(T) >= FIRST).long().expand(2, T))
    causal = masking_utils.causal_mask_function
    block = torch.zeros(2, T, dtype=torch.bool)
    block[1, 17:20] = True

    def with_block(b, h, q, k):
        return block[b, q] & block[b, k]

    def prefix(b, h, q, k):
        return (q < 4) & (k < 4)

    def hidden(b, h, q, k):
        return (k != 20) | (q == k)

    def joined(*x):
        return masking_utils.and_masks(*x)

    return {"packed": (joined(causal, packed), True),
            "packed twice": (joined(joined(causal, packed), packed), True),
            "a block both ways": (joined(masking_utils.or_masks(causal, with_block), packed), False),
            "a prefix both ways": (joined(masking_utils.or_masks(causal, prefix), packed), False),
            "a window": (joined(masking_utils.sliding_window_overlay(5), causal, packed), False),
            "a hidden key": (joined(joined(causal, hidden), packed), False),
            "both ways": (packed, False)}


@pytest.mark.parametrize("name", functions())
def test_mask_functions(name):
    """Read where they are causal within documents, refused elsewhere, eagerly and compiled."""
    from moba_megatron.huggingface.mask import moba_mask

    function, allowed = functions()[name]
    torch._dynamo.reset()
    layouts = []
    for run in (moba_mask, torch.compile(moba_mask, backend="eager", fullgraph=True)):
        given = dict(batch_size=2, q_length=T, kv_length=T, mask_function=function, device=torch.device("cpu"))
        if allowed:
            layouts.append(run(**given))
        else:
            with pytest.raises(ValueError, match="the model must attend causally for MoBA attention"):
                run(**given)
    if allowed:
        assert torch.equal(*layouts) and layouts[0].unique().tolist() == [0, FIRST]


@pytest.mark.parametrize("use_vmap", [False, True])
def test_mask_functions_over_masks_and_of_users(use_vmap):
    from moba_megatron.huggingface.mask import moba_mask

    mask = None if use_vmap else torch.ones(2, T, dtype=torch.bool)
    with pytest.raises(ValueError, match="attend causally .* got the mask function and_masks"):
        moba_mask(2, T, T, attention_mask=mask, use_vmap=use_vmap, device=torch.device("cpu"),
                  mask_function=masking_utils.and_masks(masking_utils.causal_mask_function))


def test_layers_that_are_not_sent_positions():
    """GPTBigCode's: only the mask knows of the packing."""
    register_moba(CONFIG)
    config = transformers.GPTBigCodeConfig(n_embd=32, n_layer=1, n_head=4, n_positions=64, n_inner=48, vocab_size=61,
                                           pad_token_id=0, attn_pdrop=0.0, initializer_range=0.4)
    config._attn_implementation = "moba"
    torch.manual_seed(3)
    model, ids = transformers.GPTBigCodeForCausalLM(config).double().eval(), hf.tokens(1, T)
    with torch.no_grad():
        packed = model(ids, position_ids=POSITIONS["restart"][None], use_cache=False).logits
        for a, b in ((0, FIRST), (FIRST, T)):
            torch.testing.assert_close(packed[:, a:b], model(ids[:, a:b], use_cache=False).logits)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_autocast(mask):
    """fp32 weights: as far from fp64 as torch's own attention is, at most twice over, eagerly and compiled."""
    register_moba(DENSE)
    given = inputs(mask, "default") | {"use_cache": False}

    def hidden(attention, dtype, compiled=False):
        model = hf.model(attention=attention, dtype=dtype, layers=1).eval()
        torch._dynamo.reset()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logits = run(**given).logits.double()
        return torch.cat([logits[row, a:b] for row, (a, b) in enumerate(rows_of(mask))])

    exact = hidden("sdpa", torch.float64)
    error, *ours = ((x - exact).norm() for x in (hidden("sdpa", torch.float32), hidden("moba", torch.float32),
                                                 hidden("moba", torch.float32, compiled=True)))
    assert all(x <= 2 * error for x in ours)
    model = hf.model(dtype=torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**given, labels=given["input_ids"]).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_same_dtype_for_deepspeed():
    """DeepSpeed's module takes what rotary embedding and norms in fp32 leave beside a value in bf16."""
    pytest.importorskip("deepspeed")
    from moba_megatron.deepspeed import MoBAAttention

    attention = MoBAAttention(CONFIG, 1, 1)
    q, k, v = (torch.randn(1, T, heads, 8) for heads in (4, 2, 2))
    low = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(attention(q, k, low[2]), attention(*low))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v), attention(*low))
        assert attention(*(x.double() for x in (q, k, v))).dtype == torch.float64


@pytest.mark.parametrize("layout", (
    torch.tensor([[0, 4, 0], [1, 4, 0]])[:, None, None],
    torch.tensor([[0, 0, 2, 2], [0, 1, 1, 1]])[:, None, :, None]), ids=("padded", "packed"))
def test_layers_on_several_devices_share_a_layout(layout):
    layout = layout.int()
    for device in ("cpu", "meta", "cpu"):
        x = torch.empty(2, 1, 4, 8, device=device)
        segments = row_segments(x, x, layout, None, 2)
        assert {y.device.type for y in (segments.cu_seqlens_q, segments.cu_seqlens_k, segments.seq_ids,
                                        segments.offsets)} == {device}
