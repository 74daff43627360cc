"""MoBA in Transformers on a GPU: a training step in bf16, and generation, by kernels as by the reference."""
import huggingface_models as hf
import pytest
import torch
from transformers import StaticCache

from moba_megatron import MoBAConfig, register_moba

pytestmark = pytest.mark.gpu
CONFIG = MoBAConfig(chunk_size=16, topk=3)


def step(attention, dtype):
    """Loss and gradients of a padded batch."""
    model = hf.model(attention=attention, dtype=dtype).cuda().train()
    ids = hf.tokens(3, 200).cuda()
    mask = (torch.arange(200) >= torch.tensor([[0], [70], [150]])).long().cuda()
    labels = ids.masked_fill(mask.cumsum(1) < 2, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_step(dtype):
    """As near to fp64 as the reference in the same dtype is, twice over."""
    register_moba(CONFIG)
    loss, gradient = step("moba", dtype)
    eager_loss, eager = step("moba_reference", dtype)
    exact_loss, exact = step("moba_reference", torch.float64)
    error, limit = ((x - exact).norm() / exact.norm() for x in (gradient, eager))
    assert error <= 2 * limit + torch.finfo(dtype).eps
    assert abs(loss - exact_loss) <= 2 * abs(eager_loss - exact_loss) + torch.finfo(dtype).eps * exact_loss


@pytest.mark.parametrize("kind", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("decode", ["dense", "moba"])
def test_generate(decode, kind):
    """fp32, token for token: prompts padded on the left, static caches as Transformers compiles them."""
    register_moba(CONFIG, decode=decode)
    ids = hf.tokens(2, 150).cuda()
    mask = (torch.arange(150) >= torch.tensor([[0], [37]])).long().cuda()
    found = []
    for attention in ("moba", "moba_reference"):
        model = hf.model(attention=attention, dtype=torch.float32).cuda().eval()
        found.append(model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False,
                                    cache_implementation=kind if attention == "moba" else None))
    kernels, reference = found
    assert torch.equal(kernels, reference)


def packed_batch():
    """Ids of two rows of documents, their positions, and labels that leave out first tokens."""
    ids = hf.tokens(2, 200).cuda()
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((90, 1, 109), (33, 167))])
    positions = positions.cuda()
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100),
            "use_cache": False}


def test_packed_training_in_mixed_precision_compiled():
    """fp32 weights under bf16 autocast, the model in one graph. Dense layers: as near to fp64 as torch's, twice
    over. Sparse ones: the compiled loss is the eager one."""
    def loss_and_gradient(attention, dtype=torch.float32, compiled=False, **config):
        register_moba(MoBAConfig(chunk_size=16, topk=3, **config))
        model = hf.model(attention=attention, dtype=dtype).cuda().train()
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True) if compiled else model
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            loss = run(**packed_batch()).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().double() for p in model.parameters()])

    _, exact = loss_and_gradient("sdpa", torch.float64)
    _, plain = loss_and_gradient("sdpa")
    _, dense = loss_and_gradient("moba", compiled=True, full_attention_layers="all")
    assert (dense - exact).norm() <= 2 * (plain - exact).norm()
    (eager, _), (compiled, gradient) = loss_and_gradient("moba"), loss_and_gradient("moba", compiled=True)
    assert abs(compiled - eager) <= 0.02 * eager and gradient.isfinite().all()


def test_packed_rows_in_a_cuda_graph():
    """A graph captured with one document in a row keeps other packings apart when it is replayed."""
    register_moba(CONFIG)
    model, batch = hf.model(dtype=torch.float32).cuda().eval(), packed_batch()
    ids, packed = batch["input_ids"], batch["position_ids"]
    positions = torch.arange(200, device="cuda").repeat(2, 1)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(ids, position_ids=packed, use_cache=False).logits
        torch.compile(model, backend="eager")(ids, position_ids=positions, use_cache=False)  # loads the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(ids, position_ids=positions, use_cache=False).logits
        for given, wanted in ((packed, expected), (torch.arange(200, device="cuda").expand(2, -1), None)):
            positions.copy_(given)
            graph.replay()
            if wanted is None:
                wanted = model(ids, use_cache=False).logits
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decode", ["dense", "moba"])
def test_decoding_in_a_cuda_graph(decode):
    """Steps over a static cache, captured once and replayed, find what eager steps find."""
    register_moba(CONFIG, decode=decode)
    model, ids = hf.model(dtype=torch.float32).cuda().eval(), hf.tokens(2, 120).cuda()
    with torch.no_grad():
        found = []
        for captured in (False, True):
            cache = StaticCache(config=model.config, max_cache_len=128)
            model(ids[:, :90], past_key_values=cache)
            token = ids[:, 90:91].clone()
            model(token, past_key_values=cache)  # loads the kernels, makes the means
            graph, steps = torch.cuda.CUDAGraph(), []
            if captured:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    logits = model(token, past_key_values=cache).logits
            for i in range(91, 120):
                token.copy_(ids[:, i:i + 1])
                if captured:
                    graph.replay()
                else:
                    logits = model(token, past_key_values=cache).logits
                steps.append(logits.clone())
            found.append(torch.cat(steps, 1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_trainer_packed_bf16_compiled(tmp_path):
    """Trainer(bf16=True, torch_compile=True) on rows packed by DataCollatorWithFlattening: as eager fp32."""
    pytest.importorskip("accelerate")
    import transformers

    register_moba(CONFIG)
    documents = [{"input_ids": hf.tokens(n, seed=n).tolist()} for n in (90, 40, 150, 61, 77, 20)]

    def losses(**how):
        torch._dynamo.reset()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
            report_to=[], save_strategy="no", disable_tqdm=True, **how)
        trainer = transformers.Trainer(hf.model(dtype=torch.float32, use_cache=False), arguments,
                                       train_dataset=documents,
                                       data_collator=transformers.DataCollatorWithFlattening())
        trainer.train()
        return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])

    expected = losses()
    torch.testing.assert_close(losses(bf16=True, torch_compile=True), expected, rtol=0.05, atol=0)


def test_bounds_are_checked_without_waiting():
    """Bounds that a batch brings on the GPU: new in every step, read by no host."""
    from moba_megatron.huggingface.mask import packed_bounds

    x = torch.empty(2, 4, 200, 8, device="cuda")
    given = [{"cu_seq_lens_q": cu, "cu_seq_lens_k": cu.clone(), "max_length_q": 200, "max_length_k": 200}
             for cu in torch.tensor([[0, 90, 200, 400], [0, 33, 200, 400]], device="cuda")]
    packed_bounds(given[0], x, x, None, 16)  # makes what is made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        segments = packed_bounds(given[1], x, x, None, 16)
        assert packed_bounds(given[1], x, x, None, 16) is segments
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert segments.cu_seqlens_q.tolist() == [0, 33, 200, 400] and segments.max_seqlen_q == 200
