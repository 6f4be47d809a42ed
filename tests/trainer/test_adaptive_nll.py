"""The adaptive likelihood term: its weight is the rule's, and in all the rest the run is TRL's with that weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback
from gradent.errors import InputError
from gradent.trainer.adaptive_nll.trainer import AdaptiveNLLDPOConfig, AdaptiveNLLDPOTrainer
from tests.trainer import rank_adaptive
from tests.trainer.runs import data_for, llama, weights_of, with_lora
from tests.trainer.test_pairwise import SETTINGS
from tests.trainer.test_pairwise_runs import entangled
from tests.trainer.test_ranks import two_and_one

STEPS = 5


class Weigh(TrainerCallback):
    """Gives TRL's likelihood term a weight of its own in every step."""

    def __init__(self, weights: list[float]) -> None:
        self.weights, self.trainer = weights, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.loss_weights[-1] = self.weights[state.global_step]


def make(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path, *, plain: bool = False, callbacks: Any = (),
    ref: nn.Module | None = None, data: Dataset | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    trainer, config = (DPOTrainer, DPOConfig) if plain else (AdaptiveNLLDPOTrainer, AdaptiveNLLDPOConfig)
    return trainer(
        model=model, ref_model=ref,
        args=config(**{"output_dir": str(out), **SETTINGS, "max_steps": STEPS, **arguments}),
        train_dataset=entangled() if data is None else data, processing_class=tokenizer, callbacks=list(callbacks),
    )  # fmt: skip


def logged(trainer: Any) -> list[float]:
    return [entry["nll_weight"] for entry in trainer.state.log_history if "nll_weight" in entry]


SETUPS: dict[str, dict[str, Any]] = {
    "SGD": {}, "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3}, "clipped": {"max_grad_norm": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"activation_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", SETUPS)
def test_the_run_is_that_of_trl_with_these_weights(
    name: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def model() -> nn.Module:
        return with_lora(llama()) if lora else llama()

    ref = None if lora else llama(seed=3)
    trainer = make(model(), tiny_tokenizer, tmp_path, ref=ref, **SETUPS[name])
    trainer.train()
    weights = logged(trainer)
    assert len(weights) == STEPS
    assert weights[0] == 0.0
    assert max(weights) > 0
    weigh = Weigh(weights)
    kinds = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]}
    theirs = make(model(), tiny_tokenizer, tmp_path, ref=ref, plain=True, callbacks=[weigh], **SETUPS[name], **kinds)
    weigh.trainer = theirs
    theirs.train()
    ours, others = weights_of(trainer.model), weights_of(theirs.model)
    assert [key for key in ours if not torch.equal(ours[key], others[key])] == []


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_weight_is_the_rule_s(name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Against sums written out anew, of what other pairs do to each chosen, and of how far chosen has fallen."""
    callback = EntanglementCallback(every=1, alert=None, on_error="raise")
    most, rate, multiplier, target = 0.2, 1e-4, 0.0, 0.4
    trainer = make(
        llama(seed=3), tiny_tokenizer, tmp_path, ref=llama(), callbacks=[callback], nll_smoothing=0.5,
        nll_max_weight=most, nll_rate=rate, nll_target=target, logging_steps=1, **SETUPS[name],
    )  # fmt: skip
    trainer.train()
    weights, levels = logged(trainer), [entry["rewards/chosen"] / 0.1 for entry in trainer.state.log_history[:STEPS]]
    changes, gains = [], []
    bounds = set()
    for step, record in enumerate(callback.records):
        account, used = record.attribution, weights[step]
        if account is not None:  # Adam's first step has none
            pairs = len(record.gram)
            apart = ~torch.eye(pairs, dtype=torch.bool).repeat(1, 2)
            units = account.pushes[:pairs, :pairs] / (record.verdict.d_w * record.gram.chosen_len.double().mean())
            pushed = account.pushes[:pairs].where(apart, 0.0).sum(1).mean() * pairs / (pairs - 1)
            gain = units.where(apart[:, :pairs], 0.0).sum(1).mean() * pairs / (pairs - 1)
            unit = units.sum(1).mean()
            change = float(pushed / unit) - used * float(gain / unit)
            multiplier = min(most, max(0.0, multiplier - rate * (levels[step] - target)))
            bound = most * abs(float(gain / unit))
            bounds.add(abs(change) > bound)
            changes.append(min(bound, max(-bound, change)))
            gains.append(float(gain / unit))
            shares = [0.5 ** (len(changes) - 1 - place) for place in range(len(changes))]
            summed = [
                sum(share * value for share, value in zip(shares, sums, strict=True)) for sums in (changes, gains)
            ]
            assert summed[1] > 0
            want = min(most, max(0.0, -summed[0] / summed[1]) + multiplier)
            assert [*weights, trainer.nll_weight][step + 1] == pytest.approx(want, rel=1e-5, abs=1e-9)
    assert bounds == {True, False} and multiplier > 0


def test_where_chosen_does_not_fall_the_run_is_dpo(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}?", "chosen": " yes, of course" * 3, "rejected": " no"} for n in range(8)]
    finals = []
    for plain in (False, True):
        ours = {} if plain else {"nll_target": 0.0}
        data = Dataset.from_list(rows)
        trainer = make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3), plain=plain, data=data, **ours)
        trainer.train()
        finals.append(weights_of(trainer.model))
        if not plain:
            assert set(logged(trainer)) == {0.0}
    assert [name for name in finals[0] if not torch.equal(finals[0][name], finals[1][name])] == []


def test_saved_and_resumed_to_the_bit(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    trainers = [make(llama(), tiny_tokenizer, tmp_path / "run", ref=llama(seed=3), **options) for _ in range(2)]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainers[1].nll_weight == trainers[0].nll_weight > 0
    ours, theirs = (weights_of(trainer.model) for trainer in trainers)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    (tmp_path / "run" / "checkpoint-4" / "nll_weight.json").unlink()
    with pytest.raises(InputError, match=r"no nll_weight\.json in this checkpoint, so it is of another trainer"):
        trainers[1].train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_evaluation_is_without_the_term(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    losses = []
    for plain in (False, True):
        trainer = make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3), plain=plain)
        if not plain:
            trainer.nll_weight = 0.7
        losses.append(trainer.evaluate(data_for("dpo", 4))["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "LoRA"])
def test_two_ranks_go_on_with_one_weight(kind: str, tmp_path: Path) -> None:
    two, other, one = two_and_one(rank_adaptive.main, tmp_path, kind)
    assert two["moved"] == other["moved"]
    assert two["last"] == other["last"] > 0
    assert one["last"] > 0
    assert two["weights"] == pytest.approx(one["weights"], rel=0.2)  # each rank's term is a mean over its own tokens


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "smoothing": ({"nll_smoothing": 1.0}, r"nll_smoothing=1\.0; accepted is a number in \[0, 1\)"),
    "rate": ({"nll_rate": -0.1}, r"nll_rate=-0\.1; accepted is a finite number >= 0"),
    "target": ({"nll_target": float("nan")}, r"nll_target=nan; accepted is a finite number"),
    "largest": ({"nll_max_weight": 0.0}, r"nll_max_weight=0\.0; accepted is a finite number > 0"),
    "ld_alpha": ({"ld_alpha": 0.5}, "ld_alpha=0.5: the adaptive likelihood term cannot be told"),
    "WPO": ({"use_weighting": True}, "use_weighting=True: the adaptive likelihood term cannot be told"),
    "sft": ({"loss_type": ["sigmoid", "sft"]}, "the trainer adds that term itself"),
    "apo_down": ({"loss_type": ["apo_down"]}, "it lowers chosen on purpose"),
    "budget": ({"memory_budget": "much"}, "memory_budget"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        AdaptiveNLLDPOConfig(**{"output_dir": str(tmp_path), **SETTINGS, **arguments})


def test_refused_later(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="args is a DPOConfig; accepted is a AdaptiveNLLDPOConfig"):
        AdaptiveNLLDPOTrainer(llama(), None, DPOConfig(output_dir=str(tmp_path), **SETTINGS))
    trainer = make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3), optim="adafactor")
    with pytest.raises(InputError, match=r"accepted are torch\.optim\.SGD, Adam and AdamW"):
        trainer.train()


def test_one_pair_a_step_is_said(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(llama(), tiny_tokenizer, tmp_path, ref=llama(seed=3), per_device_train_batch_size=1, max_steps=10)
    trainer.train()
    assert trainer.nll_weight == 0.0
    said = [record.message for record in caplog.records if "stays at nll_weight" in record.message]
    assert len(said) == 1 and "two pairs" in said[0]
