"""Transformers' Trainer and accelerate over two CPU processes train as one process does by torch alone."""
import huggingface_models as hf
import pytest
import torch
from ranks import run_ranks

from moba_megatron import MoBAConfig, register_moba

pytest.importorskip("accelerate")
STEPS, LR = 3, 1e-2


def rows():
    """Two rows, one a rank: a sequence, and two documents packed into one row."""
    ids, positions = hf.tokens(2, 36), torch.arange(36).repeat(2, 1)
    positions[1, 14:] -= 14
    labels = ids.masked_fill(positions == 0, -100)
    labels[0, 14] = -100  # as many that count as in the other row
    return [dict(input_ids=ids[i], position_ids=positions[i], labels=labels[i]) for i in range(2)]


def start():
    register_moba(MoBAConfig(hf.CHUNK, hf.TOPK, full_attention_layers="last:1"))
    return hf.model(dtype=torch.float32).train()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain():
    model = start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    losses = []
    for _ in range(STEPS):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    return weights(model)


def work(rank, size, directory):
    return by_trainer(directory), by_accelerate()


def by_trainer(directory):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        directory, use_cpu=True, per_device_train_batch_size=1, max_steps=STEPS, learning_rate=LR, weight_decay=0.0,
        max_grad_norm=0.0, lr_scheduler_type="constant", optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.999,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1)
    trainer = Trainer(start(), arguments, train_dataset=rows())
    assert trainer.args.world_size == 2
    trainer.train()
    return weights(trainer.model)


def by_accelerate():
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), start()
    assert accelerator.num_processes == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(rows(), batch_size=1))
    for _ in range(STEPS):
        for batch in loader:
            accelerator.backward(model(**batch, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model))


def test_two_processes_train_as_one(tmp_path):
    want = plain()
    for found in run_ranks(work, 2, tmp_path, str(tmp_path / "trainer")):
        for got in found:
            for name in want:
                # Adam divides by the gradient's size, so that rounding counts where it is near zero.
                torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4,
                                           msg=lambda text: f"{name}: {text}")
