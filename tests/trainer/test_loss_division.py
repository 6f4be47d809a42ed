"""d_w and d_l under gradient accumulation, whoever divides the loss: the trainer, its loss, or nobody."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback
from gradent.trainer.callback.loss_division import LossDivision, scalar_divisors
from tests.trainer.runs import data_for, llama


class Swiftly(DPOTrainer):
    """Divides inside `compute_loss`, as ms-swift does, and takes loss keywords so that transformers does not."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = True, None

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return torch.tensor(7)  # of the labels in its batches

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss / self.args.gradient_accumulation_steps


class Undivided(DPOTrainer):
    """Differentiates each micro-batch's mean as it is, as OnlineDPOTrainer does."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class Summed(DPOTrainer):
    """Sums over the rows and divides by all of the step's at once."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        rows = self.args.per_device_train_batch_size
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss.expand(rows).sum() / (rows * self.current_gradient_accumulation_steps)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize(("accumulation", "clipping"), [(1, 0.0), (2, 0.0), (8, 0.0), (2, 0.01)])
@pytest.mark.parametrize("kind", [DPOTrainer, Swiftly, Undivided, Summed])
def test_weights_are_of_the_mean(
    kind: Any, accumulation: int, clipping: float, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, callback = llama(), EntanglementCallback(every=1, alert=None, attribution=False, on_error="raise")
    rows = 1 if accumulation == 8 else 2
    count = 11 if accumulation == 8 else 6  # the last window of a pass is a part of one: 3 of 8, 1 of 2
    trainer = kind(
        model=model, ref_model=copy.deepcopy(model), processing_class=tiny_tokenizer, callbacks=[callback],
        train_dataset=data_for("dpo", count),
        args=DPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
            num_train_epochs=1, learning_rate=0.0, optim="sgd", max_grad_norm=clipping, report_to="none", use_cpu=True,
            bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, beta=0.1,
        ),
    )  # fmt: skip
    trainer.train()
    assert "backward" not in vars(trainer.accelerator)
    assert len(callback.records) > 1
    for record in callback.records:  # at the reference, DPO's weight is β σ(0)
        assert len(record.gram) > 0
        half = torch.full((len(record.gram),), 0.05, dtype=torch.float64)
        torch.testing.assert_close(record.verdict.d_w, half, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(record.verdict.d_l, half, rtol=1e-5, atol=0.0)


def test_divisors_of_a_loss() -> None:
    weights = torch.randn(4, requires_grad=True)
    mean = weights.square().mean()
    assert scalar_divisors(mean) == []
    assert scalar_divisors(mean / 8) == [8.0]
    assert scalar_divisors((mean * 0.5).double() / torch.tensor(4.0)) == [4.0, 2.0]
    assert scalar_divisors(weights.square().sum() / 8) == [2.0]
    assert scalar_divisors(mean / 2 + mean) == []
    assert scalar_divisors(mean.detach()) is None


def test_what_one_training_divides_by_is_forgotten_before_the_next() -> None:
    division, loss = LossDivision(), torch.ones(3, requires_grad=True).mean() / 4

    class Accelerator:
        gradient_accumulation_steps = 1

        def backward(self, loss: torch.Tensor) -> None:
            loss.backward()

    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        args=SimpleNamespace(gradient_accumulation_steps=4), current_gradient_accumulation_steps=4,
    )  # fmt: skip
    division.watch(trainer)
    trainer.accelerator.backward(loss)
    assert division.find() == 4.0
    division.forget()
    assert division.find() is None
