"""The snippets of README's "Use a loss in your own code": pytest tests/test_paste.py.

They run as they stand there, and give the loss and the gradient of our own step.
"""
import importlib.util
import re

import pytest
import torch
import transformers
from conftest import ROOT

import configs
import data
import model as models
import unlearn

PROC = models.Process(0, 1, torch.device("cpu"))
SETTINGS = dict(forget_loss="simnpo", beta=2.5, forget_weight=1.0, retain_weight=0.1375)


def snippets():
    """The names that README's code defines."""
    section = (ROOT / "README.md").read_text().split("## Use a loss in your own code")[1]
    blocks = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.S)
    names = {}
    for block in blocks:
        exec(block, names)
    return names


def groups_of(lengths):
    """Groups of one example: prompts and answers of these lengths, distinct tokens."""
    groups = []
    for k, (n_prompt, n_answer) in enumerate(lengths):
        ids = [5 + (7 * k + 3 * i) % 900 for i in range(n_prompt + n_answer)]
        groups.append([data.Example(ids, n_prompt)])
    return groups


FORGET = groups_of([(4, 6), (9, 3), (5, 11), (3, 2)])
RETAIN = groups_of([(6, 4), (3, 9), (7, 1), (4, 5)])


def padded(groups):
    """A batch as a Hugging Face collator makes it."""
    width = max(len(group[0].ids) for group in groups)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for (example,) in groups:
        n = width - len(example.ids)
        batch["input_ids"].append(example.ids + [0] * n)
        batch["attention_mask"].append([1] * len(example.ids) + [0] * n)
        answer = example.ids[example.start:]
        batch["labels"].append([-100] * example.start + answer + [-100] * n)
    return {name: torch.tensor(values) for name, values in batch.items()}


def gradient(lm):
    """All gradients as one vector."""
    found = torch.cat([p.grad.flatten() for p in lm.parameters()])
    lm.zero_grad()
    return found


def our_step(lm):
    """(loss, gradient) of one step over the whole batch, as train() computes them."""
    c = configs.make(unlearn.Config, SETTINGS)
    batch = {"forget": FORGET, "retain": RETAIN}
    weights = {"forget": c.forget_weight, "retain": c.retain_weight}
    terms = unlearn.loss_terms(c)
    total = 0
    for kind, groups, share in data.micro_batches(batch, 64):
        scores = models.score(lm, groups, PROC.device)
        loss = share * terms[kind].fn(scores, c).sum() / terms[kind].count(batch[kind])
        (weights[kind] * loss).backward()
        total += weights[kind] * loss.item()
    return total, gradient(lm)


@pytest.fixture(scope="module")
def lm(mini):
    return models.load_model(str(mini / "target"), PROC)


def test_the_pasted_loss_is_our_steps_loss_and_gradient(lm):
    loss = snippets()["unlearning_loss"](lm, padded(FORGET), padded(RETAIN))
    loss.backward()
    pasted = gradient(lm)
    expected, gradients = our_step(lm)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(pasted, gradients, atol=1e-6)


@pytest.mark.parametrize("num_items, steps, divisor", [(None, 4, 1), (100, 4, 4), (100, 1, 1)])
def test_the_trainers_loss_is_divided_by_the_accumulation_steps_exactly_once(
        lm, num_items, steps, divisor):
    """Where num_items_in_batch is passed, the Trainer leaves the division to compute_loss."""
    names = snippets()
    trainer = names["UnlearningTrainer"].__new__(names["UnlearningTrainer"])
    trainer.current_gradient_accumulation_steps = steps
    inputs = {"forget": padded(FORGET), "retain": padded(RETAIN)}
    loss = trainer.compute_loss(lm, inputs, num_items_in_batch=num_items)
    expected, _ = our_step(lm)
    assert loss.item() == pytest.approx(expected / divisor, rel=1e-6)


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="Trainer needs accelerate")
def test_a_trainer_takes_the_step_of_the_plain_loop(mini, tmp_path):
    """SGD, one step of two accumulated micro-batches: weights move by lr x the mean gradient."""
    names = snippets()
    lm = models.load_model(str(mini / "target"), PROC)
    before = torch.cat([p.detach().flatten().clone() for p in lm.parameters()])
    halves = [{"forget": FORGET[k:k + 2], "retain": RETAIN[k:k + 2]} for k in (0, 2)]
    for half in halves:
        loss = names["unlearning_loss"](lm, padded(half["forget"]), padded(half["retain"]))
        (loss / 2).backward()
    expected = gradient(lm)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2,
        max_steps=1, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=1e9, report_to=[], use_cpu=True, remove_unused_columns=False,
        save_strategy="no", disable_tqdm=True)
    trainer = names["UnlearningTrainer"](
        model=lm, args=arguments, train_dataset=halves,
        data_collator=lambda rows: {kind: padded(rows[0][kind]) for kind in rows[0]})
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in lm.parameters()])
    assert torch.allclose(after, before - 0.1 * expected, atol=1e-5)
