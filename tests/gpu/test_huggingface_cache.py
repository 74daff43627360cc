"""The means of chunks beside the caches of Transformers on a GPU: static, compiled, offloaded, in threads."""
import threading

import huggingface_models as hf
import pytest
import torch

from moba_megatron import MoBAConfig, register_moba
from moba_megatron.ops.decode import fill_chunk_means

pytestmark = pytest.mark.gpu
CHUNK = 16


@pytest.fixture(autouse=True)
def registered():
    register_moba(MoBAConfig(chunk_size=CHUNK, topk=3), decode="moba")


def made():
    return hf.model(dtype=torch.float32).cuda().eval()


def generate(model, ids, **more):
    return model.generate(ids, max_new_tokens=40, do_sample=False, **more)


def test_compiled_steps_keep_the_means_of_a_static_cache():
    """The steps that Transformers compiles write into the means that the prompt left, and no others are made."""
    ids = hf.tokens(2, 150).cuda()
    cache = generate(made(), ids, cache_implementation="static", return_dict_in_generate=True).past_key_values
    for layer in cache.layers:
        size, means = layer.keys.moba_means
        assert size == CHUNK
        keys = layer.keys.transpose(1, 2)
        lengths = torch.full((2,), 188, dtype=torch.int32, device="cuda")  # all but the last step's and its chunk's
        expected = torch.zeros_like(means)
        fill_chunk_means(keys, expected, lengths, CHUNK)
        torch.testing.assert_close(means[:, :11], expected[:, :11])


def test_offloaded_cache():
    """The host waits at each layer: Transformers brings keys back on a stream of its own, which does not wait for the
    copy that took them away. On a card that is busy with other work tokens differ with ``sdpa`` as well."""
    model, ids = made(), hf.tokens(1, 150).cuda()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: torch.cuda.synchronize())
    assert torch.equal(generate(model, ids, cache_implementation="offloaded"), generate(model, ids))


def test_inference_mode():
    model, ids = made(), hf.tokens(1, 150).cuda()
    expected = generate(model, ids)
    with torch.inference_mode():
        assert torch.equal(generate(model, ids), expected)


def test_threads_share_a_model():
    model, prompts = made(), [hf.tokens(1, 150, seed=seed).cuda() for seed in range(4)]
    expected, found = [generate(model, ids) for ids in prompts], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: generate(model, prompts[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))
