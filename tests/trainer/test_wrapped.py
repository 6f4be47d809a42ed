"""Whatever wraps the model or steps for the trainer: the run is the same to the bit, and nothing wrong is recorded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from gradent import EntanglementCallback, attach
from gradent.recorder.recording import Recording
from tests.batches import ragged
from tests.hooks.piggyback.watching import own_hooks, prepare
from tests.trainer import runs
from tests.trainer.runs import Gradients, llama, make_trainer, weights_of, with_lora
from tests.trainer_steps import dpo, through_logits
from tests.truth import TOLERANCE, scaled_error, truth
from tests.wrapped import Released, ReplicasInThreads, steps_inside
from tests.zoo import build


class TwoDevices(DPOTrainer):  # type: ignore[misc]
    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        return ReplicasInThreads(super()._wrap_model(model, training, dataloader))


def trained(
    kind: type, model: nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path, callbacks: list[Any],
    monkeypatch: pytest.MonkeyPatch, **arguments: Any,
) -> tuple[dict[str, Tensor], list[float]]:  # fmt: skip
    """The weights and the losses of a run by another class of trainer."""
    monkeypatch.setitem(runs.TRAINERS, "dpo", (kind, runs.TRAINERS["dpo"][1]))
    trainer = make_trainer("dpo", model, tokenizer, out, callbacks, max_steps=3, **arguments)
    trainer.train()
    return weights_of(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in caplog.records if line.name == "gradent"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_replicas_in_threads(
    lora: bool, checkpointing: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    callback = EntanglementCallback(every=1, realised=True, alert=None, on_error="raise")
    found = []
    for callbacks in ([], [callback]):
        model = with_lora(llama()) if lora else llama()
        with caplog.at_level(logging.WARNING, "gradent"):
            found.append(
                trained(
                    TwoDevices, model, tiny_tokenizer, tmp_path, callbacks, monkeypatch,
                    gradient_checkpointing=checkpointing, disable_dropout=True,
                )
            )  # fmt: skip
        assert own_hooks(model) == []
    (weights, losses), (ours, our_losses) = found
    assert our_losses == losses and all(torch.equal(ours[key], weights[key]) for key in weights)
    assert not callback.records and not callback.errors
    (line,) = said(caplog)
    assert "nn.DataParallel" in line and "accelerate launch" in line


def test_a_forward_in_another_thread_is_not_taken_for_the_one_that_runs() -> None:
    model, batch = prepare(build("llama", dtype=torch.float32)), ragged()
    with attach(model) as recorder:
        for _ in range(5):
            ReplicasInThreads(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        assert recorder.harvest() is None
        through_logits(model, batch).backward()
        found = recorder.harvest()
    assert isinstance(found, Recording)
    assert scaled_error(found.gram, truth(model, batch)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("options", [{}, {"mode": "measure"}, {"tokens_every": 1, "realised": True}], ids=str)
def test_a_trainer_that_steps_early(
    options: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under DeepSpeed, the weights have moved when the trainer says that its step is next."""
    seen, weights = [], []
    for kind in (DPOTrainer, steps_inside(DPOTrainer)):
        callback = EntanglementCallback(every=1, **{"realised": True, "alert": None, "on_error": "raise", **options})
        model = llama()
        weights.append(
            trained(
                kind, model, tiny_tokenizer, tmp_path, [callback], monkeypatch, optim="adamw_torch", max_grad_norm=0
            )
        )
        seen.append(list(callback.records))
    assert weights[0][1] == weights[1][1]
    assert all(torch.equal(weights[0][0][key], weights[1][0][key]) for key in weights[0][0])
    for plain, early in zip(*seen, strict=True):
        assert plain.source == early.source
        assert torch.equal(plain.gram.inner, early.gram.inner) and torch.equal(plain.verdict.d_w, early.verdict.d_w)
        assert torch.equal(plain.chosen_realised, early.chosen_realised)
        assert bool(early.chosen_realised.abs().min() > 0)
        assert (plain.tokens is None) == (early.tokens is None)
    assert seen[1][1].attribution is not None


@pytest.mark.parametrize("options", [{"realised": True, "tokens_every": 1}, {"mode": "measure"}], ids=str)
def test_weights_that_step_in_the_backward(
    options: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As LOMO and layerwise GaLore do, through `.data`: entries read off are exact, the rest is left out, and said."""
    records: dict[bool, Any] = {}
    for is_watched in (False, True):
        model = llama()
        before = Gradients(model)

        def step(part: Tensor) -> None:
            assert part.grad is not None
            part.data.sub_(part.grad, alpha=1e-2)
            part.grad = None

        for part in model.parameters():
            part.register_post_accumulate_grad_hook(step)
        callback = EntanglementCallback(every=1, alert=None, on_error="raise", **options)
        with caplog.at_level(logging.WARNING, "gradent"):
            make_trainer(
                "dpo", model, tiny_tokenizer, tmp_path, [before, *([callback] if is_watched else [])], max_steps=3
            ).train()
        records[is_watched] = (weights_of(model), list(callback.records), before.models)
    assert all(torch.equal(records[True][0][key], part) for key, part in records[False][0].items())
    if "mode" in options:
        assert not records[True][1]
        assert any("the weights have moved since the backward" in line for line in said(caplog))
        return
    assert any("leaves out realised, tokens_every" in line for line in said(caplog))
    for record, model in zip(records[True][1], records[True][2], strict=False):
        assert record.source == "piggyback" and record.chosen_realised is None and record.tokens is None
        true = truth(model, record.batch)
        assert scaled_error(record.gram, true) <= TOLERANCE["float32"]


def test_a_loss_that_never_calls_the_model(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = prepare(build("llama", dtype=torch.float32)), ragged()
    with caplog.at_level(logging.WARNING, "gradent"), attach(model) as recorder:
        for _ in range(2):
            hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
            logits = F.linear(hidden, model.lm_head.weight)
            logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)).backward()
            assert recorder.harvest() is None
    (line,) = said(caplog)
    assert "no forward of the model was seen" in line and "fused head" in line


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_parameters_that_are_released(checkpointing: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    """As under ZeRO-3: entries are read off, no node is made of an empty parameter, and no pass is gradent's own."""
    batch, grads = ragged(), list[dict[str, Tensor]]()
    true = truth(build("llama", dtype=torch.float32), batch)
    for options in (None, {"mode": "piggyback"}, {"mode": "measure"}):
        model = prepare(build("llama", dtype=torch.float32), checkpointing)
        Released(model)
        found = None
        if options is None:
            through_logits(model, batch).backward()
        else:
            with caplog.at_level(logging.WARNING, "gradent"), attach(model, **options) as recorder:  # type: ignore[arg-type]
                through_logits(model, batch).backward()
                found = recorder.harvest()
        grads.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
        if options == {"mode": "piggyback"}:
            assert isinstance(found, Recording)
            assert scaled_error(found.gram, true) <= TOLERANCE["float32"]
        else:
            assert found is None
    assert grads[0] and all(torch.equal(part[name], grads[0][name]) for part in grads[1:] for name in grads[0])
    assert any("sharded by DeepSpeed ZeRO-3" in line for line in said(caplog))
