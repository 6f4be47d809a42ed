"""float16 and its loss scaler: overflow is a skipped step and no error; gradients too small for it are not measured."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback, PairBatch, attach
from tests.batches import ragged
from tests.trainer.runs import data_for, llama
from tests.trainer_steps import labels_of, with_fused_head
from tests.truth import TOLERANCE, scaled_error, truth


class Half(DPOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.float16):
            return super().compute_loss(*args, **kwargs)


def train(tokenizer: PreTrainedTokenizerFast, out: Path, scale: float, callbacks: list[Any]) -> Any:
    trainer = Half(
        model=llama(), ref_model=llama(seed=3), processing_class=tokenizer, callbacks=callbacks,
        train_dataset=data_for("dpo", 8),
        args=DPOConfig(
            output_dir=str(out), per_device_train_batch_size=2, max_steps=12, learning_rate=1e-4, report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
            logging_steps=1,
        ),
    )  # fmt: skip
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.train()
    return trainer


@pytest.mark.parametrize("scale", [2.0**10, 2.0**24])
def test_an_overflow_is_a_skipped_step(
    scale: float, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = EntanglementCallback(every=1, realised=True)
    with caplog.at_level(logging.WARNING):
        trainer = train(tiny_tokenizer, tmp_path, scale, [callback])
    alone = train(tiny_tokenizer, tmp_path, scale, [])
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (trainer, alone)]
    assert losses[0] == losses[1]
    assert callback.errors == 0
    active = [record for record in callback.records if len(record.gram)]
    assert len(active) >= 3
    for record in active:
        assert bool(record.gram.inner.isfinite().all())
        if record.chosen_realised is not None:
            assert bool((record.chosen_realised != 0).all())
    assert ("skipped by the loss scaler" in caplog.text) == (scale > 2.0**20)
    assert "weighs the tokens" not in caplog.text


def backward(model: nn.Module, batch: Any, weights: Tensor, *, half: bool) -> None:
    """A loss that weighs each pair with its own d, chosen up and rejected down."""
    with torch.autocast("cpu", torch.float16, enabled=half):
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, labels=labels_of(batch),
            fused_lm_head=True,
        )  # fmt: skip
    chosen, rejected = output.log_probs.sum(1).chunk(2)
    (weights * (rejected - chosen)).sum().backward()


def test_pairs_that_float16_saturates_are_inactive() -> None:
    model, batch = with_fused_head(llama()), ragged()
    count = len(batch)
    scales = torch.tensor([1.0, 2.0**-5, *(2.0 ** -(12 + 6 * number) for number in range(count - 2))])
    with attach(model, pairing="halves") as recorder:
        backward(model, batch, scales, half=True)
        found = recorder.harvest()
    assert found is not None
    assert (len(found.gram), found.inactive, found.source) == (2, count - 2, "piggyback")
    true = truth(llama(), batch)
    for name in ("chosen_sq", "rejected_sq"):
        ratio = getattr(found.gram, name) / getattr(true, name)[:2]
        assert bool(((ratio - 1).abs() < 2e-2).all()), (name, ratio)


@pytest.mark.parametrize("small", [1e-33, 1e-36, 1e-38, 3e-40])
@pytest.mark.parametrize("through", ["fused head", "logits"])
def test_subnormal_weights_are_that_pair_alone(through: str, small: float, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = llama(), ragged()
    count = len(batch)
    scales = torch.tensor([1.0, small, 0.5])
    with caplog.at_level(logging.WARNING), attach(model, pairing="halves") as recorder:
        if through == "fused head":
            backward(with_fused_head(model), batch, scales, half=False)
        else:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
            logps = -F.cross_entropy(logits.mT, batch.input_ids[:, 1:], reduction="none")
            chosen, rejected = (logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)
            (scales * (rejected - chosen)).sum().backward()
        found = recorder.harvest()
    assert found is not None
    kept = [pair for pair in range(count) if scales[pair] > 1e-30]
    assert (len(found.gram), found.inactive, found.source) == (len(kept), count - len(kept), "piggyback")
    rows = [batch.row(side * count + pair) for side in (0, 1) for pair in kept]
    assert scaled_error(found.gram, truth(llama(), PairBatch.from_rows(rows))) <= TOLERANCE["float32"]
    assert not caplog.records
