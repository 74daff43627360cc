"""MoBA in Transformers on a GPU: a training step in bf16, and generation, by kernels as by the reference."""
import pytest
import torch

import huggingface_models as hf
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
