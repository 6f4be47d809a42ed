"""Every preference trainer of TRL, and a plain Trainer: what is recorded is what autograd says of the same weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from gradent import EntanglementCallback, PairBatch
from tests.trainer.row_truth import assert_rows, names_of, texts
from tests.trainer.runs import Gradients, data_for, gradient_error, llama, make_trainer, preferences, with_lora
from tests.truth import assert_exact, truth

CPO = {
    "sigmoid": {}, "hinge": {"beta": 1e-3}, "ipo": {}, "simpo": {}, "alphapo": {},
    "sigmoid without NLL": {"cpo_alpha": 0.0}, "simpo without NLL": {"cpo_alpha": 0.0},
}  # fmt: skip


def run(
    name: str, model: nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path, options: Any = None, **arguments: Any
) -> tuple[EntanglementCallback, Gradients]:
    callback, seen = EntanglementCallback(every=1, alert=None), Gradients(model)
    make_trainer(name, model, tokenizer, out, [callback, seen], options=options, **arguments).train()
    assert len(callback.records) == 2
    return callback, seen


def check(callback: EntanglementCallback, seen: Gradients, tolerance: float = 1e-5) -> None:
    for record, before in zip(callback.records, seen.models, strict=False):
        assert record.source == "piggyback"
        assert_exact(record.gram, truth(before, record.batch, dtype=torch.float64), record.batch, tolerance)


def adapted(lora: bool, model: nn.Module) -> nn.Module:
    return with_lora(model) if lora else model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", CPO)
def test_cpo(name: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    arguments = {"loss_type": name.split()[0], "max_length": 128, "learning_rate": 1e-3, **CPO[name]}
    callback, seen = run("cpo", adapted(lora, llama()), tiny_tokenizer, tmp_path, **arguments)
    check(callback, seen)
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert record.inactive == 0
        assert gradient_error(record, before, grads, 4) < 1e-5


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto(loss: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Labelled rows are no pairs: each is recorded, as raised or lowered, and all of a batch are one group."""
    callback, seen = run(
        "kto", adapted(lora, llama()), tiny_tokenizer, tmp_path, options={"ref_model": llama(seed=3)},
        loss_type=loss, per_device_train_batch_size=8,
    )  # fmt: skip
    sides = {(row["prompt"], row[side]): side for row in preferences() for side in ("chosen", "rejected")}
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert record.source == "piggyback" and record.gram is None and record.verdict is None
        assert len(record.rows) == 8 and record.inactive == 0 and (record.groups, record.flat_groups) == (1, 0)
        assert record.rows.group.tolist() == [0] * 8
        found = [sides[row] for row in texts(record, tiny_tokenizer)]
        assert [side == "chosen" for side in found] == (record.rows.weight > 0).tolist()
        assert {"chosen", "rejected"} == set(found)
        assert_rows(record, before, grads, lr=0.05)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_tpo(lora: bool, alpha: float, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """With alpha 0 the third block is left out of the forward, and nothing but the pairs moves the model."""
    callback, seen = run(
        "tpo", adapted(lora, llama()), tiny_tokenizer, tmp_path, tpo_alpha=alpha, per_device_train_batch_size=3,
        learning_rate=1e-3,
    )  # fmt: skip
    check(callback, seen)
    texts = {row["prompt"] + row["chosen"] + tiny_tokenizer.eos_token for row in preferences()}
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert len(record.gram) == 3 and record.unpaired == (3 if alpha else 0)
        assert all(tiny_tokenizer.decode(record.batch.row(row)[0][1:]) in texts for row in range(3))
        if not alpha:
            assert gradient_error(record, before, grads, 3) < 1e-5


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_orpo_is_measured(
    lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(lora, llama())
    with caplog.at_level(logging.WARNING, "gradent"):
        callback, seen = run("orpo", model, tiny_tokenizer, tmp_path, max_length=128, learning_rate=1e-3)
    said = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert len(said) == 1 and "weighs the tokens" in said[0]
    completions = {
        tiny_tokenizer.decode(tiny_tokenizer(row[side]).input_ids[1:]) + tiny_tokenizer.eos_token
        for row in preferences()
        for side in ("chosen", "rejected")
    }
    for record, before in zip(callback.records, seen.models, strict=False):
        assert record.source == "measure" and len(record.gram) == 4
        for row in range(8):
            ids, marks = record.batch.row(row)
            assert tiny_tokenizer.decode(ids[marks.bool()]) in completions, "the marks are not the completion's"
        assert_exact(record.gram, truth(before, record.batch, dtype=torch.float64), record.batch, 1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_reward_model(lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = adapted(lora, llama(kind=LlamaForSequenceClassification, num_labels=1))
    inputs: list[Any] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    callback, seen = run("reward", model, tiny_tokenizer, tmp_path, learning_rate=1e-3)
    handle.remove()
    for record, before, grads, given in zip(callback.records, seen.models, seen.grads, inputs, strict=False):
        assert record.source == "piggyback" and record.batch is None and len(record.gram) == 4
        rewards, gradients = reward_gradients(before.eval(), given)
        gram = torch.stack([gradients[:4].square().sum(1), gradients[4:].square().sum(1)])
        gram = torch.cat([gram, (gradients[:4] * gradients[4:]).sum(1)[None]])
        got = torch.stack([record.gram.chosen_sq, record.gram.rejected_sq, record.gram.inner])
        scale = torch.stack([gram[0], gram[1], (gram[0] * gram[1]).sqrt()])
        assert float(((got - gram).abs() / scale).max()) < 1e-5
        got = torch.cat([record.gram.chosen_logp, record.gram.rejected_logp])
        torch.testing.assert_close(got, rewards, rtol=1e-5, atol=1e-6)
        weights = torch.cat([-record.verdict.d_w, record.verdict.d_l]) / 4
        want = torch.cat([grads[name].flatten() for name, p in before.named_parameters() if p.requires_grad])
        assert float((weights @ gradients - want).norm() / want.norm()) < 1e-5


def reward_gradients(model: nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rewards, rows = [], []
    for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
        reward = model(input_ids=ids[mask.bool()][None], use_cache=False).logits[0, 0]
        rewards.append(reward.item())
        rows.append(torch.cat([part.double().flatten() for part in torch.autograd.grad(reward, parameters)]))
    return torch.tensor(rewards, dtype=torch.float64), torch.stack(rows)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_online_dpo(lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Which of a prompt's two completions is the chosen one, a reward says: here, the one with more small bytes."""
    rewards: dict[tuple[int, ...], float] = {}

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        rewards.update({tuple(ids): float(sum(x < 130 for x in ids)) for ids in completion_ids})
        return [rewards[tuple(ids)] for ids in completion_ids]

    model = adapted(lora, llama())
    tiny_tokenizer.padding_side = "left"
    callback, seen = EntanglementCallback(every=1, alert=None), Gradients(model)
    arguments = OnlineDPOConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, optim="sgd", max_grad_norm=0.0,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        disable_tqdm=True, max_new_tokens=7, logging_steps=1, max_length=128, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = OnlineDPOTrainer(
        model, ref_model=None if lora else llama(seed=3), reward_funcs=reward, args=arguments,
        processing_class=tiny_tokenizer, callbacks=[callback, seen],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in preferences()]),
    )  # fmt: skip
    trainer.train()
    assert len(callback.records) == 3
    check(callback, seen)
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert len(record.gram) == 4 and record.unpaired == 0
        # Each micro-batch's mean over its two pairs is differentiated as it is: nobody divides by their number.
        assert gradient_error(record, before, grads, 2) < 1e-5
        scores = [rewarded(rewards, *record.batch.row(row)) for row in range(8)]
        assert all(chosen >= rejected for chosen, rejected in zip(scores[:4], scores[4:], strict=True))


def rewarded(rewards: dict[tuple[int, ...], float], ids: torch.Tensor, marks: torch.Tensor) -> float:
    """The reward of a completion, which was given its padding too."""
    completion = ids[marks.bool()].tolist()
    (found,) = {value for ids, value in rewards.items() if [x for x in ids if x != 0] == [x for x in completion if x]}
    return found


class Preferring(Trainer):
    """A Trainer with a preference loss of one's own."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        marks = inputs["completion_mask"][:, 1:]
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logps = output.logits[:, :-1].float().log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        chosen, rejected = (logps * marks).sum(1).chunk(2)
        loss = torch.exp(-0.05 * (chosen - 0.5 * rejected)).mean()
        return (loss, output) if return_outputs else loss


def collate(rows: list[tuple[list[int], list[int], list[int]]], labels: bool = False) -> dict[str, torch.Tensor]:
    batch = PairBatch.from_tokens(rows)
    parts = {name: getattr(batch, name) for name in ("input_ids", "attention_mask", "completion_mask")}
    return parts | ({"labels": batch.input_ids.masked_fill(batch.completion_mask == 0, -100)} if labels else {})


def tokenized(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], ...]]:
    return [
        tuple(tokenizer(row[side]).input_ids[side != "prompt" :] for side in ("prompt", "chosen", "rejected"))
        for row in preferences()
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("labels", [False, True], ids=["without labels", "with labels"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_trainer_with_a_loss_of_ones_own(
    lora: bool, labels: bool, accumulation: int, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """With labels in the batch, transformers does not divide the loss by the number of accumulated batches."""
    model = adapted(lora, llama())
    callback, seen = EntanglementCallback(every=1), Gradients(model)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4 // accumulation, optim="sgd", learning_rate=1e-3,
        max_grad_norm=0.0, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False,
        gradient_accumulation_steps=accumulation, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Preferring(
        model, arguments, train_dataset=tokenized(tiny_tokenizer), callbacks=[callback, seen],
        data_collator=lambda rows: collate(rows, labels),
    )  # fmt: skip
    trainer.train()
    check(callback, seen)
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert len(record.gram) == 4
        torch.testing.assert_close(record.verdict.d_l, record.verdict.d_w / 2, rtol=1e-4, atol=0)
        # Without labels the loss is the mean over all four pairs, with labels the sum of two means over two.
        assert gradient_error(record, before, grads, 4 / accumulation if labels else 4) < 1e-5


@pytest.mark.parametrize(("pairing", "text"), [("halves", "3 rows"), (None, "every row is pushed up")])
def test_rows_that_are_no_preference_batch_are_told(
    pairing: Any, text: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three rows are not two halves: said, not guessed."""
    model, callback = llama(), EntanglementCallback(every=1, pairing=pairing)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=3, use_cpu=True, report_to="none", save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)} for _ in range(8)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    with caplog.at_level(logging.WARNING, "gradent"):
        trainer.train()
    assert not callback.records
    said = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert len(said) == 1 and text in said[0]
    assert not names_of(trainer.state.log_history)


def test_data_of_every_trainer_is_ragged() -> None:
    for name in ("dpo", "kto", "tpo"):
        assert len({len("".join(map(str, row.values()))) for row in data_for(name)}) > 3
