"""A run that is observed is the run that is not: the same weights to the bit, the same random state, nothing left."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from gradent import EntanglementCallback
from gradent.report.live.alerts import Alert
from tests.batches import ragged
from tests.shared import value_once
from tests.trainer.runs import llama, make_trainer, preferences, weights_of, with_lora

RECOMPUTED = {"gradient_checkpointing": True}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0}

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "every second step": ({}, {"every": 2}),
    "AdamW, clipped": (ADAM, {}),
    "checkpointing": (RECOMPUTED, {}),
    "reentrant checkpointing": (RECOMPUTED | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {}),
    "accumulation, sketched": (
        ADAM | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"memory_budget": 2**17},
    ),
    "bf16": ({"bf16": True}, {}),
    "bf16, checkpointing": ({"bf16": True} | RECOMPUTED, {}),
    "mode measure": ({}, {"mode": "measure"}),
    "falls back to a measurement": ({"ld_alpha": 0.5}, {}),
    "realised": ({}, {"realised": True}),
    "by module, out": ({}, {"by_module": True}),
    "probe": ({}, {"probe_data": "rows", "probe_every": 1}),
    "proxies": ({}, {"proxies": True}),
    "dropout, proxies": ({"disable_dropout": False}, {"proxies": True}),
    "metric adam": (ADAM, {"metric": "adam"}),
    "small budget": ({}, {"memory_budget": 4096}),
    "dropout": ({"disable_dropout": False}, {"mode": "auto", "realised": True, "probe_data": "batch"}),
    "dropout, measured": ({"disable_dropout": False, "ld_alpha": 0.5}, {}),
    "dropout, checkpointing": ({"disable_dropout": False} | RECOMPUTED, {}),
}


def traces(model: nn.Module) -> list[Any]:
    """What somebody could have left behind in a model: hooks, attributes, flags."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [
        (name, sorted(vars(module)), module.training, [len(getattr(module, kind)) for kind in kinds])
        for name, module in model.named_modules()
    ]
    kinds = ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
    parameters = [
        (name, parameter.grad is None, [getattr(parameter, kind) for kind in kinds])
        for name, parameter in model.named_parameters()
    ]
    return [modules, parameters]


def states() -> tuple[Any, ...]:
    return torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", RUNS)
def test_to_the_bit(name: str, lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    arguments, options = RUNS[name]
    dropout = 0.1 if "dropout" in name else 0.0
    probes: dict[str, Any] = {"rows": preferences(2), "batch": ragged()}

    def run(callbacks: list[EntanglementCallback]) -> tuple[dict[str, Tensor], tuple[Any, ...], list[float], list[Any]]:
        base = llama(attention_dropout=dropout)
        model = with_lora(base, dropout=dropout) if lora else base
        trainer = make_trainer("dpo", model, tiny_tokenizer, tmp_path, callbacks, max_steps=3, **arguments)
        trainer.train()
        losses = [logs["loss"] for logs in trainer.state.log_history[:3]]
        return weights_of(trainer.model), states(), losses, traces(trainer.model)

    options = {"every": 1, "on_error": "raise", **options}
    if "probe_data" in options:
        options["probe_data"] = probes[options["probe_data"]]
    callback = EntanglementCallback(**options, out=tmp_path / "out" if "out" in name else None)
    ours, states_watched, losses_watched, traces_watched = run([callback])
    unwatched = value_once(("unwatched", sorted(arguments.items()), lora, dropout), lambda: run([]))
    theirs, states_alone, losses_alone, traces_alone = unwatched
    assert len(callback.records) == (2 if name in ("every second step", "metric adam") else 3)
    if name == "accumulation, sketched" and not lora:  # whose rows would have room
        assert all(record.attribution.sketch_error > 0 for record in list(callback.records)[1:])
    assert losses_watched == losses_alone and len(set(losses_alone)) == 3
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert states_watched == states_alone
    assert traces_watched == traces_alone


@pytest.mark.parametrize("leave", [lambda model: setattr(model, "mark", 1), lambda model: model.train(False)])
def test_the_check_of_traces_can_fail(leave: Callable[[nn.Module], None]) -> None:
    model, other = llama().train(), llama().train()
    assert traces(model) == traces(other)
    leave(other)
    assert traces(model) != traces(other)
    model.lm_head.register_forward_hook(lambda *args: None)
    assert traces(model) != traces(llama().train())


def test_words_and_panels_change_nothing(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    finals = []
    for options in ({"alert": Alert(both_down=1e-9, both_up=1e-9, reversed=1e-9)}, {"alert": None, "panels": False}):
        model = llama()
        make_trainer("dpo", model, tiny_tokenizer, tmp_path, [EntanglementCallback(every=1, **options)]).train()
        finals.append(weights_of(model))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
