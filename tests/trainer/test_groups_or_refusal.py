"""Every trainer of TRL: pairs, groups, or one sentence that there is nothing to measure; no silence, no guess."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
from trl import (
    DistillationConfig,
    DistillationTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.a2po import A2POConfig, A2POTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from gradent import EntanglementCallback
from gradent.trainer.records.row_step import RowStepRecord
from tests.attribution.brute_force import Frozen
from tests.trainer.kinds import KINDS, configurations
from tests.trainer.rollouts import PROMPTS, make_rollouts, reward
from tests.trainer.row_truth import assert_rows, in_groups, names_of, row_gradients, texts
from tests.trainer.runs import Gradients, llama, make_trainer, preferences, weights_of, with_lora

CONVERSATIONS = Dataset.from_list([
    {
        "messages": [
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]},
        ]
    }
    for row in preferences()
])  # fmt: skip
TOLD = Dataset.from_list([{"prompt": prompt, "privileged_context": "Be brief."} for prompt in PROMPTS])


def even(completions: list[str], **_: Any) -> list[float]:
    """A reward of 0 or 1, as A2PO wants it."""
    return [float(len(text) % 2 == 0) for text in completions]


def of_rollouts(trainer: Any, config: Any, **settings: Any) -> Callable[..., Any]:
    options, data = settings.pop("options", None), settings.pop("data", None)

    def make(model: Any, tokenizer: Any, out: Path, callbacks: Any, **arguments: Any) -> Any:
        given = options() if callable(options) else options
        return make_rollouts(
            (trainer, config), model, tokenizer, out, callbacks, options=given, data=data, **settings, **arguments
        )

    return make


def of_preferences(name: str) -> Callable[..., Any]:
    def make(*args: Any, **arguments: Any) -> Any:
        return make_trainer(name, *args, learning_rate=1e-3, **arguments)

    return make


def teacher() -> dict[str, Any]:
    return {"teacher_model": llama(seed=3)}


def saved(model: Any, out: Path) -> Any:
    """The model, which some trainers load once more, as their teacher."""
    model.save_pretrained(out / "model")
    model.config._name_or_path = str(out / "model")  # noqa: SLF001  (where TRL looks)
    return model


TRAINERS: dict[str, Callable[..., Any]] = {
    "DPOConfig": of_preferences("dpo"),
    "CPOConfig": of_preferences("cpo"),
    "ORPOConfig": of_preferences("orpo"),
    "TPOConfig": of_preferences("tpo"),
    "RewardConfig": of_preferences("reward"),
    "KTOConfig": of_preferences("kto"),
    "OnlineDPOConfig": of_rollouts(
        OnlineDPOTrainer, OnlineDPOConfig, max_new_tokens=6, max_length=128, per_device_train_batch_size=2,
        options=lambda: {"reward_funcs": reward, "ref_model": llama(seed=3)},
    ),
    "GRPOConfig": of_rollouts(GRPOTrainer, GRPOConfig),
    "RLOOConfig": of_rollouts(RLOOTrainer, RLOOConfig, beta=0.0),
    "GMPOConfig": of_rollouts(GMPOTrainer, GMPOConfig),
    "A2POConfig": of_rollouts(A2POTrainer, A2POConfig, options={"reward_funcs": even}, temperature=1.0),
    "SFTConfig": of_rollouts(SFTTrainer, SFTConfig, options={}, data=CONVERSATIONS),
    "GKDConfig": of_rollouts(GKDTrainer, GKDConfig, options=teacher, data=CONVERSATIONS, max_new_tokens=4),
    "GOLDConfig": of_rollouts(GOLDTrainer, GOLDConfig, options=teacher, data=CONVERSATIONS),
    "DistillationConfig": of_rollouts(DistillationTrainer, DistillationConfig, options=teacher),
    "SDFTConfig": of_rollouts(SDFTTrainer, SDFTConfig, options={}, data=TOLD),
    "SDPOConfig": of_rollouts(SDPOTrainer, SDPOConfig),
}  # fmt: skip
"""Makers of trainers that run here; the others want a server, or several GPUs."""

SERVED = {"AsyncGRPOConfig", "AsyncDistillationConfig", "ServerDistillationConfig", "IWOPDConfig"}


def said_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.name == "gradent"]


def test_every_trainer_is_known() -> None:
    """A new one is run here, once somebody has read its loss (`KINDS`, which test_any_release.py reads)."""
    assert set(configurations()) == set(TRAINERS) | SERVED


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    if name == "RewardConfig":
        model = llama(kind=LlamaForSequenceClassification, num_labels=1)
    if name not in ("RewardConfig", "SFTConfig") and TRAINERS[name].__qualname__.startswith("of_rollouts"):
        tiny_tokenizer.padding_side = "left"
    if name in ("SDFTConfig", "SDPOConfig"):
        model = saved(model, tmp_path)
    callback, seen = EntanglementCallback(every=1, alert=None, out=tmp_path / "records"), Gradients(model)
    trainer = TRAINERS[name](model, tiny_tokenizer, tmp_path, [callback, seen])
    with caplog.at_level(logging.WARNING, "gradent"):
        trainer.train()
    names, said = names_of(trainer.state.log_history), said_in(caplog)
    files = {path.name for path in (tmp_path / "records").glob("*")}
    if KINDS[name] == "refusal":
        assert not callback.records and not names and not files
        (line,) = said
        assert line.startswith(
            f"gradent has nothing to say in {name.replace('Config', 'Trainer')}, and records nothing"
        )
        assert "docs/groups.md" in line
        return
    assert [record.step for record in callback.records] == [1, 2]
    assert not [line for line in said if "weighs the tokens" not in line]
    if KINDS[name] == "pairs":
        assert files == {"pairs.jsonl"} and "gradent/cosine" in names and "gradent/group/cosine" not in names
        assert all(len(record.gram) and not isinstance(record, RowStepRecord) for record in callback.records)
        return
    assert files == {"rows.jsonl"} and "gradent/group/cosine" in names and "gradent/cosine" not in names
    lr, temperature = trainer.args.learning_rate, 0.7 if KINDS[name] == "groups" else 1.0
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert record.source == "piggyback" and record.gram is None
        assert_rows(record, before, grads, lr=lr, temperature=temperature)
        prompts = [prompt for prompt, _ in texts(record, tiny_tokenizer)]
        if KINDS[name] == "batch":
            assert record.rows.group.tolist() == [0] * len(prompts)
        else:
            order = list(dict.fromkeys(prompts))
            assert len(order) == 2 and record.rows.group.tolist() == [order.index(prompt) for prompt in prompts]
            assert (record.groups, record.flat_groups) == (2, 0)


def test_sdpo_without_its_teacher_has_groups(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = saved(llama(), tmp_path)
    callback, seen = EntanglementCallback(every=1, alert=None, on_error="raise"), Gradients(model)
    make = TRAINERS["SDPOConfig"]
    make(model, tiny_tokenizer, tmp_path, [callback, seen], distillation_weight=0.0).train()
    assert len(callback.records) == 2
    for record, before, grads in zip(callback.records, seen.models, seen.grads, strict=False):
        assert_rows(record, before, grads, lr=0.05, temperature=0.7)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ["GRPOConfig", "SFTConfig"])
def test_to_the_bit(name: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Rollouts are sampled: the random state is left alone too, or the next step's would be others."""

    def run(callbacks: list[EntanglementCallback]) -> dict[str, torch.Tensor]:
        model = with_lora(llama()) if lora else llama()
        settings = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0}
        trainer = TRAINERS[name](model, tiny_tokenizer, tmp_path, callbacks, **settings)
        trainer.train()
        return weights_of(trainer.model)

    callback = EntanglementCallback(every=1, realised=True, on_error="raise")
    ours, theirs = run([callback]), run([])
    assert len(callback.records) == (3 if name == "GRPOConfig" else 0)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


class Optimizers(TrainerCallback):
    """Keeps what an account is made of, before each step: the model and its optimizer, in float64."""

    def __init__(self) -> None:
        self.frozen: list[tuple[Frozen, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"].optimizer
        norm = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()
        self.frozen.append((Frozen(model, optimizer, twin=with_lora(llama())), float(norm)))


def warmed(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW that has a second moment of every element, which the step to come hardly changes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1e-5
    return optimizer


def test_groups_under_adam(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Accumulated, clipped, with decay, in LoRA: what moved each row is what AdamW's formula gives."""
    callback, seen = EntanglementCallback(every=1, realised=True, on_error="raise"), Optimizers()
    model = with_lora(llama())
    make_rollouts(
        (GRPOTrainer, GRPOConfig), model, tiny_tokenizer, tmp_path, [callback, seen], max_steps=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=1.0,
        options={"reward_funcs": reward, "optimizers": (warmed(model), None)},
    ).train()  # fmt: skip
    for record, (frozen, clipped) in zip(callback.records, seen.frozen, strict=True):
        rows, weight = record.rows, record.rows.weight
        assert len(rows) == 8 and record.groups == 2 and record.attribution.is_whole
        _, grads = row_gradients(frozen.model, record, 0.7)
        norms = grads.norm(dim=1)
        # Rows of both micro-batches meet.
        assert float(((rows.products - grads @ grads.T).abs() / torch.outer(norms, norms)).max()) < 1e-5
        norm = float((weight @ grads).norm())
        kept = 1 / norm
        assert norm > 1.01 and clipped == pytest.approx(1, abs=1e-4)
        direction = frozen.lr * frozen.metric
        want = in_groups(weight, rows.group, kept * (grads * direction * frozen.fresh) @ grads.T * weight)
        want["momentum"] = -grads @ (direction * frozen.carried * frozen.moment)
        want["weight_decay"] = -grads @ (frozen.lr * frozen.decay * frozen.theta)
        for source, values in want.items():
            torch.testing.assert_close(rows.moved[source], values, rtol=1e-4, atol=1e-5 * float(rows.total.abs().max()))
        torch.testing.assert_close(rows.total, record.attribution.total)
        assert record.attribution.explained > 0.95


def test_a_group_without_contrast_is_counted(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Its rollouts all have one reward, and none is moved."""

    def flat(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        scores = reward(completion_ids)
        return [0.5 if prompt == prompts[0] else score for prompt, score in zip(prompts, scores, strict=True)]

    callback = EntanglementCallback(every=1, on_error="raise")
    trainer = make_rollouts(
        (GRPOTrainer, GRPOConfig), llama(), tiny_tokenizer, tmp_path, [callback], options={"reward_funcs": flat}
    )
    trainer.train()
    for logs in trainer.state.log_history[:2]:
        assert logs["gradent/inactive"] == logs["gradent/group/without_contrast"] == 0.5


def test_groups_of_ones_own_and_pairs_against_the_configuration(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the user says goes before what a configuration implies, in a trainer that is refused too."""
    callback = EntanglementCallback(every=1, on_error="raise", groups=2)
    trainer = TRAINERS["GRPOConfig"](llama(), tiny_tokenizer, tmp_path, [callback])
    trainer.train()
    assert [record.rows.group.tolist() for record in callback.records] == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    callback = EntanglementCallback(every=1, on_error="raise", pairing="rows")
    with caplog.at_level(logging.WARNING, "gradent"):
        TRAINERS["SFTConfig"](llama(), tiny_tokenizer, tmp_path, [callback]).train()
    assert len(callback.records) == 2 and all((record.rows.weight > 0).all() for record in callback.records)
    assert not [line for line in said_in(caplog) if "nothing to say" in line]
