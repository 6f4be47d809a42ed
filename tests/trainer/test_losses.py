"""DPO's fifteen losses under the real trainer: entries are those of autograd, and weights those of TRL's own code."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from tests.trainer.runs import Gradients, data_for, gradient_error, llama, make_trainer, with_lora
from tests.truth import assert_exact, truth

LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm"
).split()
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1, "aot": 0.1}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_step(loss: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = with_lora(llama()) if lora else llama()
    callback, seen = EntanglementCallback(every=1), Gradients(model)
    trainer = make_trainer(
        "dpo", model, tiny_tokenizer, tmp_path, [callback, seen],
        options={"ref_model": llama(seed=3)}, max_steps=1, loss_type=[loss], label_smoothing=SMOOTHED.get(loss, 0.0),
    )  # fmt: skip
    trainer.train()
    (record,) = callback.records
    if loss == "sft":  # moves chosen alone, so that rejected takes a pass of gradent's own
        assert record.source == "measure" and record.inactive == 0 and bool((record.verdict.d_l == 0).all())
        assert_exact(record.gram, truth(seen.models[0], record.batch, dtype=torch.float64), record.batch, 1e-5)
        return
    assert record.source == "piggyback" and record.inactive == 0 and record.step == 1
    before = seen.models[0]
    assert_exact(record.gram, truth(before, record.batch, dtype=torch.float64), record.batch, 1e-5)
    assert gradient_error(record, before, seen.grads[0], 4) < 1e-5


VARIANTS = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "several losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "WPO": {"use_weighting": True},
    "reference computed ahead": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_keeps_one_coefficient_a_response(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = llama()
    callback, seen = EntanglementCallback(every=1), Gradients(model)
    trainer = make_trainer(
        "dpo", model, tiny_tokenizer, tmp_path, [callback, seen],
        options={"ref_model": llama(seed=3)}, max_steps=1, **VARIANTS[name],
    )  # fmt: skip
    trainer.train()
    (record,) = callback.records
    assert record.source == "piggyback" and len(record.gram) == 4
    assert_exact(record.gram, truth(seen.models[0], record.batch, dtype=torch.float64), record.batch, 1e-5)
    assert gradient_error(record, seen.models[0], seen.grads[0], 4) < 1e-5


def test_ld_alpha_is_measured_and_said_once(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    callback, seen = EntanglementCallback(every=1, alert=None), Gradients(model)
    trainer = make_trainer("dpo", model, tiny_tokenizer, tmp_path, [callback, seen], max_steps=3, ld_alpha=0.3)
    with caplog.at_level(logging.WARNING, "gradent"):
        trainer.train()
    assert [record.source for record in callback.records] == ["measure"] * 3
    for record, before in zip(callback.records, seen.models, strict=False):
        assert_exact(record.gram, truth(before, record.batch, dtype=torch.float64), record.batch, 1e-5)
    (said,) = [line.getMessage() for line in caplog.records if line.name == "gradent"]
    assert "weighs the tokens of a response differently" in said and "mode='measure'" in said


@pytest.mark.parametrize("mode", ["measure", "piggyback"])
def test_modes(
    mode: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    callback, seen = EntanglementCallback(every=1, mode=mode, alert=None), Gradients(model)
    make_trainer("dpo", model, tiny_tokenizer, tmp_path, [callback, seen]).train()
    assert [record.source for record in callback.records] == [mode] * 2
    assert not [line for line in caplog.records if line.name == "gradent"]
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert_exact(record.gram, truth(before, record.batch, dtype=torch.float64), record.batch, 1e-5)
        assert gradient_error(record, before, grads, 4) < 1e-5


def margins(model: torch.nn.Module, reference: torch.nn.Module, batch: object) -> torch.Tensor:
    one, other = truth(model, batch), truth(reference, batch)
    return one.chosen_logp - one.rejected_logp - other.chosen_logp + other.rejected_logp


def test_a_hinge_that_is_satisfied_is_counted_and_not_averaged(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def run(beta: float) -> tuple[EntanglementCallback, Gradients, dict[str, float]]:
        model = llama()
        callback, seen = EntanglementCallback(every=1, mode="auto"), Gradients(model)
        trainer = make_trainer(
            "dpo", model, tiny_tokenizer, tmp_path, [callback, seen], options={"ref_model": llama(seed=3)},
            max_steps=1, loss_type=["hinge"], beta=beta,
        )  # fmt: skip
        trainer.train()
        return callback, seen, trainer.state.log_history[0]

    callback, _, _ = run(1e-6)
    (whole,) = callback.records
    margin = margins(llama(), llama(seed=3), whole.batch)
    assert bool((margin > 0).any()) and bool((margin < 0).any())
    callback, seen, logs = run(1e3)
    (record,) = callback.records
    active = [pair for pair, value in enumerate(margin.tolist()) if value < 0]
    assert record.inactive == 4 - len(active) and len(record.gram) == len(active)
    assert logs["gradent/inactive"] == pytest.approx((4 - len(active)) / 4)
    torch.testing.assert_close(record.gram.inner, whole.gram.inner[active], rtol=1e-4, atol=1e-6)
    assert logs["gradent/inner"] == pytest.approx(float(record.gram.inner.mean()))
    assert gradient_error(record, seen.models[0], seen.grads[0], 4) < 1e-5


def test_a_batch_without_an_active_pair(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    callback = EntanglementCallback(every=1, realised=True)
    data = [row | {"rejected": row["chosen"]} for row in data_for("dpo")]
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], data=Dataset.from_list(data))
    trainer.train()
    assert [record.inactive for record in callback.records] == [4, 4]
    for logs in trainer.state.log_history[:2]:
        assert logs["gradent/inactive"] == 1.0
        assert {key for key in logs if key.startswith("gradent/")} == {
            "gradent/inactive", "gradent/coverage", "gradent/overhead_s",
        }  # fmt: skip
